"""Memory is bounded by parts, whatever the files' size; objects of many parts, and of more than one plain put can
hold."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.format.checksum import crc32
from async_ckpt.format.manifest import FileEntry
from async_ckpt.mirror.parts import Pace, PartStream, Slots
from async_ckpt.mirror.plan import ObjectPlan
from async_ckpt.mirror.remote import remote_catalog
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem

from .making import mirroring, s3_mirror

_MIB = 1 << 20


def sparse_checkpoint(root: Path, size_bytes: int, extent_bytes: int = 64 * _MIB) -> None:
    """One file of zeros that takes no space."""
    filesystem = FileSystem()
    staging = transaction.begin(filesystem, str(root), "huge", "refuse")
    with open(os.path.join(staging.path, "model.bin"), "wb") as file:
        file.truncate(size_bytes)
    zeros = memoryview(bytearray(extent_bytes))
    whole, rest = divmod(size_bytes, extent_bytes)
    crcs = (crc32(zeros),) * whole + ((crc32(zeros[:rest]),) if rest else ())
    transaction.publish(
        filesystem, staging, [FileEntry("model.bin", size_bytes, extent_bytes, crcs, "opaque", "test", None)], {}, 1
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def upload_watched(server: Any, root: Path, prefix: str, size_bytes: int) -> int:
    """Mirror a sparse checkpoint; returns the most memory that this took."""
    sparse_checkpoint(root, size_bytes)
    mirror = s3_mirror(server, prefix, part_bytes=5 * _MIB, parallel=4, request_timeout_s=60.0, retry_timeout_s=60.0)
    stop, peak = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], resident_bytes())

    with mirroring(root, mirror, with_backlog=False) as made:
        made.check()
        watcher, before = threading.Thread(target=watch), resident_bytes()
        watcher.start()
        pending = made.expect("huge")
        made.committed(pending, None)
        pending.result(900)
        stop.set()
        watcher.join()
    assert remote_catalog(mirror).verify("huge", level="size").ok
    return peak[0] - before


@pytest.mark.wide
def test_memory_is_parallel_times_part(moto: Any, tmp_path: Path, prefix: str) -> None:
    assert upload_watched(moto, tmp_path, prefix, 96 * _MIB) <= (4 * 5 + 32) * _MIB


@pytest.mark.slow
def test_an_object_of_six_gib(seaweedfs: Any, tmp_path: Path, prefix: str) -> None:
    assert upload_watched(seaweedfs, tmp_path, prefix, 6 << 30) <= (4 * 5 + 32) * _MIB


def test_no_part_is_read_before_a_slot_is_free(tmp_path: Path) -> None:
    sparse_checkpoint(tmp_path, 10 * _MIB, _MIB)
    entry = FileEntry("model.bin", 10 * _MIB, _MIB, (crc32(bytes(_MIB)),) * 10, "opaque", "test", None)

    async def main() -> None:
        file = FileSystem().open_read(str(tmp_path / "huge"), ("model.bin",))
        with ThreadPoolExecutor(2) as pool:
            stream = PartStream(
                file,
                ObjectPlan("key", entry),
                slots=Slots(2, _MIB),
                pace=Pace(None),
                part_bytes=_MIB,
                executor=pool,
                on_part=lambda started_s, offset, num_bytes: None,
            )
            held = [await anext(stream), await anext(stream)]
            await stream.md5s()
            third = asyncio.ensure_future(anext(stream))
            done, _ = await asyncio.wait([third], timeout=0.2)
            assert not done
            held.pop()
            held.append(await asyncio.wait_for(third, 10))
            held.clear()
            third = None  # type: ignore[assignment]
            async for part in stream:
                del part
            await stream.close()
        file.close()

    asyncio.run(main())
