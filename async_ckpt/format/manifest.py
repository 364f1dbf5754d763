"""The manifest: what one committed checkpoint consists of. No I/O.

A committed checkpoint is a directory `<root>/<tag>` with a regular file `manifest.json` at its top. The manifest is
one JSON object in ASCII, with these members:

- "format": "async-ckpt"; "format_version": 1. Readers refuse other versions and ignore members they do not know.
- "tag": the name it was committed under; "created_unix_ns": time of the commit, the order among checkpoints.
- "metadata": what the user gave to `commit`, NaN and infinities as null; "not_finite" (or nothing): what those were,
  by where they stand (`"metadata['loss']": "nan"`).
- "timing" (or nothing): seconds that the checkpoint took, "stall_s" of the training thread and "durable_s" from the
  first `save` until every file was synced; "writer": names and versions of the software that wrote it, and
  "clock_unix_ns", what its clock said.
- "files": one object per file. "path" (relative, "/" between components), "size_bytes", "format" ("torch",
  "safetensors" or "opaque"), "planner", "plan_hash" and "rank" (or null: one process alone, or several together).
  "extent_bytes" cuts the file into extents of that length, the last one shorter; "extent_crc32" is one string of 8
  lower-case hex digits (CRC-32) for each.
  "shared_bytes" (or nothing): how many of its bytes were not written, but shared with an older file.
- "attempt" (or nothing): the folder beside the manifest in which a mirror has put the files, 16 hex digits.
- "crc32", always last: 8 lower-case hex digits, the CRC-32 of every byte of the file before the text
  `,"crc32":"`. After the digits come exactly `"}` and a newline. So each flipped, missing or extra byte is found.

Names that are not committed checkpoints begin with a dot, which no tag does: `.staging.<tag>.<owner>.<n>` is being
written, `.trash.<tag>.<owner>.<n>` is being deleted, `.aside.<tag>.<owner>.<n>` is an old checkpoint set aside for
the moment of its replacement, on file systems that cannot exchange two names. <owner> is described in
`host/process.py`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import CheckpointError, CorruptCheckpointError, UnsupportedStateError
from .checksum import crc32
from .metadata import JSON, MAX_INT_DIGITS, check_metadata, unique_pairs
from .names import check_relative_path, check_tag, shown

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 32 << 20
CLOCK_KEY = "clock_unix_ns"
"""In "writer": what the clock said when the manifest was written, which "created_unix_ns" need not be."""

_MAX_DEPTH = 40
_MAX_ITEMS = 2_000_000
# At most, of one file's entry without its path and checksums, and of all that is no file and no metadata.
_ENTRY_BYTES, _ENTRY_ITEMS = 600, 40
_OTHER_BYTES, _OTHER_ITEMS = 4096, 200
MAX_FILES_BYTES = MAX_MANIFEST_BYTES - 2 * _OTHER_BYTES
"""What the files of all ranks may take of a manifest, metadata not counted."""
_MAX_FILE_BYTES = (1 << 63) - 1
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_TAIL = re.compile(rb',"crc32":"([0-9a-f]{8})"\}\n')
_TAIL_BYTES = len(',"crc32":"00000000"}\n')

FileFormat = Literal["torch", "safetensors", "opaque"]


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint; `extent_crc32[i]` covers bytes [i * extent_bytes, (i + 1) * extent_bytes)."""

    path: str
    size_bytes: int
    extent_bytes: int
    extent_crc32: tuple[int, ...]
    format: FileFormat
    planner: str
    plan_hash: str | None
    rank: int | None = None
    shared_bytes: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """The components of `path`."""
        return tuple(self.path.split("/"))


@dataclass(frozen=True)
class Manifest:
    """One checkpoint's contents."""

    tag: str
    created_unix_ns: int
    files: tuple[FileEntry, ...]
    metadata: Mapping[str, JSON] = field(default_factory=dict)
    writer: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    timing: Mapping[str, float] = field(default_factory=dict)
    not_finite: Mapping[str, str] = field(default_factory=dict)
    """What numbers in `metadata` were that JSON cannot hold and that are None there, by where they stand."""
    attempt: str = ""
    """The folder beside the manifest that the files lie in, in a mirror or a copy of one; empty: right beside it."""

    @property
    def size_bytes(self) -> int:
        """Sum over all files, without the manifest."""
        return sum(entry.size_bytes for entry in self.files)

    @property
    def shared_bytes(self) -> int:
        """What of that was not written, but shared with older files."""
        return sum(entry.shared_bytes for entry in self.files)

    def file(self, path: str) -> FileEntry | None:
        """The entry of `path`, or None."""
        return next((entry for entry in self.files if entry.path == path), None)


