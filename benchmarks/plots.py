"""The PNG plots: stall against durable, step times of real training runs, durable throughput against the limits.

Nothing here measures; everything comes from the rows of `results`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from benchmarks.results import Group, Row

GIB = 1 << 30
OURS, PEER, LIMIT = "#c0392b", "#4a6fa5", "#888888"


def color_of(name: str) -> str:
    """Ours, a limit, or a peer."""
    if name.startswith("async_ckpt"):
        return OURS
    return LIMIT if name.startswith("limit_") else PEER


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path


def stall_against_durable(key: Group, rows: dict[str, Row], folder: Path) -> Path | None:
    """Both axes logarithmic; down and left is better."""
    points = []
    for row in rows.values():
        stall, durable = row.samples("stall_s"), row.samples("durable_s")
        if stall and durable:
            points.append((row.contender, stall.median * 1e3, durable.median))
    if not points:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    for name, stall_ms, durable_s in points:
        axes.scatter(stall_ms, durable_s, color=color_of(name), zorder=3)
        axes.annotate(name, (stall_ms, durable_s), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="stall of the training thread, ms (median)",
        ylabel="until durable, s (median)",
    )
    axes.set_title(f"{key.workload}, {key.size_mib} MiB: stall against time until durable")
    axes.grid(True, which="both", alpha=0.25)
    return _save(figure, folder / f"stall_against_durable-{key.slug()}.png")


def durable_throughput(key: Group, rows: dict[str, Row], folder: Path) -> Path | None:
    """Bytes of state over seconds until durable; the best limit is drawn as a line."""
    rates = {}
    for row in rows.values():
        durable, size = row.samples("durable_s"), row.samples("num_bytes")
        if durable and size and durable.median > 0:
            rates[row.contender] = size.median / durable.median / GIB
    if not rates:
        return None
    names = sorted(rates, key=lambda name: rates[name])
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(names) + 1.6))
    axes.barh(names, [rates[name] for name in names], color=[color_of(name) for name in names])
    limits = [rate for name, rate in rates.items() if name.startswith("limit_fio")]
    if limits:
        axes.axvline(max(limits), color="black", linestyle="--", linewidth=1, label="best fio mode of the run")
        axes.legend(fontsize=8, loc="lower right")
    axes.set(
        xlabel="GiB/s from the call until synced (median)",
        title=f"{key.workload}, {key.size_mib} MiB: durable throughput",
    )
    axes.tick_params(axis="y", labelsize=8)
    return _save(figure, folder / f"durable_throughput-{key.slug()}.png")


def step_times(key: Group, rows: dict[str, Row], folder: Path) -> Path | None:
    """Each contender's own training run: step times with checkpoints over those without, one small panel each."""
    shown = [
        row
        for row in sorted(rows.values(), key=lambda row: row.contender)
        if any(run.get("segments") for run in row.good())
    ]
    if not shown:
        return None
    num_columns = 3
    num_lines = -(-len(shown) // num_columns)
    figure, grid = pyplot.subplots(
        num_lines, num_columns, figsize=(11, 1.9 * num_lines + 0.6), sharex=True, sharey=True, squeeze=False
    )
    for axes, row in zip(grid.flat, shown, strict=False):
        segments = next(run["segments"] for run in row.good() if run.get("segments"))
        with_: list[float] = next((s["step_s"] for s in segments if s["with_checkpoints"]), [])
        without: list[float] = next((s["step_s"] for s in segments if not s["with_checkpoints"]), [])
        axes.plot([s * 1e3 for s in without], color=LIMIT, linewidth=1, label="without")
        axes.plot([s * 1e3 for s in with_], color=color_of(row.contender), linewidth=1.2, label="with")
        axes.set_title(row.contender, fontsize=8)
        axes.grid(True, alpha=0.25)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_visible(False)
    grid[0][0].legend(fontsize=7)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("step, ms", fontsize=9)
    figure.suptitle(f"{key.workload}, {key.size_mib} MiB: step times with and without checkpoints", fontsize=10)
    return _save(figure, folder / f"step_times-{key.slug()}.png")


def draw(groups: dict[Group, dict[str, Row]], folder: Path) -> list[Path]:
    """Every plot that the results have numbers for."""
    made: list[Path | None] = []
    for key, rows in groups.items():
        if key.scenario == "save":
            made += [stall_against_durable(key, rows, folder), durable_throughput(key, rows, folder)]
        elif key.scenario == "training":
            made.append(step_times(key, rows, folder))
    return [path for path in made if path is not None]
