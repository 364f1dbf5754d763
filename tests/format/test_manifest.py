"""Names and the manifest: what is accepted, what is refused, and that no byte can change unseen."""

from __future__ import annotations

import contextlib
import json
import math
import time
from enum import Enum, IntEnum
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsafePathError, UnsupportedStateError
from async_ckpt.format import manifest
from async_ckpt.format.checksum import crc32
from async_ckpt.format.manifest import FileEntry, Manifest, ManifestBudget, decode, encode
from async_ckpt.format.metadata import check_metadata
from async_ckpt.format.names import check_relative_path, check_tag
from async_ckpt.reading.committed import find_extra
from async_ckpt.storage.filesystem import FileSystem

SAMPLE = Manifest(
    "step-1",
    1_700_000_000_000_000_000,
    (
        FileEntry("a/b.pt", 10, 4, (1, 2, 0xFFFFFFFF), "torch", "fast", "abc"),
        FileEntry("empty", 0, 4096, (), "opaque", "", None, 3),
    ),
    {"loss": 2.5, "nested": [1, {'quote"d': "[[{\\\\", "none": None}], "big": 2**70},
    {"torch": "2.13"},
)


def sealed(document: object) -> bytes:
    """`document` with a checksum that matches: a file made by hand, not an accident."""
    body = json.dumps(document).rstrip()[:-1].encode()
    return seal(body)


def seal(body: bytes) -> bytes:
    return body + b',"crc32":"%08x"}\n' % crc32(body)


def as_document() -> dict[str, object]:
    document = json.loads(encode(SAMPLE))
    del document["crc32"]
    return document


@pytest.mark.wide
def test_round_trip_and_plain_json() -> None:
    raw = encode(SAMPLE)
    assert decode(raw, source="x") == SAMPLE
    assert decode(sealed(as_document()), source="x") == SAMPLE
    assert json.loads(raw)["metadata"]["loss"] == 2.5


def test_every_flipped_missing_or_extra_byte_is_found() -> None:
    raw = encode(SAMPLE)
    for at in range(len(raw)):
        for mask in (1, 0x20, 0x80):
            bad = raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :]
            with pytest.raises(CorruptCheckpointError):
                decode(bad, source="x")
        for bad in (raw[:at], raw[:at] + raw[at + 1 :], raw[:at] + b" " + raw[at:]):
            with pytest.raises(CorruptCheckpointError):
                decode(bad, source="x")
    with pytest.raises(CorruptCheckpointError):
        decode(raw + b"\n", source="x")


def hostile_entry(**changes: object) -> bytes:
    document = as_document()
    document["files"] = [{**document["files"][0], **changes}]  # type: ignore[index]
    return sealed(document)


