"""`python -m benchmarks.report results/ --out benchmarks/figures`: tables (report.md) and plots from the JSON lines.

Of each scenario, workload and size: limits on top, then contenders by their main figure, then those without numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import Group, Row, Run, Spread, group, read, reduced, spread, stages, training_figures

Column = tuple[str, Callable[[Row], str]]
GIB = 1 << 30


def ms(figure: Spread | None) -> str:
    return "" if figure is None else figure.text(1e3, 1)


def plain(figure: Spread | None, digits: int = 3) -> str:
    return "" if figure is None else figure.text(1.0, digits)


def mib(figure: Spread | None) -> str:
    return "" if figure is None else figure.text(1 / (1 << 20), 0)


def rate(row: Row, key: str) -> str:
    """GiB/s of the state's bytes at the median of `key`."""
    took, size = row.samples(key), row.samples("num_bytes")
    return f"{size.median / took.median / GIB:.2f}" if took and size and took.median > 0 else ""


def training(row: Row, key: str) -> Spread | None:
    return spread(training_figures(run).get(key) for run in row.good())


def stage_text(row: Row) -> str:
    found = [stages(run) for run in row.good()]
    found = [one for one in found if one]
    if not found:
        return ""
    return ", ".join(f"{key[:-2]} {reduced([one[key] for one in found]).median:.3f}" for key in found[0])


COLUMNS: dict[str, tuple[Callable[[Row], Spread | None], list[Column]]] = {
    "save": (
        lambda row: row.samples("durable_s") or row.samples("stall_s"),
        [
            ("stall, ms", lambda row: ms(row.samples("stall_s"))),
            ("safe to mutate, ms", lambda row: ms(row.samples("safe_s"))),
            ("reported saved, s", lambda row: plain(row.samples("saved_s"))),
            ("durable, s", lambda row: plain(row.samples("durable_s"))),
            ("durable, GiB/s", lambda row: rate(row, "durable_s")),
            ("first: stall, ms", lambda row: ms(row.first("stall_s"))),
            ("first: durable, s", lambda row: plain(row.first("durable_s"))),
            ("start, s", lambda row: plain(row.top("setup_s"))),
            ("prewarm, s", lambda row: plain(row.top("prewarm_s"))),
            ("synced by", lambda row: row.text("synced_by")),
        ],
    ),
    "training": (
        lambda row: training(row, "slowdown"),
        [
            ("wall, with / without", lambda row: plain(training(row, "slowdown"))),
            ("s per checkpoint", lambda row: plain(training(row, "per_checkpoint_s"))),
            ("s per checkpoint, drained", lambda row: plain(training(row, "drained_per_checkpoint_s"))),
            ("stall, ms", lambda row: ms(training(row, "stall_s"))),
            ("stages of one checkpoint, thread seconds", stage_text),
        ],
    ),
    "gil": (
        lambda row: row.samples("background_s"),
        [
            ("longest hold behind save, ms", lambda row: ms(row.samples("background_s"))),
            ("same window, control process, ms", lambda row: ms(row.samples("control_s"))),
            ("longest hold inside save, ms", lambda row: ms(row.samples("during_save_s"))),
            ("idle, ms", lambda row: ms(row.top("idle_s"))),
        ],
    ),
    "restore": (
        lambda row: row.samples("restore_s"),
        [
            ("read, s", lambda row: plain(row.samples("restore_s"))),
            ("GiB/s", lambda row: rate(row, "restore_s")),
            ("still cached", lambda row: "" if (f := row.samples("resident_fraction")) is None else f"{f.high:.1%}"),
        ],
    ),
    "memory": (
        lambda row: row.top("tree_extra_bytes"),
        [
            ("extra peak, all processes, MiB", lambda row: mib(row.top("tree_extra_bytes"))),
            ("extra peak, this process, MiB", lambda row: mib(row.top("hwm_extra_bytes"))),
            ("state, MiB", lambda row: mib(row.samples("num_bytes"))),
        ],
    ),
    "planning": (
        lambda row: row.samples("us_per_tensor"),
        [
            ("repeated, us per tensor", lambda row: plain(row.samples("us_per_tensor"), 2)),
            ("first, us per tensor", lambda row: plain(row.first("us_per_tensor"), 2)),
        ],
    ),
}


def cell(text: str) -> str:
    """Table-safe, on one line."""
    return " ".join(text.replace("|", "\\|").split())


