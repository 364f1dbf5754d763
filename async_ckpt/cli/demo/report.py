"""The demo's figures and picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ...observers.units import format_bytes, format_rate
from .training import DemoResult, StepRecord


def summary(result: DemoResult) -> list[tuple[str, str]]:
    """Stall per save, step time with and without a save in flight, durable throughput, bytes: name and value."""
    commits = [pending.metrics for pending in result.commits]
    rows = [
        ("steps, saves", f"{len(result.steps)}, {sum(step.saved for step in result.steps)}"),
        ("parameters", f"{result.num_parameters:,}"),
    ]
    if commits:
        last = commits[-1]
        rows += [
            ("bytes per checkpoint", f"{format_bytes(last.size_bytes)} in {last.num_files} files"),
            ("stall per save (create + save + commit)", _median_ms([m.stall_s for m in commits])),
            ("time until durable", _median_ms([m.total_s for m in commits])),
            ("durable throughput", format_rate(statistics.median(m.bytes_per_s for m in commits))),
        ]
    kinds = {
        "no save in flight": [s.seconds for s in result.steps if not s.saved and not s.in_flight],
        "save in flight": [s.seconds for s in result.steps if not s.saved and s.in_flight],
        "saving": [s.seconds for s in result.steps if s.saved],
    }
    rows += [(f"step time, {kind}", _median_ms(seconds)) for kind, seconds in kinds.items()]
    return [*rows, ("wall time", f"{result.wall_s:.1f} s")]


def _median_ms(seconds: Sequence[float]) -> str:
    if not seconds:
        return "no such step"
    return f"{1e3 * statistics.median(seconds):.1f} ms (max {1e3 * max(seconds):.1f}, n={len(seconds)})"


def plot_steps(steps: Sequence[StepRecord], path: str) -> None:
    """Write a PNG of the step times with the saves marked. Needs matplotlib (the `plot` extra)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([s.step for s in steps], [1e3 * s.seconds for s in steps], linewidth=0.9, color="0.35", label="step")
    saved = {s.step: 1e3 * s.seconds for s in steps if s.saved}
    axes.scatter(list(saved), list(saved.values()), s=18, color="tab:red", zorder=3, label="step with a save")
    for record in steps:
        if record.in_flight and not record.saved:
            axes.axvspan(record.step - 0.5, record.step + 0.5, color="tab:blue", alpha=0.12, linewidth=0)
    title = "Step times; blue: a save is being written"
    axes.set(xlabel="training step", ylabel="time in ms", ylim=(0, None), title=title)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=130)
