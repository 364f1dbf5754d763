"""`load`: equal to what was saved, or an error; never anything else."""

from __future__ import annotations

import errno
import io
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import async_ckpt
from async_ckpt import (
    Catalog,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    UnsafePathError,
    UnsupportedStateError,
)
from async_ckpt.reading import load as restore
from async_ckpt.reading.errors import ReadError
from async_ckpt.reading.load import load_opened

from ..support.comparing import torch_bytes
from .committed import commit
from .faulty import FaultyFileSystem
from .states import plain, torch_only, trained

KINDS = {
    "trained": trained,
    "plain": plain,
    "torch_only": torch_only,
    "nothing": dict,
    "a tensor": lambda: torch.ones(3),
}


@pytest.fixture(autouse=True)
def no_descriptor_left():
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.wide
@pytest.mark.parametrize("verify", ["full", "size", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_load_gives_what_torch_load_gives(tmp_path: Path, kind: str, verify: str) -> None:
    data = torch_bytes(KINDS[kind]())
    catalog = commit(tmp_path, "a", {"sub/m.pt": data}, extent_bytes=8192)
    # Byte-identical when saved again: values, dtypes, strides, aliasing, key order, requires_grad, metadata.
    expected = torch_bytes(torch.load(tmp_path / "a/sub/m.pt"))
    assert torch_bytes(restore.load_committed(catalog, "a", "sub/m.pt", verify=verify)) == expected
    assert kind == "torch_only" or expected == data


@pytest.mark.parametrize(
    "map_location",
    ["cpu", torch.device("cpu"), lambda storage, loc: storage, {"cpu": "cpu"}, lambda storage, loc: None],
)
def test_map_locations(tmp_path: Path, map_location: object) -> None:
    data = torch_bytes(plain())
    catalog = commit(tmp_path, "a", {"m.pt": data})
    assert torch_bytes(restore.load_committed(catalog, "a", "m.pt", map_location=map_location)) == data


def test_map_location_meta_and_mmap(tmp_path: Path) -> None:
    data = torch_bytes(trained())
    catalog = commit(tmp_path, "a", {"m.pt": data})
    assert restore.load_committed(catalog, "a", "m.pt", map_location="meta")["model"]["0.weight"].is_meta
    assert torch_bytes(restore.load_committed(catalog, "a", "m.pt", mmap=True)) == data


def test_a_device_that_is_not_there_is_torchs_own_error(tmp_path: Path) -> None:
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(torch.ones(2))})
    with pytest.raises(RuntimeError, match=r"cuda|CUDA|device"):
        restore.load_committed(catalog, "a", "m.pt", map_location="cuda:77")


def test_storages_can_be_resized_like_torchs_own(tmp_path: Path) -> None:
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(torch.ones(3_000_000))})
    loaded = restore.load_committed(catalog, "a", "m.pt")
    loaded.resize_(6_000_000)
    assert loaded[:3_000_000].eq(1).all()


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["small", "torch_only"])
def test_every_flipped_byte_is_found(tmp_path: Path, kind: str) -> None:
    data = torch_bytes({"w": torch.arange(5.0), "n": 1} if kind == "small" else {"s": {1}, "w": torch.arange(5.0)})
    catalog = commit(tmp_path, "a", {"m.pt": data}, extent_bytes=4096)
    path = tmp_path / "a/m.pt"
    for i in range(0, len(data), 1 if kind == "small" else 11):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
        with pytest.raises(CorruptCheckpointError, match="damaged"):
            restore.load_committed(catalog, "a", "m.pt")


