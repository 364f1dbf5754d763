"""Tables of what a sweep has done, and the command line that prints them."""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

Point = TypeVar("Point")


@dataclass
class Row:
    """One line: operations of the job, faults that were injected, those that were survived, those that lost data."""

    name: str
    operations: int = 0
    injected: int = 0
    survived: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def check(self, how: Extent, what: str, oracle: Callable[..., object], *args: Any) -> None:
        """Count one injected fault, and whether the oracle found that it was survived."""
        self.injected += 1
        try:
            oracle(*args)
        except Exception as error:
            self.lost += 1
            if how.stop:
                raise AssertionError(f"{self.name}: {what}: {error}") from error
            if len(self.notes) < 5:
                self.notes.append(f"{what}: {''.join(traceback.format_exception(error))}"[:4000])
        else:
            self.survived += 1


@dataclass(frozen=True)
class Part:
    """Every `num_parts`-th point, from the `number`-th on (from 1): all parts together are the whole sweep."""

    number: int
    num_parts: int

    @staticmethod
    def parse(text: str) -> Part:
        number, _, num_parts = text.partition("/")
        part = Part(int(number), int(num_parts))
        if not 1 <= part.number <= part.num_parts:
            raise ValueError(f"part {text} of a sweep: the first of three is 1/3, the last 3/3")
        return part


@dataclass(frozen=True)
class Extent:
    """How much of a sweep is played: all points, a part of them, or `sample` of them drawn with `seed`."""

    sample: int | Part | None = None
    seed: int = 1
    stop: bool = True
    """Whether the first failure is raised, or counted as lost."""

    def of(self, points: Iterable[Point]) -> list[Point]:
        """The chosen points, in their order."""
        chosen, num = list(points), self.sample
        if isinstance(num, Part):
            return chosen[num.number - 1 :: num.num_parts]
        if num is None or num >= len(chosen):
            return chosen
        return [chosen[k] for k in sorted(random.Random(self.seed).sample(range(len(chosen)), num))]


ALL = Extent()


def extent_of(options: argparse.Namespace, num: int | None = None) -> Extent:
    """As the command line wants it: `num` points (None: all), unless it says --full or --part."""
    return Extent(options.part or (None if options.full else num), options.seed, stop=False)


COLUMNS = ("operations", "injected", "survived", "lost")


def print_table(title: str, rows: list[Any], columns: tuple[str, ...] = COLUMNS) -> None:
    """The rows with their sum. A row is a dataclass with a name, notes, and these columns."""
    width = max([len(row.name) for row in rows] + [8])
    print(f"\n{title}\n{'':{width}}  {'  '.join(f'{column:>{max(4, len(column))}}' for column in columns)}")
    lines = [(row.name, [getattr(row, column) for column in columns]) for row in rows]
    lines.append(("total", [sum(numbers) for numbers in zip(*(values for _, values in lines), strict=True)]))
    for name, values in lines:
        print(f"{name:{width}}  {'  '.join(f'{v:{max(4, len(c))}}' for c, v in zip(columns, values, strict=True))}")
    for row in rows:
        for note in row.notes:
            print(f"  LOST {row.name}: {note}", file=sys.stderr)


def command(
    title: str,
    description: str | None,
    run: Callable[[argparse.Namespace], Iterable[Any]],
    *extra: tuple[str, dict[str, Any]],
    columns: tuple[str, ...] = COLUMNS,
) -> None:
    """Parse the options every sweep has, run it, print the table; exit code 1 when anything was lost."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--full", action="store_true", help="every point; without it, a sample")
    parser.add_argument("--part", type=Part.parse, default=None, metavar="K/N", help="the K-th of N parts of --full")
    parser.add_argument("--seed", type=int, default=1)
    for name, settings in extra:
        parser.add_argument(name, **settings)
    options = parser.parse_args()
    started = time.perf_counter()
    options.full = options.full or options.part is not None
    rows = []
    for row in run(options):
        rows.append(row)
        print(row.name, *(getattr(row, column) for column in columns), flush=True)
    print_table(title, rows, columns)
    extent = "every point" if options.full else "a sample (--full for every point)"
    if options.part:
        extent = f"part {options.part.number} of {options.part.num_parts}"
    print(f"{time.perf_counter() - started:.0f} s, seed {options.seed}, {extent}")
    sys.exit(1 if any(row.lost for row in rows) else 0)
