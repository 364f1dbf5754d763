"""An ``AsyncStager`` for ``dcp.async_save``: snapshots into memory that is touched once and reused, and never
overwritten while in use.

Guarantees:
- The staged state dict holds the values at the moment of `stage`, with every tensor's dtype, shape, stride, conjugate
  and negative bit, `requires_grad` and kind (Parameter, DTensor); tensors that share memory still do.
- A slot is handed out again only when no tensor of its snapshot is alive any more; till then `stage` takes another
  slot, or waits.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from ...host.device import accelerators, beside_captures, pinning, synchronize
from ...plan.strided import view_span
from ...snapshot.arena import StagingArena, StagingChunk
from ...threads.locks import uninterrupted
from .blobs import flip_bits, is_plain

_ALIGNMENT = 64
_SLOT_STEP_BYTES = 2 << 20


class ArenaStager(AsyncStager):
    """Give it to ``dcp.async_save`` as `async_stager` (which torch 2.7 does not have), the same one each time.

    Args:
        num_slots: snapshots that may be alive at once; each takes as much host memory as the state.
        slot_bytes: size of one slot; by default that of the first state staged. A larger state later gets new slots.
        timeout_s: how long `stage` waits for a slot before `BackpressureTimeout`.
        to_process: set it with ``AsyncCheckpointerType.PROCESS``. torch's way into another process drops conjugate and
            negative bits without a word, so tensors that have them are staged with the bits worked into the values.

    `stage` blocks for the copy (and the devices' copies), on the caller's thread. A forked child may read what was
    staged, and stages into slots of its own.
    """

    _synchronize_after_execute = False

    def __init__(
        self, *, num_slots: int = 2, slot_bytes: int | None = None, timeout_s: float = 1800.0, to_process: bool = False
    ) -> None:
        self._to_process = to_process
        self._num_slots = num_slots
        self._slot_bytes = slot_bytes
        self._timeout_s = timeout_s
        self._arena: StagingArena | None = None
        self._pid = os.getpid()
        """Whose the slots are."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of `state_dict` in staging memory.

        Raises:
            BackpressureTimeout: earlier snapshots were not written in time.
        """
        found = _Storages(resolve_bits=self._to_process)
        tensors = [leaf for leaf in tree_leaves(state_dict) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            found.add(tensor)
        chunk = self._slot(found.lay_out()).acquire(self._timeout_s)
        arena = self._arena
        assert arena is not None
        holder = (ctypes.c_char * arena.chunk_bytes).from_buffer(chunk.view)
        # From here on the slot belongs to the tensors on it: it is free when the last of them is gone.
        weakref.finalize(holder, arena.release, chunk)
        found.copy(chunk, memoryview(holder).cast("B"))
        # A deep copy of everything else, in which these stand for the tensors.
        return copy.deepcopy(state_dict, {id(tensor): found.rebuild(tensor) for tensor in tensors})

    def synchronize_staging(self) -> None:
        """Nothing to wait for: `stage` has copied."""

    def close(self) -> None:
        """Give the memory back once the last snapshot is gone."""
        if self._arena is not None:
            self._arena.close()

    def _slot(self, needed_bytes: int) -> StagingArena:
        wanted = max(needed_bytes, self._slot_bytes or 0, 1)
        if self._arena is None or self._arena.chunk_bytes < needed_bytes or self._pid != os.getpid():
            size = -(-wanted // _SLOT_STEP_BYTES) * _SLOT_STEP_BYTES
            slots = StagingArena(self._num_slots, size, pinning=pinning("auto"), is_inherited=True)
            old, self._arena, self._pid = self._arena, slots, os.getpid()
            if old is not None:
                old.close()
        return self._arena


@dataclass
class _Range:
    """The bytes of a storage from `low` to `high`, which go to `offset` in the slot."""

    storage: torch.UntypedStorage
    low: int
    high: int
    offset: int = 0
    staged: torch.UntypedStorage = field(default_factory=lambda: torch.UntypedStorage(0))


class _Storages:
    """The byte ranges of storages that a state uses, where they go in the slot, and the tensors rebuilt on them."""

    def __init__(self, *, resolve_bits: bool) -> None:
        self._resolve_bits = resolve_bits
        self._ranges: dict[int, _Range] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Note what a tensor covers of its storage."""
        if isinstance(tensor, DTensor):
            self.add(_local(tensor))
            return
        if not self._shares_memory(tensor):
            return
        storage, start = tensor.untyped_storage(), int(tensor.storage_offset())
        end = view_span(tensor.size(), tensor.stride(), start)[1] if tensor.numel() else start
        low, high = start * tensor.element_size(), end * tensor.element_size()
        low -= low % _ALIGNMENT
        known = self._ranges.setdefault(storage._cdata, _Range(storage, low, high))
        known.low, known.high = min(low, known.low), max(high, known.high)

    def lay_out(self) -> int:
        """Give every range a place in the slot; returns the bytes needed."""
        position = 0
        for one in self._ranges.values():
            one.offset = position
            position += -(-(one.high - one.low) // _ALIGNMENT) * _ALIGNMENT
        return position

    def copy(self, chunk: StagingChunk, memory: memoryview) -> None:
        """Copy all ranges into the slot, and make a storage on each."""
        devices = accelerators(one.storage.device for one in self._ranges.values())
        streams = {device: torch.accelerator.current_stream(device) for device in devices}
        try:
            self._queue_copies(chunk, memory)
            synchronize(streams.values())
        except BaseException:
            # The slot must not be given back while a device still writes to it.
            for stream in streams.values():
                with contextlib.suppress(RuntimeError):  # The device is lost, and its copies with it.
                    uninterrupted(partial(synchronize, [stream]))
            raise

    def _queue_copies(self, chunk: StagingChunk, memory: memoryview) -> None:
        for one in self._ranges.values():
            if one.high <= one.low:
                continue
            place, device = slice(one.offset, one.offset + one.high - one.low), one.storage.device
            source = torch.empty(0, dtype=torch.uint8, device=device)
            source.set_(one.storage, one.low, (one.high - one.low,), (1,))
            with beside_captures(device):
                chunk.tensor[place].copy_(source, non_blocking=True)
            one.staged = torch.frombuffer(memory[place], dtype=torch.uint8).untyped_storage()

    def rebuild(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor on the staged storage."""
        with torch.no_grad():
            if isinstance(tensor, DTensor):
                local = self.rebuild(_local(tensor)).detach()
                mesh, placements = tensor.device_mesh, tensor.placements
                staged: torch.Tensor = DTensor.from_local(
                    local, mesh, placements, run_check=False, shape=tensor.size(), stride=tensor.stride()
                )
            elif not self._shares_memory(tensor):
                staged = tensor.detach().resolve_conj().resolve_neg() if self._resolve_bits else tensor.detach()
                staged = staged.cpu().clone()
            else:
                staged = self._rebuild_plain(tensor)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(staged, tensor.requires_grad)
        return staged.requires_grad_() if tensor.requires_grad else staged

    def _shares_memory(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is staged as a range of its storage; else it is cloned."""
        return is_plain(tensor) and not (self._resolve_bits and (tensor.is_conj() or tensor.is_neg()))

    def _rebuild_plain(self, tensor: torch.Tensor) -> torch.Tensor:
        one = self._ranges[tensor.untyped_storage()._cdata]
        offset = tensor.storage_offset() - one.low // tensor.element_size() if tensor.numel() else 0
        staged = torch.empty(0, dtype=tensor.dtype, device="cpu")
        return flip_bits(staged.set_(one.staged, offset, tensor.size(), tensor.stride()), tensor)


def _local(tensor: DTensor) -> torch.Tensor:
    with torch.no_grad():
        local: torch.Tensor = tensor.to_local()
    return local
