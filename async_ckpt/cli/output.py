"""What commands print: JSON, or tables through rich, which is imported only for those."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import escaped

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_COLUMNS = 240
_PAD_COLUMNS = 40


def print_json(value: Any) -> None:
    """One JSON document on standard output, indented for a terminal; ASCII, so that no text can steer one."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def console() -> Console:
    """Standard output; wide where it is no terminal, so that nothing is cut for a program that reads it."""
    from rich.console import Console

    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=_PIPE_COLUMNS)


Row = Sequence[str]


def print_table(
    columns: Sequence[str], rows: Iterable[Row], *, right: Iterable[str] = (), styles: Sequence[str] = ()
) -> None:
    """A table without frames; `right` names the columns that hold numbers, `styles` has one style per row.

    Into a pipe it is plain text, nothing cut and nothing wrapped.
    """
    numbers = frozenset(right)
    cells = [[escaped(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        _print_plain(columns, cells, numbers)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column, justify="right" if column in numbers else "left", no_wrap=column in numbers or column == columns[0]
        )
    for index, row in enumerate(cells):
        table.add_row(*map(Text, row), style=styles[index] if styles else "")
    console().print(table)


def _print_plain(columns: Sequence[str], cells: list[list[str]], numbers: frozenset[str]) -> None:
    lines = [list(columns), *cells]
    # One long cell (metadata, an error) does not make all lines as long.
    widths = [
        max([len(columns[k]), *(len(line[k]) for line in cells if len(line[k]) <= _PAD_COLUMNS)])
        for k in range(len(columns))
    ]
    for line in lines:
        parts = [
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(columns, line, widths, strict=True)
        ]
        print("  ".join(parts).rstrip())
