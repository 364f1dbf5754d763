"""`async-ckpt watch`: what is under a root, looked at again and again."""

from __future__ import annotations

import os
import time
from typing import Annotated, Any

import typer

from ..errors import escaped
from ..host.process import OwnerState
from ..observers.units import format_age, format_bytes, format_seconds
from ..reading.catalog import Catalog
from .listing import OWNERS, measure_tree
from .locating import catalog_of
from .output import console, print_json

_NUM_SHOWN = 10


def command(
    root: Annotated[
        str, typer.Argument(help="Directory that holds the checkpoints.", metavar="ROOT", show_default=False)
    ],
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=3600)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Look once and print JSON.")] = False,
) -> None:
    """Show what is committed, how long that took, and what is being saved now. Ends with Ctrl-C.

    Works on every machine that sees ROOT: everything is read from it.

    JSON: {root, checkpoints: [{tag, age_s, size_bytes, num_files, stall_s, durable_s}], staging: [{tag, kind, name,
    owner, owner_state, age_s, size_bytes, num_files}]}; stall_s and durable_s are null where the manifest does not
    tell.
    """
    catalog = catalog_of(root)
    if as_json:
        print_json(_look(catalog))
        return
    screen = console()
    if once or not screen.is_terminal:
        screen.print(_view(_look(catalog)))
        return
    from rich.live import Live

    try:
        with Live(_view(_look(catalog)), console=screen, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(_view(_look(catalog)), refresh=True)
    except KeyboardInterrupt:
        return


def _look(catalog: Catalog) -> dict[str, Any]:
    now_s = time.time()
    checkpoints = []
    # Not tags(), which logs damaged ones: a log record in the middle of a live view destroys it.
    for entry in catalog.entries():
        if entry.manifest is not None and entry.problem is None:
            timing = entry.manifest.timing
            checkpoints.append(
                {
                    "tag": entry.tag,
                    "age_s": now_s - entry.manifest.created_unix_ns / 1e9,
                    "size_bytes": entry.manifest.size_bytes,
                    "num_files": len(entry.manifest.files),
                    "stall_s": timing.get("stall_s"),
                    "durable_s": timing.get("durable_s"),
                }
            )
    staging = []
    for info in catalog.staging():
        size_bytes, num_files, changed_s = measure_tree(os.path.join(catalog.root, info.name))
        if changed_s is not None:
            staging.append(
                {
                    "tag": info.tag,
                    "kind": info.kind,
                    "name": info.name,
                    "owner": info.owner,
                    "owner_state": info.owner_state.value,
                    "age_s": now_s - changed_s,
                    "size_bytes": size_bytes,
                    "num_files": num_files,
                }
            )
    return {"root": catalog.root, "checkpoints": checkpoints, "staging": staging}


def _view(seen: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    committed = seen["checkpoints"]
    earlier = f", the newest {_NUM_SHOWN} are shown" if len(committed) > _NUM_SHOWN else ""
    parts: list[Any] = [Text(escaped(f"{seen['root']}  {len(committed)} checkpoints{earlier}"), style="bold")]
    if committed:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("tag", no_wrap=True)
        for column in ("age", "size", "stall", "durable in"):
            table.add_column(column, justify="right", no_wrap=True)
        for item in committed[-_NUM_SHOWN:]:
            seconds = ["" if item[name] is None else format_seconds(item[name]) for name in ("stall_s", "durable_s")]
            table.add_row(
                Text(escaped(item["tag"])), format_age(item["age_s"]), format_bytes(item["size_bytes"]), *seconds
            )
        parts.append(table)
    parts += [Text(escaped(_staged(item)), style="dim") for item in seen["staging"]] or [
        Text("nothing is staged", style="dim")
    ]
    return Group(*parts)


def _staged(item: dict[str, Any]) -> str:
    state = OwnerState(item["owner_state"])
    hint = "; left behind, `async-ckpt sweep` removes it" if state is OwnerState.DEAD else ""
    size = f"{format_bytes(item['size_bytes'])} reserved or written in {item['num_files']} files"
    return (
        f"{item['kind']} of {item['tag']}, {OWNERS[state]}: {size}, last change {format_age(item['age_s'])} ago{hint}"
    )
