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
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from ...host.device import accelerators, beside_captures, pinning, synchronize
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


class _Storages:
    """The byte ranges of storages that a state uses, where they go in the slot, and the tensors rebuilt on them."""

    def __init__(self, *, resolve_bits: bool) -> None:
        self._resolve_bits = resolve_bits
        self._ranges: dict[int, tuple[torch.UntypedStorage, int, int]] = {}
        self._offsets: dict[int, int] = {}
        self._staged: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Note what a tensor covers of its storage."""
        if isinstance(tensor, DTensor):
            self.add(_local(tensor))
            return
        if not self._shares_memory(tensor):
            return
        storage = tensor.untyped_storage()
        low = int(tensor.storage_offset()) * tensor.element_size()
        last: int = (
            sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
            if tensor.numel()
            else -1
        )
        high = low + (last + 1) * tensor.element_size()
        low -= low % _ALIGNMENT
        known = self._ranges.get(storage._cdata)
        if known is not None:
            low, high = min(low, known[1]), max(high, known[2])
        self._ranges[storage._cdata] = (storage, low, high)

    def lay_out(self) -> int:
        """Give every range a place in the slot; returns the bytes needed."""
        position = 0
        for key, (_, low, high) in self._ranges.items():
            self._offsets[key] = position
            position += -(-(high - low) // _ALIGNMENT) * _ALIGNMENT
        return position

    def copy(self, chunk: StagingChunk, memory: memoryview) -> None:
        """Copy all ranges into the slot, and make a storage on each."""
        devices = accelerators(storage.device for storage, _, _ in self._ranges.values())
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
        for key, (storage, low, high) in self._ranges.items():
            if high <= low:
                self._staged[key] = torch.UntypedStorage(0)
                continue
            offset, nbytes = self._offsets[key], high - low
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, low, (nbytes,), (1,))
            with beside_captures(storage.device):
                chunk.tensor[offset : offset + nbytes].copy_(source, non_blocking=True)
            self._staged[key] = torch.frombuffer(memory[offset : offset + nbytes], dtype=torch.uint8).untyped_storage()

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
        key = tensor.untyped_storage()._cdata
        _, low, _ = self._ranges[key]
        offset = tensor.storage_offset() - low // tensor.element_size() if tensor.numel() else 0
        staged = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(
            self._staged[key], offset, tensor.size(), tensor.stride()
        )
        return flip_bits(staged, tensor)


def _local(tensor: DTensor) -> torch.Tensor:
    with torch.no_grad():
        local: torch.Tensor = tensor.to_local()
    return local
