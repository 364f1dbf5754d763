"""Where the bytes of a file's payloads lie, in the user's storages."""

from __future__ import annotations

import ctypes
from operator import add, le

import torch

from ..errors import TornSnapshotError
from ..host.device import accelerators
from ..plan.plan import PlannedState
from .chunk_map import LargePiece

_OUTCOME = "This checkpoint is not committed; older ones are untouched. Call wait_snapshot() before freeing tensors"


class Payloads:
    """The payloads of one planned state, by number. Keeps their storages alive until `drop`. One thread at a time.

    `addresses` are those of the first byte of each, as they were found last; of those on devices too.

    Raises:
        UnsupportedStateError: a storage's device cannot be copied from.
        TornSnapshotError: a storage has become shorter since it was planned.
    """

    def __init__(self, state: PlannedState) -> None:
        self.devices = accelerators(state.devices)
        self._storages = state.storages
        self._starts = state.starts
        self._nbytes = state.plan.payload_nbytes
        planned = state.addresses
        if planned and not self.devices:
            self.addresses = list(map(add, planned, self._starts)) if any(self._starts) else planned
        else:
            self.addresses = self._look()
        self.on_devices: frozenset[int] = frozenset()
        """The numbers of the payloads on devices."""
        if self.devices:
            self.on_devices = frozenset(k for k, storage in enumerate(self._storages) if storage.device.type != "cpu")

    @property
    def host_addresses(self) -> list[int]:
        """The addresses of payloads that the CPU can read, and 0 for the others."""
        if not self.on_devices:
            return self.addresses
        return [0 if k in self.on_devices else address for k, address in enumerate(self.addresses)]

    def look_again(self) -> None:
        """Find the addresses again: the user may have moved the bytes.

        Raises:
            TornSnapshotError: a storage has become shorter, or a device's memory was given back meanwhile: no probe
                sees what another owner has put there.
        """
        before, self.addresses = self.addresses, self._look()
        if any(before[k] != self.addresses[k] for k in self.on_devices):
            raise TornSnapshotError(
                f"a tensor's memory was given back and taken anew before its snapshot was taken. {_OUTCOME}"
            )

    def bytes_of(self, piece: LargePiece) -> torch.Tensor:
        """The bytes of a piece of a payload, on its device."""
        storage = self._storages[piece.source]
        view = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return view.set_(storage, self._starts[piece.source] + piece.source_offset, (piece.nbytes,), (1,))

    def drop(self) -> None:
        """Let go of the storages."""
        self._storages = []

    def _look(self) -> list[int]:
        storage_nbytes = list(map(torch.UntypedStorage.nbytes, self._storages))
        ends = list(map(add, self._starts, self._nbytes))
        if not all(map(le, ends, storage_nbytes)):
            end, now = next((end, now) for end, now in zip(ends, storage_nbytes, strict=True) if end > now)
            raise TornSnapshotError(
                f"a tensor's storage was resized from {end} bytes or more to {now} before its snapshot was "
                f"taken. {_OUTCOME}"
            )
        return list(map(add, map(torch.UntypedStorage.data_ptr, self._storages), self._starts))


def address_of_bytes(data: bytes) -> int:
    """Of the first byte; valid while `data` is alive."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
