"""`async-ckpt sweep`: remove what crashed processes left staged."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..observers.units import format_bytes
from ..storage.filesystem import FileSystem
from .listing import measure_tree
from .locating import catalog_of
from .output import print_json, print_table


def command(
    root: Annotated[
        str, typer.Argument(help="Directory that holds the checkpoints.", metavar="ROOT", show_default=False)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what is staged, and by whom.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Remove staging left by processes that are certainly gone; never a live one's, never a committed checkpoint.

    Also test files of a `bench` that was killed. Every engine does this when it starts, apart from those.

    JSON: a list of {name, tag, action, reason, size_bytes}; action is removed, restored, left or (with --dry-run) none
    """
    from ..storage.sweep import sweep
    from .measuring import remove_dead_measurements

    catalog = catalog_of(root)
    results: list[dict[str, Any]]
    if dry_run:
        results = []
        for info in catalog.staging():
            size_bytes, _, _ = measure_tree(f"{catalog.root}/{info.name}")
            results.append(
                {
                    "name": info.name,
                    "tag": info.tag,
                    "action": "none",
                    "reason": f"owner is {info.owner_state.value}",
                    "size_bytes": size_bytes,
                }
            )
    else:
        results = [
            {"name": swept.name, "tag": swept.tag, "action": swept.action, "reason": swept.reason, "size_bytes": None}
            for swept in sweep(FileSystem(), catalog.root)
        ]
        results += [
            {"name": name, "tag": None, "action": "removed", "reason": "its owner is gone", "size_bytes": None}
            for name in remove_dead_measurements(root)
        ]
    if as_json:
        print_json(results)
    elif not results:
        typer.echo("nothing is staged")
    else:
        rows = [
            (r["name"], r["action"], r["reason"], "" if r["size_bytes"] is None else format_bytes(r["size_bytes"]))
            for r in results
        ]
        print_table(("name", "action", "reason", "size"), rows, right=("size",))
