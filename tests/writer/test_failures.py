"""The first failure of a file stays, its memory comes back exactly once, and the pool goes on."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import Future

import pytest

from async_ckpt.errors import CheckpointError, TransactionStateError, WriteError
from async_ckpt.format.chunk import Chunk

from .fakes import TIMEOUT_S, Gate, Source, seal

NUM = 8


def fail_at(offset_to_fail: int | None, error: BaseException):
    def step(path: str, offset: int) -> None:
        if path in ("f", "d", "d/f") and offset_to_fail in (None, offset):
            raise error

    return step


def assert_usable(pool) -> None:
    source = Source(3 * 4096, 4096)
    source.write(pool, "next").done.result(TIMEOUT_S)
    source.assert_released_once()


STEPS = [(kind, 0) for kind in ("makedirs", "open", "truncate", "fsync", "close")]


@pytest.mark.wide
@pytest.mark.parametrize(("kind", "at"), [*STEPS, ("write", 0), ("write", NUM // 2), ("write", NUM - 1)])
def test_any_step_may_fail(make_pool, fs, kind, at):
    cause = OSError(errno.EIO, "injected")
    fs.on[kind] = fail_at(at * 4096 if kind == "write" else None, cause)
    pool = make_pool()
    source = Source(NUM * 4096 - 1, 4096)
    file = source.write(pool, "d/f")
    error = file.done.exception(TIMEOUT_S)
    assert isinstance(error, WriteError)
    assert error.errno == errno.EIO
    assert error.__cause__ is cause
    source.assert_released_once()
    if kind not in ("makedirs", "open", "close"):
        assert fs.files["d/f"].num_closed == 1
    assert fs.kinds().count("fsync") == (kind in ("fsync", "close"))
    assert_usable(pool)


def test_chunks_after_the_failure_are_released_unwritten(make_pool, fs):
    fs.on["write"] = fail_at(0, OSError(errno.ENOSPC, "injected"))
    source = Source(NUM * 4096, 4096)
    file = make_pool().open_file("f", size_bytes=source.size_bytes, seal=seal)
    file.submit(source.chunks[0])
    file.done.exception(TIMEOUT_S)
    for chunk in source.chunks[1:]:
        file.submit(chunk)
    source.assert_released_once()
    assert fs.kinds().count("write") == 1


@pytest.mark.parametrize("at", [0, 3, NUM - 1])
def test_a_seal_that_raises(make_pool, fs, at):
    cause = ValueError("seal")

    def sealing(offset: int, view: memoryview) -> int:
        if offset == at * 4096:
            raise cause
        return 0

    source = Source(NUM * 4096, 4096)
    file = source.submit(make_pool().open_file("f", size_bytes=source.size_bytes, seal=sealing))
    error = file.done.exception(TIMEOUT_S)
    assert isinstance(error, WriteError)
    assert error.__cause__ is cause
    source.assert_released_once()


def test_a_file_whose_seal_raises_beside_a_failed_write_is_not_written_once_more(make_pool, fs):
    fs.on["write"] = fail_at(0, WriteError("injected", errno=errno.EIO))
    fs.unlink = lambda path: None
    has_failed = threading.Event()

    def sealing(offset: int, view: memoryview) -> int:
        if offset == 4096:
            assert has_failed.wait(TIMEOUT_S)
            raise ValueError("seal")
        return 0

    source = Source(NUM * 4096, 4096)
    file = make_pool(rewrite=True).open_file("f", size_bytes=source.size_bytes, seal=sealing)
    fail = file._fail

    def failing(error: BaseException, **how: bool) -> None:
        fail(error, **how)
        has_failed.set()

    file._fail = failing
    error = source.submit(file).done.exception(TIMEOUT_S)
    assert isinstance(error, WriteError) and error.errno == errno.EIO
    source.assert_released_once()
    assert fs.kinds().count("open") == 1


def test_memory_and_descriptor_are_kept_until_writes_in_flight_ended(make_pool, fs):
    gate = fs.on["write"] = Gate()
    source = Source(NUM * 4096, 4096)
    pool = make_pool(num_writers=3)
    file = source.write(pool)
    gate.wait_inside(3)
    file.abort(WriteError("given up"))
    # The loop has handled the abort once it runs something that was queued after it.
    pool.run(_nothing()).result(TIMEOUT_S)
    assert not file.done.done()
    assert not any(source.releases.values())
    gate.open()
    assert str(file.done.exception(TIMEOUT_S)).startswith("given up")
    source.assert_released_once()
    assert fs.files["f"].num_closed == 1
    assert fs.kinds().count("write") == 3


async def _nothing() -> None:
    pass


def test_the_first_failure_stays(make_pool, fs):
    first, second = WriteError("first"), WriteError("second")
    file = make_pool().open_file("f", size_bytes=4096, seal=seal)
    file.abort(first)
    file.abort(second)
    assert file.done.exception(TIMEOUT_S) is first
    file.abort(second)
    assert file.done.exception(TIMEOUT_S) is first


def test_abort_of_a_finished_file_changes_nothing(make_pool):
    source = Source(4096, 4096)
    file = source.write(make_pool())
    file.done.result(TIMEOUT_S)
    file.abort(WriteError("late"))
    assert file.done.exception(TIMEOUT_S) is None


def test_abort_while_the_location_is_unknown(make_pool, fs):
    location: Future[str] = Future()
    source = Source(4096, 4096)
    file = source.write(make_pool(), folder=location)
    file.abort(WriteError("given up"))
    assert isinstance(file.done.exception(TIMEOUT_S), WriteError)
    source.assert_released_once()
    location.set_result("late")
    assert fs.log == []


def test_a_location_that_fails(make_pool, fs):
    location: Future[str] = Future()
    source = Source(4096, 4096)
    file = source.write(make_pool(), folder=location)
    location.set_exception(PermissionError(errno.EACCES, "no"))
    error = file.done.exception(TIMEOUT_S)
    assert isinstance(error, WriteError)
    assert error.errno == errno.EACCES
    source.assert_released_once()


def test_keyboard_interrupt_given_as_the_reason_does_not_spread(make_pool):
    file = make_pool().open_file("f", size_bytes=4096, seal=seal)
    file.abort(KeyboardInterrupt())
    error = file.done.exception(TIMEOUT_S)
    assert isinstance(error, CheckpointError)
    assert isinstance(error.__cause__, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("extents", "words"),
    [
        ([(4096, 4096)], "out of order"),
        ([(0, 4096), (0, 4096)], "out of order"),
        ([(0, 4096), (4096, 12288)], "the file has"),
        ([(0, 0)], "the file has"),
        ([(0, 4096), (4096, 2048)], "all chunks but the last"),
        ([(0, 2048), (2048, 4096)], "all chunks but the last"),
        ([(0, 12288)], "buffer"),
    ],
)
def test_wrong_chunks_are_refused_and_released(make_pool, extents, words):
    released: list[int] = []
    file = make_pool().open_file("f", size_bytes=3 * 4096, seal=seal)
    source = Source(2 * 4096, 2 * 4096)
    chunks = [Chunk(o, n, source.chunks[0].buffer, lambda k=k: released.append(k)) for k, (o, n) in enumerate(extents)]
    file.submit(*chunks)
    with pytest.raises(TransactionStateError, match=words):
        file.done.result(TIMEOUT_S)
    assert sorted(released) == list(range(len(extents)))


def test_failures_of_one_file_leave_others_alone(make_pool, fs):
    fs.on["write"] = fail_at(4096, OSError(errno.EIO, "injected"))
    pool = make_pool()
    bad, good = Source(NUM * 4096, 4096), Source(NUM * 4096, 4096)
    failing = bad.write(pool)
    other = good.write(pool, "g")
    assert failing.done.exception(TIMEOUT_S) is not None
    other.done.result(TIMEOUT_S)
    bad.assert_released_once()
    good.assert_released_once()


def test_thirty_good_and_thirty_failed_files_leave_nothing(make_pool, fs):
    pool = make_pool()
    num_threads = threading.active_count()
    for k in range(60):
        fs.on["write"] = (
            fail_at(4096 * (k // 2 % NUM), OSError(errno.EIO, "injected")) if k % 2 else lambda path, offset: None
        )
        source = Source(NUM * 4096, 4096)
        file = source.write(pool)
        assert (file.done.exception(TIMEOUT_S) is None) == (k % 2 == 0)
        source.assert_released_once()
        assert fs.files["f"].num_closed == 1
    assert pool.disk.num_queued == 0
    assert threading.active_count() == num_threads
