"""Which storages belong to some optimizers: asked for after every step, so it costs well under a microsecond per tensor.

Guarantees: a storage that none of the optimizers owned when they were last looked at is never taken for one of theirs,
not even when it lies where one of theirs lay. The tensors are not kept alive.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch

from .file_copy import storages_of

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


class OwnedStorages:
    """`UntypedStorage._cdata` of every parameter and state tensor. One thread at a time."""

    def __init__(self) -> None:
        self._addresses: list[int] | None = None
        self._ids: frozenset[int] = frozenset()
        self._letting_go: weakref.finalize[..., OwnedStorages] | None = None

    def look(self, optimizers: Iterable[torch.optim.Optimizer]) -> frozenset[int]:
        """What `optimizers` own now. Where every tensor's data lies where it lay at the last look, that answer still holds.

        It does because the identities in it cannot be given to other storages: weak references keep them taken. Were one
        of these tensors given another storage over the same memory, it would only be missing, and be copied eagerly.
        """
        values = _values(optimizers)
        try:
            # A default device installs a function mode, which would turn each of these calls into Python.
            with torch._C.DisableTorchFunction():
                addresses: list[int] | None = list(map(torch.Tensor.data_ptr, values))
        except (TypeError, RuntimeError):
            # Not all of them are tensors, or dense ones.
            addresses = None
        if addresses is not None and addresses == self._addresses:
            return self._ids
        self._forget()
        storages = _plain_storages(values) if addresses is not None else None
        if storages is None:
            # Their data may lie where it lay and be another storage's: these are looked at again each time.
            addresses, storages = None, _storages(values)
        # A weak reference to a storage is its `_cdata`.
        taken: list[Any] = list(map(torch.UntypedStorage._weak_ref, storages))
        self._letting_go = weakref.finalize(self, _let_go, taken)
        self._ids = frozenset(taken)
        self._addresses = addresses
        return self._ids

    def _forget(self) -> None:
        self._addresses = None
        if self._letting_go is not None:
            self._letting_go()
            self._letting_go = None


def _let_go(taken: list[int]) -> None:
    deque(map(torch.UntypedStorage._free_weak_ref, taken), maxlen=0)


def owned_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """The parameters and the tensors of the states."""
    values = _values(optimizers)
    return values if _PLAIN.issuperset(map(type, values)) else [value for value in values if isinstance(value, torch.Tensor)]


def _values(optimizers: Iterable[torch.optim.Optimizer]) -> list[Any]:
    """Parameters and whatever the states hold, in the optimizers' order."""
    values: list[Any] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            values.extend(group["params"])
        states = list(getattr(optimizer, "state", {}).values())
        if set(map(type, states)) <= {dict}:
            values.extend(chain.from_iterable(map(dict.values, states)))
        else:
            values.extend(value for state in states if isinstance(state, Mapping) for value in state.values())
    return values


def _plain_storages(tensors: list[torch.Tensor]) -> list[torch.UntypedStorage] | None:
    """Their storages, if all of them are torch's own classes and dense; else None: others may hide what they are made of."""
    if not _PLAIN.issuperset(map(type, tensors)):
        return None
    try:
        with torch._C.DisableTorchFunction():
            return list(map(torch.Tensor.untyped_storage, tensors))
    except RuntimeError:
        return None


def _storages(values: Iterable[Any]) -> list[torch.UntypedStorage]:
    """The storages of those that are tensors and have one."""
    found: list[torch.UntypedStorage] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            with contextlib.suppress(RuntimeError, NotImplementedError):
                found.extend(storages_of(value))
    return found
