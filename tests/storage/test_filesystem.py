"""The seam itself, on real file systems: complete writes, alignment, fallbacks, descriptors, and nothing followed."""

from __future__ import annotations

import asyncio
import errno
import itertools
import mmap
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.errors import CorruptCheckpointError, OutOfSpaceError, PathExistsError, WriteError
from async_ckpt.storage.filesystem import FileSystem
from async_ckpt.storage.root import make_root
from async_ckpt.storage.write_file import WritableFile
from tests.support.faulty_filesystem import FaultyFileSystem, Operation
from tests.support.mounts import mounted

CHUNK_BYTES = 64 << 10
FS = FileSystem()


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def padded(data: bytes) -> memoryview:
    memory = memoryview(mmap.mmap(-1, max(4096, -(-len(data) // 4096) * 4096)))
    memory[: len(data)] = data
    return memory


def aligned(data: bytes) -> memoryview:
    return padded(data)[: len(data)]


async def write(fs: FileSystem, path: Path, data: bytes, executor: ThreadPoolExecutor, *, direct: bool) -> WritableFile:
    file = await fs.open_write(str(path), len(data), direct=direct, executor=executor)
    try:
        offsets = list(range(0, len(data), CHUNK_BYTES))
        random.Random(1).shuffle(offsets)
        await asyncio.gather(
            *(asyncio.to_thread(file.pwrite, padded(data[at : at + CHUNK_BYTES]), at) for at in offsets)
        )
        file.truncate(len(data))
        file.fsync()
    finally:
        await file.close()
    return file


def everything(num_bytes: int) -> bytes:
    return random.Random(num_bytes).randbytes(num_bytes)


@pytest.mark.wide
@pytest.mark.parametrize("num_bytes", [0, 1, 4095, 4096, CHUNK_BYTES, 3 * CHUNK_BYTES + 4097])
@pytest.mark.parametrize("direct", [True, False])
async def test_written_and_read_back(
    tmp_path: Path, executor: ThreadPoolExecutor, num_bytes: int, direct: bool
) -> None:
    data = everything(num_bytes)
    file = await write(FS, tmp_path / "f", data, executor, direct=direct)
    assert file.direct is (direct and FS.fs_type(str(tmp_path)) != "tmpfs")
    assert (tmp_path / "f").read_bytes() == data
    for direct_read in (True, False):
        reader = FS.open_read(str(tmp_path), ["f"], direct=direct_read)
        assert reader.size_bytes == num_bytes
        for start, length in ((0, num_bytes), (num_bytes // 3, num_bytes // 2), (0, num_bytes // 2)):
            memory = aligned(bytes(length))
            reader.pread_into(memory, start)
            assert bytes(memory) == data[start : start + length]
        with pytest.raises(CorruptCheckpointError, match="too early"):
            reader.pread_into(memoryview(bytearray(num_bytes + 1)), 0)
        reader.close()
        reader.close()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
async def test_on_every_file_system(tmp_path: Path, executor: ThreadPoolExecutor, kind: str) -> None:
    data = everything(5 * CHUNK_BYTES + 1234)
    with mounted(kind, tmp_path, 400 << 20) as root:
        assert FS.fs_type(str(root)) == kind
        file = await write(FS, root / "f", data, executor, direct=True)
        assert file.direct is (kind != "tmpfs")
        assert (root / "f").read_bytes() == data
        assert FS.free_bytes(str(root)) > 0
        (root / "a").mkdir()
        (root / "b").mkdir()
        (root / "a" / "x").touch()
        FS.rename_exchange(str(root / "a"), str(root / "b"))
        assert (root / "b" / "x").exists()
        with pytest.raises(FileExistsError):
            FS.rename_noreplace(str(root / "a"), str(root / "b"))


async def test_a_roots_type_is_asked_once_and_each_root_has_its_own(
    tmp_path: Path, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, asked = FileSystem(), list[str]()
    types = {str(tmp_path / "a"): "tmpfs", str(tmp_path / "a" / "inner"): "ext4", str(tmp_path / "ab"): "ext4"}
    monkeypatch.setattr(fs, "fs_type", lambda path: asked.append(path) or types[path])
    for root in types:
        make_root(fs, root)
    for root, kind in types.items():
        file = await write(fs, Path(root) / "f", everything(4096), executor, direct=True)
        assert file.direct is (kind != "tmpfs") or FS.fs_type(str(tmp_path)) == "tmpfs"
    assert asked == list(types)


async def test_a_root_that_is_looked_at_while_a_file_is_opened(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    """By another thread: of another checkpoint, whose directory is new."""
    fs = FileSystem()

    class Name(str):
        def startswith(self, *prefix: Any) -> bool:
            fs.root_types[f"/{len(fs.root_types)}"] = "ext4"
            return super().startswith(*prefix)

    make_root(fs, str(tmp_path))
    file = await fs.open_write(Name(tmp_path / "f"), 1, direct=True, executor=executor)
    await file.close()
    assert len(fs.root_types) == 2


SHORTENERS: dict[str, Callable[[Operation], int]] = {
    "to one byte once in a while": lambda op: 1 if op.index % 5 == 0 else 1 << 30,
    "inside a page": lambda op: 5000,
    "by a page": lambda op: max(4096, (op.num_bytes or 0) - 4096),
}


@pytest.mark.parametrize("shorten", SHORTENERS)
@pytest.mark.parametrize("direct", [True, False])
async def test_short_writes_are_completed(
    tmp_path: Path, executor: ThreadPoolExecutor, shorten: str, direct: bool
) -> None:
    fs = FaultyFileSystem()
    fs.short_writes = SHORTENERS[shorten]
    data = everything(3 * CHUNK_BYTES + 777)
    file = await write(fs, tmp_path / "f", data, executor, direct=direct)
    assert (tmp_path / "f").read_bytes() == data
    for op in fs.operations:
        if op.name == "pwrite" and op.direct:
            assert op.offset is not None
            assert op.offset % 4096 == 0
    assert file.direct is direct


@pytest.mark.parametrize("direct", [True, False])
async def test_interrupted_writes_are_completed(tmp_path: Path, executor: ThreadPoolExecutor, direct: bool) -> None:
    fs = FaultyFileSystem()
    fs.fail_when(lambda op: op.name == "pwrite" and op.index % 2 == 0, errno.EINTR)
    data = everything(3 * CHUNK_BYTES + 777)
    await write(fs, tmp_path / "f", data, executor, direct=direct)
    assert (tmp_path / "f").read_bytes() == data
    (tmp_path / "g").unlink(missing_ok=True)
    fs.create_file(str(tmp_path / "g"), data)
    assert (tmp_path / "g").read_bytes() == data


def test_amended_bytes_are_durable_and_what_stood_there_is_told(tmp_path: Path) -> None:
    fs, path = FaultyFileSystem(), tmp_path / "f"
    data = everything(20_000)
    path.write_bytes(data)
    fs.short_writes = lambda op: 3
    changes = [(100, b"abcdefgh"), (104, b"ijkl"), (15_000, data[15_000:15_100])]
    before = fs.amend(str(path), 19_000, changes)
    assert before == [data[100:108], b"efgh", data[15_000:15_100]]
    assert path.read_bytes() == (data[:100] + b"abcdijkl" + data[108:])[:19_000]
    assert [op.name for op in fs.operations if op.name in ("pwrite", "fsync")] == ["pwrite"] * 5 + ["fsync"]
    fs.operations.clear()
    assert fs.amend(str(path), 19_000, changes[1:]) == [data for _, data in changes[1:]]
    assert {op.name for op in fs.operations} & {"pwrite", "fsync", "truncate"} == set()


@pytest.mark.parametrize("call", ["open", "read", "pwrite", "truncate", "fsync", "close"])
def test_an_amend_that_fails_says_so(tmp_path: Path, call: str) -> None:
    fs, path = FaultyFileSystem(), tmp_path / "f"
    path.write_bytes(bytes(2000))
    fs.fail_when(lambda op: op.name == call, errno.EIO)
    with pytest.raises(WriteError, match="amending"):
        fs.amend(str(path), 1000, [(10, b"abc")])


async def test_a_shared_file_is_made_by_whoever_comes_first(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    data = everything(4 * CHUNK_BYTES)
    files = [
        await FS.open_write(str(tmp_path / "f"), len(data), direct=direct, executor=executor, shared=True)
        for direct in (True, False, True)
    ]
    for k, file in enumerate([*files, files[0]]):
        file.pwrite(aligned(data[k * CHUNK_BYTES : (k + 1) * CHUNK_BYTES]), k * CHUNK_BYTES)
    for file in files:
        file.fsync()
        await file.close()
    assert (tmp_path / "f").read_bytes() == data


@pytest.mark.parametrize("refusal", ["refuse_direct_open", "refuse_direct_write"])
async def test_refused_direct_io_falls_back_per_file(
    tmp_path: Path, executor: ThreadPoolExecutor, refusal: str
) -> None:
    fs = FaultyFileSystem()
    setattr(fs, refusal, True)
    data = everything(3 * CHUNK_BYTES + 777)
    file = await write(fs, tmp_path / "f", data, executor, direct=True)
    assert not file.direct
    assert (tmp_path / "f").read_bytes() == data


@pytest.mark.parametrize("what", ["memory", "offset", "length"])
async def test_unaligned_requests_are_right_all_the_same(
    tmp_path: Path, executor: ThreadPoolExecutor, what: str
) -> None:
    data = everything(4 * 4096)
    file = await FS.open_write(str(tmp_path / "f"), len(data), direct=True, executor=executor)
    cuts = {"memory": [0, 4096], "offset": [0, 100, 4096], "length": [0, 8192, 8292]}[what] + [len(data)]
    for start, stop in itertools.pairwise(cuts):
        part = (
            memoryview(bytearray(1) + bytearray(data[start:stop]))[1:]
            if what == "memory"
            else aligned(data[start:stop])
        )
        await asyncio.to_thread(file.pwrite, part, start)
    file.truncate(len(data))
    file.fsync()
    await file.close()
    assert (tmp_path / "f").read_bytes() == data


async def test_direct_files_on_ext4_are_reserved_ahead(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    if FS.fs_type(str(tmp_path)) not in ("ext4", "xfs"):
        pytest.skip("the scratch directory is neither on ext4 nor on xfs")
    fs = FaultyFileSystem()
    await write(fs, tmp_path / "f", everything(CHUNK_BYTES + 5), executor, direct=True)
    assert [op.num_bytes for op in fs.operations if op.name == "allocate"] == [CHUNK_BYTES + 5]
    await write(fs, tmp_path / "g", everything(CHUNK_BYTES + 5), executor, direct=False)
    assert sum(op.name == "allocate" for op in fs.operations) == 1


FAULTS = [
    (name, code)
    for name in ("create", "allocate", "pwrite", "truncate", "fsync", "close")
    for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT)
]


@pytest.mark.parametrize(("name", "code"), FAULTS)
async def test_every_failure_is_raised_with_path_and_errno(
    tmp_path: Path, executor: ThreadPoolExecutor, name: str, code: int
) -> None:
    if name == "allocate" and FS.fs_type(str(tmp_path)) not in ("ext4", "xfs"):
        pytest.skip("nothing is reserved here")
    fs = FaultyFileSystem()
    fs.fail_when(lambda op: op.name == name, code)
    with pytest.raises(WriteError) as caught:
        await write(fs, tmp_path / "f", everything(3 * CHUNK_BYTES), executor, direct=True)
    assert caught.value.errno == code
    assert caught.value.path == str(tmp_path / "f")
    assert isinstance(caught.value.__cause__, OSError)
    if code != errno.EIO:
        assert isinstance(caught.value, OutOfSpaceError)
        assert caught.value.free_bytes is not None and "make room, or keep fewer" in str(caught.value)
    if name == "pwrite":
        assert caught.value.offset is not None
    if name == "allocate":
        assert not (tmp_path / "f").exists()


async def test_an_existing_file_or_link_is_never_written_to(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    (tmp_path / "victim").write_text("keep")
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "dangling").symlink_to("new")
    for name in ("victim", "link", "dangling"):
        for direct in (True, False):
            with pytest.raises(WriteError) as caught:
                await FS.open_write(str(tmp_path / name), 1, direct=direct, executor=executor)
            assert caught.value.errno == errno.EEXIST
        with pytest.raises(PathExistsError, match=name):
            FS.create_file(str(tmp_path / name), b"x")
    assert (tmp_path / "victim").read_text() == "keep"
    assert not (tmp_path / "new").exists()


# --- reading ---


@pytest.mark.timeout(60)
def test_nothing_but_regular_files_is_opened(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / "link").symlink_to("real/file")
    (tmp_path / "folder").symlink_to("real")
    os.mkfifo(tmp_path / "fifo")
    for parts in (["link"], ["folder", "file"], ["fifo"], ["real"], ["real", "file", "more"]):
        with pytest.raises(CorruptCheckpointError):
            FS.open_read(str(tmp_path), parts)
    for parts in (
        ["..", tmp_path.name, "real", "file"],
        ["real", "..", "real", "file"],
        ["real/file"],
        ["real", ""],
        ["."],
    ):
        with pytest.raises(CorruptCheckpointError):
            FS.open_read(str(tmp_path), parts)
    with pytest.raises(FileNotFoundError):
        FS.open_read(str(tmp_path), ["real", "none"])
    with pytest.raises(CorruptCheckpointError):
        FS.read_file(str(tmp_path / "real" / "file"), 0)
    assert FS.read_file(str(tmp_path / "real" / "file"), 1) == b"x"
    with pytest.raises(CorruptCheckpointError):
        FS.open_dir(str(tmp_path), ("folder",))


def test_a_directory_handle_keeps_its_tree(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    handle = FS.open_dir(str(tmp_path), ("a",))
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("new")
    assert handle.read_file(("x",), 10) == b"old"
    assert handle.entries() == [("x", "file")]
    assert handle.identity != FS.stat(str(tmp_path / "a")).identity
    handle.close()
    with pytest.raises(ValueError, match="closed"):
        handle.entries()


def test_read_errors_are_raised_with_path_and_offset(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(8192))
    fs = FaultyFileSystem()
    reader = fs.open_read(str(tmp_path), ["x"], direct=True)
    fs.fail_when(lambda op: op.name == "read", errno.EIO)
    with pytest.raises(OSError, match="offset 0") as caught:
        reader.pread_into(aligned(bytes(8192)), 0)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(tmp_path / "x")
    fs.heal()
    fs.faults.append((lambda op: op.name == "read" and op.index % 2 == 0, errno.EINTR))
    reader.pread_into(aligned(bytes(8192)), 0)
    reader.close()


def test_locks_exclude_and_end_with_close(tmp_path: Path) -> None:
    first = FS.lock(str(tmp_path))
    assert first is not None
    assert FS.lock(str(tmp_path)) is None
    first.close()
    first.close()
    second = FS.lock(str(tmp_path))
    assert second is not None
    second.close()


def test_errors_of_a_call_without_a_python_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        FS.rename_exchange(str(tmp_path / "a"), str(tmp_path / "b"))
    assert caught.value.filename == str(tmp_path / "a")
