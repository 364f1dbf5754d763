"""Memory is bounded by parts, whatever the files' size; objects of many parts, and of more than one plain put can
hold."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt.format.checksum import crc32
from async_ckpt.format.manifest import FileEntry, Manifest
from async_ckpt.metrics import MirrorMetrics
from async_ckpt.mirror.config import Mirror
from async_ckpt.mirror.context import MirrorContext
from async_ckpt.mirror.objects import ObjectPlan
from async_ckpt.mirror.parts import PartStream, Slots
from async_ckpt.mirror.remote import remote_catalog
from async_ckpt.reading.scatter import Scatter, stream_into
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from tests.support.making import begin

from ..support.stepping import until
from .making import mirroring, s3_mirror, upload_processes

_MIB = 1 << 20


def sparse_checkpoint(root: Path, size_bytes: int, extent_bytes: int = 64 * _MIB) -> None:
    """One file of zeros that takes no space."""
    filesystem = FileSystem()
    staging = begin(filesystem, root, "huge", "refuse")
    with open(os.path.join(staging.path, "model.bin"), "wb") as file:
        file.truncate(size_bytes)
    zeros = memoryview(bytearray(extent_bytes))
    whole, rest = divmod(size_bytes, extent_bytes)
    crcs = (crc32(zeros),) * whole + ((crc32(zeros[:rest]),) if rest else ())
    entry = FileEntry("model.bin", size_bytes, extent_bytes, crcs, "opaque", "test", None)
    transaction.publish(filesystem, staging, Manifest("huge", 1, (entry,)))


def resident_bytes() -> int:
    """Of this process, and of those that upload for it what they share with nobody."""
    found = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    for child in upload_processes():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
            found += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))
    return found


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
    """More than one plain put can hold; up, and back into a tensor that holds other values."""
    size_bytes = 6 << 30
    assert upload_watched(seaweedfs, tmp_path, prefix, size_bytes) <= (4 * 5 + 32) * _MIB
    catalog, tensor = remote_catalog(s3_mirror(seaweedfs, prefix)), torch.ones(size_bytes, dtype=torch.uint8)
    catalog.read("huge", lambda checkpoint: _restore(checkpoint, tensor))
    assert not tensor.any()


def _restore(checkpoint: Any, tensor: torch.Tensor) -> None:
    scatter, entry = Scatter(), checkpoint.manifest.files[0]
    scatter.add(0, entry.size_bytes, tensor.untyped_storage())
    scatter.freeze()
    with checkpoint.open_file(entry) as file:
        stream_into(file, scatter)


def test_no_part_is_read_before_a_slot_is_free(tmp_path: Path) -> None:
    size_bytes, filesystem = 50 * _MIB, FileSystem()
    sparse_checkpoint(tmp_path, size_bytes, _MIB)
    entry = FileEntry("model.bin", size_bytes, _MIB, (crc32(bytes(_MIB)),) * 50, "opaque", "test", None)
    mirror = Mirror(f"file://{tmp_path}/other", part_bytes=5 * _MIB, parallel=2)
    metrics = MirrorMetrics("huge")

    file = filesystem.open_read(str(tmp_path / "huge"), ("model.bin",))
    with ThreadPoolExecutor(2) as pool:
        context = MirrorContext(mirror, filesystem, str(tmp_path))
        stream = PartStream(Slots(context), file, ObjectPlan("key", entry), metrics)
        held = [next(stream), next(stream)]
        third = pool.submit(next, stream)
        until(lambda: num_waiting(context.changed) == 1)
        assert not third.done() and metrics.num_parts == 2
        held.pop()
        held.append(third.result(60))
        held.clear()
        del third
        for part in stream:
            del part
        assert metrics.sent_bytes == size_bytes
    file.close()


def num_waiting(changed: Any) -> int:
    return 0 if changed._waiters is None else len(changed._waiters._waiters)
