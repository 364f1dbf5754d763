"""Which storages belong to some optimizers: asked for after every step, so it costs well under a microsecond per
tensor.

Guarantees: a storage that none of the optimizers owned when they were last looked at is never taken for one of theirs,
not even when it lies where one of theirs lay. The tensors are not kept alive.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


@dataclass(frozen=True, slots=True)
class Owned:
    """What some optimizers own. Short-lived: it keeps the tensors alive."""

    ids: frozenset[int]
    """`UntypedStorage._cdata` of every parameter and state tensor."""
    tensors: list[torch.Tensor]
    covers: bool = False
    """Whether that is all that was asked about."""


NOTHING = Owned(frozenset(), [])


class TakenIds:
    """What tells some storages apart (`_cdata`), which no other storage gets while this is alive. Keeps no memory."""

    def __init__(self, storages: Iterable[torch.UntypedStorage]) -> None:
        # A weak reference to a storage is its `_cdata`.
        taken: list[Any] = list(map(torch.UntypedStorage._weak_ref, storages))
        self.ids: frozenset[int] = frozenset(taken)
        weakref.finalize(self, _let_go, taken).atexit = False


def _let_go(taken: list[int]) -> None:
    deque(map(torch.UntypedStorage._free_weak_ref, taken), maxlen=0)


class OwnedStorages:
    """Knows the storages of some optimizers from one look to the next. One thread at a time."""

    def __init__(self) -> None:
        self._addresses: list[int] | None = None
        self._taken: TakenIds | None = None
        self._looked_at: tuple[int, ...] = ()
        """The optimizers, by identity."""

    def of(self, optimizers: Sequence[Any], wanted: Sequence[int]) -> Owned:
        """As `look`, for who asks about the storages `wanted`; `NOTHING` where none of them is owned. Where all
        were owned at the last look, nobody looks again: what others do to one that has been taken from its optimizer
        since is for the torn check."""
        looked_at, taken = tuple(map(id, optimizers)), self._taken
        if taken is not None and looked_at == self._looked_at and taken.ids.issuperset(wanted):
            return Owned(taken.ids, _tensors(optimizers), covers=True) if wanted else NOTHING
        found, self._looked_at = self.look(optimizers), looked_at
        if found.ids.isdisjoint(wanted):
            return NOTHING
        return Owned(found.ids, found.tensors, covers=found.ids.issuperset(wanted))

    def look(self, optimizers: Sequence[Any]) -> Owned:
        """What `optimizers` own now. Where every tensor's data lies where it lay at the last look, that answer still
        holds: weak references keep the identities in it taken. Were one of these tensors given another storage over the
        same memory, it would only be missing, and be copied eagerly."""
        tensors = _tensors(optimizers)
        addresses = _addresses(tensors) if _PLAIN.issuperset(map(type, tensors)) else None
        if self._taken is None or addresses is None or addresses != self._addresses:
            # Forgotten first: an exception from here on must not leave the old answer.
            self._taken = None
            self._taken = TakenIds(_storages(tensors, are_plain=addresses is not None))
            self._addresses = addresses
        return Owned(self._taken.ids, tensors)


def _tensors(optimizers: Iterable[Any]) -> list[torch.Tensor]:
    """The parameters, and the tensors in the states, in the optimizers' order."""
    values: list[Any] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            values.extend(group["params"])
        states = list(getattr(optimizer, "state", {}).values())
        if set(map(type, states)) <= {dict}:
            values.extend(chain.from_iterable(map(dict.values, states)))
        else:
            values.extend(value for state in states if isinstance(state, Mapping) for value in state.values())
    if _PLAIN.issuperset(map(type, values)):
        return values
    return [value for value in values if isinstance(value, torch.Tensor)]


def _addresses(tensors: list[torch.Tensor]) -> list[int] | None:
    """Where the data of torch's own tensors lies; None where one of them has none."""
    try:
        # A default device installs a function mode, which would turn each of these calls into Python.
        with torch._C.DisableTorchFunction():
            return list(map(torch.Tensor.data_ptr, tensors))
    except RuntimeError:
        return None


def _storages(tensors: list[torch.Tensor], *, are_plain: bool) -> list[torch.UntypedStorage]:
    """The storages of those that have one."""
    if are_plain:
        with torch._C.DisableTorchFunction():
            return list(map(torch.Tensor.untyped_storage, tensors))
    found: list[torch.UntypedStorage] = []
    for tensor in tensors:
        with contextlib.suppress(RuntimeError, NotImplementedError):
            found.extend(storages_of(tensor))
    return found


def storages_of(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """What holds the bytes of a dense tensor (of a DTensor's local part); nothing for other layouts, and without
    bytes."""
    local = getattr(tensor, "_local_tensor", tensor)
    if torch.nn.parameter.is_lazy(local):
        return []
    return [local.untyped_storage()] if local.layout == torch.strided else []


def storage_ids(tensor: torch.Tensor) -> list[int]:
    """`UntypedStorage._cdata` of `storages_of`."""
    return [storage._cdata for storage in storages_of(tensor)]
