"""`python -m benchmarks.run`: one process per contender and repeat, in alternating order, one line of JSON each.

Guarantees: contenders take turns within a repeat and the order turns round between repeats; a missing, failing, hanging
or memory-exhausting contender is a row with its reason; scratch files are removed after every child.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from benchmarks import contenders, results, workloads
from benchmarks.limits import LIMITS
from benchmarks.scenarios import planning, restore
from benchmarks.scenarios.common import SCENARIOS, Request
from benchmarks.watch import Watched, run_child

ROOT = Path(__file__).resolve().parent.parent


def candidates(scenario: str) -> tuple[str, ...]:
    """Who can take part in a scenario; "all" means these."""
    if scenario == "restore":
        return restore.NAMES
    if scenario == "planning":
        return (planning.NAME,)
    if scenario == "save":
        return (*LIMITS, *contenders.NAMES)
    return contenders.NAMES


def choose(scenario: str, wanted: str) -> list[str]:
    """Names from the command line; unknown ones stay, and become rows that say so."""
    if wanted == "all":
        return list(candidates(scenario))
    return [name.strip() for name in wanted.split(",") if name.strip()]


def order_of(names: list[str], repeat: int, seed: int) -> list[str]:
    """A seeded shuffle, turned round in every second repeat: no contender always follows the same one."""
    shuffled = list(names)
    random.Random(seed * 1000 + repeat // 2).shuffle(shuffled)
    return shuffled[::-1] if repeat % 2 else shuffled


def child_environment(run_id: str) -> dict[str, str]:
    """The caller's variables, with this checkout importable, quiet libraries, and a name for what outlives a child."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    quiet = {"PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3", "DLROVER_LOG_LEVEL": "ERROR"}
    return {**quiet, **os.environ, "PYTHONPATH": path, "BENCH_RUN_ID": run_id}


def tree_extra_bytes(result: dict[str, Any], watched: Watched) -> int | None:
    """Highest sampled memory of the process tree after the child's baseline mark, over what it was before."""
    mark = result.get("baseline_monotonic_s")
    if mark is None:
        return None
    end = result.get("end_monotonic_s", float("inf"))
    before = [size for when, size in watched.samples if when <= mark]
    after = [size for when, size in watched.samples if mark < when <= end]
    return max(after) - before[-1] if before and after else None


def run_one(request: Request, timeout_s: float, scratch: Path) -> dict[str, Any]:
    """One child in a scratch directory of its own; returns the whole JSON document."""
    place = Path(tempfile.mkdtemp(prefix="bench-", dir=scratch))
    run_id = f"bench-{uuid.uuid4().hex[:12]}"
    try:
        request = dataclasses.replace(request, directory=str(place / "data"))
        os.mkdir(request.directory)
        out = place / "result.json"
        asked = dataclasses.asdict(request)
        command = [sys.executable, "-m", "benchmarks.child", "--request", json.dumps(asked), "--out", str(out)]
        started = time.time()
        watched = run_child(
            command,
            timeout_s=timeout_s,
            sample_memory=request.scenario == "memory",
            environment=child_environment(run_id),
            log=place / "log.txt",
        )
        result = json.loads(out.read_text()) if out.exists() else explain(watched, timeout_s)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        for left in Path("/dev/shm").glob(f"{run_id}*"):
            left.unlink(missing_ok=True)
    if request.scenario == "memory":
        result["tree_extra_bytes"] = tree_extra_bytes(result, watched)
    result |= {name: asked[name] for name in ("scenario", "contender", "repeat", "seed")}
    result |= {"schema": 1, "started_unix_s": started, "elapsed_s": time.time() - started}
    return {**result, "request": {**asked, "directory": "(scratch)"}}


