"""`async-ckpt demo`: train a small GPT, saving often, and show what that cost."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from .output import console


def command(
    root: Annotated[str, typer.Option(help="Where checkpoints go; a second run resumes there.")] = "runs/demo",
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 250,
    save_every: Annotated[int, typer.Option(help="Steps between two saves.", min=1)] = 10,
    keep_last: Annotated[int, typer.Option(help="Checkpoints to keep.", min=1)] = 3,
    device: Annotated[str, typer.Option(help="'cpu', 'cuda' or another of torch's, or 'auto'.")] = "auto",
    plot: Annotated[
        str | None, typer.Option(help="Write the step times as a PNG (needs matplotlib).", show_default=False)
    ] = None,
    trace: Annotated[
        str | None, typer.Option(help="Write a trace for the Perfetto viewer.", show_default=False)
    ] = None,
) -> None:
    """Train a small GPT on text for a minute or two, saving every few steps; interrupt it and run it again to see it
    resume.
    """
    from ..observers.trace import TraceObserver
    from .demo.report import plot_steps, summary_table
    from .demo.training import DemoConfig, StepRecord, train

    config = DemoConfig(root=root, num_steps=steps, save_every=save_every, keep_last=keep_last, device=device)
    screen = console()
    observers: list[Any] = []
    with contextlib.ExitStack() as stack:
        if trace is not None:
            observers.append(stack.enter_context(TraceObserver(trace, "async-ckpt demo")))

        def on_step(record: StepRecord) -> None:
            if record.saved or record.step == 1:
                screen.print(
                    f"step {record.step:5d}  loss {record.loss:.3f}  {1e3 * record.seconds:6.1f} ms"
                    + ("  saved" if record.saved else "")
                )

        result = train(config, on_step, tuple(observers))
    if result.resumed_from is not None:
        typer.echo(f"resumed from {result.resumed_from}")
    if not result.steps:
        typer.echo(f"step {steps} was reached by an earlier run in {root!r}; ask for more --steps or another --root")
        return
    screen.print(summary_table(result))
    if plot is not None:
        plot_steps(result.steps, plot)
        typer.echo(f"step times: {plot}")
    if trace is not None:
        typer.echo(f"trace: {trace} (open it at https://ui.perfetto.dev)")