@dataclass
class ManifestBudget:
    """How much of a manifest's limits a checkpoint takes while it is being filled. Pure arithmetic; one thread at a
    time."""

    num_bytes: int = _OTHER_BYTES
    num_items: int = _OTHER_ITEMS

    def add_file(self, path: str, size_bytes: int, extent_bytes: int) -> int:
        """Count a file in, before its bytes are written; returns its part of `MAX_FILES_BYTES`, which files of other
        ranks take from too. Raises UnsupportedStateError: the manifest could not hold it; the file is not counted."""
        more_bytes = _ENTRY_BYTES + len(json.dumps(path)) + 8 * -(-size_bytes // extent_bytes)
        advice = "use larger chunk_bytes or fewer files. Nothing of this file was written"
        self.num_bytes, self.num_items = self._with(repr(path), more_bytes, _ENTRY_ITEMS, advice)
        return max(more_bytes, -(-_ENTRY_ITEMS * MAX_MANIFEST_BYTES // _MAX_ITEMS))

    def check_metadata(self, metadata: Mapping[str, JSON]) -> None:
        """Refuse metadata that does not fit beside the files. Raises UnsupportedStateError: the manifest could not hold
        it."""
        not_finite: dict[str, str] = {}
        raw = json.dumps([check_metadata(metadata, not_finite), not_finite]).encode("ascii")
        self._with("the metadata", len(raw), _count_items(raw), "give less. The checkpoint stays open")

    def _with(self, what: str, more_bytes: int, more_items: int, advice: str) -> tuple[int, int]:
        num_bytes, num_items = self.num_bytes + more_bytes, self.num_items + more_items
        if num_bytes > MAX_MANIFEST_BYTES or num_items > _MAX_ITEMS:
            raise UnsupportedStateError(
                f"{what} does not fit: with it, the checkpoint's manifest would have {num_bytes} bytes and {num_items} "
                f"items (at most {MAX_MANIFEST_BYTES} and {_MAX_ITEMS}); {advice}"
            )
        return num_bytes, num_items


def _count_items(raw: bytes) -> int:
    return sum(raw.count(char) for char in (b",", b'"', b"[", b"{"))


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`. Raises UnsupportedStateError: metadata that is not JSON, with the field named.
    CheckpointError: readers would refuse it for its size, or for files that contradict each other or themselves."""
    not_finite = dict(manifest.not_finite)
    metadata = check_metadata(manifest.metadata, not_finite)
    document = {
        "format": "async-ckpt",
        "format_version": manifest.format_version,
        "tag": manifest.tag,
        "created_unix_ns": manifest.created_unix_ns,
        "metadata": metadata,
        **({"not_finite": not_finite} if not_finite else {}),
        **({"timing": dict(manifest.timing)} if manifest.timing else {}),
        "writer": dict(manifest.writer),
        "files": [
            {name: value for name, value in vars(entry).items() if name != "shared_bytes" or value}
            | {"extent_crc32": struct.pack(f">{len(entry.extent_crc32)}I", *entry.extent_crc32).hex()}
            for entry in manifest.files
        ],
    }
    body = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))[:-1].encode("ascii")
    raw = body + f',"crc32":"{crc32(body):08x}"}}\n'.encode("ascii")
    # What readers would refuse must not be committed.
    if problem := _excess(raw) or _disorder(manifest.files):
        raise CheckpointError(
            f"the manifest of tag {manifest.tag!r} would not be readable, nothing was committed: {problem}. Use larger "
            "chunk_bytes, fewer files or less metadata"
        )
    return raw


def decode(raw: bytes, *, source: str) -> Manifest:
    """The manifest in `raw`, fully checked, in bounded time and memory; `source` is named in errors. Raises
    CorruptCheckpointError: anything about it is not as `encode` writes it, or the version is unknown."""
    document = _parse(raw, source)
    try:
        files = tuple(_entry_from(item, index) for index, item in enumerate(_typed(document["files"], list, "files")))
        if problem := _disorder(files):
            raise ValueError(problem)
        metadata = _typed(document["metadata"], dict, "metadata")
        writer = _typed(document["writer"], dict, "writer")
        not_finite = _typed(document.get("not_finite", {}), dict, "not_finite")
        if not all(isinstance(value, str) for value in (*writer.values(), *not_finite.values())):
            raise ValueError("writer or not_finite holds something that is not a string")
        created = _bounded(document["created_unix_ns"], _MAX_FILE_BYTES, "created_unix_ns")
        timing = _typed(document.get("timing", {}), dict, "timing")
        if not all(isinstance(value, float) and value >= 0 for value in timing.values()):
            raise ValueError("timing holds something that is not a number of seconds")
        attempt = _typed(document.get("attempt", ""), str, "attempt")
        if attempt and not re.fullmatch("[0-9a-f]{16}", attempt):
            raise ValueError("attempt is not 16 hex digits")
        tag = check_tag(document["tag"])
        return Manifest(tag, created, files, metadata, writer, FORMAT_VERSION, timing, not_finite, attempt)
    except (KeyError, TypeError, ValueError) as error:
        what = f"member {error} is missing" if isinstance(error, KeyError) else str(error)
        raise CorruptCheckpointError(f"{source} is not a valid manifest: {what}", path=source) from error


def _parse(raw: bytes, source: str) -> dict[str, Any]:
    def corrupt(why: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{source} is damaged: {why}", path=source)

    if problem := _excess(raw):
        raise corrupt(problem)
    tail = _TAIL.fullmatch(raw[-_TAIL_BYTES:]) if len(raw) > _TAIL_BYTES else None
    if tail is None:
        raise corrupt("it does not end in its checksum")
    if int(tail[1], 16) != crc32(raw[:-_TAIL_BYTES]):
        raise corrupt("its checksum does not match")
    # The checksum keeps accidents out; from here on it is about files made by hand.
    outside_strings = raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    brackets = b"".join(outside_strings).translate(None, _NOT_BRACKETS)
    if max(itertools.accumulate(1 if char in b"[{" else -1 for char in brackets), default=0) > _MAX_DEPTH:
        raise corrupt("it is nested too deeply")
    try:
        document = json.loads(
            raw.decode("ascii"),
            object_pairs_hook=unique_pairs,
            parse_int=_bounded_int,
            parse_float=_finite_float,
            parse_constant=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        raise corrupt(str(error)) from error
    if not isinstance(document, dict) or document.get("format") != "async-ckpt":
        raise corrupt("it is not an async-ckpt manifest")
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CorruptCheckpointError(
            f"{source} has format_version {shown(str(version))}; this release reads {FORMAT_VERSION}: use a "
            "newer release",
            path=source,
        )
    return document


def _bounded_int(text: str) -> int:
    if len(text) > MAX_INT_DIGITS + 1:
        raise ValueError("a number has too many digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text) if len(text) <= 64 else math.inf
    if not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def _entry_from(item: Any, index: int) -> FileEntry:
    where = f"files[{index}]"
    _typed(item, dict, where)
    path = _typed(item["path"], str, f"{where}.path")
    check_relative_path(path, stored=True)
    size_bytes = _bounded(item["size_bytes"], _MAX_FILE_BYTES, f"{where}.size_bytes")
    extent_bytes = _bounded(item["extent_bytes"], _MAX_FILE_BYTES, f"{where}.extent_bytes")
    text = _typed(item["extent_crc32"], str, f"{where}.extent_crc32")
    if not extent_bytes or not re.fullmatch("([0-9a-f]{8})*", text):
        raise ValueError(f"{where}: extent_bytes is 0, or extent_crc32 is not 8 hex digits for each extent")
    if item["format"] not in ("torch", "safetensors", "opaque"):
        raise ValueError(f"{where}.format is unknown")
    planner = _typed(item["planner"], str, f"{where}.planner")
    plan_hash = item["plan_hash"] if item["plan_hash"] is None else _typed(item["plan_hash"], str, f"{where}.plan_hash")
    rank = item["rank"] if item["rank"] is None else _bounded(item["rank"], 1 << 31, f"{where}.rank")
    if len(planner) > 64 or len(plan_hash or "") > 256:
        raise ValueError(f"{where}: planner or plan_hash is too long")
    crcs = struct.unpack(f">{len(text) // 8}I", bytes.fromhex(text))
    shared_bytes = _bounded(item.get("shared_bytes", 0), size_bytes, f"{where}.shared_bytes")
    return FileEntry(path, size_bytes, extent_bytes, crcs, item["format"], planner, plan_hash, rank, shared_bytes)


def _excess(raw: bytes) -> str:
    """What of a manifest is more than readers look at, in words; empty where nothing is."""
    if len(raw) > MAX_MANIFEST_BYTES:
        return f"{len(raw)} bytes, more than {MAX_MANIFEST_BYTES}"
    return "it holds too many items" if _count_items(raw) > _MAX_ITEMS else ""


def _disorder(files: Sequence[FileEntry]) -> str:
    """Which file contradicts itself or another, in words; empty where none does."""
    for entry in files:
        num_extents = -(-entry.size_bytes // entry.extent_bytes)
        if len(entry.extent_crc32) != num_extents:
            return f"{shown(entry.path)} has {len(entry.extent_crc32)} checksums for {num_extents} extents"
    # With the separator before all other characters, what lies below a file comes right behind it.
    ordered = sorted(entry.path.replace("/", "\0") for entry in files)
    for path, following in itertools.pairwise(ordered):
        if f"{following}\0".startswith(f"{path}\0"):
            return f"{shown(following.replace(chr(0), '/'))} is twice there, or lies below another file"
    return ""


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where} is not a {kind.__name__}")
    return value


def _bounded(value: Any, high: int, where: str) -> int:
    if type(value) is not int or not 0 <= value <= high:
        raise ValueError(f"{where} is not an integer from 0 to {high}")
    return value
