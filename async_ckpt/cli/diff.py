"""`async-ckpt diff`: which tensors differ between two checkpoints, by checksum.

A torch file's directory has a CRC for each storage, so nothing but headers is read, except for tensors that are a part
of a storage that differs. A safetensors file has none: there the manifest's CRCs settle equal extents, and only tensors
in differing ones are read.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import CheckpointNotFoundError, ConfigError, escaped
from ..format.manifest import FileEntry
from ..format.tensors import MAX_OTHERS, OtherInfo, TensorExtent
from ..observers.units import format_bytes
from ..reading.committed import CommittedCheckpoint
from ..reading.records import FileHeader, range_crc, read_header
from ..reading.verified_file import VerifiedFile
from .locating import Located, place_of
from .output import EXIT_FAILED, EXIT_OK, add_json, key_name, print_json, print_table


@dataclass(frozen=True)
class _Side:
    entry: FileEntry
    file: VerifiedFile
    header: FileHeader | None


@dataclass
class _Found:
    changes: list[dict[str, Any]] = field(default_factory=list)
    num_equal: int = 0
    others: list[str] = field(default_factory=list)

    def note(self, kind: str, file: str, tensor: str | None, detail: str) -> None:
        self.changes.append({"change": kind, "file": file, "tensor": tensor, "detail": detail})


def options(parser: argparse.ArgumentParser) -> None:
    for name, which in (("a", "older"), ("b", "newer")):
        parser.add_argument(name, metavar=name.upper(), help=f"ROOT/TAG or ROOT/TAG/FILE: the {which} one")
    add_json(parser)


def command(a: str, b: str, as_json: bool) -> int:
    """Show tensors that were added, removed or changed from A to B. Exit code 1 if there are any, 0 if all are equal.

    Values that are no tensors (step counts, learning rates) are named when they differ, and change no exit code.

    JSON: {changes: [{change, file, tensor, detail}], num_equal, other_values: ["file: path"]}
    """
    older, newer = place_of(a), place_of(b)
    if (older.file is None) != (newer.file is None):
        raise ConfigError("compare two checkpoints or two files, not a checkpoint with a file")
    with older.catalog.open(older.tag) as first, newer.catalog.open(newer.tag) as second:
        found = _compare(first, second, older, newer)
    changes, others = found.changes, found.others
    if as_json:
        print_json({"changes": changes, "num_equal": found.num_equal, "other_values": others})
    elif not changes:
        print(f"equal: {found.num_equal} tensors")
    else:
        rows = [(c["change"], c["file"], c["tensor"] or "(file)", c["detail"]) for c in changes]
        print_table(("change", "file", "tensor", "detail"), rows, styles=[_STYLES[c["change"]] for c in changes])
        counts = ", ".join(f"{sum(c['change'] == kind for c in changes)} {kind}" for kind in _STYLES)
        print(f"{counts}, {found.num_equal} equal")
    if others and not as_json:
        more = ", ..." if len(others) > 10 else ""
        print(escaped(f"values that are no tensors differ: {', '.join(others[:10])}{more}"))
    return EXIT_FAILED if changes else EXIT_OK


_STYLES = {"added": "green", "removed": "red", "changed": "yellow"}


def _compare(first: CommittedCheckpoint, second: CommittedCheckpoint, older: Located, newer: Located) -> _Found:
    found = _Found()
    left = {entry.path: entry for entry in first.manifest.files}
    right = {entry.path: entry for entry in second.manifest.files}
    pairs = [(left[path], right[path]) for path in left if path in right]
    if older.file is not None and newer.file is not None:
        pairs = [(first.entry(older.file), second.entry(newer.file))]
    else:
        for kind, path, entry in _unpaired(left, right):
            found.note(kind, path, None, format_bytes(entry.size_bytes))
    for one, other in pairs:
        with _opened(first, one) as x, _opened(second, other) as y:
            _compare_files(x, y, found)
    return found


@contextlib.contextmanager
def _opened(checkpoint: CommittedCheckpoint, entry: FileEntry) -> Iterator[_Side]:
    with checkpoint.open_file(entry) as file:
        yield _Side(entry, file, None if entry.format == "opaque" else read_header(file))
    if not checkpoint.is_current():
        raise CheckpointNotFoundError(
            f"checkpoint {checkpoint.manifest.tag!r} was deleted or replaced while it was compared"
        )


def _compare_files(x: _Side, y: _Side, found: _Found) -> None:
    file, size_bytes = y.entry.path, y.entry.size_bytes
    if x.header is None or y.header is None:
        if x.entry.size_bytes != size_bytes or range_crc(x.file, 0, size_bytes) != range_crc(y.file, 0, size_bytes):
            found.note("changed", file, None, "contents")
        return
    left, right = _by_name(x.header.tensors, y.header.tensors)
    for kind, path, tensor in _unpaired(left, right):
        found.note(kind, file, path, _describe(tensor))
    for path in left:
        if path in right:
            detail = _difference(x, left[path], y, right[path])
            if detail is None:
                found.num_equal += 1
            else:
                found.note("changed", file, path, detail)
    one, other = (
        {name: (leaf.text, leaf.exact) for name, leaf in side.items()}
        for side in _by_name(x.header.others, y.header.others)
    )
    found.others += [f"{file}: {name}" for name in {**one, **other} if one.get(name) != other.get(name)]
    if x.header.rest != y.header.rest:
        found.others.append(f"{file}: some of the values behind the first {MAX_OTHERS}")


_T = TypeVar("_T")


def _unpaired(left: Mapping[str, _T], right: Mapping[str, _T]) -> Iterator[tuple[str, str, _T]]:
    """What only one side has: "removed" or "added", its name, and it."""
    for kind, here, there in (("removed", left, right), ("added", right, left)):
        for name in here:
            if name not in there:
                yield kind, name, here[name]


_Leaf = TypeVar("_Leaf", TensorExtent, OtherInfo)


def _by_name(a: Sequence[_Leaf], b: Sequence[_Leaf]) -> tuple[dict[str, _Leaf], dict[str, _Leaf]]:
    """Two files' leaves by dotted name; by key path where a file has two of that name (`{"a.b": x}` beside `{"a": {"b":
    y}}`)."""
    counts = [Counter(leaf.path for leaf in side) for side in (a, b)]

    def name(leaf: _Leaf) -> str:
        return ".".join(leaf.path) if all(count[leaf.path] <= 1 for count in counts) else key_name(leaf)

    return {name(leaf): leaf for leaf in a}, {name(leaf): leaf for leaf in b}


def _difference(x: _Side, a: TensorExtent, y: _Side, b: TensorExtent) -> str | None:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{_describe(a)} -> {_describe(b)}"
    if (a.is_conj, a.is_neg) != (b.is_conj, b.is_neg):
        return "the conjugate or the negative bit"
    if (a.kind, a.extra) != (b.kind, b.extra):
        return (
            f"{a.kind or 'plain'} -> {b.kind}"
            if a.kind != b.kind
            else "what belongs to it besides the elements (a scale, attributes)"
        )
    if a.stride != b.stride and a.num_bytes:
        return f"strides {a.stride} -> {b.stride}"
    in_zip = bool(a.record and b.record)
    both_whole = in_zip and all(tensor.extent_bytes == tensor.storage.num_bytes for tensor in (a, b))
    same_place = both_whole or (a.record, a.offset) == (b.record, b.offset)
    if in_zip and a.storage.crc32 == b.storage.crc32 and same_place:
        return None
    if both_whole:
        return "values"
    if not a.record and _same_extents(x.entry, a, y.entry, b):
        return None
    if range_crc(x.file, a.offset, a.extent_bytes) == range_crc(y.file, b.offset, b.extent_bytes):
        return None
    return "values"


def _same_extents(x: FileEntry, a: TensorExtent, y: FileEntry, b: TensorExtent) -> bool:
    """Whether the manifests' CRCs alone say that these bytes are equal."""
    if x.extent_bytes != y.extent_bytes or a.offset != b.offset or not a.extent_bytes:
        return not a.extent_bytes
    first, last = a.offset // x.extent_bytes, (a.offset + a.extent_bytes - 1) // x.extent_bytes
    same_length = x.size_bytes == y.size_bytes or last < min(len(x.extent_crc32), len(y.extent_crc32)) - 1
    return same_length and x.extent_crc32[first : last + 1] == y.extent_crc32[first : last + 1]


def _describe(tensor: TensorExtent) -> str:
    return f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"
