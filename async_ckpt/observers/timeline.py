"""A picture of who did what when: one row per thread, one bar per piece of work, from spans or from a trace file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, CorruptCheckpointError
from ..metrics import Observer, Span
from ..threads.locks import Lock

_COLOURS = {
    "save": "#b2182b",
    "d2h": "#762a83",
    "copy": "#762a83",
    "crc": "#1b7837",
    "write": "#2166ac",
    "fsync": "#e08214",
    "publish": "#d9d9d9",
    "manifest": "#8c6d31",
    "sync": "#fdb863",
    "sync root": "#b35806",
    "rename": "#000000",
    "open": "#bdbdbd",
    "truncate": "#8c8c8c",
    "close": "#636363",
}
_OTHER = "#969696"
_MAX_TRACE_BYTES = 1 << 30


class SpanRecorder(Observer):
    """Keeps the spans of a run in memory, for `write_timeline`; the newest `max_spans`. Any thread."""

    def __init__(self, max_spans: int = 200_000) -> None:
        self._lock = Lock()
        self._max_spans = max_spans
        self._spans: list[Span] = []

    def on_span(self, span: Span) -> None:
        with self._lock:
            self._spans.append(span)
            if len(self._spans) > 2 * self._max_spans:
                del self._spans[: -self._max_spans]

    @property
    def spans(self) -> list[Span]:
        """A copy of what was recorded, oldest first."""
        with self._lock:
            return self._spans[-self._max_spans :]


def read_trace(path: str | os.PathLike[str]) -> list[Span]:
    """The spans of a file that `TraceObserver` wrote. Blocks for reading it.

    Raises:
        CorruptCheckpointError: it is no such trace.
        OSError: it cannot be read.
    """
    name = os.fspath(path)
    if os.path.getsize(name) > _MAX_TRACE_BYTES:
        raise ConfigError(f"{name!r} is larger than {_MAX_TRACE_BYTES} bytes; open it in the Perfetto viewer instead")
    with open(name, "rb") as file:
        raw = file.read()
    try:
        events = json.loads(raw)["traceEvents"]
        threads = {
            event["tid"]: event["args"]["name"]
            for event in events
            if event["ph"] == "M" and event["name"] == "thread_name"
        }
        return [_span(event, threads) for event in events if event["ph"] == "X"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{name!r} is not a trace of this package ({type(error).__name__}: {error})", path=name
        ) from error


def _span(event: dict[str, Any], threads: dict[Any, str]) -> Span:
    args, start_s = event.get("args", {}), float(event["ts"]) / 1e6
    return Span(
        kind=str(event["name"]),
        start_s=start_s,
        end_s=start_s + float(event["dur"]) / 1e6,
        thread=str(threads.get(event["tid"], event["tid"])),
        tag=str(args.get("tag", "")),
        path=str(args.get("path", "")),
        offset=int(args.get("offset", 0)),
        num_bytes=int(args.get("num_bytes", 0)),
    )


def write_timeline(spans: Sequence[Span], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Write a PNG of `spans`, one row per thread in the order of first use. Needs matplotlib (the `plot` extra).

    Raises:
        ConfigError: there are no spans. ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not spans:
        raise ConfigError("there are no spans to draw: nothing was saved while they were recorded")
    origin_s = min(span.start_s for span in spans)
    rows = _rows(spans)
    figure = Figure(figsize=(10, 1.3 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, (_, members) in enumerate(rows):
        # "publish" first: its steps lie within it and are drawn upon it.
        for kind in sorted({span.kind for span in members}, key=lambda kind: (kind not in ("publish", "save"), kind)):
            bars = [
                (1e3 * (s.start_s - origin_s), 1e3 * max(s.end_s - s.start_s, 1e-6)) for s in members if s.kind == kind
            ]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=_COLOURS.get(kind, _OTHER), linewidth=0)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set(xlabel="time in ms", title=title, ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)
    kinds = sorted(
        {span.kind for span in spans}, key=lambda kind: list(_COLOURS).index(kind) if kind in _COLOURS else 99
    )
    handles = [Patch(color=_COLOURS.get(kind, _OTHER), label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), fontsize=8, frameon=False)
    figure.savefig(os.fspath(path), dpi=130)


def _rows(spans: Sequence[Span]) -> list[tuple[str, list[Span]]]:
    """Threads of one pool together, in their numbers' order, as their pool began."""
    by_thread: dict[str, list[Span]] = {}
    pools: dict[str, int] = {}
    for span in sorted(spans, key=lambda span: span.start_s):
        by_thread.setdefault(span.thread, []).append(span)
        pools.setdefault(_pool(span.thread), len(pools))
    return sorted(by_thread.items(), key=lambda item: (pools[_pool(item[0])], len(item[0]), item[0]))


def _pool(name: str) -> str:
    return re.sub(r"[-_]?[0-9]+$", "", name)
