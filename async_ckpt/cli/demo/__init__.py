"""`async-ckpt demo`: train a small GPT, for real, on the Python standard library's sources, saving often, and show what
that cost.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...observers.units import format_bytes, format_rate
from ..common import EXIT_OK, console, number, print_table

if TYPE_CHECKING:
    from .training import DemoResult, StepRecord


def options(parser: argparse.ArgumentParser) -> None:
    count = number(int, 1)
    parser.add_argument(
        "--root", default="runs/demo", help="where checkpoints go; a second run resumes there [runs/demo]"
    )
    parser.add_argument("--steps", metavar="N", type=count, default=250, help="training steps [250]")
    parser.add_argument("--save-every", metavar="N", type=count, default=10, help="steps between two saves [10]")
    parser.add_argument("--keep-last", metavar="N", type=count, default=3, help="checkpoints to keep [3]")
    parser.add_argument("--device", default="auto", help="'cpu', 'cuda' or another of torch's, or 'auto' [auto]")
    parser.add_argument("--plot", metavar="PNG", help="write the step times as a PNG (needs matplotlib)")
    parser.add_argument("--trace", metavar="FILE", help="write a trace for the Perfetto viewer")


def command(
    root: str, steps: int, save_every: int, keep_last: int, device: str, plot: str | None, trace: str | None
) -> int:
    """Train a small GPT on text for a minute or two, saving every few steps; interrupt it and run it again to see it
    resume.
    """
    from ...observers.trace import TraceObserver
    from .training import DemoConfig, train

    config = DemoConfig(root=root, num_steps=steps, save_every=save_every, keep_last=keep_last, device=device)
    screen = console()

    def on_step(record: StepRecord) -> None:
        if record.saved or record.step == 1:
            saved = "  saved" if record.saved else ""
            screen.print(f"step {record.step:5d}  loss {record.loss:.3f}  {1e3 * record.seconds:6.1f} ms{saved}")

    with contextlib.ExitStack() as stack:
        observers: tuple[Any, ...] = ()
        if trace is not None:
            observers = (stack.enter_context(TraceObserver(trace, "async-ckpt demo")),)
        result = train(config, on_step, observers)
    if result.resumed_from is not None:
        print(f"resumed from {result.resumed_from}")
    if not result.steps:
        print(f"step {steps} was reached by an earlier run in {root!r}; ask for more --steps or another --root")
        return EXIT_OK
    print("\nWhat checkpointing cost")
    print_table(("figure", "value"), summary(result), right=("value",))
    if plot is not None:
        plot_steps(result.steps, plot)
        print(f"step times: {plot}")
    if trace is not None:
        print(f"trace: {trace} (open it at https://ui.perfetto.dev)")
    return EXIT_OK


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
