"""Keeps results as JSON lines, one file per machine and month, and reduces them: medians with their spread, per
contender, workload and size.

Guarantees: every number in a table or plot comes out of these files; a contender without numbers keeps its reason.
Lines are only ever appended; where a run was repeated, its newest line counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.environment import describe

Run = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median, extremes and number of samples of one figure."""

    median: float
    low: float
    high: float
    num: int

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        return f"{self.median * scale:.{digits}f} [{self.low * scale:.{digits}f} to {self.high * scale:.{digits}f}]"


def reduced(values: Collection[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


def spread(values: Iterable[float | None]) -> Spread | None:
    """None where there is nothing to reduce."""
    found = [value for value in values if value is not None]
    return reduced(found) if found else None


@dataclass(frozen=True, order=True)
class Group:
    """Runs that may be compared with each other."""

    scenario: str
    workload: str
    size_mib: int
    device: str = "cpu"

    def title(self) -> str:
        where = "" if self.device == "cpu" else f", {self.device}"
        return f"{self.scenario}: `{self.workload}`, {self.size_mib} MiB{where}"

    def slug(self) -> str:
        return f"{self.workload}-{self.size_mib}" + ("" if self.device == "cpu" else f"-{self.device}")


@dataclass
class Row:
    """All runs of one contender in one group."""

    contender: str
    runs: list[Run] = field(default_factory=list)

    def good(self) -> list[Run]:
        return [run for run in self.runs if run["status"] == "ok"]

    def samples(self, key: str) -> Spread | None:
        """One key over all samples of all good runs."""
        return spread(sample.get(key) for run in self.good() for sample in run.get("samples", []))

    def first(self, key: str) -> Spread | None:
        """One key of the first saves."""
        return spread(run.get("first", {}).get(key) for run in self.good())

    def top(self, key: str) -> Spread | None:
        """One key of the runs themselves."""
        return spread(run.get(key) for run in self.good())

    def text(self, key: str) -> str:
        """A word that is the same in all runs, such as the configuration."""
        return next((str(run[key]) for run in self.runs if run.get(key)), "")

    def reason(self) -> str:
        """Why there are no numbers, or how many runs are missing from them."""
        bad = [run for run in self.runs if run["status"] != "ok"]
        if not bad:
            return ""
        part = "" if len(bad) == len(self.runs) else f"{len(bad)} of {len(self.runs)} runs "
        return f"{part}{bad[0]['status']}: {bad[0]['reason']}"


def file_of(environment: dict[str, Any], folder: Path) -> Path:
    """The file of this machine and month, such as ``amd-epyc-2-cores-2026-11.jsonl``."""
    name = environment["gpu"]["name"] if environment.get("gpu") else environment["cpu"]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / f"{slug}-{environment['num_cores']}-cores-{time.strftime('%Y-%m')}.jsonl"


def append(run: Run, folder: Path) -> Path:
    """Add one run as a line; returns the file. A probe's line has its name under "probe", and figures of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(run.get("environment") or describe(folder), folder)
    with path.open("a") as file:
        file.write(json.dumps(run) + "\n")
    return path


def parser_of(about: str | None, **defaults: float | str) -> argparse.ArgumentParser:
    """What every probe is asked: a directory, its settings (an option for each of `defaults`), where results go."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--out", type=Path, help="folder of results; without it they are only printed")
    return parser


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(*arguments)` returns in a fresh interpreter, whose standard output is thrown away."""
    with ProcessPoolExecutor(1, get_context("spawn"), _silence) as process:
        return process.submit(work, *arguments).result()


def _silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def timed(call: Callable[[], object]) -> float:
    """The seconds that a call takes, not those that its result takes to be freed."""
    started = time.perf_counter()
    kept = call()
    taken_s = time.perf_counter() - started
    del kept
    return taken_s


def keep(given: argparse.Namespace, probe: str, figures: Run, environment: dict[str, Any] | None = None) -> None:
    """Append a probe's figures, where that was asked for; `environment` is that of `given.directory`."""
    if given.out is not None:
        append({"probe": probe, "environment": environment or describe(given.directory), **figures}, given.out)


def key_of(request: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for repetitions of one run."""
    return tuple(request[name] for name in ("scenario", "workload", "size_mib", "device", "contender", "repeat"))


def read(folder: Path) -> list[Run]:
    """Every run of the harness in a folder; lines of the probes are their own. Raises ValueError for another schema."""
    runs: dict[tuple[Any, ...], Run] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            run = json.loads(line)
            if run.get("probe"):
                continue
            if run.get("schema") != 1:
                raise ValueError(f"{path.name}: schema {run.get('schema')!r}, this report reads schema 1")
            runs[key_of(run["request"])] = run
    return list(runs.values())


def group(runs: Iterable[Run]) -> dict[Group, dict[str, Row]]:
    """Runs by what may be compared, then by contender."""
    found: dict[Group, dict[str, Row]] = defaultdict(dict)
    for run in runs:
        request = run["request"]
        key = Group(run["scenario"], request["workload"], request["size_mib"], request["device"])
        found[key].setdefault(run["contender"], Row(run["contender"])).runs.append(run)
    return dict(sorted(found.items()))


def training_figures(run: Run) -> dict[str, float]:
    """With against without, of one training run: ratio of walls, seconds per checkpoint (and with the drain)."""
    with_ = [s for s in run["segments"] if s["with_checkpoints"]]
    without = [s for s in run["segments"] if not s["with_checkpoints"]]
    if not with_ or not without:
        return {}
    plain = statistics.median(s["wall_s"] for s in without)
    loaded = statistics.median(s["wall_s"] for s in with_)
    drained = statistics.median(s["wall_s"] + s["drain_s"] for s in with_)
    num = max(1, with_[0]["num_checkpoints"])
    return {
        "slowdown": loaded / plain,
        "per_checkpoint_s": (loaded - plain) / num,
        "drained_per_checkpoint_s": (drained - plain) / num,
        "stall_s": statistics.median(stall for s in with_ for stall in s["stall_s"]),
    }


def stages(run: Run) -> dict[str, float]:
    """Copy, CRC, write and sync seconds of the last checkpoint, where the contender tells them."""
    details = [s["detail"] for s in run.get("segments", []) if s.get("detail")]
    details += [s["detail"] for s in run.get("samples", []) if s.get("detail")]
    if not details:
        return {}
    saves = details[-1].get("saves", [])
    return {
        key: sum(save.get(key, 0.0) for save in saves) for key in ("plan_s", "copy_s", "crc_s", "write_s", "sync_s")
    }
