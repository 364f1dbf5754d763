"""Copies from devices to staging memory, queued on side streams.

Neither queueing nor ordering blocks the CPU; what waits gives up the GIL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from functools import partial

import torch

from ..host.device import keep_for, on_stream, record_now, side_stream, synchronize
from ..threads.locks import uninterrupted


class SideStreams:
    """One stream per device, made when it is first needed. Any thread."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.Stream] = {}

    def order_behind(self, callers: Mapping[torch.device, torch.Event]) -> None:
        """What is queued from here on begins after these points on the caller's streams."""
        for device, event in callers.items():
            self._stream(device).wait_event(event)

    def queue(
        self, device: torch.device, copies: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> torch.Event:
        """Queue copies from one device to the host; returns what ends them. `copies`: memory that is read, its bytes,
        and where they go; each made on the side stream when it is asked for."""
        stream = self._stream(device)
        with on_stream(stream):
            for memory, source, target in copies:
                keep_for(memory, stream)
                target.copy_(source, non_blocking=True)
            return record_now(device)

    def finish(self, devices: Iterable[torch.device]) -> None:
        """Return when no queued copy writes to a chunk any more, whatever interrupts the wait: the chunks are to be
        given up."""
        for device in devices:
            if device in self._streams:
                with contextlib.suppress(RuntimeError):  # The device is lost, and its copies with it.
                    uninterrupted(partial(synchronize, [self._streams[device]]))

    def _stream(self, device: torch.device) -> torch.Stream:
        # Both the caller's thread and the copy thread may be the first.
        return self._streams.get(device) or self._streams.setdefault(device, side_stream(device))