def in_order(scenario: str, rows: dict[str, Row]) -> list[Row]:
    """Limits first, then by the scenario's main figure, those without numbers last."""
    main = COLUMNS[scenario][0]

    def key(row: Row) -> tuple[int, float, str]:
        figure = main(row)
        if figure is None:
            return (2, 0.0, row.contender)
        return (0 if row.contender.startswith("limit_") else 1, figure.median, row.contender)

    return sorted(rows.values(), key=key)


def table(key: Group, rows: dict[str, Row]) -> str:
    """One group as Markdown: medians with [lowest to highest], number of samples, and why somebody has none."""
    main, columns = COLUMNS[key.scenario]
    names = ["contender", *(title for title, _ in columns), "n", "note"]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in in_order(key.scenario, rows):
        figure = main(row)
        cells = [row.contender, *(text(row) for _, text in columns), str(figure.num) if figure else "0", row.reason()]
        lines.append("| " + " | ".join(cell(one) for one in cells) + " |")
    return "\n".join(lines)


def growth_table(groups: dict[Group, dict[str, Row]]) -> str:
    """Stall and durable time per GiB over the sizes of one workload; "" where there is only one size."""
    sizes: dict[str, list[Group]] = {}
    for key in groups:
        if key.scenario == "save" and key.device == "cpu":
            sizes.setdefault(key.workload, []).append(key)
    parts = []
    for workload, keys in sizes.items():
        if len(keys) < 2:
            continue
        heads = [f"{key.size_mib} MiB" for key in keys]
        parts += [f"`{workload}`, durable seconds per GiB:", "", f"| contender | {' | '.join(heads)} |"]
        parts.append("|" + " --- |" * (len(keys) + 1))
        for name in sorted({name for key in keys for name in groups[key]}):
            cells = []
            for key in keys:
                row = groups[key].get(name)
                took = row.samples("durable_s") if row else None
                size = row.samples("num_bytes") if row else None
                cells.append(f"{took.median / size.median * GIB:.3f}" if took and size else "")
            if any(cells):
                parts.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def machine(runs: list[Run]) -> str:
    """Hardware, system and versions of the runs; says so when they are not all from the same machine."""
    environments: list[dict[str, Any]] = [run["environment"] for run in runs if run.get("environment")]
    if not environments:
        return "No run left a description of its machine."
    hardware = ("cpu", "num_cores", "torch_threads", "memory_bytes", "gpu")
    system = ("kernel", "transparent_hugepage", "file_system")
    seen = {str([one.get(name) for name in (*hardware, *system)]) for one in environments}
    last = environments[-1]
    disk = last["file_system"]
    lines = [
        f"- {last['cpu']}, {last['num_cores']} cores, {last['memory_bytes'] / GIB:.1f} GiB, GPU: "
        f"{(last['gpu'] or {}).get('name', 'none')}",
        f"- Linux {last['kernel']}, {disk['fs_type']} ({disk['mount_options']}), scheduler "
        f"{disk.get('scheduler', 'unknown')}",
        "- " + ", ".join(f"{name} {version}" for name, version in last["versions"].items()),
    ]
    if len(seen) > 1:
        lines.append(f"- **From {len(seen)} different machines or settings: do not compare across them.**")
    return "\n".join(lines)


def configurations(groups: dict[Group, dict[str, Row]]) -> str:
    """What each contender was told to do."""
    known = [row for rows in groups.values() for row in rows.values() if row.text("config")]
    texts = {row.contender: row.text("config") for row in known}
    return "\n".join(f"- `{name}`: {text}" for name, text in sorted(texts.items()))


def document(runs: list[Run], plots: list[Path]) -> str:
    """The whole report as Markdown."""
    groups = group(runs)
    about = "Medians [lowest to highest]; n is the number of samples. How they are measured: `benchmarks/README.md`."
    parts = ["# Results", "", about, ""]
    parts += ["## Machine", "", machine(runs), ""]
    for key, rows in groups.items():
        parts += [f"## {key.title()}", "", table(key, rows), ""]
    growth = growth_table(groups)
    if growth:
        parts += ["## Growth with size", "", growth]
    if plots:
        parts += ["## Plots", "", *(f"![{path.stem}]({path.name})" for path in plots), ""]
    parts += ["## Configurations", "", configurations(groups), ""]
    parts += ["## Commands", "", *(f"    {line}" for line in sorted({run["command_line"] for run in runs})), ""]
    return "\n".join(parts)


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
