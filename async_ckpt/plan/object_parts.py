"""What pickle would make of an object that is no plain container: a reference to a global, or a call with its parts.

Guarantees:
- `expand` asks the very method that pickle asks, so that its answer is pickle's; whoever uses it may ask again and
  compare.
- Only objects are asked whose method is known to have no effects (`_is_plain`): those of object itself, of the
  interpreter's, NumPy's and torch's value types, and of enumerations. Everything else raises NotPlainError.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import copyreg
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import pickle
import sys
import types
from functools import lru_cache
from typing import Any, NamedTuple

import torch

LATIN1 = "latin1"
"""pickle passes a string object of its own; a user's equal one may or may not be the same."""

MAX_BLOB_BYTES = 1 << 20
"""Bytes objects are kept with the plan; more of them than this are left to torch."""

_GLOBAL_KINDS = frozenset((types.FunctionType, types.BuiltinFunctionType, torch.dtype))
_VALUE_KINDS = frozenset(
    (
        argparse.Namespace,
        collections.Counter,
        collections.defaultdict,
        collections.deque,
        complex,
        datetime.date,
        datetime.datetime,
        datetime.time,
        datetime.timedelta,
        datetime.timezone,
        decimal.Decimal,
        fractions.Fraction,
        functools.partial,
        pathlib.PosixPath,
        pathlib.PurePosixPath,
        pathlib.PureWindowsPath,
        pathlib.WindowsPath,
        range,
        slice,
        torch.device,
        types.SimpleNamespace,
    )
)
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    name: (getattr(object, name, None),) for name in ("__reduce_ex__", "__reduce__", "__getstate__")
}
if "__getstate__" in vars(torch.nn.Module):
    # A copy of its `__dict__`.
    _DEFAULTS["__getstate__"] += (torch.nn.Module.__getstate__,)
_NEW_ARGUMENTS = tuple(vars(kind)["__getnewargs__"] for kind in (str, bytes, int, float, complex, tuple))


class NotPlainError(Exception):
    """The state holds something that only torch knows how to write."""


class Form(NamedTuple):
    """How the parts of an object follow each other: what is called, then the state, the items, the keys and the
    values.
    """

    is_new: bool
    """The class and the arguments of its `__new__`, one by one; otherwise a callable and the tuple of its arguments."""
    num_called: int
    has_state: bool
    num_items: int
    num_pairs: int


def is_global(obj: Any) -> bool:
    """Whether pickle writes `obj` by its name."""
    kind = type(obj)
    return kind in _GLOBAL_KINDS or issubclass(kind, type)


def global_opcode(obj: Any) -> bytes:
    """GLOBAL with the names pickle gives `obj`, without the memo opcode behind it. Raises NotPlainError for what has
    none.
    """
    try:
        raw = pickle.dumps(obj, protocol=2)
    except Exception as error:
        raise NotPlainError(f"{obj!r} cannot be pickled") from error
    opcode, rest = raw[2:-3], raw[-3:]
    if not opcode.startswith(b"c") or opcode.count(b"\n") != 2 or rest != b"q\0.":
        raise NotPlainError(f"{obj!r} is not pickled as a plain global")
    return opcode


def is_still_global(obj: Any, opcode: bytes) -> bool:
    """Whether pickle would still write `obj` as `opcode`: its name may mean something else by now."""
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    if module is not None and getattr(module, getattr(obj, "__qualname__", ""), None) is obj:
        return True
    try:
        return global_opcode(obj) == opcode
    except NotPlainError:
        return False


def expand(obj: Any) -> tuple[Form, list[Any]]:
    """The parts of `obj`, in the order of `Form`. Raises NotPlainError where that is for torch to find out."""
    value = _reduce(obj)
    if type(value) is not tuple or not 2 <= len(value) <= 5 or type(value[1]) is not tuple:
        raise NotPlainError(f"a {type(obj).__qualname__} is reduced in an unusual way")
    function, arguments, state, items, pairs = (*value, None, None, None)[:5]
    is_new = function is copyreg.__newobj__  # type: ignore[attr-defined]
    if is_new and (not arguments or arguments[0] is not type(obj) or obj.__class__ is not type(obj)):
        raise NotPlainError("an object that passes itself off as one of another class")
    if not is_new and getattr(function, "__name__", "") in ("__newobj__", "__newobj_ex__"):
        raise NotPlainError(f"a {type(obj).__qualname__} is reduced in an unusual way")
    called = arguments if is_new else (function, arguments)
    states = () if state is None else (state,)
    listed = [] if items is None else list(items)
    paired = [] if pairs is None else list(pairs)
    parts = [*called, *states, *listed, *(key for key, _ in paired), *(value for _, value in paired)]
    return Form(is_new, len(called), bool(states), len(listed), len(paired)), parts


def _reduce(obj: Any) -> Any:
    kind: type = type(obj)
    # What pickle itself knows, without asking the object.
    if kind in (set, frozenset):
        return kind, (list(obj),)
    if kind is bytes:
        if len(obj) > 1:
            raise NotPlainError("long bytes are written piece by piece")
        return (codecs.encode, (obj.decode(LATIN1), LATIN1)) if obj else (bytes, ())
    if not _is_plain(kind):
        raise NotPlainError(f"holds a {kind.__qualname__}")
    if is_numpy(kind) and getattr(obj, "nbytes", 0) > MAX_BLOB_BYTES:
        raise NotPlainError("holds a large array")
    registered = copyreg.dispatch_table.get(kind)
    if registered is not None and kind is not complex:
        raise NotPlainError(f"a {kind.__qualname__} has a registered reducer")
    try:
        return obj.__reduce_ex__(2) if registered is None else registered(obj)
    except Exception as error:
        # torch is asked next, and says it in its own words.
        raise NotPlainError(f"a {kind.__qualname__} cannot be reduced") from error


@lru_cache(maxsize=512)
def _is_plain(kind: type) -> bool:
    """Whether reducing an object of this class runs no code of its own."""
    if kind in _VALUE_KINDS or is_numpy(kind):
        return True
    if issubclass(kind, (torch.Tensor, torch.storage.TypedStorage, torch.UntypedStorage)):
        return False
    if issubclass(kind, enum.Enum):
        return getattr(kind.__reduce_ex__, "__module__", "") == "enum"
    if any(getattr(kind, name, None) not in defaults for name, defaults in _DEFAULTS.items()) or hasattr(
        kind, "__getnewargs_ex__"
    ):
        return False
    if type(kind.__getattribute__) is not types.WrapperDescriptorType:
        return False
    if (issubclass(kind, dict) and kind.items is not dict.items) or (
        issubclass(kind, list) and kind.__iter__ is not list.__iter__
    ):
        return False
    arguments = getattr(kind, "__getnewargs__", None)
    return arguments is None or arguments in _NEW_ARGUMENTS or (issubclass(kind, tuple) and hasattr(kind, "_fields"))


def is_numpy(kind: type) -> bool:
    numpy = sys.modules.get("numpy")
    if numpy is None or kind.__module__.partition(".")[0] != "numpy":
        return False
    return kind is numpy.ndarray or issubclass(kind, (numpy.generic, numpy.dtype))
