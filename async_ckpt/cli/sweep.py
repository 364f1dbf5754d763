"""`async-ckpt sweep`: remove what crashed processes left staged."""

from __future__ import annotations

import argparse

from ..observers.units import format_bytes
from ..storage.delete import sweep
from ..storage.filesystem import FileSystem
from .common import EXIT_OK, add_json, add_root, catalog_of, picked, print_json, print_table
from .list import staged


def options(parser: argparse.ArgumentParser) -> None:
    add_root(parser)
    parser.add_argument("--dry-run", action="store_true", help="only show what is staged, and by whom")
    add_json(parser)


def command(root: str, dry_run: bool, as_json: bool) -> int:
    """Remove staging left by processes that are certainly gone; never a live one's, never a committed checkpoint.

    Also test files of a `bench` that was killed. Every engine does this when it starts.

    JSON: a list of {name, tag, action, reason, size_bytes}; action is removed, restored, left or (with --dry-run) none
    """
    catalog = catalog_of(root)
    if dry_run:
        results = [
            {**picked(info, "name tag"), "action": "none", "reason": f"owner is {info.owner_state.value}"}
            | {"size_bytes": staged(catalog, info, 0.0)["size_bytes"]}
            for info in catalog.staging()
        ]
    else:
        swept = sweep(FileSystem(), catalog.root)
        results = [{**picked(one, "name tag action reason"), "size_bytes": None} for one in swept]
    if as_json:
        print_json(results)
    elif not results:
        print("nothing is staged")
    else:
        rows = [
            (r["name"], r["action"], r["reason"], "" if r["size_bytes"] is None else format_bytes(r["size_bytes"]))
            for r in results
        ]
        print_table(("name", "action", "reason", "size"), rows, right=("size",))
    return EXIT_OK
