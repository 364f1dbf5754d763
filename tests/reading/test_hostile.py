"""Crafted files are errors, in bounded time and memory, and their words do not reach a terminal as they are."""

from __future__ import annotations

import io
import random
import resource
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import async_ckpt
from async_ckpt import Catalog, CheckpointError, CorruptCheckpointError, StateMismatchError, UnsupportedStateError

from ..support.comparing import torch_bytes
from .committed import commit
from .states import plain, torch_only

STATE = {"w": torch.arange(1000.0), "x": torch.ones(3)}
ESCAPE = b"\x1b[31m"


@pytest.mark.wide
def test_names_of_records_are_escaped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = torch_bytes(STATE).replace(b"archive/data/0", b"archive/" + ESCAPE + b"/")
    commit(tmp_path, "a", {"m.pt": data})
    with pytest.raises(CheckpointError) as caught:
        async_ckpt.load(tmp_path / "a/m.pt")
    assert str(caught.value).isprintable()
    # Damage in that very record: verify, latest and load name it.
    at = data.index(ESCAPE) + 200
    (tmp_path / "a/m.pt").write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    (problem,) = Catalog(tmp_path).verify("a").problems
    assert problem.record is not None and "\\x1b[31m" in problem.record
    assert str(problem).isprintable()
    assert Catalog(tmp_path).latest() is None
    assert all(record.getMessage().isprintable() for record in caplog.records)
    with pytest.raises(CorruptCheckpointError) as damaged:
        async_ckpt.load(tmp_path / "a/m.pt")
    assert str(damaged.value).isprintable() and (damaged.value.record or "").isprintable()


@pytest.mark.parametrize("name", [b"evil" + ESCAPE, "evil\u202e".encode()])
def test_names_in_pickles_are_escaped(tmp_path: Path, name: bytes) -> None:
    pickled = torch_bytes(argument := {"o": Mine()})
    assert b"Mine" in pickled and argument
    commit(tmp_path, "a", {"m.pt": pickled.replace(b"Mine\n", name[: len(b"Mine")] + b"\n")})
    with pytest.raises(CheckpointError) as caught:
        async_ckpt.load(tmp_path / "a/m.pt")
    assert str(caught.value).isprintable()


class Mine:
    """No class that is loaded by default."""


def test_a_place_that_nobody_knows_is_no_bare_error(tmp_path: Path) -> None:
    data = torch_bytes(STATE).replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00xyz")
    commit(tmp_path, "a", {"m.pt": data})
    with pytest.raises(CorruptCheckpointError):
        async_ckpt.load(tmp_path / "a/m.pt")


@pytest.mark.parametrize("place", [b"mps", b"hpu"])
def test_a_place_that_is_not_here_is_said_so(tmp_path: Path, place: bytes) -> None:
    commit(tmp_path, "a", {"m.pt": torch_bytes(STATE).replace(b"X\x03\0\0\0cpu", b"X\x03\0\0\0" + place)})
    with pytest.raises(CheckpointError, match="map_location"):
        async_ckpt.load(tmp_path / "a/m.pt")
    assert torch.equal(async_ckpt.load(tmp_path / "a/m.pt", map_location="cpu")["x"], STATE["x"])


def test_no_device_at_all_is_damage(tmp_path: Path) -> None:
    data = torch_bytes({"d": torch.device("cpu"), "s": {1}})
    commit(tmp_path, "a", {"m.pt": data.replace(b"X\x03\0\0\0cpu", b"X\x03\0\0\0zzz")})
    for load in (async_ckpt.load, mapped, by_callable):
        with pytest.raises(CorruptCheckpointError, match="device string"):
            load(tmp_path / "a/m.pt")


@pytest.mark.parametrize("other", [{}, {"s": {1}}], ids=["plain", "for torch"])
def test_a_storage_is_as_long_as_its_record(tmp_path: Path, other: Any) -> None:
    """Mapped, a longer one would hold the bytes behind its record."""
    data = torch_bytes({"x": torch.ones(3), **other})
    commit(tmp_path, "a", {"m.pt": data.replace(b"K\x03t", b"K\x08t").replace(b"K\x03\x85", b"K\x08\x85")})
    for load in (async_ckpt.load, mapped, by_callable, on_meta, in_place):
        with pytest.raises(CorruptCheckpointError, match="needs 32 bytes of record 'data/0', which holds 12"):
            load(tmp_path / "a/m.pt")


@pytest.mark.parametrize("what", ["a tensor", "one of two names", "a storage"])
def test_a_legacy_file_holds_what_it_names(tmp_path: Path, what: str) -> None:
    """torch makes room for as much as is named before it looks at the file."""
    weight, buffer = torch.ones(70_000), io.BytesIO()
    torch.save([weight[:2], weight], buffer, _use_new_zipfile_serialization=False)
    ones = b"J" + (70_000).to_bytes(4, "little")
    huge = b"J" + (1 << 30).to_bytes(4, "little")
    end, said = {
        "a tensor": (b"\x85", "outside its record"),
        "one of two names": (b"N", "which holds"),
        "a storage": (b"N", "larger than the file"),
    }[what]
    data = buffer.getvalue()
    assert data.count(ones + b"\x85") == 1 and data.count(ones + b"N") == 2
    commit(tmp_path, "a", {"m.pt": data.replace(ones + end, huge + end, 1 if what == "one of two names" else -1)})
    for load in (async_ckpt.load, by_callable, in_place):
        with pytest.raises(CorruptCheckpointError, match=said):
            load(tmp_path / "a/m.pt")