@pytest.mark.parametrize("mode", [{}, {"mmap": True}, {"map_location": lambda storage, loc: storage}])
def test_damage_names_file_and_record(tmp_path: Path, mode: dict[str, object]) -> None:
    data = bytearray(torch_bytes({"a": torch.zeros(40_000), "b": torch.full((40_000,), 7.25)}))
    catalog = commit(tmp_path, "a", {"m.pt": bytes(data)})
    data[data.index(torch.full((4,), 7.25).numpy().tobytes()) + 100_000] ^= 1
    (tmp_path / "a/m.pt").write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"m\.pt.*data/1") as caught:
        restore.load_committed(catalog, "a", "m.pt", **mode)
    assert caught.value.record == "data/1"
    assert caught.value.path == str(tmp_path / "a/m.pt")


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: b""])
@pytest.mark.parametrize("verify", ["full", "size", "off"])
def test_wrong_size_is_refused_at_every_level(tmp_path: Path, change, verify: str) -> None:
    data = torch_bytes(trained())
    catalog = commit(tmp_path, "a", {"m.pt": data})
    (tmp_path / "a/m.pt").write_bytes(change(data))
    with pytest.raises(CorruptCheckpointError, match="bytes"):
        restore.load_committed(catalog, "a", "m.pt", verify=verify)


def test_missing_things_are_named_with_what_is_there(tmp_path: Path) -> None:
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(1), "o.pt": torch_bytes(2)})
    with pytest.raises(CheckpointNotFoundError, match=r"'b'.*'a'"):
        restore.load_committed(catalog, "b", "m.pt")
    with pytest.raises(CheckpointNotFoundError, match=r"x\.pt.*m\.pt.*o\.pt"):
        restore.load_committed(catalog, "a", "x.pt")
    (tmp_path / "a/m.pt").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"m\.pt"):
        restore.load_committed(catalog, "a", "m.pt")


@pytest.mark.parametrize("name", ["../a/m.pt", "/etc/passwd", "a\0b", ""])
def test_paths_cannot_leave_the_checkpoint(tmp_path: Path, name: str) -> None:
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(1)})
    with pytest.raises(UnsafePathError):
        restore.load_committed(catalog, "a", name)


def test_links_and_fifos_are_refused(tmp_path: Path) -> None:
    data = torch_bytes(1)
    catalog = commit(tmp_path, "a", {"m.pt": data, "f.pt": data})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(data)
    (tmp_path / "a/m.pt").unlink()
    (tmp_path / "a/m.pt").symlink_to(elsewhere)
    (tmp_path / "a/f.pt").unlink()
    os.mkfifo(tmp_path / "a/f.pt")
    for name in ("m.pt", "f.pt"):
        with pytest.raises(CorruptCheckpointError):
            restore.load_committed(catalog, "a", name)


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_a_manifest_of_the_wrong_kind_is_damage_to_whoever_loads_by_path(tmp_path: Path, kind: str) -> None:
    """The message was that there is no checkpoint, and that torch.load reads the file, unverified."""
    commit(tmp_path, "a", {"m.pt": torch_bytes(1)})
    manifest = tmp_path / "a/manifest.json"
    manifest.rename(tmp_path / "moved")
    {"fifo": os.mkfifo, "link": lambda path: path.symlink_to(tmp_path / "moved"), "directory": os.mkdir}[kind](manifest)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        async_ckpt.load(tmp_path / "a/m.pt")


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_the_file_that_is_mapped_is_the_one_that_was_verified(tmp_path: Path, change: str) -> None:
    """It was opened a second time by its name, which a replacement had taken by then."""
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes({"w": torch.ones(1000)})})
    with catalog.open_file("a", "m.pt") as opened:
        (tmp_path / "a").rename(tmp_path / "moved")
        if change == "replaced":
            commit(tmp_path, "a", {"m.pt": torch_bytes({"w": torch.zeros(1000)})})
        loaded = load_opened(opened, mmap=True)
    assert torch.equal(loaded["w"], torch.ones(1000))


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(1)})
    with pytest.raises(ConfigError, match="verify"):
        restore.load_committed(catalog, "a", "m.pt", verify="crc")
    with pytest.raises(ConfigError, match="num_threads"):
        restore.load_committed(catalog, "a", "m.pt", num_threads=0)


