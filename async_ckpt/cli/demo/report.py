"""The demo's table and picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table

from .training import DemoResult, StepRecord


def summary_table(result: DemoResult) -> Table:
    """Stall per save, step time with and without a save in flight, durable throughput, bytes."""
    table = Table(title="What checkpointing cost", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    commits = [p.metrics for p in result.commits]
    saving = [s for s in result.steps if s.saved]
    alone = [s.seconds for s in result.steps if not s.saved and not s.in_flight]
    beside = [s.seconds for s in result.steps if not s.saved and s.in_flight]
    table.add_row("steps, saves", f"{len(result.steps)}, {len(saving)}")
    table.add_row("parameters", f"{result.num_parameters:,}")
    if commits:
        table.add_row(
            "bytes per checkpoint", f"{commits[-1].size_bytes / 2**20:.1f} MiB in {commits[-1].num_files} files"
        )
        table.add_row("stall per save (create + save + commit)", _median_ms([m.stall_s for m in commits]))
        table.add_row("time until durable", _median_ms([m.total_s for m in commits]))
        table.add_row("durable throughput", f"{statistics.median(m.bytes_per_s for m in commits) / 2**20:.0f} MiB/s")
    table.add_row("step time, no save in flight", _median_ms(alone))
    table.add_row("step time, save in flight", _median_ms(beside))
    table.add_row("step time, saving", _median_ms([s.seconds for s in saving]))
    table.add_row("wall time", f"{result.wall_s:.1f} s")
    return table


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
    saved = [s for s in steps if s.saved]
    axes.scatter(
        [s.step for s in saved],
        [1e3 * s.seconds for s in saved],
        s=18,
        color="tab:red",
        zorder=3,
        label="step with a save",
    )
    for record in steps:
        if record.in_flight and not record.saved:
            axes.axvspan(record.step - 0.5, record.step + 0.5, color="tab:blue", alpha=0.12, linewidth=0)
    axes.set(
        xlabel="training step", ylabel="time in ms", ylim=(0, None), title="Step times; blue: a save is being written"
    )
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=130)
