"""`async-ckpt diff`: which tensors differ between two checkpoints, by checksum.

A torch file's directory has a CRC for each storage, so nothing but headers is read, except for tensors that are a part
of a storage that differs. A safetensors file has none: there the manifest's CRCs settle equal extents, and only tensors
in differing ones are read.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import ConfigError, escaped
from ..format.tensors import MAX_OTHERS, OtherInfo, TensorExtent
from ..observers.units import format_bytes
from ..reading.committed import CommittedCheckpoint, gone
from ..reading.records import range_crc, read_header
from ..reading.verified_file import VerifiedFile
from .common import EXIT_FAILED, EXIT_OK, add_json, key_name, place_of, print_json, print_table

_STYLES = {"added": "green", "removed": "red", "changed": "yellow"}
_T = TypeVar("_T")
_Leaf = TypeVar("_Leaf", TensorExtent, OtherInfo)


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
        found = _compare(first, second, (older.file, newer.file))
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


def _compare(first: CommittedCheckpoint, second: CommittedCheckpoint, files: tuple[str | None, str | None]) -> _Found:
    """Compare one file of each, or (None) all."""
    found = _Found()
    if files[0] is not None and files[1] is not None:
        pairs = [("", first.entry(files[0]), second.entry(files[1]))]
    else:
        left, right = ({entry.path: entry for entry in side.manifest.files} for side in (first, second))
        pairs = _paired(
            left, right, lambda kind, path, entry: found.note(kind, path, None, format_bytes(entry.size_bytes))
        )
    for _, one, other in pairs:
        with first.open_file(one) as x, second.open_file(other) as y:
            _compare_files(x, y, found)
    for checkpoint in (first, second):
        if not checkpoint.is_current():
            raise gone(checkpoint.manifest.tag)
    return found


def _compare_files(x: VerifiedFile, y: VerifiedFile, found: _Found) -> None:
    file = y.entry.path
    if "opaque" in (x.entry.format, y.entry.format):
        if x.size_bytes != y.size_bytes or range_crc(x, 0, x.size_bytes) != range_crc(y, 0, y.size_bytes):
            found.note("changed", file, None, "contents")
        return
    older, newer = read_header(x), read_header(y)
    left, right = _by_name(older.tensors, newer.tensors)
    for path, a, b in _paired(left, right, lambda kind, path, one: found.note(kind, file, path, _describe(one))):
        detail = _difference(x, a, y, b)
        if detail is None:
            found.num_equal += 1
        else:
            found.note("changed", file, path, detail)
    one, other = (
        {name: (leaf.text, leaf.exact) for name, leaf in side.items()} for side in _by_name(older.others, newer.others)
    )
    found.others += [f"{file}: {name}" for name in {**one, **other} if one.get(name) != other.get(name)]
    if older.rest != newer.rest:
        found.others.append(f"{file}: some of the values behind the first {MAX_OTHERS}")


def _paired(
    left: Mapping[str, _T], right: Mapping[str, _T], unpaired: Callable[[str, str, _T], None]
) -> list[tuple[str, _T, _T]]:
    """What both sides have; `unpaired("removed" or "added", name, it)` is called for what only one has."""
    for kind, here, there in (("removed", left, right), ("added", right, left)):
        for name in here:
            if name not in there:
                unpaired(kind, name, here[name])
    return [(name, left[name], right[name]) for name in left if name in right]


def _by_name(a: Sequence[_Leaf], b: Sequence[_Leaf]) -> tuple[dict[str, _Leaf], dict[str, _Leaf]]:
    """Two files' leaves by dotted name; by key path where a file has two of that name (`{"a.b": x}` beside `{"a": {"b":
    y}}`)."""
    counts = [Counter(leaf.path for leaf in side) for side in (a, b)]

    def name(leaf: _Leaf) -> str:
        return ".".join(leaf.path) if all(count[leaf.path] <= 1 for count in counts) else key_name(leaf)

    return {name(leaf): leaf for leaf in a}, {name(leaf): leaf for leaf in b}


def _difference(x: VerifiedFile, a: TensorExtent, y: VerifiedFile, b: TensorExtent) -> str | None:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{_describe(a)} -> {_describe(b)}"
    if (a.is_conj, a.is_neg) != (b.is_conj, b.is_neg):
        return "the conjugate or the negative bit"
    if a.kind != b.kind:
        return f"{a.kind or 'plain'} -> {b.kind}"
    if a.extra != b.extra:
        return "what belongs to it besides the elements (a scale, attributes)"
    if a.stride != b.stride and a.num_bytes:
        return f"strides {a.stride} -> {b.stride}"
    in_zip = bool(a.record and b.record)
    both_whole = in_zip and all(tensor.extent_bytes == tensor.storage.num_bytes for tensor in (a, b))
    same_place = both_whole or (a.record, a.offset) == (b.record, b.offset)
    if in_zip and a.storage.crc32 == b.storage.crc32 and same_place:
        return None
    if both_whole:
        return "values"
    if not a.record and _same_extents(x, a, y, b):
        return None
    return None if range_crc(x, a.offset, a.extent_bytes) == range_crc(y, b.offset, b.extent_bytes) else "values"


def _same_extents(x: VerifiedFile, a: TensorExtent, y: VerifiedFile, b: TensorExtent) -> bool:
    """Whether the manifests' CRCs alone say that these bytes are equal."""
    if x.extent_bytes != y.extent_bytes or a.offset != b.offset:
        return False
    extents = x.extents_of(a.offset, a.extent_bytes)
    same_length = x.size_bytes == y.size_bytes or extents.stop < min(x.num_extents, y.num_extents)
    return same_length and all(x.entry.extent_crc32[k] == y.entry.extent_crc32[k] for k in extents)


def _describe(tensor: TensorExtent) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