def test_load_by_path_finds_the_manifest_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(tmp_path / "runs", "a", {"deep/er/m.pt": torch_bytes(5), "m.pt": torch_bytes(6)})
    assert async_ckpt.load(tmp_path / "runs/a/deep/er/m.pt") == 5
    monkeypatch.chdir(tmp_path / "runs")
    assert async_ckpt.load("a/m.pt") == 6
    torch.save(7, tmp_path / "loose.pt")
    with pytest.raises(CheckpointNotFoundError, match=r"torch\.load"):
        async_ckpt.load(tmp_path / "loose.pt")
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        async_ckpt.load(tmp_path / "nothing.pt")


def _container(pickled: bytes) -> bytes:
    """What `torch.save` writes, around any pickle."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, data in {"data.pkl": pickled, "byteorder": b"little", "data/0": bytes(4000)}.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return buffer.getvalue()


_TENSOR = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuM\xe8\x03tQ"
)
_REST = b"\x89ccollections\nOrderedDict\n)RtR."
CRAFTED = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "text cut off": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "no storage": b"\x80\x02(X\x07\0\0\0storageX\1\0\0\0xtQ.",
    "storage too small": _TENSOR + b"K\0M\0\x10\x85K\1\x85" + _REST,
    "offset below zero": _TENSOR + b"J\xfc\xff\xff\xffK\x0a\x85K\1\x85" + _REST,
    "size below zero": _TENSOR + b"K\0J\xfb\xff\xff\xff\x85K\1\x85" + _REST,
    "size of 72 bits": _TENSOR + b"K\0\x8a\x09" + b"\xff" * 8 + b"\x01\x85K\1\x85" + _REST,
    "storage of a length": b"\x80\x02ctorch.storage\nUntypedStorage\n" + pickle.dumps((1 << 40,), 2)[2:-1] + b"R.",
    "tensor of a length": b"\x80\x02ctorch\nFloatTensor\n" + pickle.dumps((1 << 40,), 2)[2:-1] + b"R.",
    "bytes of a length": pickle.dumps(bytes, 2)[:-1] + pickle.dumps((1 << 40,), 2)[2:-1] + b"R.",
    "bytearray of a length": pickle.dumps(bytearray, 2)[:-1] + pickle.dumps((1 << 40,), 2)[2:-1] + b"R.",
}


@pytest.mark.parametrize("mode", [{}, {"mmap": True}], ids=["read", "mapped"])
@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_pickle_is_an_error_of_ours_that_names_the_file(
    tmp_path: Path, kind: str, mode: dict[str, bool]
) -> None:
    """torch's own EOFError, RuntimeError, TypeError passed; and a few bytes made as many gigabytes as they said."""
    catalog = commit(tmp_path, "a", {"m.pt": _container(CRAFTED[kind])})
    with pytest.raises(CorruptCheckpointError, match=r"a/m\.pt"):
        restore.load_committed(catalog, "a", "m.pt", **mode)


@pytest.mark.parametrize("mode", [{}, {"mmap": True}], ids=["read", "mapped"])
def test_a_bytearray_of_bytes_is_none_of_them(tmp_path: Path, mode: dict[str, bool]) -> None:
    data = {
        "b": bytearray(b"bytes"),
        "e": bytearray(),
        "w": torch.ones(3).to_sparse(),
        "s": torch.ones(3).untyped_storage(),
    }
    loaded = restore.load_committed(commit(tmp_path, "a", {"m.pt": torch_bytes(data)}), "a", "m.pt", **mode)
    assert (loaded["b"], loaded["e"]) == (data["b"], data["e"]) and torch.equal(loaded["w"].to_dense(), torch.ones(3))


@pytest.mark.parametrize("num_spare", [0, 1])
def test_a_shortage_while_mapping_is_no_damage(tmp_path: Path, num_spare: int) -> None:
    """torch opens the file itself, and its RuntimeError passed for a damaged file."""
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes({"w": torch.ones(1000)})})
    with catalog.open_file("a", "m.pt", num_threads=1) as opened:
        opened.verify_rest()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + num_spare, limits[1]))
        try:
            with pytest.raises(ReadError, match=r"m\.pt") as caught:
                load_opened(opened, mmap=True)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE


def test_errors_of_the_callers_own_code_pass(tmp_path: Path) -> None:
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes({"w": torch.ones(3)})})

    def place(storage: object, location: str) -> object:
        raise LookupError("where to?")

    with pytest.raises(LookupError, match="where to"):
        restore.load_committed(catalog, "a", "m.pt", map_location=place)


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    catalog = commit(tmp_path / "r", "a", {"m.pt": torch_bytes({"x": Bomb(str(trap)), "w": torch.ones(2)})})
    with pytest.raises(UnsupportedStateError, match=r"open.*weights_only=False") as caught:
        restore.load_committed(catalog, "a", "m.pt")
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert not trap.exists()
    restore.load_committed(catalog, "a", "m.pt", weights_only=False)["x"].close()
    assert trap.exists()


@pytest.mark.parametrize("mode", [{}, {"mmap": True}, {"map_location": lambda storage, loc: storage}])
def test_an_unverified_pickle_is_never_unpickled(tmp_path: Path, mode: dict[str, object]) -> None:
    trap = tmp_path / "trap"
    good = torch_bytes({"x": "A" * 200, "w": torch.ones(2)})
    catalog = commit(tmp_path / "r", "a", {"m.pt": good})
    bad = torch_bytes({"x": Bomb(str(trap)), "w": torch.ones(2)})
    (tmp_path / "r/a/m.pt").write_bytes(bad.ljust(len(good), b"\0")[: len(good)])
    with pytest.raises(CorruptCheckpointError):
        restore.load_committed(catalog, "a", "m.pt", weights_only=False, **mode)
    assert not trap.exists()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mode", [{}, {"map_location": lambda storage, loc: storage}])
def test_each_failing_read_is_an_error_and_leaves_nothing(tmp_path: Path, mode: dict[str, object]) -> None:
    data = torch_bytes(trained())
    commit(tmp_path, "a", {"m.pt": data}, extent_bytes=4096)
    faulty = FaultyFileSystem()
    catalog = Catalog(tmp_path, faulty)
    assert torch_bytes(restore.load_committed(catalog, "a", "m.pt", **mode)) == data
    reads = faulty.num_reads
    assert reads > 5
    for k in range(reads):
        faulty.fail_at(k)
        with pytest.raises(OSError, match=r"m\.pt.*offset \d+") as caught:
            restore.load_committed(catalog, "a", "m.pt", **mode)
        assert isinstance(caught.value, async_ckpt.CheckpointError)
        assert caught.value.errno == 5


def test_memory_for_a_lying_file_is_never_taken(tmp_path: Path) -> None:
    # A pickle that claims a storage of 16 GiB, in a file whose CRCs are all right.
    lying = bytearray(torch_bytes({"w": torch.arange(70_000)}))
    at = lying.index(b"J" + (70_000).to_bytes(4, "little"))
    lying[at + 1 : at + 5] = (2**31 - 1).to_bytes(4, "little")
    catalog = commit(tmp_path, "a", {"m.pt": bytes(lying)})
    with pytest.raises(CorruptCheckpointError, match="data/0"):
        restore.load_committed(catalog, "a", "m.pt")


def test_load_from_threads_at_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    data = torch_bytes(trained())
    catalog = commit(tmp_path, "a", {"m.pt": data}, extent_bytes=4096)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: torch_bytes(restore.load_committed(catalog, "a", "m.pt")), range(12)))
    assert results == [data] * 12


def test_reading_modules_need_no_torch() -> None:
    modules = ", ".join(f"async_ckpt.{name}" for name in ("reading.verified_file", "reading.records"))
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["nfs4", "fuse.rclone", "lustre", "ext4", "fuseblk"])
def test_on_a_network_file_system_nothing_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes({"w": torch.arange(5000)})})
    asked: list[str] = []
    monkeypatch.setattr(restore, "mount_type", lambda path: asked.append(os.path.realpath(path)) or kind)
    loaded = restore.load_committed(catalog, "a", "m.pt", mmap=True)
    assert torch.equal(loaded["w"], torch.arange(5000))
    assert asked == [str(tmp_path / "a/m.pt")]
    mapped = "m.pt" in Path("/proc/self/maps").read_text()
    assert mapped == (kind in ("ext4", "fuseblk"))
