"""Tables of what a sweep has done, and the command line that prints them."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Row:
    """One line: how many operations the job has, how many faults were injected, how many were survived, how many lost data."""

    name: str
    operations: int = 0
    injected: int = 0
    survived: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def check(self, what: str, oracle: Callable[[], object], *, stop: bool) -> None:
        """Count one injected fault; `stop` lets the first failure through, else it is noted and counted as lost."""
        self.injected += 1
        try:
            oracle()
        except Exception as error:
            self.lost += 1
            if stop:
                raise AssertionError(f"{self.name}: {what}: {error}") from error
            if len(self.notes) < 5:
                self.notes.append(f"{what}: {''.join(traceback.format_exception(error))}"[:4000])
        else:
            self.survived += 1


def print_table(title: str, rows: list[Row]) -> None:
    width = max([len(row.name) for row in rows] + [8])
    print(f"\n{title}\n{'':{width}}  operations  injected  survived  lost")
    total = Row("total")
    for row in rows:
        for column in ("operations", "injected", "survived", "lost"):
            setattr(total, column, getattr(total, column) + getattr(row, column))
    for row in [*rows, total]:
        print(f"{row.name:{width}}  {row.operations:10}  {row.injected:8}  {row.survived:8}  {row.lost:4}")
    for row in rows:
        for note in row.notes:
            print(f"  LOST {row.name}: {note}", file=sys.stderr)


def command(
    title: str, description: str | None, run: Callable[[argparse.Namespace], list[Row]], *extra: tuple[str, dict[str, Any]]
) -> None:
    """Parse the options every sweep has, run it, print the table (or JSON); exit code 1 when anything was lost."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--full", action="store_true", help="every point; without it, a sample")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the table there too")
    parser.add_argument("--seed", type=int, default=1)
    for name, options in extra:
        parser.add_argument(name, **options)
    options = parser.parse_args()
    started = time.perf_counter()
    rows = run(options)
    print_table(title, rows)
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s, seed {options.seed}{', every point' if options.full else ', a sample (--full for every point)'}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(
                {"sweep": title, "full": options.full, "seed": options.seed, "seconds": seconds, "rows": [asdict(r) for r in rows]},
                file,
                indent=1,
            )
    sys.exit(1 if any(row.lost for row in rows) else 0)
