"""`async-ckpt demo`: train a small GPT, for real, on the Python standard library's sources, saving often, and show what
that cost.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

from ..failing import EXIT_OK
from ..output import console, number, print_table

if TYPE_CHECKING:
    from .training import StepRecord


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
    from .report import plot_steps, summary
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
