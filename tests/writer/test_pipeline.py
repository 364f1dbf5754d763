"""The way of files through the pool when nothing fails."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from types import FrameType

import pytest

from async_ckpt.metrics import Span
from async_ckpt.storage.filesystem import FileSystem
from async_ckpt.writer.disk import Jobs
from async_ckpt.writer.file import FileWrite
from tests.support.stepping import until

from .fakes import TIMEOUT_S, Gate, Source, seal


@pytest.mark.wide
@pytest.mark.parametrize("io_mode", ["auto", "direct", "buffered"])
@pytest.mark.parametrize("size_bytes", [1, 4095, 4096, 4097, 8192, 20_000, 3 << 20, (3 << 20) + 5])
def test_bytes_and_crcs_on_a_real_disk(make_pool, tmp_path, io_mode, size_bytes):
    pool = make_pool(FileSystem(), io_mode=io_mode)
    source = Source(size_bytes, 8192 if size_bytes < 1 << 20 else 1 << 20)
    path = tmp_path / "a" / "b" / "file"
    written = source.write(pool, str(path)).done.result(TIMEOUT_S)
    assert path.read_bytes() == source.data
    assert (written.path, written.size_bytes, written.extent_crc32) == (str(path), size_bytes, [*source.crcs])
    assert written.extent_bytes == source.chunks[0].nbytes
    source.assert_released_once()


def test_an_empty_file_is_made_and_synced(make_pool, fs):
    written = make_pool().open_file("empty", size_bytes=0, seal=seal).done.result(TIMEOUT_S)
    assert written.extent_crc32 == []
    assert fs.kinds() == ["open", "fsync", "close"]


def test_what_seal_patches_is_written(make_pool, fs):
    def patch(offset: int, view: memoryview) -> int:
        view[0] = 255
        return seal(offset, view)

    source = Source(3 * 4096 + 1, 4096)
    source.submit(make_pool().open_file("f", size_bytes=source.size_bytes, seal=patch)).done.result(TIMEOUT_S)
    assert [fs.files["f"].data[k * 4096] for k in range(4)] == [255] * 4


def test_files_are_sealed_in_parallel(make_pool):
    both = threading.Barrier(2)

    def sealing(offset: int, view: memoryview) -> int:
        both.wait(TIMEOUT_S)
        return 0

    pool = make_pool()
    files = [Source(4096, 4096).submit(pool.open_file(name, size_bytes=4096, seal=sealing)) for name in "ab"]
    for file in files:
        file.done.result(TIMEOUT_S)


def test_writes_in_flight_are_bounded_over_all_files(make_pool, fs):
    gate = fs.on["write"] = Gate()
    pool = make_pool(num_writers=3)
    files = [Source(6 * 4096, 4096).write(pool, name) for name in "ab"]
    gate.wait_inside(3)
    # The loop has seen all of them once it runs something that was queued after them.
    pool.run(asyncio.sleep(0)).result(TIMEOUT_S)
    assert pool.disk.num_queued == 12
    gate.open()
    for file in files:
        file.done.result(TIMEOUT_S)
    assert fs.most_at_once["write"] == 3
    assert pool.disk.num_queued == 0
    assert [pool.disk.restart_max_queued(), pool.disk.restart_max_queued()] == [12, 0]


def test_a_chunk_whose_turn_has_come_stays_until_its_job_has_ended(make_pool, fs):
    """A file is given up between the choice of its next chunk and the job that seals it."""
    gate = fs.on["write"] = Gate()
    source, files, given_back_early = Source(4096, 4096), [], []

    def give_up(frame: FrameType, event: str, _: object) -> None:
        chooser = frame.f_back
        if frame.f_code is not Jobs.run.__code__ or chooser is None or len(files) < 2 or given_back_early:
            return
        if chooser.f_code is FileWrite.begin_next.__code__ and chooser.f_locals["self"] is files[1]:
            files[1].abort(OSError("given up"))
            given_back_early.append(source.all_released.wait(0.2))

    threading.settrace(give_up)
    try:
        pool = make_pool(num_writers=1)
        files.append(Source(4096, 4096).write(pool, "a"))
        gate.wait_inside(1)
        files.append(source.write(pool, "b"))
        pool.run(asyncio.sleep(0)).result(TIMEOUT_S)
        gate.open()
        assert "given up" in str(files[1].done.exception(TIMEOUT_S))
        source.assert_released_once()
    finally:
        threading.settrace(None)
    assert given_back_early == [False]


def test_a_file_written_through_the_cache_has_one_write_in_flight(make_pool, fs):
    source = Source(6 * 4096, 4096)
    source.write(make_pool(io_mode="buffered")).done.result(TIMEOUT_S)
    assert fs.most_at_once["write"] == 1


def test_order_on_disk_ends_with_truncate_sync_close(make_pool, fs):
    source = Source(2 * 4096 + 1, 4096)
    source.write(make_pool(), "d/f").done.result(TIMEOUT_S)
    assert fs.log[:2] == [("makedirs", "d", 0), ("open", "d/f", 0)]
    assert fs.kinds()[2:] == ["write"] * 3 + ["truncate", "fsync", "close"]
    assert bytes(fs.files["d/f"].data) == source.data


def test_fsync_of_a_file_does_not_wait_for_other_files(make_pool, fs):
    gate = Gate()
    fs.on["write"] = lambda path, offset: gate() if path == "slow" else None
    pool = make_pool(num_writers=3)
    slow = Source(2 * 4096, 4096).write(pool, "slow")
    gate.wait_inside(2)
    Source(4096, 4096).write(pool, "quick").done.result(TIMEOUT_S)
    assert not slow.done.done()
    gate.open()
    slow.done.result(TIMEOUT_S)


def test_a_location_that_comes_later(make_pool, fs):
    location: Future[str] = Future()
    source = Source(4096, 4096)
    pool = make_pool()
    file = source.write(pool, folder=location)
    until(lambda: pool.waiting_for() == "the directory of 'f'")
    location.set_result("late")
    assert file.done.result(TIMEOUT_S).path == "late/f"


def test_waiting_for_names_operation_offset_and_file(make_pool, fs):
    pool = make_pool(num_writers=1)
    assert pool.waiting_for() == "nothing"
    file = pool.open_file("somewhere", size_bytes=2 * 4096, seal=seal)
    source = Source(2 * 4096, 4096)
    gate = Gate()
    fs.on["write"] = lambda path, offset: gate() if offset else None
    source.submit(file)
    gate.wait_inside(1)
    text = pool.waiting_for()
    assert "write of 4096 bytes at offset 4096" in text
    assert "somewhere" in text
    gate.open()
    file.done.result(TIMEOUT_S)


def test_spans_tell_kind_thread_and_extent(make_pool):
    spans: list[Span] = []
    source = Source(2 * 4096, 4096)
    pool = make_pool(on_span=spans.append)
    source.write(pool, tag="t").done.result(TIMEOUT_S)
    told = {(s.kind, s.offset, s.num_bytes) for s in spans}
    extents = {(kind, offset, 4096) for kind in ("crc", "write") for offset in (0, 4096)}
    assert told == extents | {("open", 0, 0), ("fsync", 0, 0), ("close", 0, 0)}
    assert all(s.tag == "t" and s.path == "f" and s.end_s >= s.start_s for s in spans)
    assert {s.thread.rsplit("-", 1)[0] for s in spans} == {"async-ckpt-io"}


def test_copies_run_one_after_the_other_in_order(make_pool):
    pool = make_pool()
    gate, order = Gate(), []
    copies = [pool.copier.submit(gate), *(pool.copier.submit(lambda k=k: order.append(k)) for k in range(5))]
    gate.wait_inside(1)
    gate.open()
    for copy in copies:
        copy.result(TIMEOUT_S)
    assert order == [0, 1, 2, 3, 4]