def test_elements_of_a_sparse_tensor_lie_inside_it(tmp_path: Path) -> None:
    """What computes with others reads and writes foreign memory."""
    indices = torch.tensor([[7_777_777]])
    data = torch_bytes({"s": torch.sparse_coo_tensor(indices, torch.ones(1), (10_000_000,))})
    outside = data.replace((7_777_777).to_bytes(8, "little"), (77_777_777).to_bytes(8, "little"))
    commit(tmp_path, "a", {"m.pt": data, "outside.pt": outside})
    for load in (async_ckpt.load, mapped, by_callable):
        assert load(tmp_path / "a/m.pt")["s"]._indices() == 7_777_777
        with pytest.raises(CorruptCheckpointError):
            load(tmp_path / "a/outside.pt")
    assert on_meta(tmp_path / "a/m.pt")["s"].is_meta


def test_a_parameter_of_whole_numbers_has_no_gradient(tmp_path: Path) -> None:
    data = torch_bytes({"p": torch.nn.Parameter(torch.ones(3).half())})
    data = data.replace(b"HalfStorage", b"CharStorage").replace(b"K\x03t", b"K\x06t")
    commit(tmp_path, "a", {"m.pt": data})
    for target in ({}, {"p": torch.zeros(3, dtype=torch.int8)}):
        with pytest.raises(CorruptCheckpointError, match="gradient"):
            async_ckpt.load_into(target, tmp_path / "a/m.pt", strict=False)


def test_an_attribute_of_a_file_may_have_a_methods_name(tmp_path: Path) -> None:
    state = OrderedDict(w=torch.ones(3))
    vars(state).update(kexs=1, itexs=2, valxes=3)
    data = torch_bytes(state).replace(b"kexs", b"keys").replace(b"itexs", b"items").replace(b"valxes", b"values")
    commit(tmp_path, "a", {"m.pt": data})
    assert vars(async_ckpt.load(tmp_path / "a/m.pt"))["items"] == 2
    target = {"w": torch.zeros(3)}
    async_ckpt.load_into(target, tmp_path / "a/m.pt")
    assert target["w"].eq(1).all()


@pytest.mark.parametrize(
    "key", [b"[" * 100_000, ("[" * 100_000, 1), "['" * 50_000 + '"'], ids=lambda k: type(k).__name__
)
def test_names_are_taken_apart_in_linear_time(tmp_path: Path, key: Any) -> None:
    commit(tmp_path, "a", {"m.pt": torch_bytes({key: torch.ones(2)})})
    started = time.process_time()
    with pytest.raises(StateMismatchError) as caught:
        async_ckpt.load_into({}, tmp_path / "a/m.pt", select="none")
    assert time.process_time() - started < 5 and len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "key", [1 << 20_000, (1 << 20_000, "a"), b"\x1b[31m", "\x1b[31m\ud800"], ids=lambda k: type(k).__name__
)
def test_keys_of_every_kind_can_be_named(tmp_path: Path, key: Any) -> None:
    state = {key: torch.ones(2)}
    commit(tmp_path, "a", {"m.pt": torch_bytes(state)})
    target = {key: torch.zeros(2)}
    async_ckpt.load_into(target, tmp_path / "a/m.pt")
    assert torch.equal(target[key], torch.ones(2))
    for options in ({}, {"select": "none"}):
        with pytest.raises(StateMismatchError) as caught:
            async_ckpt.load_into({}, tmp_path / "a/m.pt", **options)
        assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["shared lists", "long key"])
def test_key_paths_cannot_be_made_to_blow_up(tmp_path: Path, kind: str) -> None:
    state: Any = [torch.ones(1)]
    if kind == "shared lists":
        for _ in range(60):
            state = [state, state]
    else:
        state = {"k" * 1_000_000: [0] * 300_000, "w": torch.ones(1)}
    commit(tmp_path, "a", {"m.pt": torch_bytes(state)})
    weight = torch.zeros(1)
    started = time.process_time()
    with pytest.raises(UnsupportedStateError, match="too often"):
        async_ckpt.load_into({"w": weight}, tmp_path / "a/m.pt", strict=False)
    assert time.process_time() - started < 20
    assert weight.eq(0).all()


def by_callable(path: Path) -> Any:
    return async_ckpt.load(path, map_location=lambda storage, location: storage)


def mapped(path: Path) -> Any:
    return async_ckpt.load(path, mmap=True)


def on_meta(path: Path) -> Any:
    return async_ckpt.load(path, map_location="meta")


def in_place(path: Path) -> Any:
    return async_ckpt.load_into({"w": torch.zeros(1000)}, path, strict=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [plain, torch_only, lambda: STATE], ids=["plain", "torch only", "small"])
def test_mutants_are_loaded_or_refused(tmp_path: Path, make: Callable[[], Any]) -> None:
    """Every CRC of the manifest is right: only what the file says is wrong. A bound on time and memory for each."""
    chance = random.Random(7)
    data = torch_bytes(make())
    interesting = [at for at in range(len(data)) if data[at : at + 1] != b"Z"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(400):
        mutant = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            mutant[chance.choice(interesting)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        commit(tmp_path, f"t{number}", {"m.pt": bytes(mutant)})
        started = time.process_time()
        for load in (async_ckpt.load, mapped, by_callable, in_place):
            try:
                load(tmp_path / f"t{number}/m.pt")
            except CheckpointError as error:
                assert str(error).isprintable()
        assert time.process_time() - started < 10
        (tmp_path / f"t{number}/m.pt").unlink()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20
