"""`async-ckpt timeline`: a trace file as a picture."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    trace: Annotated[str, typer.Argument(help="A file that TraceObserver wrote.", metavar="TRACE", show_default=False)],
    png: Annotated[str, typer.Argument(help="The picture to write.", metavar="PNG", show_default=False)],
    title: Annotated[str, typer.Option(help="Title of the picture.")] = "",
) -> None:
    """Draw a trace as a PNG: one row per thread, one bar per piece of work. Needs matplotlib (the 'plot' extra)."""
    from ..timeline import read_trace, write_timeline

    spans = read_trace(trace)
    write_timeline(spans, png, title=title)
    typer.echo(f"{png}: {len(spans)} pieces of work on {len({span.thread for span in spans})} threads")
