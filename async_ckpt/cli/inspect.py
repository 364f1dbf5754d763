"""`async-ckpt inspect`: the tensors of a checkpoint, from the files' headers alone."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, escaped
from ..format.manifest import FileEntry
from ..format.tensors import OtherInfo, TensorExtent
from ..observers.units import format_bytes
from ..reading.committed import CommittedCheckpoint
from ..reading.records import FileHeader, read_header, read_records
from .common import EXIT_OK, add_json, console, key_name, number, picked, place_of, print_json, print_table

_MAX_OBJECTS = 200
_ROOT = ("(the whole file)",)
"""Where a file holds one tensor or object and no dict."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="ROOT/TAG", help="a checkpoint; or ROOT/TAG/FILE for one file")
    parser.add_argument("--prefix", default="", help="only tensors whose key path starts with this")
    parser.add_argument("--depth", metavar="N", type=number(int, 1), help="fold the tree below this many levels")
    parser.add_argument("--flat", action="store_true", help="a plain table instead of a tree")
    parser.add_argument(
        "--records", action="store_true", help="the zip records instead of tensors; works for every torch file"
    )
    add_json(parser)


def command(path: str, prefix: str, depth: int | None, flat: bool, records: bool, as_json: bool) -> int:
    """Show key path, shape, dtype, bytes and offset of every tensor, as a tree with totals per prefix.

    Reads the headers only, and runs no code from them: objects of other classes are shown as <their class>, with the
    tensors inside. A crafted or damaged header is refused.

    JSON: a list of {file, format, size_bytes, tensor_bytes, num_tensors, num_others, tensors: [{path, dtype, shape,
    num_bytes, offset, record, shared, kind}], others: [{path, text}]}; with --records {file, format, size_bytes,
    records: [{name, offset, num_bytes, crc32}]}; for opaque files {file, format, size_bytes, tensors: [], note}
    """
    if records and (prefix or flat or depth):
        raise ConfigError("--records shows no tensors: it goes without --prefix, --depth and --flat")
    place = place_of(path)

    def look(checkpoint: CommittedCheckpoint) -> list[tuple[FileEntry, Any]]:
        entries = checkpoint.manifest.files if place.file is None else (checkpoint.entry(place.file),)
        return [(entry, _look_at(checkpoint, entry, records)) for entry in entries]

    found = place.catalog.read(place.tag, look)
    if as_json:
        print_json([_as_json(entry, header, prefix) for entry, header in found])
        return EXIT_OK
    for entry, header in found:
        if isinstance(header, FileHeader) and not flat:
            _print_tree(entry, header, prefix, depth)
        else:
            _print_flat(entry, header, prefix)
    return EXIT_OK


def _look_at(checkpoint: CommittedCheckpoint, entry: FileEntry, records: bool) -> Any:
    if entry.format == "opaque":
        return "no tensors: an opaque file"
    with checkpoint.open_file(entry) as file:
        if not records:
            return read_header(file)
        return read_records(file) if entry.format == "torch" else "no zip records: a safetensors file"


def _chosen(header: FileHeader, prefix: str) -> list[TensorExtent]:
    return [tensor for tensor in header.tensors if tensor.name.startswith(prefix)]


def _as_json(entry: FileEntry, header: Any, prefix: str) -> dict[str, Any]:
    common = {"file": entry.path, "format": entry.format, "size_bytes": entry.size_bytes}
    if isinstance(header, str):
        return {**common, "tensors": [], "note": header}
    if isinstance(header, dict):
        records = [{"name": name, **picked(record, "offset num_bytes crc32")} for name, record in header.items()]
        return {**common, "records": records}
    others = [{"path": ".".join(other.path), "text": other.text} for other in header.others]
    return {
        **common,
        "tensor_bytes": header.tensor_bytes,
        "num_tensors": len(header.tensors),
        "num_others": header.num_others,
        "tensors": [
            {
                "path": tensor.name,
                **picked(tensor, "dtype shape num_bytes offset"),
                "record": tensor.record or None,
                "shared": tensor.is_shared,
                "kind": tensor.kind or None,
            }
            for tensor in _chosen(header, prefix)
        ],
        "others": [other for other in others if other["path"].startswith(prefix)],
    }


