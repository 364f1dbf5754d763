"""Each observer against the engine's own reports: log records, trace, timeline, status file, progress, metrics of other
tools.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import os

import pytest
import torch

from async_ckpt import (
    AsyncCheckpointEngine,
    CommitProgress,
    LoggingObserver,
    SpanRecorder,
    TensorBoardObserver,
    TraceObserver,
)
from async_ckpt.errors import ConfigError, CorruptCheckpointError, WriteError
from async_ckpt.metrics import CommitMetrics, SaveMetrics, Span
from async_ckpt.observers.trace import read_trace, write_timeline
from tests.support.insides import commits_of, exclusion_of, guard_of
from tests.support.stepping import saved

KINDS = {"save", "copy", "crc", "write", "fsync"}


def train(root, *observers, num_saves: int = 2, lazy: bool = True) -> None:
    model = torch.nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    with AsyncCheckpointEngine(root, staging_bytes=8 << 20, chunk_bytes=64 << 10, observers=observers) as engine:
        if lazy:
            engine.guard(optimizer)
        for step in range(num_saves):
            model(torch.ones(2, 256)).sum().backward()
            optimizer.step()
            saved(
                engine,
                {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                f"step-{step}",
                path="state.pt",
            )


@pytest.mark.wide
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_spans_cover_every_chunk_once_per_kind(tmp_path, lazy):
    recorder = SpanRecorder()
    train(tmp_path / "root", recorder, num_saves=2, lazy=lazy)
    for step in range(2):
        size_bytes = (tmp_path / "root" / f"step-{step}" / "state.pt").stat().st_size
        spans = [span for span in recorder.spans if span.tag == f"step-{step}"]
        for kind in ("crc", "write"):
            covered = sorted((span.offset, span.num_bytes) for span in spans if span.kind == kind)
            assert covered[0][0] == 0
            assert sum(num_bytes for _, num_bytes in covered) == size_bytes
            assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(covered))
        offsets = {span.offset for span in spans if span.kind == "copy"}
        assert {span.offset for span in spans if span.kind == "crc"} >= offsets
        assert len(offsets) > 5
        assert all(span.end_s >= span.start_s for span in spans)


def check_nesting(spans: list[dict]) -> None:
    """The format's rule for complete events: two on one row are nested or apart."""
    for tid in {event["tid"] for event in spans}:
        above: list[float] = []
        row = [(e["ts"], -e["dur"], e["name"]) for e in spans if e["tid"] == tid]
        for start, negative, name in sorted(row):
            while above and above[-1] <= start + 0.002:
                above.pop()
            assert not above or start - negative <= above[-1] + 0.002, f"{name} at {start} ends after what it lies in"
            above.append(start - negative)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_trace_is_valid_for_the_viewer(tmp_path, lazy):
    """The Trace Event Format. The same file was opened once in the Perfetto viewer: all events, no import error."""
    path = tmp_path / "trace.json"
    with TraceObserver(path, "rank 0") as trace:
        train(tmp_path / "root", trace, lazy=lazy)
    document = json.loads(path.read_text())
    events = document["traceEvents"]
    assert set(document) == {"displayTimeUnit", "traceEvents"}
    spans = [event for event in events if event["ph"] == "X"]
    assert KINDS | {"publish", "manifest", "sync", "rename", "sync root"} <= {event["name"] for event in spans}
    for event in spans:
        assert isinstance(event["ts"], (int, float))
        assert event["dur"] >= 0
        assert event["ts"] >= 0
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
    names = {
        event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] == "thread_name"
    }
    assert {event["tid"] for event in spans} <= set(names)
    assert len(set(names.values())) == len(names)
    assert [e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"] == ["rank 0"]
    begun = [(e["id"], e["name"]) for e in events if e["ph"] == "b"]
    assert begun == [(e["id"], e["name"]) for e in events if e["ph"] == "e"]
    assert sorted(name for _, name in begun) == ["checkpoint step-0", "checkpoint step-1"]
    check_nesting(spans)
    assert {e["args"]["tag"] for e in spans if e["name"] == "manifest"} == {"step-0", "step-1"}


def test_trace_times_are_microseconds(tmp_path):
    with TraceObserver(tmp_path / "trace.json") as trace:
        trace.on_span(Span("write", 1.5, 1.75, "w", tag="t"))
        trace.on_span(Span("write", 3.0, 3.25, "w", tag="t"))
    event, later = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert later["ts"] - event["ts"] == pytest.approx(1_500_000)
    assert event["dur"] == pytest.approx(250_000)


def test_device_copies_that_overlap_get_rows_of_their_own(tmp_path):
    with TraceObserver(tmp_path / "trace.json") as trace:
        for start in range(6):
            trace.on_span(Span("d2h", start, start + 2.5, "MainThread", tag="t", offset=start, num_bytes=1))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    check_nesting(spans)
    assert len({event["tid"] for event in spans}) == 3


def test_a_checkpoint_that_is_given_up_is_told_to_every_observer(tmp_path, caplog):
    class Old:
        """An observer of before this event: it is not told, and not left out."""

        def __init__(self):
            self.commits = []

        def on_span(self, span): ...

        def on_save(self, metrics): ...

        def on_commit(self, metrics, error):
            self.commits.append(metrics.tag)

    old = Old()
    with TraceObserver(tmp_path / "trace.json") as trace, caplog.at_level(logging.INFO, logger="async_ckpt"):
        observers = (trace, LoggingObserver(), old)
        with AsyncCheckpointEngine(tmp_path / "root", staging_bytes=8 << 20, observers=observers) as engine:
            engine.create("lost")
            engine.save({"x": torch.zeros(10)}, "x.pt")
            engine.abort("lost")
            engine.create("kept")
            engine.commit("kept")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "i"] == ["gave up lost"]
    assert any("'lost' was given up" in record.getMessage() for record in caplog.records)
    assert old.commits == ["kept"]


