"""Where torch and this package could read one file in two ways, or torch's own switches have a say: the same, or
refused by name."""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.serialization import config

import async_ckpt
from async_ckpt import AsyncCheckpointEngine, ConfigError, CorruptCheckpointError, UnsupportedStateError

from ..support.comparing import torch_bytes
from .committed import commit

OTHER_ORDER = "big" if sys.byteorder == "little" else "little"


def load_into(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    options.pop("mmap", None)
    target = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    async_ckpt.load_into(target, path, **options)
    return target


WAYS: dict[str, Callable[..., Any]] = {
    "load": async_ckpt.load,
    "mapped": lambda path, **options: async_ckpt.load(path, mmap=True, **options),
    "by torch": lambda path, **options: async_ckpt.load(
        path, map_location=lambda storage, location: storage, **options
    ),
    "trusted": lambda path, **options: async_ckpt.load(path, mmap=True, weights_only=False, **options),
    "load_into": load_into,
}
STATE = {"a": torch.arange(1000.0), "b": torch.ones(1000)}


def header_of(data: bytes, name: bytes) -> int:
    return data.index(name) - 30


def shifted(data: bytes) -> bytes:
    """The payload begins 4 bytes later for whoever looks at the local header."""
    at = header_of(data, b"archive/data/0") + 28
    (extra,) = struct.unpack_from("<H", data, at)
    return data[:at] + struct.pack("<H", extra + 4) + data[at + 2 :]


def renamed(data: bytes) -> bytes:
    """Its local header gives a record another name."""
    at = data.index(b"archive/data/0")
    return data[:at] + b"archive/data/1" + data[at + 14 :]


def two_cases(data: bytes) -> bytes:
    """Two records that differ in case alone: torch takes the first that it finds."""
    return data.replace(b"archive/version", b"archive/DATA.PK").replace(b"archive/DATA.PK", b"archive/Data/0x"[:15])


def compressed(data: bytes) -> bytes:
    at = header_of(data, b"archive/data/0") + 8
    return data[:at] + struct.pack("<H", 8) + data[at + 2 :]


@pytest.mark.wide
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verify", ["full", "off"])
@pytest.mark.parametrize("craft", [shifted, renamed, compressed], ids=lambda craft: craft.__name__)
def test_local_headers_that_contradict_the_directory(
    tmp_path: Path, craft: Callable[[bytes], bytes], verify: str, way: str
) -> None:
    for extent_bytes in (4096, 1 << 20):
        commit(tmp_path, f"a{extent_bytes}", {"m.pt": craft(torch_bytes(STATE))}, extent_bytes=extent_bytes)
        with pytest.raises(CorruptCheckpointError, match="local header"):
            WAYS[way](tmp_path / f"a{extent_bytes}/m.pt", verify=verify)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shift", range(0, 60, 7))
def test_a_header_that_lies_in_two_blocks(tmp_path: Path, shift: int) -> None:
    # The padding of the first tensor moves the second one's header over the border of a page.
    state = {"a": torch.zeros(4096 - 100 - shift, dtype=torch.uint8), "b": torch.ones(5000, dtype=torch.uint8)}
    data = torch_bytes(state)
    commit(tmp_path, "good", {"m.pt": data}, extent_bytes=4096)
    assert torch.equal(async_ckpt.load(tmp_path / "good/m.pt")["b"], state["b"])
    at = data.index(b"archive/data/1")
    commit(tmp_path, "bad", {"m.pt": data[:at] + b"archive/data/7" + data[at + 14 :]}, extent_bytes=4096)
    with pytest.raises(CorruptCheckpointError, match="local header"):
        async_ckpt.load(tmp_path / "bad/m.pt")
    with pytest.raises(CorruptCheckpointError, match=r"m\.pt: .*local header.*partly overwritten"):
        async_ckpt.load_into(
            {name: torch.zeros_like(tensor) for name, tensor in state.items()}, tmp_path / "bad/m.pt", atomic=False
        )


def test_names_that_differ_in_case_alone(tmp_path: Path) -> None:
    data = (
        torch_bytes(STATE)
        .replace(b"archive/.format_version", b"archive/.FORMAT_VERSION")
        .replace(b"archive/.storage_alignment", b"archive/.format_version\0\0\0"[:26])
    )
    commit(tmp_path, "a", {"m.pt": data.replace(b"archive/data/1", b"archive/DATA/0")})
    for way in WAYS.values():
        with pytest.raises(CorruptCheckpointError, match="twice"):
            way(tmp_path / "a/m.pt")


@pytest.mark.parametrize(
    "device", ["meta", torch.device("meta"), lambda storage, location: storage, {"cpu": "meta"}], ids=str
)
def test_another_byte_order_without_memory(tmp_path: Path, device: Any) -> None:
    """torch would exchange bytes that are not there, and end the process."""
    native, other = sys.byteorder.encode(), OTHER_ORDER.encode().ljust(len(sys.byteorder), b"\0")
    data = torch_bytes(STATE)
    at = data.index(native, data.index(b"byteorder"))
    commit(tmp_path, "a", {"m.pt": data[:at] + other + data[at + len(native) :]})
    with pytest.raises(UnsupportedStateError, match="byte order"):
        async_ckpt.load(tmp_path / "a/m.pt", map_location=device)


def test_a_file_that_does_not_say_its_byte_order(tmp_path: Path) -> None:
    """torch is told by `set_default_load_endianness`."""
    states = {"m.pt": STATE, "s.pt": {"set": {1}, **STATE}}
    files = {name: torch_bytes(state).replace(b"/byteorder", b"/byteorde_") for name, state in states.items()}
    commit(tmp_path, "a", files)
    endianness = torch.serialization.LoadEndianness
    try:
        for order in endianness:
            torch.serialization.set_default_load_endianness(order)
            expected = torch.load(io.BytesIO(files["m.pt"]))["a"]
            for name in files:
                assert torch.equal(async_ckpt.load(tmp_path / "a" / name)["a"], expected)
        torch.serialization.set_default_load_endianness(endianness[OTHER_ORDER.upper()])
        with pytest.raises(UnsupportedStateError, match="byte order"):
            async_ckpt.load(tmp_path / "a/m.pt", map_location="meta")
    finally:
        torch.serialization.set_default_load_endianness(None)


# torch's old format.


def legacy_bytes(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def test_an_intact_legacy_file_is_loaded(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        engine.create("t")
        engine.save_bytes(legacy_bytes(STATE), "old.pt")
        engine.commit("t").result(60)
        loaded = engine.load("t/old.pt")
        target = {name: torch.zeros(1000) for name in STATE}
        engine.load_into(target, "t/old.pt")
        for name, tensor in STATE.items():
            assert torch.equal(loaded[name], tensor) and torch.equal(target[name], tensor)
        with pytest.raises(UnsupportedStateError, match="cannot be mapped"):
            engine.load("t/old.pt", mmap=True)


def test_a_legacy_file_that_lies_about_its_storages(tmp_path: Path) -> None:
    data = legacy_bytes({"w": torch.arange(70_000)})
    at = data.index(b"J" + (70_000).to_bytes(4, "little"))
    commit(
        tmp_path, "a", {"m.pt": data[: at + 1] + (2**31 - 1).to_bytes(4, "little") + data[at + 5 :]}, format="opaque"
    )
    with pytest.raises(CorruptCheckpointError, match="larger than the file"):
        async_ckpt.load(tmp_path / "a/m.pt")
    commit(tmp_path, "b", {"m.pt": data[:400]}, format="opaque")
    with pytest.raises(CorruptCheckpointError):
        async_ckpt.load(tmp_path / "b/m.pt")


# torch's switches.


class Mine:
    """What the restricted unpickler refuses."""


@pytest.fixture
def needs_code(tmp_path: Path) -> Path:
    commit(tmp_path, "a", {"m.pt": torch_bytes({"mine": Mine(), "w": torch.ones(3)})})
    return tmp_path / "a/m.pt"


def outcome(load: Callable[[], Any]) -> str:
    try:
        load()
    except Exception as error:  # noqa: BLE001 - which one depends on who loads
        return "refused" if "weights" in str(error).lower() else repr(error)
    return "loaded"


@pytest.mark.filterwarnings("ignore:Environment variable")
@pytest.mark.parametrize("value", ["1", "true", "0", "no"])
@pytest.mark.parametrize("name", ["TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_the_environment_says_whether_code_runs(
    needs_code: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    target: dict[str, Any] = {"w": torch.zeros(3)}
    for options in ({}, {"weights_only": True}, {"weights_only": False}):
        expected = outcome(lambda options=options: torch.load(needs_code, **options))
        assert outcome(lambda options=options: async_ckpt.load(needs_code, **options)) == expected
        assert outcome(lambda options=options: async_ckpt.load(needs_code, mmap=True, **options)) == expected
        assert (
            outcome(lambda options=options: async_ckpt.load_into(target, needs_code, strict=False, **options))
            == expected
        )


def test_switches_that_contradict_each_other_are_refused(needs_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch, which raises RuntimeError for any file; the file is not called damaged."""
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")
    commit(needs_code.parent.parent, "b", {"m.pt": torch_bytes(STATE)})
    for path in (needs_code, needs_code.parent.parent / "b/m.pt"):
        for options in ({}, {"weights_only": True}, {"weights_only": False}):
            with pytest.raises(ConfigError, match="both set"):
                async_ckpt.load(path, **options)
            with pytest.raises(ConfigError, match="both set"):
                async_ckpt.load_into({}, path, strict=False, **options)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[AsyncCheckpointEngine]:
    with AsyncCheckpointEngine(tmp_path / "e", staging_bytes=1 << 20) as engine:
        engine.create("t")
        engine.save(STATE, "m.pt")
        engine.commit("t").result(60)
        yield engine


def test_mapping_by_default(engine: AsyncCheckpointEngine) -> None:
    def is_mapped(tensor: torch.Tensor) -> bool:
        with open("/proc/self/maps", encoding="ascii") as maps:
            ranges = [line.split("-", 1) for line in maps if "m.pt" in line]
        return any(int(low, 16) <= tensor.data_ptr() < int(rest.split(" ")[0], 16) for low, rest in ranges)

    assert not is_mapped(engine.load("t/m.pt")["a"])
    with config.patch({"load.mmap": True}):  # type: ignore[attr-defined]
        mapped = engine.load("t/m.pt")["a"]
        assert is_mapped(mapped)
        assert torch.equal(mapped, STATE["a"])
        assert not is_mapped(engine.load("t/m.pt", mmap=False)["a"])
        sparse = {"s": torch.eye(3).to_sparse()}
        engine.create("u")
        engine.save(sparse, "s.pt")
        engine.commit("u").result(60)
        assert torch.equal(engine.load("u/s.pt")["s"].to_dense(), torch.eye(3))
        target = {"s": torch.zeros(3, 3).to_sparse()}
        engine.load_into(target, "u/s.pt")
        assert torch.equal(target["s"].to_dense(), torch.eye(3))


def test_maps_that_would_write_into_the_checkpoint_are_refused(engine: AsyncCheckpointEngine) -> None:
    import mmap

    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        with pytest.raises(ConfigError, match="MAP_SHARED"):
            engine.load("t/m.pt", mmap=True)
        assert torch.equal(engine.load("t/m.pt")["a"], STATE["a"])


def test_skipped_data_is_refused(engine: AsyncCheckpointEngine) -> None:
    engine.create("u")
    with torch.serialization.skip_data():
        with pytest.raises(ConfigError, match="skip_data"):
            engine.load("t/m.pt")
        with pytest.raises(ConfigError, match="skip_data"):
            engine.load_into({"a": torch.zeros(1000)}, "t/m.pt", strict=False)
        with pytest.raises(ConfigError, match="skip_data"):
            engine.save(STATE, "m.pt")
    engine.save(STATE, "m.pt")
    engine.commit("u").result(60)


def test_checksums_cannot_be_left_out(engine: AsyncCheckpointEngine) -> None:
    engine.create("u")
    with config.patch({"save.compute_crc32": False}), pytest.raises(ConfigError, match="compute_crc32"):  # type: ignore[attr-defined]
        engine.save(STATE, "m.pt")
    engine.save(STATE, "m.pt")
    engine.commit("u").result(60)


def test_a_default_device_and_fake_tensors(engine: AsyncCheckpointEngine) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with torch.device("meta"):
        assert torch.equal(engine.load("t/m.pt")["a"], STATE["a"])
        done = engine.load_into({}, "t/m.pt", strict=False)
        assert done.state["a"].device.type == "cpu"
    assert torch.equal(done.state["a"], STATE["a"])
    with FakeTensorMode():
        loaded = engine.load("t/m.pt")["a"]
        assert isinstance(loaded, FakeTensor) and loaded.shape == (1000,)
