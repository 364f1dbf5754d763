"""Progress bars for long commits and loads; silent when the output is not a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BackpressureTimeout
from ..metrics import CommitMetrics, Observer, Span, listening_to_reads
from ..threads.locks import Lock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_REFRESH_S = 0.1


def terminal(console: Console | None = None) -> Console:
    """The console that progress is drawn on: standard error."""
    if console is not None:
        return console
    from rich.console import Console

    return Console(stderr=True)


def progress_bar(console: Console) -> Progress:
    """An empty bar with bytes, rate and remaining time; use it as a context."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


@contextlib.contextmanager
def show_progress(console: Console | None = None) -> Iterator[None]:
    """Draw a bar for every `load` and `load_into` within the block, when standard error is a terminal.

    ```python
    with async_ckpt.show_progress():
        engine.load_into(model.state_dict(), "step-100/model.pt")
    ```
    """
    screen = terminal(console)
    if not screen.is_terminal:
        yield
        return
    tasks: dict[str, Any] = {}
    lock = Lock()
    with progress_bar(screen) as bar:

        def on_read(name: str, num_bytes: int, total_bytes: int) -> None:
            with lock:
                if name not in tasks:
                    tasks[name] = bar.add_task(f"loading {name}", total=total_bytes)
            bar.advance(tasks[name], num_bytes)

        with listening_to_reads(on_read):
            yield


class Awaited(Protocol):
    """What is needed of a pending commit."""

    tag: str
    metrics: CommitMetrics

    def wait(self, timeout_s: float | None) -> bool: ...

    def result(self) -> object: ...


class CommitProgress(Observer):
    """Waits for commits with a bar: give it to the engine as an observer, then call `wait`. Any thread."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._lock = Lock()
        self._written: dict[str, int] = {}

    def on_span(self, span: Span) -> None:
        if span.kind == "write":
            with self._lock:
                self._written[span.tag] = self._written.get(span.tag, 0) + span.num_bytes

    def on_commit(self, metrics: CommitMetrics, error: BaseException | None) -> None:
        with self._lock:
            self._written.pop(metrics.tag, None)

    def on_abort(self, metrics: CommitMetrics, error: BaseException) -> None:
        self.on_commit(metrics, error)

    def wait(self, *pending: Awaited, timeout_s: float = float("inf")) -> None:
        """Block until all have ended, with a bar for each when standard error is a terminal.

        Raises:
            BackpressureTimeout: not within `timeout_s` seconds. CheckpointError: the first failure.
        """
        deadline_s = time.monotonic() + timeout_s
        screen = terminal(self._console)
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(progress_bar(screen)) if screen.is_terminal else None
            for commit in pending:
                self._wait_for(commit, deadline_s, bar)
        for commit in pending:
            commit.result()

    def _wait_for(self, commit: Awaited, deadline_s: float, bar: Progress | None) -> None:
        task = None
        while not commit.wait(min(_REFRESH_S if bar is not None else 60.0, deadline_s - time.monotonic())):
            if time.monotonic() >= deadline_s:
                raise BackpressureTimeout(
                    f"the commit of {commit.tag!r} did not end in time and goes on; nothing is visible under "
                    "this tag yet"
                )
            if bar is not None:
                total_bytes = sum(save.size_bytes for save in commit.metrics.saves)
                task = bar.add_task(f"committing {commit.tag}", total=total_bytes) if task is None else task
                with self._lock:
                    bar.update(task, completed=self._written.get(commit.tag, 0))
