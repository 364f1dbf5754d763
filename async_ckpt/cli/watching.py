"""`async-ckpt watch`: a live view of the saves of running trainings, from what their engines publish and what the root shows."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from ..catalog import Catalog
from ..host.process import OwnerState
from ..observers.published import read_statuses
from ..observers.status_document import Status
from ..units import format_age, format_bytes, format_rate, format_seconds
from .failing import clean
from .listing import OWNERS, measure_tree
from .locating import catalog_of
from .output import console, print_json


def command(
    root: Annotated[str, typer.Argument(help="Directory that holds the checkpoints.", metavar="ROOT", show_default=False)],
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=3600)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Look once and print JSON.")] = False,
) -> None:
    """Show what running trainings are saving: in flight, bytes, rate, queue, last stall. Ends with Ctrl-C.

    Every engine on this machine publishes that by itself. A training on another machine publishes it into a shared root with
    observers=(StatusObserver(root),); without it, its staging directories are shown as they are seen from outside.

    JSON: {root, num_checkpoints, newest, engines: [{owner, owner_state, pid, rank, world_size, updated_unix_s, in_flight: [{tag,
    state, since_unix_s, size_bytes, copied_bytes, written_bytes, num_files, stall_s}], queue_bytes, queue_chunks, written_bytes,
    bytes_per_s, num_committed, num_failed, num_aborted, last: {tag, error, ended_unix_s, size_bytes, stall_s, total_s,
    bytes_per_s, backpressure_s} or null}], staging: [{tag, kind, name, owner, owner_state, size_bytes, num_files}]}
    """
    catalog = catalog_of(root)
    if as_json:
        print_json(_as_json(_look(catalog)))
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


@dataclass
class _Seen:
    """One look at a root."""

    root: str
    tags: list[str]
    engines: list[Status]
    staging: list[dict[str, Any]]
    """What is staged by processes that publish nothing here."""
    now_s: float = field(default_factory=time.time)


def _look(catalog: Catalog) -> _Seen:
    engines = read_statuses(catalog.root)
    publishing = {str(status.owner) for status in engines}
    staging = []
    for info in catalog.staging():
        if info.owner in publishing:
            continue
        size_bytes, num_files, _ = measure_tree(os.path.join(catalog.root, info.name))
        if size_bytes is not None:
            staging.append(
                {
                    "tag": info.tag,
                    "kind": info.kind,
                    "name": info.name,
                    "owner": info.owner,
                    "owner_state": info.owner_state.value,
                    "size_bytes": size_bytes,
                    "num_files": num_files,
                }
            )
    # Not tags(), which logs damaged ones: a log record in the middle of a live view destroys it.
    tags = [entry.tag for entry in catalog.entries() if entry.problem is None]
    return _Seen(catalog.root, tags, engines, staging)


def _as_json(seen: _Seen) -> dict[str, Any]:
    engines = []
    for status in seen.engines:
        fields = dataclasses.asdict(status)
        del fields["root"]
        rate = status.rate_bytes_per_s(seen.now_s)
        engines.append(
            {**fields, "owner": str(status.owner), "owner_state": status.owner_state.value, "pid": status.owner.pid, "bytes_per_s": rate}
        )
    newest = seen.tags[-1] if seen.tags else None
    return {"root": seen.root, "num_checkpoints": len(seen.tags), "newest": newest, "engines": engines, "staging": seen.staging}


def _view(seen: _Seen) -> Any:
    from rich.console import Group
    from rich.text import Text

    newest = f"newest committed: {seen.tags[-1]}" if seen.tags else "nothing is committed yet"
    head = Text(clean(f"{seen.root}  {len(seen.tags)} checkpoints, {newest}"), style="bold")
    parts: list[Any] = [head, *(_one(status, seen.now_s) for status in seen.engines), *map(_outside, seen.staging)]
    if len(parts) == 1:
        parts.append(Text("no training on this machine has an engine open here, and nothing is staged", style="dim"))
    return Group(*parts)


def _outside(staged: dict[str, Any]) -> Any:
    from rich.text import Text

    state = OwnerState(staged["owner_state"])
    size = f"{format_bytes(staged['size_bytes'])} reserved or written in {staged['num_files']} files"
    hint = "left behind, `async-ckpt sweep` removes it" if state is OwnerState.DEAD else "which publishes nothing here"
    return Text(clean(f"{staged['kind']} of {staged['tag']}, {OWNERS[state]}, {hint}: {size}"), style="dim")


def _ago(seconds: float) -> str:
    return "now" if seconds < 1 else f"{format_age(seconds)} ago"


def _one(status: Status, now_s: float) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
    state = "" if status.owner_state is OwnerState.ALIVE else f", {OWNERS[status.owner_state]}"
    rank = f", rank {status.rank} of {status.world_size}" if status.world_size > 1 else ""
    table.title = Text(f"process {status.owner.pid}{rank}{state}, last news {_ago(now_s - status.updated_unix_s)}")

    def row(name: str, text: str, style: str = "") -> None:
        table.add_row(Text(name, style="dim"), Text(clean(text), style=style))

    for flying in status.in_flight:
        since = format_seconds(max(0.0, now_s - flying["since_unix_s"]))
        done = f"{format_bytes(flying['written_bytes'])} of {format_bytes(flying['size_bytes'])} written"
        row("in flight", f"{flying['tag']} ({flying['state']}): {done}, for {since}, stall {format_seconds(flying['stall_s'])}")
    if not status.in_flight:
        row("in flight", "nothing")
    row("queue", f"{format_bytes(status.queue_bytes)} in {status.queue_chunks} chunks, copied and not yet written")
    row("written", f"{format_bytes(status.written_bytes)}, {format_rate(status.rate_bytes_per_s(now_s))} over the last seconds")
    ended = f"{status.num_committed} committed, {status.num_failed} failed, {status.num_aborted} given up"
    row("commits", ended, "red" if status.num_failed else "")
    last = status.last
    if last is not None and last["error"] is not None:
        row("last", f"{last['tag']} FAILED: {last['error']}", "red")
    elif last is not None:
        took = f"{format_bytes(last['size_bytes'])} durable in {format_seconds(last['total_s'])} ({format_rate(last['bytes_per_s'])})"
        row("last", f"{last['tag']}: {took}, stall {format_seconds(last['stall_s'])}, {_ago(now_s - last['ended_unix_s'])}")
    return table
