"""`python -m benchmarks.report results/ --out benchmarks/figures`: tables (report.md) and PNG plots from the JSON
lines.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.results import group, read
from benchmarks.tables import document


def main(argv: list[str] | None = None) -> int:
    """Write report.md and the plots; prints the tables. Returns 1 when there is nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/figures"))
    parser.add_argument("--no-plots", action="store_true", help="tables only; needs no matplotlib")
    arguments = parser.parse_args(argv)
    runs = read(arguments.results)
    if not runs:
        print(f"no results in {arguments.results}", file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    plots: list[Path] = []
    if not arguments.no_plots:
        from benchmarks.plots import draw

        plots = draw(group(runs), arguments.out)
    text = document(runs, plots)
    (arguments.out / "report.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
