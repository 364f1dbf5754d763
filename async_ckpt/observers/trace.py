"""Every chunk's work on its thread, as a trace file for the Perfetto and Chrome viewers.

The file is the JSON form of the Trace Event Format: an object with "traceEvents". Work is complete events ("ph": "X",
times in microseconds), one row per thread, named by metadata events ("M"), nested or apart on each row as the format
demands; copies from a device overlap on the thread that queued them and get rows of their own. Checkpoints are
asynchronous events ("b", "e"), because several may be in flight. Open it at https://ui.perfetto.dev or
chrome://tracing.
"""

from __future__ import annotations

import json
import os
import time
from types import TracebackType
from typing import Any, BinaryIO

from ..metrics import CommitMetrics, Observer, Span
from ..threads.locks import Lock

_TAIL = b"\n]}\n"
_MAX_BUFFERED = 4096


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
