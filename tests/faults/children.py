"""Processes that work on a root and note beside it what was reported to them, a line each."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.support.processes import context

from .workloads import TIMEOUT_S, Told


def begin_notes(root: Path) -> Callable[[str], object]:
    """In the child: returns what notes a line; its standard error goes to a file too."""
    out = os.open(f"{root}.notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(f"{root}.err", os.O_WRONLY | os.O_CREAT, 0o600), 2)
    return lambda text: os.writev(out, [text.encode() + b"\n"])


class Child:
    """`work(root, *arguments)` in a process of its own, which tries to commit these tags and versions."""

    def __init__(
        self, root: Path, told: Told, commits: Iterable[tuple[str, int]], work: Callable[..., None], *arguments: Any
    ) -> None:
        for tag, version in commits:
            told.attempt(tag, version)
        self._root, self._told = root, told
        self._process = context.Process(target=work, args=(root, *arguments))
        self._process.start()

    def notes(self) -> list[str]:
        """Wait for its end, in bounded time; `told` hears of every commit ("TAG VERSION") that it noted."""
        self._process.join(2 * TIMEOUT_S)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"the process hangs: {self.errors()}")
        notes = Path(f"{self._root}.notes")
        lines = notes.read_text().splitlines() if notes.exists() else []
        for line in lines:
            tag, _, version = line.partition(" ")
            if version.isdigit():
                self._told.commit(tag, int(version))
        return lines

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    @property
    def was_killed(self) -> bool:
        return self.exit_code == -signal.SIGKILL

    def errors(self) -> str:
        """The end of what it wrote to standard error."""
        return Path(f"{self._root}.err").read_text()[-3000:]

    def close(self) -> None:
        self._process.close()
