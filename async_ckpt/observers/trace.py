"""Every piece of work on its thread: as a trace file for the Perfetto and Chrome viewers, in memory, and as a picture.

The file is the JSON form of the Trace Event Format: an object with "traceEvents". Work is complete events ("ph": "X",
times in microseconds), one row per thread, named by metadata events ("M"), nested or apart on each row as the format
demands; copies from a device overlap on the thread that queued them and get rows of their own. Checkpoints are
asynchronous events ("b", "e"), because several may be in flight. Open it at https://ui.perfetto.dev or
chrome://tracing.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ConfigError, CorruptCheckpointError
from ..metrics import CommitMetrics, Observer, Span
from ..threads.locks import Lock

_TAIL = b"\n]}\n"
_MAX_BUFFERED = 4096
_MAX_TRACE_BYTES = 1 << 30


class TraceObserver(Observer):
    """Writes a trace of everything the engine does. Any thread; keeps at most a few thousand spans in memory.

    Guarantees: after each commit, and after `close`, the file is one valid JSON document.

    Args:
        path: the file; an existing one is replaced.
        process_name: how the viewer names this process, for traces of several ranks.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], process_name: str = "async_ckpt") -> None:
        self._lock = Lock()
        self._origin_s = time.perf_counter()
        self._threads: dict[str, int] = {}
        self._device_rows: list[float] = []
        self._num_commits = 0
        self._pid = os.getpid()
        self._buffer: list[dict[str, Any]] = []
        self._is_first = True
        self._file: BinaryIO | None = open(path, "wb")  # noqa: SIM115 - lives as long as the observer
        self._file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n' + _TAIL)
        self._add("M", "process_name", 0, args={"name": process_name})
        self._flush()

    def on_span(self, span: Span) -> None:
        args: dict[str, Any] = {"tag": span.tag}
        if span.path:
            args["path"] = span.path
        if span.num_bytes:
            args |= {"offset": span.offset, "num_bytes": span.num_bytes}
        dur = max(0.0, round((span.end_s - span.start_s) * 1e6, 3))
        with self._lock:
            thread = self._thread(self._row(span))
            self._add("X", span.kind, thread, cat="async_ckpt", ts=self._us(span.start_s), dur=dur, args=args)
            if len(self._buffer) >= _MAX_BUFFERED:
                self._flush()

    def on_commit(self, metrics: CommitMetrics, error: BaseException | None) -> None:
        now_s = time.perf_counter()
        args = {"tag": metrics.tag, "size_bytes": metrics.size_bytes, "stall_s": metrics.stall_s}
        args["error"] = str(error) if error else None
        name, began_us = f"checkpoint {metrics.tag}", self._us(max(self._origin_s, now_s - metrics.total_s))
        with self._lock:
            self._num_commits += 1
            self._add("b", name, 0, cat="checkpoint", id=self._num_commits, ts=began_us, args=args)
            self._add("e", name, 0, cat="checkpoint", id=self._num_commits, ts=self._us(now_s))
            self._flush()

    def on_abort(self, metrics: CommitMetrics, error: BaseException) -> None:
        args, now_us = {"tag": metrics.tag, "error": str(error)}, self._us(time.perf_counter())
        with self._lock:
            self._add("i", f"gave up {metrics.tag}", 0, cat="checkpoint", s="p", ts=now_us, args=args)
            self._flush()

    def close(self) -> None:
        """Write what is left and close the file; idempotent. Call it after the engine is closed."""
        with self._lock:
            if self._file is not None:
                self._flush()
                self._file.close()
                self._file = None

    def __enter__(self) -> TraceObserver:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _us(self, at_s: float) -> float:
        return round((at_s - self._origin_s) * 1e6, 3)

    def _row(self, span: Span) -> str:
        """The thread, or for a copy that the device did the first row of such copies that is free at that time."""
        if span.kind != "d2h":
            return span.thread
        lane = next((k for k, end_s in enumerate(self._device_rows) if end_s <= span.start_s), len(self._device_rows))
        self._device_rows[lane : lane + 1] = [span.end_s]
        return f"device copies {lane + 1}"

    def _thread(self, name: str) -> int:
        number = self._threads.get(name)
        if number is None:
            number = self._threads[name] = len(self._threads) + 1
            self._add("M", "thread_name", number, args={"name": name})
            self._add("M", "thread_sort_index", number, args={"sort_index": number})
        return number

    def _add(self, phase: str, name: str, thread: int, **fields: object) -> None:
        self._buffer.append({"ph": phase, "name": name, "pid": self._pid, "tid": thread, **fields})

    def _flush(self) -> None:
        if self._file is None or not self._buffer:
            return
        body = b",\n".join(json.dumps(event, separators=(",", ":")).encode() for event in self._buffer)
        self._buffer.clear()
        # The tail is overwritten by the next part, so that the file is whole after each flush.
        self._file.seek(-len(_TAIL), os.SEEK_END)
        self._file.write((b"" if self._is_first else b",\n") + body + _TAIL)
        self._file.flush()
        self._is_first = False


class SpanRecorder(Observer):
    """Keeps the spans of a run in memory, for `write_timeline`; the newest `max_spans`. Any thread."""

    def __init__(self, max_spans: int = 200_000) -> None:
        self._lock = Lock()
        self._spans: deque[Span] = deque(maxlen=max_spans)

    def on_span(self, span: Span) -> None:
        with self._lock:
            self._spans.append(span)

    @property
    def spans(self) -> list[Span]:
        """A copy of what was recorded, oldest first."""
        with self._lock:
            return list(self._spans)


def read_trace(path: str | os.PathLike[str]) -> list[Span]:
    """The spans of a file that `TraceObserver` wrote. Blocks for reading it.

    Raises:
        CorruptCheckpointError: it is no such trace. ConfigError: it is too large.
        OSError: it cannot be read.
    """
    name = os.fspath(path)
    if os.path.getsize(name) > _MAX_TRACE_BYTES:
        raise ConfigError(f"{name!r} is larger than {_MAX_TRACE_BYTES} bytes; open it in the Perfetto viewer instead")
    raw = Path(name).read_bytes()
    try:
        events = json.loads(raw)["traceEvents"]
        names = [event for event in events if event["ph"] == "M" and event["name"] == "thread_name"]
        threads = {event["tid"]: event["args"]["name"] for event in names}
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
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not spans:
        raise ConfigError("there are no spans to draw: nothing was saved while they were recorded")
    rows, origin_s = _rows(spans), min(span.start_s for span in spans)
    colours = {kind: colormaps["tab20"](k % 20) for k, kind in enumerate(sorted({span.kind for span in spans}))}
    figure = Figure(figsize=(10, 1.3 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for row, (_, members) in enumerate(rows):
        # These first: what lies within them is drawn upon them.
        members.sort(key=lambda span: span.kind not in ("publish", "save"))
        bars = [(1e3 * (span.start_s - origin_s), 1e3 * max(span.end_s - span.start_s, 1e-6)) for span in members]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=[colours[span.kind] for span in members], linewidth=0)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set(xlabel="time in ms", title=title, ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)
    handles = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
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
