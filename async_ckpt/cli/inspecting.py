"""`async-ckpt inspect`: the tensors of a checkpoint, from the files' headers alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from ..catalog import OpenCheckpoint
from ..header import FileHeader, TensorInfo, read_header, read_records
from ..manifest import FileEntry
from ..units import format_bytes
from .failing import UsageError, clean
from .locating import place_of
from .output import console, print_json, print_table


def command(
    path: Annotated[str, typer.Argument(help="ROOT/TAG, or ROOT/TAG/FILE for one file.", metavar="ROOT/TAG", show_default=False)],
    prefix: Annotated[str, typer.Option(help="Only tensors whose key path starts with this.", show_default=False)] = "",
    depth: Annotated[int | None, typer.Option(help="Fold the tree below this many levels.", min=1, show_default=False)] = None,
    flat: Annotated[bool, typer.Option("--flat", help="A plain table instead of a tree.")] = False,
    records: Annotated[bool, typer.Option("--records", help="The zip records instead of tensors; works for every torch file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show key path, shape, dtype, bytes and offset of every tensor, as a tree with totals per prefix.

    Reads the headers only, and runs no code from them. A crafted or damaged header is refused.
    """
    if records and (prefix or flat or depth):
        raise UsageError("--records shows no tensors: it goes without --prefix, --depth and --flat")
    place = place_of(path)

    def look(checkpoint: OpenCheckpoint) -> list[tuple[FileEntry, Any]]:
        entries = checkpoint.manifest.files if place.file is None else (checkpoint.entry(place.file),)
        return [(entry, _look_at(checkpoint, entry, records)) for entry in entries]

    found = place.catalog.read(place.tag, look)
    if as_json:
        print_json([_as_json(entry, header, prefix) for entry, header in found])
        return
    for entry, header in found:
        if isinstance(header, str):
            typer.echo(f"{entry.path}  {format_bytes(entry.size_bytes)}  {header}")
        elif records:
            _print_records(entry, header)
        elif flat:
            _print_flat(entry, _chosen(header, prefix))
        else:
            _print_tree(entry, header, _chosen(header, prefix), depth)


def _look_at(checkpoint: OpenCheckpoint, entry: FileEntry, records: bool) -> Any:
    if entry.format == "opaque":
        return "no tensors: an opaque file"
    file = checkpoint.open_file(entry)
    try:
        if not records:
            return read_header(file, entry.format, name=entry.path)
        return read_records(file, name=entry.path) if entry.format == "torch" else "no zip records: a safetensors file"
    finally:
        file.close()


def _chosen(header: FileHeader, prefix: str) -> list[TensorInfo]:
    return [tensor for tensor in header.tensors if tensor.name.startswith(prefix)]


def _as_json(entry: FileEntry, header: Any, prefix: str) -> dict[str, Any]:
    common = {"file": entry.path, "format": entry.format, "size_bytes": entry.size_bytes}
    if isinstance(header, str):
        return {**common, "tensors": [], "note": header}
    if isinstance(header, dict):
        return {
            **common,
            "records": [{"name": n, "offset": r.offset, "num_bytes": r.num_bytes, "crc32": r.crc32} for n, r in header.items()],
        }
    tensors = [
        {
            "path": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "num_bytes": tensor.num_bytes,
            "offset": tensor.offset,
            "record": tensor.record or None,
            "shared": tensor.is_shared,
        }
        for tensor in _chosen(header, prefix)
    ]
    return {
        **common,
        "tensor_bytes": header.tensor_bytes,
        "num_tensors": len(header.tensors),
        "num_others": header.num_others,
        "tensors": tensors,
    }


def _print_records(entry: FileEntry, records: Any) -> None:
    typer.echo(f"{entry.path}  {format_bytes(entry.size_bytes)}")
    rows = [(name, format_bytes(r.num_bytes), str(r.offset), f"{r.crc32:08x}") for name, r in records.items()]
    print_table(("record", "size", "offset", "crc32"), rows, right=("size", "offset"))


def _print_flat(entry: FileEntry, tensors: list[TensorInfo]) -> None:
    typer.echo(f"{entry.path}  {format_bytes(entry.size_bytes)}")
    rows = [(t.name, t.dtype, _shape(t), format_bytes(t.num_bytes), str(t.offset), "shared" if t.is_shared else "") for t in tensors]
    print_table(("tensor", "dtype", "shape", "size", "offset", ""), rows, right=("size", "offset"))


def _shape(tensor: TensorInfo) -> str:
    return "[" + ", ".join(map(str, tensor.shape)) + "]"


@dataclass
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    tensor: TensorInfo | None = None
    num_tensors: int = 0
    num_bytes: int = 0


def _grow(tensors: list[TensorInfo]) -> _Node:
    root = _Node()
    for tensor in tensors:
        node = root
        for part in ("", *tensor.path):
            node = node.children.setdefault(part, _Node()) if part else node
            node.num_tensors += 1
            node.num_bytes += 0 if tensor.is_shared else tensor.num_bytes
        node.tensor = tensor
    return root


def _print_tree(entry: FileEntry, header: FileHeader, tensors: list[TensorInfo], depth: int | None) -> None:
    from rich.text import Text
    from rich.tree import Tree

    others = f", {header.num_others} other values" if header.num_others else ""
    size, tensor_size = format_bytes(entry.size_bytes), format_bytes(header.tensor_bytes)
    head = f"{entry.path}  {size}, {entry.format}: {len(header.tensors)} tensors of {tensor_size}{others}"
    tree = Tree(Text(clean(head), style="bold"), guide_style="dim")
    todo: list[tuple[Any, _Node, int]] = [(tree, _grow(tensors), 0)]
    while todo:
        branch, node, level = todo.pop()
        for name, child in node.children.items():
            # A chain of single children is one line: "transformer.h.0", not three.
            label = name
            while child.tensor is None and len(child.children) == 1:
                ((part, child),) = child.children.items()
                label = f"{label}.{part}"
            twig = branch.add(_label(label, child))
            if child.children and (depth is None or level + 1 < depth):
                todo.append((twig, child, level + 1))
    console().print(tree)


def _label(name: str, node: _Node) -> Any:
    from rich.text import Text

    text = Text(clean(name))
    if node.tensor is not None:
        shared = "  shared" if node.tensor.is_shared else ""
        text.append(
            f"  {node.tensor.dtype} {_shape(node.tensor)}  {format_bytes(node.tensor.num_bytes)}  @{node.tensor.offset}{shared}",
            style="cyan",
        )
    if node.children:
        text.append(f"  {node.num_tensors} tensor{'s' * (node.num_tensors != 1)}, {format_bytes(node.num_bytes)}", style="dim")
    return text
