"""`async-ckpt watch`: what is under a root, looked at again and again."""

from __future__ import annotations

import argparse
import time
from typing import Any

from ..errors import escaped
from ..host.process import OwnerState
from ..observers.units import format_age, format_bytes, format_seconds
from ..reading.catalog import Catalog
from .common import EXIT_OK, add_json, add_root, catalog_of, console, drawn_table, number, print_json
from .list import OWNERS, staged

_NUM_SHOWN = 10


def options(parser: argparse.ArgumentParser) -> None:
    add_root(parser)
    parser.add_argument(
        "--interval", metavar="SECONDS", type=number(float, 0.1, 3600), default=1.0, help="between two looks [1]"
    )
    parser.add_argument("--once", action="store_true", help="look once and leave")
    add_json(parser)


def command(root: str, interval: float, once: bool, as_json: bool) -> int:
    """Show what is committed, how long that took, and what is being saved now. Ends with Ctrl-C.

    Works on every machine that sees ROOT: everything is read from it. With --json it looks once.

    JSON: {root, checkpoints: [{tag, age_s, size_bytes, num_files, stall_s, durable_s}], staging: [{tag, kind, name,
    owner, owner_state, age_s, size_bytes, num_files}]}; stall_s and durable_s are null where the manifest does not
    tell.
    """
    catalog = catalog_of(root)
    if as_json:
        print_json(_look(catalog))
        return EXIT_OK
    screen = console()
    if once or not screen.is_terminal:
        screen.print(_view(_look(catalog)))
    else:
        from rich.live import Live

        try:
            with Live(_view(_look(catalog)), console=screen, auto_refresh=False) as live:
                while True:
                    time.sleep(interval)
                    live.update(_view(_look(catalog)), refresh=True)
        except KeyboardInterrupt:
            pass
    return EXIT_OK


def _look(catalog: Catalog) -> dict[str, Any]:
    now_s = time.time()
    # Not tags(), which logs damaged ones: a log record in the middle of a live view destroys it.
    checkpoints = [
        {
            "tag": entry.tag,
            "age_s": now_s - manifest.created_unix_ns / 1e9,
            "size_bytes": manifest.size_bytes,
            "num_files": len(manifest.files),
            "stall_s": manifest.timing.get("stall_s"),
            "durable_s": manifest.timing.get("durable_s"),
        }
        for entry in catalog.entries()
        if (manifest := entry.manifest) is not None
    ]
    staging = [{**staged(catalog, info, now_s), "kind": info.kind} for info in catalog.staging()]
    seen = [item for item in staging if item["age_s"] is not None]
    return {"root": catalog.root, "checkpoints": checkpoints, "staging": seen}


def _view(seen: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    committed = seen["checkpoints"]
    earlier = f", the newest {_NUM_SHOWN} are shown" if len(committed) > _NUM_SHOWN else ""
    parts: list[Any] = [Text(escaped(f"{seen['root']}  {len(committed)} checkpoints{earlier}"), style="bold")]
    if committed:
        columns = ("tag", "age", "size", "stall", "durable in")
        rows = []
        for item in committed[-_NUM_SHOWN:]:
            seconds = ["" if item[name] is None else format_seconds(item[name]) for name in ("stall_s", "durable_s")]
            rows.append((item["tag"], format_age(item["age_s"]), format_bytes(item["size_bytes"]), *seconds))
        parts.append(drawn_table(columns, rows, right=columns[1:]))
    for item in seen["staging"]:
        state = OwnerState(item["owner_state"])
        hint = "; left behind, `async-ckpt sweep` removes it" if state is OwnerState.DEAD else ""
        size = f"{format_bytes(item['size_bytes'])} reserved or written in {item['num_files']} files"
        line = f"{item['kind']} of {item['tag']}, {OWNERS[state]}: {size}, last change {format_age(item['age_s'])} ago"
        parts.append(Text(escaped(line + hint), style="dim"))
    if not seen["staging"]:
        parts.append(Text("nothing is staged", style="dim"))
    return Group(*parts)
