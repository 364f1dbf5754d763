"""Everything that only a device can tell, in under ten minutes on one of them; leaves one JSON file.

    python -m benchmarks.device DIRECTORY --out FILE.json [--gib 8] [--simulated] [--skip-tests]

The device tests on this machine's accelerator; how fast it copies into pinned memory, and an eager save beside that;
the first save; what a guarded save costs the training thread, and how soon it is durable; how much slower steps are
while one is in flight; what it costs to keep copied memory for the side stream; every piece of work of one checkpoint
on its thread. `--simulated` does the same on the simulated accelerator, with a small state: no time is told then,
because none would mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from async_ckpt import AsyncCheckpointEngine, PendingCommit
from async_ckpt.host.device import keep_for, side_stream
from async_ckpt.metrics import CommitMetrics, Observer, Span
from benchmarks.environment import describe
from benchmarks.limits import pinned_d2h
from benchmarks.results import timed

ROOT = Path(__file__).parent.parent
GOALS = {
    "eager_share_of_d2h": ("at least", 0.9),
    "guarded_stall_s": ("at most", 0.005),
    "guarded_host_waits": ("at most", 0),
    "steps_slowed": ("at most", 0.01),
}
TIMEOUT_S = 300.0
BUDGET_S = 540.0
"""After so long nothing is repeated any more."""


class Timeline(Observer):
    """Keeps the spans of every checkpoint."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def on_span(self, span: Span) -> None:
        self.spans.append(span)


