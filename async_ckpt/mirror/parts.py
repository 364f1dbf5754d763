"""The parts of one file on their way to a store: bounded memory, every byte compared with the manifest before it is
sent.

Each part lies in a slot; a slot is free again when the store has let go of the part, which is seen by the end of the
memory view that was handed over. So however a library schedules its requests, at most `parallel` parts exist.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator

from ..errors import CorruptCheckpointError
from ..format.checksum import crc32
from ..host.memory import region
from ..metrics import MirrorMetrics
from ..storage.filesystem import ReadableFile
from .context import MirrorContext, Stopped
from .objects import ObjectPlan


class Slots:
    """Memory for the parts of one upload, given back with the object. Any thread."""

    def __init__(self, context: MirrorContext) -> None:
        self.context = context
        self.is_closed = False
        """Whether the upload has failed: no part of it is wanted any more."""
        self._free: list[memoryview | None] = [None] * context.mirror.parallel

    def take(self, num_bytes: int) -> memoryview:
        """A view of `num_bytes` bytes, at most one part. Its slot is free again when the last reference to the view
        ends. Blocks. Raises Stopped."""
        with self.context.changed:
            self.context.wait_for(lambda: self.is_closed or bool(self._free))
            if self.is_closed:
                raise Stopped("another object of the checkpoint has failed", url=self.context.mirror.url)
            memory = self._free.pop() or region(self.context.mirror.part_bytes)
        view = memory[:num_bytes]
        weakref.finalize(view, self._give_back, memory).atexit = False
        return view

    def _give_back(self, memory: memoryview) -> None:
        """On whichever thread dropped the view last."""
        with self.context.changed:
            self._free.append(memory)
            self.context.changed.notify_all()

    def close(self) -> None:
        """Let nobody take or wait for a slot any more."""
        with self.context.changed:
            self.is_closed = True
            self.context.changed.notify_all()


class PartStream(Iterator[memoryview]):
    """The parts of one file, in order, for one call of `Store.put`. Blocks; one thread at a time.

    Raises (from the iteration; also kept in `failure`, because libraries wrap what their source raises):
        Stopped: no part is wanted any more. CorruptCheckpointError: the file on disk is not what was committed.
        OSError: it cannot be read."""

    def __init__(self, slots: Slots, file: ReadableFile, plan: ObjectPlan, metrics: MirrorMetrics) -> None:
        self.failure: BaseException | None = None
        self.md5s: list[bytes] = []
        """The MD5 of each part so far; none where the store compares checksums itself."""
        self._slots = slots
        self._context = context = slots.context
        self._file = file
        self._plan = plan
        self._metrics = metrics
        self._todo = plan.parts(context.mirror.part_bytes)
        self._takes_md5 = context.abilities is not None and context.abilities.compares_md5
        self._crc = 0

    def __next__(self) -> memoryview:
        offset, num_bytes = next(self._todo)
        try:
            view = self._slots.take(num_bytes)
            self._context.keep_pace(num_bytes)
            self._fill(view, offset)
        except BaseException as error:
            self.failure = error
            raise
        if self._takes_md5:
            self.md5s.append(hashlib.md5(view, usedforsecurity=False).digest())
        with self._context.changed:
            self._metrics.num_parts += 1
            self._metrics.sent_bytes += num_bytes
        return view

    def _fill(self, view: memoryview, offset: int) -> None:
        self._file.pread_into(view, offset)
        entry = self._plan.entry
        done, end = offset, offset + view.nbytes
        while done < end:
            extent = done // entry.extent_bytes
            stop = min(end, (extent + 1) * entry.extent_bytes)
            self._crc = crc32(view[done - offset : stop - offset], self._crc)
            if stop == min(entry.size_bytes, (extent + 1) * entry.extent_bytes):
                if self._crc != entry.extent_crc32[extent]:
                    where = f"bytes {extent * entry.extent_bytes} to {stop - 1}"
                    told = f"{self._file.path}: {where} differ from what was committed; it is not mirrored"
                    raise CorruptCheckpointError(told, path=self._file.path)
                self._crc = 0
            done = stop