def explain(watched: Watched, timeout_s: float) -> dict[str, Any]:
    """A row for a child that left no result."""
    lines = watched.stderr_tail.strip().splitlines()
    last = lines[-1] if lines else "no output"
    if watched.ended == "timeout":
        return {"status": "timeout", "reason": f"no end after {timeout_s:.0f} s; last words: {last}"[:600]}
    if watched.ended == "memory":
        return {"status": "killed", "reason": "stopped: the machine's free memory ran out"}
    return {"status": "killed", "reason": f"died with exit code {watched.returncode}: {last}"[:600]}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--scenario", default="save", help=f"one or more of {', '.join(SCENARIOS)}, separated by commas"
    )
    parser.add_argument("--workload", default="adamw", help=f"one or more of {', '.join(workloads.NAMES)}")
    parser.add_argument("--size-mib", default="", help="one or more sizes; default: the workload's own")
    parser.add_argument("--contenders", default="all", help="'all', or names separated by commas")
    parser.add_argument("--repeats", type=int, default=5, help="child processes per contender")
    numbers = parser.add_argument_group("numbers of one child")
    for name, field, about in (
        ("saves", "num_saves", "measured saves (or reads)"),
        ("warmups", "num_warmups", "saves after the first one that are not counted"),
        ("steps", "num_steps", "training: steps per segment"),
        ("every", "every", "training: steps between checkpoints"),
        ("segments", "num_segments", "training: pairs of segments"),
        ("tokens", "num_tokens", "training: tokens per step"),
        ("seed", "seed", "of the states, the batches and the order of the contenders"),
    ):
        default = getattr(Request, field)
        numbers.add_argument(f"--{name}", dest=field, type=int, default=default, help=f"{about} (default: {default})")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--timeout-s", type=float, default=900.0, help="per child")
    parser.add_argument("--scratch", type=Path, default=None, help="directory on the disk under test; default: --out")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--resume", action="store_true", help="skip runs that have a good line already")
    return parser.parse_args(argv)


def requests_of(arguments: argparse.Namespace) -> list[Request]:
    """Every run of the command line, in the order in which it is done."""
    shared = {name: value for name, value in vars(arguments).items() if name in Request.__dataclass_fields__}
    found = []
    for scenario, workload in itertools.product(arguments.scenario.split(","), arguments.workload.split(",")):
        sizes = [int(size) for size in arguments.size_mib.split(",") if size]
        sizes = sizes or [workloads.default_size_mib(workload)]
        own = shared | {"scenario": scenario, "workload": workload, "directory": ""}
        if workload == "small" and scenario == "training":
            own["every"] = 1
        for size_mib, repeat in itertools.product(sizes, range(arguments.repeats)):
            for name in order_of(choose(scenario, arguments.contenders), repeat, arguments.seed):
                found.append(Request(**own | {"contender": name, "size_mib": size_mib, "repeat": repeat}))
    return found


def name_of(request: Request) -> str:
    return f"{request.scenario}-{request.workload}-{request.size_mib}-{request.contender}-r{request.repeat}"


def headline(result: dict[str, Any]) -> str:
    """One line of progress: the first sample's times, or why there are none."""
    if result["status"] != "ok":
        return f"{result['status']}: {result['reason']}"
    if result.get("segments"):
        return ", ".join(
            f"{'with' if s['with_checkpoints'] else 'without'} {s['wall_s']:.2f} s" for s in result["segments"]
        )
    last = (result.get("samples") or [{}])[-1]
    return ", ".join(f"{key} {value:.4f}" for key, value in last.items() if isinstance(value, float))


def main(argv: list[str] | None = None) -> int:
    """Run everything asked for; returns 0 even when contenders fail, because their rows say so."""
    arguments = parse(argv)
    # A run that is told to stop must still end its child and remove its scratch files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments.out.mkdir(parents=True, exist_ok=True)
    scratch = arguments.scratch or arguments.out
    scratch.mkdir(parents=True, exist_ok=True)
    line = "python -m benchmarks.run " + " ".join(argv if argv is not None else sys.argv[1:])
    todo = requests_of(arguments)
    known = results.read(arguments.out) if arguments.resume else []
    kept = {results.key_of(run["request"]) for run in known if run["status"] == "ok"}
    for number, request in enumerate(todo, 1):
        if results.key_of(dataclasses.asdict(request)) in kept:
            continue
        result = run_one(request, arguments.timeout_s, scratch)
        result["command_line"] = line
        results.append(result, arguments.out)
        print(f"[{number}/{len(todo)}] {name_of(request)}: {headline(result)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