def _print_flat(entry: FileEntry, found: Any, prefix: str) -> None:
    print(f"{entry.path}  {format_bytes(entry.size_bytes)}" + (f"  {found}" if isinstance(found, str) else ""))
    if isinstance(found, dict):
        rows = [(name, format_bytes(r.num_bytes), str(r.offset), f"{r.crc32:08x}") for name, r in found.items()]
        print_table(("record", "size", "offset", "crc32"), rows, right=("size", "offset"))
    elif isinstance(found, FileHeader):
        tensors = [
            (t.name, t.dtype, str(list(t.shape)), format_bytes(t.num_bytes), str(t.offset), "shared" * t.is_shared)
            for t in _chosen(found, prefix)
        ]
        print_table(("tensor", "dtype", "shape", "size", "offset", ""), tensors, right=("size", "offset"))


@dataclass
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    tensor: TensorExtent | None = None
    text: str = ""
    num_tensors: int = 0
    num_bytes: int = 0


def _grow(tensors: list[TensorExtent], others: list[OtherInfo]) -> _Node:
    root = _Node()
    leaves: list[TensorExtent | OtherInfo] = [*others, *tensors]
    for leaf in leaves:
        nodes = [root]
        for part in leaf.path or _ROOT:
            nodes.append(nodes[-1].children.setdefault(part, _Node()))
        if nodes[-1].tensor is not None or nodes[-1].text:
            # Two of one dotted name: the later one is told by its key path.
            nodes.append(nodes[-1].children.setdefault(key_name(leaf), _Node()))
        if isinstance(leaf, OtherInfo):
            nodes[-1].text = leaf.text
            continue
        nodes[-1].tensor = leaf
        for node in nodes:
            node.num_tensors += 1
            node.num_bytes += 0 if leaf.is_shared else leaf.num_bytes
    return root


def _print_tree(entry: FileEntry, header: FileHeader, prefix: str, depth: int | None) -> None:
    from rich.text import Text
    from rich.tree import Tree

    others = f", {header.num_others} other values" if header.num_others else ""
    # Plain values are counted, objects are shown: some, for there may be thousands.
    objects = [other for other in header.others if other.is_object and ".".join(other.path).startswith(prefix)]
    if len(objects) > _MAX_OBJECTS:
        others += f" ({len(objects) - _MAX_OBJECTS} of them objects that are left out here; --json has them)"
    size, tensor_size = format_bytes(entry.size_bytes), format_bytes(header.tensor_bytes)
    head = f"{entry.path}  {size}, {entry.format}: {len(header.tensors)} tensors of {tensor_size}{others}"
    tree = Tree(Text(escaped(head), style="bold"), guide_style="dim")
    todo: list[tuple[Any, _Node, int]] = [(tree, _grow(_chosen(header, prefix), objects[:_MAX_OBJECTS]), 0)]
    while todo:
        branch, node, level = todo.pop()
        for name, child in node.children.items():
            # A chain of single children is one line: "transformer.h.0", not three.
            label = name
            while child.tensor is None and not child.text and len(child.children) == 1:
                ((part, child),) = child.children.items()
                label = f"{label}.{part}"
            twig = branch.add(_label(label, child))
            if child.children and (depth is None or level + 1 < depth):
                todo.append((twig, child, level + 1))
    console().print(tree)


def _label(name: str, node: _Node) -> Any:
    from rich.text import Text

    text = Text(escaped(name))
    if node.text:
        text.append(f"  {escaped(node.text)}", style="magenta")
    if (tensor := node.tensor) is not None:
        size, shared = format_bytes(tensor.num_bytes), "  shared" * tensor.is_shared
        text.append(f"  {tensor.dtype} {list(tensor.shape)}  {size}  @{tensor.offset}{shared}", style="cyan")
        if tensor.kind:
            text.append(f"  <{escaped(tensor.kind)}>", style="magenta")
    if node.num_tensors > (node.tensor is not None):
        plural = "s" * (node.num_tensors != 1)
        text.append(f"  {node.num_tensors} tensor{plural}, {format_bytes(node.num_bytes)}", style="dim")
    return text
