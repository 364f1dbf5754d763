"""Is the fast encoder right for this Python and this torch? Asked once per process and kind of structure, by comparing with torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch

from .cached_plan import Encode, FastPlan
from .structure import NotPlainError
from .torch_layout import RecordingError, record

MAX_STATE_TENSORS = 100
"""A first state up to this size is compared as a whole (about 10 ms), beyond it the samples have to do, unless it holds objects."""

TensorKey = tuple[type, torch.dtype, torch.device]
_INTEGERS = (0, 255, 256, 65535, 65536, -1, -(2**31), 2**31 - 1, 2**31, -(2**31) - 1, 2**63, -(2**63), -(2**64), 2**2039, 1 - 2**2040)
_FLOATS = (0.0, -0.0, 1.5, float("inf"), float("nan"))
_STRINGS = ("", "0", "7", "storage", "cpu", "weight", "schl\u00fcssel", "\ud800", "\U0001f600", "x" * 300)

# What the states of most trainings hold; checked ahead, so that their first save need not.
_COMMON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)

_verdicts: dict[tuple[Any, ...], bool] = {}


def agrees(plan: FastPlan, root: Any, *, alignment: int, encode: Encode) -> bool:
    """False where the fast encoder and torch write different bytes for this kind of structure. Remembered for the process."""
    kind = (encode, frozenset(plan.structure.types), plan.tensor_kinds)
    verdict = _verdicts.get(kind)
    if verdict is None:
        verdict = _containers_agree(encode) and all(_tensors_agree(k, encode) for k in plan.tensor_kinds)
        has_objects = any(item.form is not None for item in plan.structure.opened)
        if verdict and (has_objects or len(plan.structure.tensor_positions) <= MAX_STATE_TENSORS):
            verdict = _same_as_torch(root, encode=encode, alignment=alignment)
        _verdicts[kind] = verdict
    return verdict


def check_ahead(encode: Encode) -> None:
    """Compare what most states are made of before a save needs the answer. Any thread; about 0.1 s of Python, once per process."""
    device = torch.device("cpu")
    if _containers_agree(encode):
        for dtype in _COMMON_DTYPES:
            _tensors_agree((torch.Tensor, dtype, device), encode)


def _containers_agree(encode: Encode) -> bool:
    if (encode,) not in _verdicts:
        _verdicts[(encode,)] = _same_as_torch(container_sample(), encode=encode, alignment=64)
    return _verdicts[(encode,)]


def _tensors_agree(kind: TensorKey, encode: Encode) -> bool:
    if (encode, kind) not in _verdicts:
        _verdicts[(encode, kind)] = _same_as_torch(tensor_sample([kind]), encode=encode, alignment=64)
    return _verdicts[(encode, kind)]


def _same_as_torch(root: Any, *, encode: Encode, alignment: int) -> bool:
    try:
        fast = FastPlan(root, alignment=alignment, compact_views=False, encode=encode).container
        return fast == record(root, alignment=alignment).container
    except (NotPlainError, RecordingError):
        return False


def tensor_sample(kinds: Iterable[TensorKey]) -> Any:
    """A small state with tensors of each kind: whole, empty, seen as a view, and with a gradient."""
    tensors: dict[str, Any] = {}
    for number, (kind, dtype, device) in enumerate(sorted(kinds, key=str)):
        base = torch.empty(6, dtype=dtype, device=device)
        tensors[f"{number}.view"] = base[2:]
        tensors[f"{number}.empty"] = torch.empty((0, 3), dtype=dtype, device=device)
        if kind is torch.Tensor:
            tensors[f"{number}.whole"] = base
        else:
            tensors[f"{number}.parameter"] = torch.nn.Parameter(base, requires_grad=False)
        if dtype.is_floating_point or dtype.is_complex:
            made = torch.empty((1, 2, 1, 3), dtype=dtype, device=device).requires_grad_()
            tensors[f"{number}.grad"] = made if kind is torch.Tensor else torch.nn.Parameter(made)
    with_attributes: OrderedDict[str, Any] = OrderedDict(tensors)
    with_attributes._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    return {"tensors": tensors, "again": with_attributes}


def container_sample() -> Any:
    """A small state with every container, every kind of scalar, and the batch limits of pickle."""
    lengths = (0, 1, 2, 3, 4, 999, 1000, 1001, 2000, 2001)
    cycle: list[Any] = []
    cycle.append((cycle, {"back": cycle}))
    return {
        "integers": list(_INTEGERS),
        "floats": list(_FLOATS),
        "atoms": [None, True, False],
        "strings": [*_STRINGS, *_STRINGS],
        "tuples": [tuple(range(length)) for length in lengths[:5]],
        "lists": [list(range(length)) for length in lengths],
        "dicts": [dict.fromkeys(range(length)) for length in lengths],
        "ordered": [OrderedDict.fromkeys(range(length)) for length in lengths],
        "cycle": cycle,
        1: {2.5: {None: (True, ("nested", ()))}},
    }
