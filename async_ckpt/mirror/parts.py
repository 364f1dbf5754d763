"""The parts of one file on their way to a store: bounded memory, every byte compared with the manifest before it is
sent.

Each part lies in a slot; a slot is free again when the store has let go of the part, which is seen by the end of the
memory view that was handed over. So however a library schedules its requests, at most `parallel` parts exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import weakref

from ..errors import CorruptCheckpointError
from ..format.checksum import crc32
from ..host.memory import region
from ..metrics import MirrorMetrics
from ..storage.filesystem import ReadableFile
from .context import MirrorContext
from .plan import ObjectPlan


class Slots:
    """Memory for parts. Made and used on one event loop; the memory is given back with the object."""

    def __init__(self, num_slots: int, part_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._part_bytes = part_bytes
        self._free: list[memoryview] = []
        self._semaphore = asyncio.Semaphore(num_slots)
        self._lent: dict[int, weakref.ref[memoryview]] = {}

    async def take(self, num_bytes: int) -> memoryview:
        """A view of `num_bytes` bytes, at most one part. Its slot is free again when the last reference to the view
        ends."""
        await self._semaphore.acquire()
        memory = self._free.pop() if self._free else region(self._part_bytes)
        view = memory[:num_bytes]

        def ended(reference: weakref.ref[memoryview]) -> None:
            # On whichever thread dropped it last; when the loop is gone, nobody waits for a slot any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._give_back, id(reference), memory)

        reference = weakref.ref(view, ended)
        # By its number: a reference to memory that can be written has no hash.
        self._lent[id(reference)] = reference
        return view

    def _give_back(self, number: int, memory: memoryview) -> None:
        del self._lent[number]
        self._free.append(memory)
        self._semaphore.release()


class PartStream:
    """The parts of one file, in order, for one call of `Store.put`. One event loop.

    Raises (from the iteration; also kept in `failure`, because libraries wrap what their source raises):
        CorruptCheckpointError: the file on disk is not what was committed.
        OSError: it cannot be read.
    """

    def __init__(
        self, context: MirrorContext, file: ReadableFile, plan: ObjectPlan, slots: Slots, metrics: MirrorMetrics
    ) -> None:
        self.failure: BaseException | None = None
        self._context = context
        self._file = file
        self._plan = plan
        self._slots = slots
        self._metrics = metrics
        self._todo = plan.parts(context.mirror.part_bytes)
        self._md5s: list[asyncio.Future[bytes]] = []
        self._reading: asyncio.Future[None] | None = None
        self._crc = 0

    def __aiter__(self) -> PartStream:
        return self

    async def __anext__(self) -> memoryview:
        part = next(self._todo, None)
        if part is None:
            raise StopAsyncIteration
        offset, num_bytes = part
        loop, executor = asyncio.get_running_loop(), self._context.executor
        try:
            view = await self._slots.take(num_bytes)
            await self._context.pace.wait(num_bytes)
            self._reading = loop.run_in_executor(executor, self._fill, view, offset)
            await self._reading
        except BaseException as error:
            self.failure = error if self.failure is None else self.failure
            raise
        if self._context.abilities is not None and self._context.abilities.compares_md5:
            # Beside the sending: the store's own checksum is compared with it afterwards.
            self._md5s.append(loop.run_in_executor(executor, _md5, view))
        self._metrics.num_parts += 1
        self._metrics.sent_bytes += num_bytes
        return view

    async def md5s(self) -> list[bytes]:
        """The MD5 of each part, once all were sent; none where the store compares checksums itself."""
        return list(await asyncio.gather(*self._md5s))

    async def close(self) -> None:
        """Wait until nothing reads the file any more."""
        pending = [future for future in (self._reading, *self._md5s) if future is not None and not future.done()]
        if pending:
            await asyncio.wait(pending)
        for future in self._md5s:
            # Never asked for where the put failed.
            if future.done() and not future.cancelled():
                future.exception()

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
                    first = extent * entry.extent_bytes
                    message = (
                        f"{self._file.path}: bytes {first} to {stop - 1} differ from what was committed; "
                        "it is not mirrored"
                    )
                    raise CorruptCheckpointError(message, path=self._file.path)
                self._crc = 0
            done = stop


def _md5(view: memoryview) -> bytes:
    return hashlib.md5(view, usedforsecurity=False).digest()
