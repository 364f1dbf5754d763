"""The two PNG plots: durable throughput against the limits, step times of real training runs; 1 GiB of `adamw`.

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


def draw(groups: dict[Group, dict[str, Row]], folder: Path, workload: str = "adamw") -> list[Path]:
    """A workload's save and training run; of several sizes the one nearest to 1 GiB."""
    made: list[Path | None] = []
    for scenario, plot in (("save", durable_throughput), ("training", step_times)):
        keys = [key for key in groups if key.scenario == scenario and key.workload == workload]
        if keys:
            key = min(keys, key=lambda key: abs(key.size_mib - 1024))
            made.append(plot(key, groups[key], folder))
    return [path for path in made if path is not None]
