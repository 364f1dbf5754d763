"""Objects that states hold beside containers and tensors, as factories: name -> object, fresh at each call."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import operator
import pathlib
import random
import types
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn


class Stage(int, enum.Enum):
    FIRST = 1
    SECOND = 2


class Colour(enum.Enum):
    RED = "red"
    PAIR = (1, "two")


class Flags(enum.Flag):
    A = 1
    B = 2


@dataclass
class Fragment:
    numel: int
    start: int
    note: str = "x"
    more: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    value: float


class Slotted:
    __slots__ = ("a", "b", "missing")

    def __init__(self) -> None:
        self.a, self.b = 1, [2.5]


class SlottedAndMore(Slotted):
    def __init__(self) -> None:
        super().__init__()
        self.c = 3


class Point(NamedTuple):
    x: float
    y: Any


class Bag(dict):  # type: ignore[type-arg]
    """A dict with attributes."""


class Row(list):  # type: ignore[type-arg]
    """A list with attributes."""


class Word(str):
    """A string with attributes."""


class Empty:
    """Nothing in it."""


class Scaler:
    """As DeepSpeed's: a live object with numbers."""

    def __init__(self) -> None:
        self.cur_scale, self.cur_iter, self.dtype = 65536.0, 0, torch.float16
        self.inner = Fragment(1, 2)


class Selfish:
    """Refers to itself."""

    def __init__(self) -> None:
        self.me, self.mates = self, {self}


def _noted(made: Any, note: Any = "attribute") -> Any:
    made.note = note
    return made


def _row() -> Row:
    made = Row(range(1001))
    return _noted(made, made)


def _shared_size() -> Any:
    size = torch.Size((2, 3))
    return [size, size, torch.Size((2, 3)), tuple(size)]


OBJECTS: dict[str, Any] = {
    "size": lambda: [*map(torch.Size, ((), (1,), (2, 300), (1, 2, 3, 70000))), torch.ones(4, 5).shape],
    "shared_size": _shared_size,
    "dtype": lambda: [torch.float32, torch.uint16, torch.float32],
    "device": lambda: [torch.device("cpu"), torch.device("cuda", 1)],
    "complex": lambda: [1 + 2j, complex(0.0, -0.0)],
    "bytes": lambda: [b"", b"b", b"\xff", b"bytes", bytes(range(256)), b"\xe9" * 300, "b", "\xff"],
    "sets": lambda: [set(), {1}, {"a", "b", "c"}, frozenset(), frozenset((1, 2)), set(range(1001)), {frozenset((3,))}],
    "globals": lambda: [int, dict, torch.nn.Linear, len, operator.add, torch.save, Fragment, Stage, list],
    "stage": lambda: [Stage.FIRST, Stage.SECOND, Stage.FIRST],
    "enum": lambda: [Colour.RED, Colour.PAIR],
    "flag": lambda: [Flags.A, Flags.A | Flags.B],
    "dataclass": lambda: [Fragment(1, 2), Fragment(3, 4, "y", [torch.ones(2)]), Frozen(0.5)],
    "slots": lambda: [Slotted(), SlottedAndMore()],
    "namedtuple": lambda: Point(0.5, torch.ones(1)),
    "bag": lambda: _noted(Bag((str(n), n) for n in range(1001))),
    "row": _row,
    "word": lambda: _noted(Word("text"), [1]),
    "empty": Empty,
    "scaler": Scaler,
    "selfish": Selfish,
    "namespace": lambda: argparse.Namespace(lr=0.1, weight=torch.ones(2), flags=[True], path=pathlib.PurePath("x")),
    "simple_namespace": lambda: types.SimpleNamespace(a=1, b="c"),
    "defaultdict": lambda: collections.defaultdict(list, {"x": [1], "y": [torch.ones(1)]}),
    "counter": lambda: collections.Counter({"".join(("a", str(n))): n for n in range(5)}),
    "deque": lambda: [collections.deque((1, 2, 3)), collections.deque((1,), 5), collections.deque(range(1001))],
    "path": lambda: [pathlib.Path("/a/b.pt"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:/d")],
    "datetime": lambda: [
        datetime.datetime(2024, 2, 29, 1, 2, 3, 4, datetime.timezone.utc),
        datetime.date(2024, 2, 29),
        datetime.timedelta(1, 2, 3),
        datetime.time(1, 2),
    ],
    "numbers": lambda: [decimal.Decimal("1.5"), fractions.Fraction(1, 3), range(3), slice(1, None, 2)],
    "partial": lambda: functools.partial(int, base=2),
    "numpy_scalars": lambda: [
        np.float64(0.1),
        np.int64(7),
        np.float32(2.5),
        np.bool_(True),
        np.float64(0.1),
        np.str_("x"),
    ],
    "numpy_arrays": lambda: [
        np.arange(5, dtype=np.uint32),
        np.zeros((2, 3)),
        np.array(3.0),
        np.zeros(0),
        np.asfortranarray(np.ones((2, 3))),
        np.array(["a", None, 1.5], dtype=object),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.dtype("float32"),
        np.array([True]),
    ],
    "numpy_rng": lambda: np.random.RandomState(3).get_state(),
    "python_rng": lambda: random.Random(3).getstate(),
    "torch_rng": lambda: torch.Generator().manual_seed(3).get_state(),
    "module": lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
}
"""Those that the fast planner must take itself."""


class Choosy:
    """Decides itself what is pickled."""

    def __init__(self) -> None:
        self.value = 1

    def __getstate__(self) -> Any:
        return {"value": self.value, "calls": CALLS.append(1)}

    def __setstate__(self, state: Any) -> None:
        self.value = state["value"]


CALLS: list[int] = []


class Reduced:
    def __reduce__(self) -> Any:
        return (Reduced, ())


class Overridden(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        return [(1, 2)]


class WithArguments:
    def __new__(cls, value: int = 0) -> Any:
        made = super().__new__(cls)
        made.value = value  # type: ignore[attr-defined]
        return made

    def __getnewargs__(self) -> tuple[int]:
        return (self.value,)  # type: ignore[attr-defined]


class WithKeywords(WithArguments):
    def __getnewargs_ex__(self) -> Any:
        return (), {"value": 3}


class Outer:
    class Inner:
        pass


LEFT_TO_TORCH: dict[str, Any] = {
    "choosy": Choosy,
    "reduced": Reduced,
    "items": lambda: Overridden(a=1),
    "new_arguments": lambda: WithArguments(3),
    "new_keywords": WithKeywords,
    "nested_class": Outer.Inner,
    "nested_class_itself": lambda: Outer.Inner,
    "method": lambda: [].append,
    # Met on the way down to itself: pickle throws its first writing away.
    "recursive_set": lambda: Selfish().mates,
    "method_of_type": lambda: torch.tanh,
    "layout": lambda: torch.strided,
    "big_bytes": lambda: bytes(2 << 20),
    "big_array": lambda: np.zeros(2 << 20, dtype=np.uint8),
    "none_type": lambda: [type(None), ...],
    "latin1": lambda: ["".join(("lat", "in1")), b"bytes"],
    "storage": lambda: torch.arange(3.0).untyped_storage(),
    "optimizer": lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1),
    "uuid": lambda: __import__("uuid").UUID(int=5),
    "bytearray": lambda: bytearray(b"xy"),
    "generic": lambda: list[int],
}
"""Those that are torch's business: their bytes are right all the same."""