HOSTILE = {
    "not json": seal(b"{hello"),
    "list": seal(b"[1"),
    "deep list": seal(b'{"format":"async-ckpt","x":' + b"[" * 100_000 + b"]" * 100_000),
    "deep dict": seal(b'{"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep in strings": seal(b'{"x":"\\\\","y":' + b"[" * 500 + b"]" * 500 + b',"z":"\\"'),
    "many items": seal(b'{"x":[' + b"1," * 3_000_000 + b"1]"),
    "huge int": seal(b'{"format":"async-ckpt","x":' + b"9" * 100_000),
    "huge float": seal(b'{"format":"async-ckpt","x":1e999'),
    "long float": seal(b'{"format":"async-ckpt","x":0.' + b"1" * 1_000_000),
    "nan": seal(b'{"format":"async-ckpt","x":NaN'),
    "duplicate key": seal(b'{"format":"async-ckpt","format":"async-ckpt"'),
    "not utf-8": seal(b'{"format":"\xff"'),
    "too long": b" " * (manifest.MAX_MANIFEST_BYTES + 1),
    "missing member": seal(b'{"format":"async-ckpt","format_version":1'),
    "bool version": sealed({**as_document(), "format_version": True}),
    "bad attempt": sealed({**as_document(), "attempt": "../0123456789abc"}),
    "bad tag": sealed({**as_document(), "tag": "../x"}),
    "tag is a list": sealed({**as_document(), "tag": ["x"]}),
    "files is a dict": sealed({**as_document(), "files": {}}),
    "files of ints": sealed({**as_document(), "files": [1]}),
    "metadata is a list": sealed({**as_document(), "metadata": []}),
    "writer of ints": sealed({**as_document(), "writer": {"a": 1}}),
    "negative time": sealed({**as_document(), "created_unix_ns": -1}),
    "path up": hostile_entry(path="../x"),
    "path absolute": hostile_entry(path="/etc/passwd"),
    "path nul": hostile_entry(path="a\0b"),
    "path manifest": hostile_entry(path="manifest.json"),
    "path number": hostile_entry(path=1),
    "size lies": hostile_entry(size_bytes=1 << 62),
    "size negative": hostile_entry(size_bytes=-1),
    "size float": hostile_entry(size_bytes=10.0),
    "size too big": hostile_entry(size_bytes=1 << 70),
    "extent zero": hostile_entry(extent_bytes=0),
    "crc short": hostile_entry(extent_crc32="00"),
    "crc upper": hostile_entry(extent_crc32="0000000100000002FFFFFFFF"),
    "crc list": hostile_entry(extent_crc32=[1, 2, 3]),
    "format": hostile_entry(format="pickle"),
    "format list": hostile_entry(format=[]),
    "planner": hostile_entry(planner="x" * 1000),
    "rank": hostile_entry(rank=-1),
    "twice": sealed({**as_document(), "files": [as_document()["files"][0]] * 2}),  # type: ignore[index]
    "file below file": sealed(
        {**as_document(), "files": [{**as_document()["files"][0], "path": p} for p in ("a", "a/b")]}  # type: ignore[index]
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_are_refused_fast(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(CorruptCheckpointError) as caught:
        decode(HOSTILE[name], source="here/manifest.json")
    assert time.monotonic() - started < 5
    assert "here/manifest.json" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.wide
def test_deep_paths_take_no_time_and_no_memory(tmp_path: Path) -> None:
    """Neither in a manifest, nor where what lies beside its files is looked for."""
    files = [FileEntry(f"{k}/" + "a/" * 60 + "b", 0, 1, (), "opaque", "", None) for k in range(5000)]
    started = time.thread_time()
    raw = encode(Manifest("t", 1, tuple(files)))
    (tmp_path / "7/a").mkdir(parents=True)
    for name in ("7/mine", "7/a/b", "8"):
        (tmp_path / name).write_bytes(b"")
    with contextlib.closing(FileSystem().open_dir(str(tmp_path))) as directory:
        assert find_extra(directory, decode(raw, source="m")) == (["7/a/b", "7/mine", "8"], [])
    assert time.thread_time() - started < 5
    for path in ("a/" * 64 + "b", "a/" * 500 + "b"):
        with pytest.raises(UnsafePathError, match="64 components"):
            check_relative_path(path, stored=True)


def test_other_versions_are_refused_with_the_way_out() -> None:
    with pytest.raises(CorruptCheckpointError, match=r"format_version '2'.*newer release"):
        decode(sealed({**as_document(), "format_version": 2}), source="x")


def test_unknown_members_are_ignored() -> None:
    assert decode(sealed({**as_document(), "later": {"more": 1}}), source="x") == SAMPLE


class Color(str, Enum):
    RED = "red"


class Level(IntEnum):
    LOW = 1


def test_metadata_becomes_plain_and_independent() -> None:
    given_list = [1]
    plain = check_metadata({"a": given_list, "t": (1, 2), "e": Color.RED, "i": Level.LOW, "f": 1.5, "b": True})
    given_list.append(2)
    assert plain == {"a": [1], "t": [1, 2], "e": "red", "i": 1, "f": 1.5, "b": True}
    assert type(plain["i"]) is int
    assert type(plain["e"]) is str
    assert check_metadata(None) == {}


class Scalar:
    def item(self) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("metadata", "where"),
    [
        ({"a": {"b": [0, object()]}}, r"metadata\['a'\]\['b'\]\[1\]"),
        ({1: 2}, "keys are str"),
        ({"x": b"bytes"}, "bytes"),
        ({"x": {1, 2}}, "set"),
        ({"x": Scalar()}, r"\.item\(\)"),
        ({"x": 10**100}, "digits"),
        ([1], "mapping"),
    ],
)
def test_bad_metadata_names_the_field(metadata: object, where: str) -> None:
    with pytest.raises(UnsupportedStateError, match=where):
        check_metadata(metadata)  # type: ignore[arg-type]


def test_numbers_that_json_cannot_hold_are_null_and_the_manifest_says_so() -> None:
    """Also beside a user's key of any name."""
    given = {"loss": math.nan, "eval": {"bound": [1.0, -math.inf]}, "lr": 0.1, "_not_finite": "mine", "not_finite": 1}
    plain = check_metadata(given)
    assert math.isnan(plain["loss"]) and plain["eval"] == given["eval"]
    found = decode(encode(Manifest("t", 1, (), plain)), source="m")
    assert found.not_finite == {"metadata['loss']": "nan", "metadata['eval']['bound'][1]": "-inf"}
    assert found.metadata == {**given, "loss": None, "eval": {"bound": [1.0, None]}}
    assert decode(encode(found), source="m") == found


def test_what_will_not_fit_is_refused_while_the_checkpoint_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget never accepts what `encode` would refuse, and refuses no more than a small part of what would fit."""
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 200_000)
    budget, entries = ManifestBudget(), []
    with pytest.raises(UnsupportedStateError, match="larger chunk_bytes"):
        budget.add_file("huge.pt", 4096 * 25_000, 4096)
    with contextlib.suppress(UnsupportedStateError):
        for k in range(10_000):
            budget.add_file(path := f"größe/{k}.pt", 10 * 4096, 4096)
            entries.append(FileEntry(path, 10 * 4096, 4096, (1,) * 10, "safetensors", "safetensors", "0" * 64, 12345))
    assert len(entries) < 10_000
    raw = encode(Manifest("t" * 128, 1 << 62, tuple(entries), {}, {"async_ckpt": "0.1"}))
    assert len(raw) > 80_000
    budget.check_metadata({"step": 1})
    with pytest.raises(UnsupportedStateError, match="metadata"):
        budget.check_metadata({"x": "y" * 200_000})
    with pytest.raises(UnsupportedStateError, match="items"):
        ManifestBudget().check_metadata({"x": "," * 3_000_000})


def test_cyclic_metadata_ends() -> None:
    cycle: dict[str, object] = {}
    cycle["self"] = cycle
    with pytest.raises(UnsupportedStateError, match="nested"):
        check_metadata(cycle)


def test_what_readers_would_refuse_is_not_encoded() -> None:
    with pytest.raises(CheckpointError):
        encode(Manifest("t", 1, (), {"x": "y" * (manifest.MAX_MANIFEST_BYTES + 1)}))
    with pytest.raises(CheckpointError, match="too many items"):
        encode(Manifest("t", 1, (), {"x": "," * 3_000_000}))
    for why, entries in (
        ("twice", (("a", (1,)), ("b", (1,)), ("a", (1,)))),
        ("below another", (("a", (1,)), ("a-", (1,)), ("a/b", (1,)))),
        ("2 checksums for 1 extents", (("a", (1, 2)),)),
    ):
        files = tuple(FileEntry(path, 10, 4096, crcs, "opaque", "test", None) for path, crcs in entries)
        with pytest.raises(CheckpointError, match=why):
            encode(Manifest("t", 1, files))


# --- names ---


@pytest.mark.wide
@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_accepted_names_are_harmless(text: str) -> None:
    for check in (check_tag, check_relative_path):
        refusal = ""
        try:
            check(text)
        except UnsafePathError as error:
            refusal = str(error)
        if refusal:
            assert refusal.isascii()
            assert refusal.isprintable()
            assert len(refusal) < 2000
            continue
        assert text.isascii()
        assert text.isprintable()
        # The one name with a leading dot: torch.distributed.checkpoint calls its index so.
        assert not text.startswith((".", "/", " ")) or (check is check_relative_path and text == ".metadata")
        assert all(part not in ("", ".", "..") and len(part) <= 200 for part in text.split("/"))
        assert check is check_relative_path or "/" not in text


@given(st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9._+=@, -]{0,60}[A-Za-z0-9._+=@-])?", fullmatch=True))
def test_the_documented_alphabet_is_accepted(name: str) -> None:
    assert check_tag(name) == name
    assert check_relative_path(f"sub/{name}") == ("sub", name)


@pytest.mark.parametrize("name", ["manifest.json", "MANIFEST.JSON", "Manifest.Json"])
def test_the_manifests_name_is_refused_everywhere(name: str) -> None:
    for path in (name, f"sub/{name}", f"{name}/sub", f"a/{name}/b"):
        for carried in (False, True):
            with pytest.raises(UnsafePathError, match="own"):
                check_relative_path(path, carried=carried)
    with pytest.raises(UnsafePathError, match="another tag"):
        check_tag(name)
    # What an earlier version has committed stays readable.
    assert check_relative_path(f"sub/{name}", stored=True) == ("sub", name)
    entry = FileEntry(f"sub/{name}", 0, 1, (), "opaque", "test", None)
    manifest = Manifest("t", 1, (entry,), {}, {})
    assert decode(encode(manifest), source="m") == manifest


@pytest.mark.parametrize("name", [".gitattributes", "notes (1).txt", "größe.txt", ".a/b", "~x", "a&b;c"])
def test_names_of_other_tools_are_carried_but_not_made(name: str) -> None:
    with pytest.raises(UnsafePathError):
        check_relative_path(name)
    assert "/".join(check_relative_path(name, stored=True)) == name
    manifest = Manifest("t", 1, (FileEntry(name, 0, 1, (), "opaque", "test", None),), {}, {})
    assert decode(encode(manifest), source="m") == manifest


BAD_FOREIGN = [
    "",
    ".",
    "..",
    "a//b",
    "/a",
    "a/..",
    "a\nb",
    "a\x00b",
    "a\u202eb",
    "\ud800",
    "x" * 201,
    "ü" * 101,
    ".part.0.json",
]


@pytest.mark.parametrize("name", [*BAD_FOREIGN, "a\u200bb", "manifest.json"])
def test_bad_names_of_other_tools(name: str) -> None:
    with pytest.raises(UnsafePathError) as caught:
        check_relative_path(name, stored=True)
    assert str(caught.value).isascii() and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "bad", [None, 1, b"bytes", "manifest.json", "MANIFEST.json/x", "a//b", "a/", "/a", "a/../b", "a/./b", "x" * 1025]
)
def test_bad_paths(bad: object) -> None:
    with pytest.raises(UnsafePathError):
        check_relative_path(bad)  # type: ignore[arg-type]
