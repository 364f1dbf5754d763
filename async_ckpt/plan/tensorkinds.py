"""How torch writes a tensor of each dtype and device, learnt from torch by pickling a tiny one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .object_parts import NotPlainError, global_opcode
from .torch_layout import RecordingError, record


@dataclass(frozen=True, slots=True)
class TensorKind:
    """The parts of a tensor's pickle that depend on dtype and device only. Globals are pickle opcodes, ready to write."""

    rebuild: bytes
    storage_class: bytes
    dtype: bytes | None
    """None where the storage class says it."""
    unit_nbytes: int
    """What a storage's size is counted in."""
    marker: str
    """torch's own "storage" string object; identity matters, an equal string of the user may be the same object."""
    location: str
    fresh_location: bool
    """True where torch makes a new location string object for every tensor."""


@lru_cache(maxsize=256)
def tensor_kind(dtype: torch.dtype, device: torch.device) -> TensorKind:
    """Learn one kind; allocates two tiny tensors on `device`. Raises NotPlainError where torch does something special for it."""
    try:
        samples = [torch.empty(2, dtype=dtype, device=device) for _ in range(2)]
        function, arguments = samples[0].__reduce_ex__(2)
        first, second = record(samples).persistent_ids
    except (RuntimeError, NotImplementedError, TypeError, ValueError, RecordingError) as error:
        raise NotPlainError(f"no plain way to write {dtype} on {device}") from error
    expected = (0, (2,), (1,), False)
    if tuple(arguments[1:5]) != expected or len(arguments) not in (6, 7) or (len(arguments) == 7 and arguments[6] is not dtype):
        raise NotPlainError(f"unknown way to write {dtype} on {device}")
    return TensorKind(
        rebuild=global_opcode(function),
        storage_class=global_opcode(first[1]),
        dtype=global_opcode(dtype) if len(arguments) == 7 else None,
        unit_nbytes=samples[0].untyped_storage().nbytes() // first[4],
        marker=first[0],
        location=first[3],
        fresh_location=first[3] is not second[3],
    )
