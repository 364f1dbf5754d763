"""`python -m benchmarks.pictures`: the README's pictures, from a run of the demo on this machine.

Writes into benchmarks/figures: step_times.png (the demo's steps, with the saves marked), timeline.png (who did what
while one checkpoint was saved), list.svg and verify.svg (what the command line shows). Needs the `plot` extra; takes
about two minutes.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from async_ckpt import SpanRecorder, write_timeline
from async_ckpt.cli import main as command_line
from async_ckpt.cli.demo.report import plot_steps
from async_ckpt.cli.demo.training import DemoConfig, train
from async_ckpt.cli.output import recording
from async_ckpt.host.process import current_owner
from async_ckpt.metrics import Span

FIGURES = Path(__file__).resolve().parent / "figures"
_COLUMNS = 112


def main() -> None:
    """Train, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="training steps of the demo")
    parser.add_argument("--save-every", type=int, default=20, help="steps between two saves")
    parser.add_argument("--out", type=Path, default=FIGURES, help="where the pictures go")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
        root = Path(folder) / "runs" / "demo"
        recorder = SpanRecorder()
        config = DemoConfig(root=str(root), num_steps=arguments.steps, save_every=arguments.save_every, keep_last=4)
        result = train(config, observers=(recorder,))
        # The first steps warm up allocators and caches; they would set the scale of the whole plot.
        plot_steps(result.steps[5:], str(arguments.out / "step_times.png"))
        tag = result.commits[-2].tag
        write_timeline(
            _of_one_save(recorder.spans, tag), arguments.out / "timeline.png", title=f"Saving {tag}: who did what"
        )
        capture(
            ["list", str(root)],
            arguments.out / "list.svg",
            shown="async-ckpt list runs/demo",
            before=lambda: _leave_staging(root),
        )
        capture(
            ["verify", str(root)],
            arguments.out / "verify.svg",
            shown="async-ckpt verify runs/demo",
            before=lambda: _damage(root),
        )
    for path in sorted(arguments.out.glob("*")):
        print(path)


def _of_one_save(spans: list[Span], tag: str) -> list[Span]:
    return [span for span in spans if span.tag == tag]


def capture(arguments: list[str], path: Path, *, shown: str, before) -> None:
    """Run a command line and write what it prints as an SVG of a terminal."""
    before()
    screen = Console(record=True, force_terminal=True, width=_COLUMNS, file=io.StringIO(), highlight=False)
    screen.print(f"$ {shown}", style="bold")
    with recording(screen):
        try:
            command_line(arguments)
        except SystemExit as left:
            screen.print(f"$ echo $?\n{left.code or 0}", style="dim")
    screen.save_svg(str(path), title="async-ckpt")


def _leave_staging(root: Path) -> None:
    """What a process that was killed in the middle of a save leaves behind."""
    me = current_owner()
    staging = root / f".staging.step-000210.{me.host}-{me.boot}-{me.pid_namespace}-4000000-1.0"
    staging.mkdir(mode=0o700)
    newest = sorted(path for path in root.iterdir() if not path.name.startswith("."))[-1]
    shutil.copyfile(newest / "model.pt", staging / "model.pt")


def _damage(root: Path) -> None:
    """One flipped byte in the middle of one file."""
    tags = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    with open(tags[1] / "model.pt", "r+b") as file:
        file.seek(4_000_000)
        byte = file.read(1)
        file.seek(4_000_000)
        file.write(bytes([byte[0] ^ 1]))


if __name__ == "__main__":
    main()