class Training:
    """A layer and AdamW: a third of the bytes are parameters."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        width = max(64, int((num_bytes / 3 / 4 / 8) ** 0.5))
        torch.manual_seed(0)
        self.device = device
        self.model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(8))).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.ones(64, width, device=device)
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()

    def states(self) -> dict[str, Any]:
        return {"model.pt": self.model.state_dict(), "optim.pt": self.optimizer.state_dict()}

    @property
    def num_bytes(self) -> int:
        return 3 * sum(p.numel() * p.element_size() for p in self.model.parameters())


def commit(engine: AsyncCheckpointEngine, tag: str, training: Training) -> PendingCommit:
    engine.create(tag)
    for path, state in training.states().items():
        engine.save(state, path)
    return engine.commit(tag)


def device_tests(kind: str) -> dict[str, Any]:
    """The cases of `tests/accelerator`, on this device."""
    name = "test_on_the_simulated_accelerator" if kind == "simulated" else "test_on_the_accelerator_of_this_machine"
    command = [sys.executable, "-m", "pytest", "-q", "tests/accelerator/test_accelerator.py", "-k", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    said = done.stdout.strip().splitlines()[-1:]
    return {"passed": done.returncode == 0, "said": said, "output": done.stdout[-4000:] if done.returncode else ""}


def keeping_s(device: torch.device) -> float:
    """Seconds per tensor to keep its memory for the side stream, and to free it."""
    stream = side_stream(device)
    tensors = [torch.empty(1 << 16, device=device) for _ in range(1000)]

    def free(is_kept: bool) -> None:
        while tensors:
            tensor = tensors.pop()
            if is_kept:
                keep_for(tensor, stream)

    plain = timed(lambda: free(False))
    tensors += [torch.empty(1 << 16, device=device) for _ in range(1000)]
    return max(0.0, timed(lambda: free(True)) - plain) / 1000


class Device:
    """Measures one device; `figures` has what was found, and None for what was not measured."""

    def __init__(self, directory: Path, num_bytes: int, simulator: Any) -> None:
        own = torch.accelerator.current_accelerator()
        assert own is not None
        self.device = torch.device(own.type, torch.accelerator.current_device_index())
        self.figures: dict[str, Any] = {}
        self._directory = directory
        self._simulator = simulator
        self._num_bytes = num_bytes
        self._started = time.perf_counter()
        self._timeline = Timeline()

    def measure(self) -> None:
        """Everything but the tests. Blocks for minutes on a real device."""
        training = Training(self._num_bytes, self.device)
        self.figures["state_bytes"] = training.num_bytes
        copied_bytes = min(self._num_bytes, 1 << 30)
        copies_s = [pinned_d2h(self._directory, copied_bytes)["stall_s"] for _ in range(5)]
        self.figures["d2h_bytes_per_s"] = copied_bytes / min(copies_s)
        self.figures["keeping_s_per_tensor"] = keeping_s(self.device)
        options: dict[str, Any] = {"staging_bytes": training.num_bytes + (128 << 20), "observers": [self._timeline]}
        with AsyncCheckpointEngine(self._directory / "eager", **options) as engine:
            first = self._save(engine, "first", training)
            self.figures["first_save_stall_s"], self.figures["first_save_durable_s"] = first[0], first[1].total_s
            eager = [self._save(engine, f"eager-{k}", training) for k in range(3) if k == 0 or self._has_time]
            self.figures["eager_stall_s"] = min(stall for stall, _ in eager)
            self.figures["is_pinned"] = all(save.pinned for _, metrics in eager for save in metrics.saves)
        rate = training.num_bytes / self.figures["eager_stall_s"]
        self.figures["eager_share_of_d2h"] = rate / self.figures["d2h_bytes_per_s"]
        shutil.rmtree(self._directory / "eager")
        with AsyncCheckpointEngine(self._directory / "guarded", **options) as engine:
            engine.guard(training.optimizer)
            engine.prewarm(states=training.states())
            self._guarded(engine, training)
            self._slowed(engine, training)
        shutil.rmtree(self._directory / "guarded")

    @property
    def _has_time(self) -> bool:
        return time.perf_counter() - self._started < BUDGET_S

    def _save(self, engine: AsyncCheckpointEngine, tag: str, training: Training) -> tuple[float, CommitMetrics]:
        torch.accelerator.synchronize(self.device)
        started = time.perf_counter()
        pending = commit(engine, tag, training)
        stall_s = time.perf_counter() - started
        pending.result(TIMEOUT_S)
        return stall_s, pending.metrics

    def _guarded(self, engine: AsyncCheckpointEngine, training: Training) -> None:
        """create + save + save + commit + step on the training thread, behind queued work."""
        stalls, durable, waits = [], [], []
        for k in range(4):
            if k > 1 and not self._has_time:
                break
            training.step()
            torch.accelerator.synchronize(self.device)
            training.model(training.batch).square().mean().backward()
            plain_s = timed(training.optimizer.step)
            torch.accelerator.synchronize(self.device)
            if self._simulator is not None:
                self._simulator.waits.clear()
            self._timeline.spans.clear()
            started = time.perf_counter()
            pending = commit(engine, f"guarded-{k}", training)
            training.optimizer.step()
            stalls.append(time.perf_counter() - started - plain_s)
            if self._simulator is not None:
                waits.append(sum(wait.thread == "MainThread" for wait in self._simulator.waits))
            pending.result(TIMEOUT_S)
            durable.append(pending.metrics.total_s)
        self.figures["guarded_stall_s"] = max(0.0, statistics.median(stalls[1:]))
        self.figures["guarded_durable_s"] = statistics.median(durable[1:])
        self.figures["guarded_host_waits"] = max(waits) if waits else None
        begin = min(span.start_s for span in self._timeline.spans)
        self.figures["timeline"] = [
            {"kind": s.kind, "thread": s.thread, "num_bytes": s.num_bytes}
            | {"start_s": s.start_s - begin, "end_s": s.end_s - begin}
            for s in self._timeline.spans
        ]

    def _slowed(self, engine: AsyncCheckpointEngine, training: Training) -> None:
        """Steps while a save is in flight, against quiet ones."""

        def step_s() -> float:
            return timed(lambda: (training.step(), torch.accelerator.synchronize(self.device)))

        quiet = [step_s() for _ in range(30)]
        busy: list[float] = []
        for k in range(3):
            if k and not self._has_time:
                break
            pending = commit(engine, f"busy-{k}", training)
            # The first step waits for the copies on the device, and is the stall's.
            step_s()
            while not pending.done():
                busy.append(step_s())
            pending.result(TIMEOUT_S)
        quiet += [step_s() for _ in range(30)]
        self.figures["quiet_step_s"] = statistics.median(quiet)
        self.figures["steps_while_saving"] = len(busy)
        self.figures["steps_slowed"] = statistics.median(busy) / statistics.median(quiet) - 1 if busy else None


def without_times(figures: dict[str, Any]) -> dict[str, Any]:
    """What a simulated device can tell: no seconds, and no ratio of them."""
    timeless = ("state_bytes", "is_pinned", "guarded_host_waits", "steps_while_saving")
    found = {name: value if name in timeless else None for name, value in figures.items()}
    told = ("kind", "thread", "num_bytes")
    found["timeline"] = [{name: span[name] for name in told} for span in figures["timeline"]]
    return found


def judged(figures: dict[str, Any]) -> dict[str, Any]:
    """Each goal with whether it was met; None where it was not measured."""
    found = {}
    for name, (relation, goal) in GOALS.items():
        value = figures.get(name)
        is_met = None if value is None else (value >= goal if relation == "at least" else value <= goal)
        found[name] = {"goal": f"{relation} {goal}", "found": value, "met": is_met}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="an empty folder on the disk to be written to")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--gib", type=float, default=8.0, help="bytes of the state (on a real device)")
    parser.add_argument("--simulated", action="store_true", help="on the simulated accelerator, without times")
    parser.add_argument("--skip-tests", action="store_true", help="without the device tests")
    given = parser.parse_args(arguments)
    simulator = None
    if given.simulated:
        from tests.accelerator import simulator as simulators

        simulator = simulators.load_for_package()
    if not torch.accelerator.is_available():
        parser.error("torch sees no accelerator here; --simulated runs on the simulated one")
    measured = Device(given.directory, 24 << 20 if given.simulated else int(given.gib * (1 << 30)), simulator)
    tests = None if given.skip_tests else device_tests(measured.device.type)
    measured.measure()
    figures = without_times(measured.figures) if given.simulated else measured.figures
    report = {
        "device": str(measured.device),
        "is_simulated": given.simulated,
        "command": ["python", "-m", "benchmarks.device", *(arguments if arguments is not None else sys.argv[1:])],
        "environment": describe(given.directory),
        "tests": tests,
        "goals": judged(figures),
        "figures": figures,
    }
    fresh = given.out.with_suffix(".part")
    fresh.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(fresh, given.out)
    for name, goal in report["goals"].items():
        print(f"{name}: {goal['found']} (goal: {goal['goal']}, met: {goal['met']})")
    return 0 if tests is None or tests["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