def test_trace_is_whole_after_each_commit_and_bounded_in_memory(tmp_path):
    trace = TraceObserver(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for number in range(10_000):
        trace.on_span(Span("write", number, number + 1, "w", tag="t", num_bytes=1))
        assert len(trace._buffer) < 5000
    trace.on_commit(CommitMetrics("t"), WriteError("disk gone"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 10_000
    assert "disk gone" in next(event["args"]["error"] for event in events if event["ph"] == "b")
    trace.close()
    trace.close()


@pytest.mark.wide
def test_timeline_from_spans_and_from_the_trace(tmp_path):
    recorder = SpanRecorder()
    with TraceObserver(tmp_path / "trace.json") as trace:
        train(tmp_path / "root", trace, recorder)
    read = read_trace(tmp_path / "trace.json")
    assert sorted((s.kind, s.tag, s.path, s.offset, s.num_bytes, s.thread) for s in read) == sorted(
        (s.kind, s.tag, s.path, s.offset if s.num_bytes else 0, s.num_bytes, s.thread) for s in recorder.spans
    )
    for name, spans in (("a.png", recorder.spans), ("b.png", read)):
        write_timeline(spans, tmp_path / name, title="two saves")
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_timeline_refuses_nothing_and_nonsense(tmp_path):
    with pytest.raises(ConfigError, match="no spans"):
        write_timeline([], tmp_path / "a.png")
    for text in ("", "[]", '{"traceEvents": [{"ph": "X"}]}', "[" * 100_000):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CorruptCheckpointError, match=r"bad\.json"):
            read_trace(tmp_path / "bad.json")


def test_a_trace_may_hold_events_of_others(tmp_path):
    events = [{"ph": "E"}, {"ph": "M", "name": "thread_name", "tid": 7, "args": {"name": "w"}}]
    events.append({"ph": "X", "name": "write", "ts": 1e6, "dur": 1e6, "tid": 7})
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert read_trace(tmp_path / "trace.json") == [Span("write", 1.0, 2.0, "w")]


def test_recorder_keeps_the_newest():
    recorder = SpanRecorder(max_spans=10)
    for number in range(105):
        recorder.on_span(Span("write", number, number, "w"))
        assert len(recorder._spans) <= 20
    assert [span.start_s for span in recorder.spans] == list(range(95, 105))


def test_log_records_carry_the_metrics(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, logger="async_ckpt"):
        train(tmp_path / "root", LoggingObserver(), num_saves=1)
        LoggingObserver().on_commit(CommitMetrics("lost"), WriteError("disk gone"))
    records = [record for record in caplog.records if hasattr(record, "async_ckpt")]
    assert [record.levelname for record in records] == ["DEBUG", "INFO", "ERROR"]
    assert isinstance(records[0].async_ckpt, SaveMetrics)
    assert "step-0" in records[1].getMessage()
    assert "/s" in records[1].getMessage()
    assert "disk gone" in records[2].getMessage()


class Scalars:
    def __init__(self) -> None:
        self.points: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.points.setdefault(tag, []).append((global_step, scalar_value))


def test_tensorboard_points_lie_at_the_tags_step():
    scalars = Scalars()
    observer = TensorBoardObserver(scalars)
    observer.on_commit(CommitMetrics("run2-step-000100", size_bytes=7, stall_s=0.5), None)
    observer.on_commit(CommitMetrics("final"), WriteError("no"))
    TensorBoardObserver(scalars, step_of=lambda metrics: 42, prefix="x").on_commit(CommitMetrics("a1"), None)
    assert scalars.points["checkpoint/stall_s"] == [(100, 0.5)]
    assert scalars.points["checkpoint/failed"] == [(100, 0.0), (2, 1.0)]
    assert scalars.points["x/size_bytes"] == [(42, 0)]


def test_tensorboard_with_its_own_library(tmp_path):
    pytest.importorskip("tensorboard")
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        TensorBoardObserver(writer).on_commit(CommitMetrics("step-1"), None)
    assert [path for path in tmp_path.iterdir() if "tfevents" in path.name]


def test_prometheus_counts_and_times(tmp_path):
    prometheus = pytest.importorskip("prometheus_client")
    from async_ckpt import PrometheusObserver

    registry = prometheus.CollectorRegistry()
    observer = PrometheusObserver(registry)
    train(tmp_path / "root", observer, num_saves=2)
    observer.on_commit(CommitMetrics("lost"), WriteError("no"))
    value = registry.get_sample_value
    assert value("async_ckpt_commits_total") == 2
    assert value("async_ckpt_commit_failures_total") == 1
    assert value("async_ckpt_stall_seconds_count") == 2
    size_bytes = sum(path.stat().st_size for path in (tmp_path / "root").rglob("*.pt"))
    assert value("async_ckpt_durable_bytes_total") == size_bytes
    assert sum(value("async_ckpt_files_total", {"io": io}) or 0 for io in ("direct", "buffered")) == 2
    with pytest.raises(ValueError, match="Duplicated"):
        PrometheusObserver(registry)
    PrometheusObserver(registry, prefix="other")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_draws_on_a_terminal_only(tmp_path):
    from rich.console import Console

    for file, drawn in ((Terminal(), True), (io.StringIO(), False)):
        progress = CommitProgress(Console(file=file, force_terminal=drawn))
        with AsyncCheckpointEngine(tmp_path / str(drawn), staging_bytes=64 << 20, observers=(progress,)) as engine:
            gate = HeldCommit(engine)
            pending = saved(engine, {"x": torch.zeros(1 << 20)}, path="x.pt")
            if drawn:
                gate.open_after_draw(file)
            else:
                gate.open()
            progress.wait(pending, timeout_s=60)
        assert pending.done()
        assert ("committing t" in file.getvalue()) == drawn


class HeldCommit:
    """Keeps commits from ending until something was drawn."""

    def __init__(self, engine) -> None:
        import threading

        self._gate = threading.Event()
        for _ in range(64):
            commits_of(engine).pool.submit_io(self._gate.wait)

    def open(self) -> None:
        self._gate.set()

    def open_after_draw(self, file: Terminal) -> None:
        write = file.write

        def writing(text: str) -> int:
            if "committing" in text:
                self._gate.set()
            return write(text)

        file.write = writing


def test_progress_raises_the_failure_of_a_commit():

    from async_ckpt.engine.pending import PendingCommit

    pending = PendingCommit("t", CommitMetrics("t"), lambda: "nothing")
    pending.resolve("t", WriteError("disk gone"))
    with pytest.raises(WriteError, match="disk gone"):
        CommitProgress().wait(pending)


def test_loads_show_a_bar_on_a_terminal_only(tmp_path):
    from rich.console import Console

    from async_ckpt import load, show_progress

    train(tmp_path / "root", num_saves=1)
    for file, drawn in ((Terminal(), True), (io.StringIO(), False)):
        with show_progress(Console(file=file, force_terminal=drawn, width=120)):
            load(tmp_path / "root" / "step-0" / "state.pt")
        assert ("loading" in file.getvalue()) == drawn
    outside = Terminal()
    load(tmp_path / "root" / "step-0" / "state.pt")
    assert outside.getvalue() == ""


def test_stall_includes_the_wait_of_the_guard(tmp_path, held_copies):
    import threading

    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=64 << 10) as engine:
        engine.guard(optimizer)
        held = held_copies(engine)
        pending = saved(engine, model.state_dict(), path="m.pt")

        def let_go_once_the_step_waits() -> None:
            while exclusion_of(guard_of(engine)).idle:
                os.sched_yield()
            held.let_go()

        thread = threading.Thread(target=let_go_once_the_step_waits)
        thread.start()
        optimizer.step()
        thread.join()
        pending.result()
    assert 0.0 < pending.metrics.guard_wait_s <= pending.metrics.stall_s
