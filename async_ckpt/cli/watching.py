"""`async-ckpt watch`: a live view of the saves of running trainings, from what `StatusObserver` publishes."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Any

import typer

from ..catalog import Catalog
from ..observers.status import Status, read_statuses
from ..units import format_age, format_bytes, format_rate, format_seconds
from .failing import clean
from .locating import catalog_of
from .output import console, print_json


def command(
    root: Annotated[str, typer.Argument(help="Directory that holds the checkpoints.", metavar="ROOT", show_default=False)],
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=3600)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Look once and print JSON.")] = False,
) -> None:
    """Show what running trainings are saving: in flight, bytes, rate, queue, last stall. Ends with Ctrl-C.

    The training must publish it: AsyncCheckpointEngine(root, observers=(StatusObserver(root),)).
    """
    catalog = catalog_of(root)
    if as_json:
        print_json([_as_json(status) for status in read_statuses(catalog.root)])
        return
    screen = console()
    if once or not screen.is_terminal:
        screen.print(_view(catalog))
        return
    from rich.live import Live

    try:
        with Live(_view(catalog), console=screen, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(_view(catalog), refresh=True)
    except KeyboardInterrupt:
        return


def _as_json(status: Status) -> dict[str, Any]:
    fields = dataclasses.asdict(status)
    return {**fields, "owner": str(status.owner), "owner_state": status.owner_state.value, "in_flight": list(status.in_flight)}


def _view(catalog: Catalog) -> Any:
    from rich.console import Group
    from rich.text import Text

    root = catalog.root
    # Not tags(), which logs damaged ones: a log record in the middle of a live view destroys it.
    tags = [entry.tag for entry in catalog.entries() if entry.problem is None]
    statuses = read_statuses(root)
    newest = f"newest committed: {tags[-1]}" if tags else "nothing is committed yet"
    head = Text(clean(f"{root}  {len(tags)} checkpoints, {newest}"), style="bold")
    if not statuses:
        return Group(head, Text("nobody publishes here; give the engine observers=(StatusObserver(root),)", style="dim"))
    return Group(head, *(_one(status) for status in statuses))


def _one(status: Status) -> Any:
    from rich.table import Table
    from rich.text import Text

    now_s = time.time()
    table = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
    state = "" if status.owner_state.value == "alive" else f" ({status.owner_state.value})"
    table.title = Text(f"process {status.owner.pid}{state}, {format_age(now_s - status.updated_unix_s)}")

    def row(name: str, text: str, style: str = "") -> None:
        table.add_row(Text(name, style="dim"), Text(clean(text), style=style))

    for flying in status.in_flight:
        since = format_seconds(max(0.0, now_s - flying["since_unix_s"]))
        row(
            "in flight",
            f"{flying['tag']}: {format_bytes(flying['written_bytes'])} written, for {since}, stall {format_seconds(flying['stall_s'])}",
        )
    if not status.in_flight:
        row("in flight", "nothing")
    row("queue", f"{format_bytes(status.queue_bytes)} copied and not yet written")
    row("written", f"{format_bytes(status.written_bytes)}, {format_rate(status.bytes_per_s)} over the last seconds")
    row("commits", f"{status.num_committed} committed, {status.num_failed} failed", "red" if status.num_failed else "")
    last = status.last
    if last is not None and last["error"] is not None:
        row("last", f"{last['tag']} FAILED: {last['error']}", "red")
    elif last is not None:
        took = f"{format_bytes(last['size_bytes'])} durable in {format_seconds(last['total_s'])} ({format_rate(last['bytes_per_s'])})"
        row("last", f"{last['tag']}: {took}, stall {format_seconds(last['stall_s'])}, {format_age(now_s - last['ended_unix_s'])} ago")
    return table
