"""Follows one child: its memory (the whole process tree), its time limit, and the machine's last free memory.

Guarantees: ends only process groups that `run_child` started; a child that would exhaust the memory is stopped before
the kernel has to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.environment import memory_bytes

MIN_AVAILABLE_BYTES = 768 << 20
GRACE_S = 2.0


@dataclass
class Watched:
    """How a child ended, and the memory of its tree: (monotonic seconds, bytes) with shared pages counted once."""

    returncode: int | None
    ended: str
    stderr_tail: str = ""
    samples: list[tuple[float, int]] = field(default_factory=list)


def group_members(group: int) -> list[int]:
    """Processes of a process group, by /proc."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue
            if int(fields[2]) == group:
                found.append(int(entry))
    return found


def tree_pss_bytes(group: int) -> int:
    """Proportional set size of a process group; a process that ended meanwhile counts nothing."""
    return sum(memory_bytes("Pss:", f"{pid}/smaps_rollup") for pid in group_members(group))


def _first_to_be_killed() -> None:
    """Should memory run out after all, the kernel takes this child and not a bystander."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def run_child(
    command: list[str], *, timeout_s: float, sample_memory: bool, environment: dict[str, str], log: Path
) -> Watched:
    """Run a child in its own process group until it ends, the time is up, or memory runs short."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_first_to_be_killed if os.path.exists("/proc/self/oom_score_adj") else None,
        )
    deadline = time.monotonic() + timeout_s
    samples: list[tuple[float, int]] = []
    ended = "exited"
    interval_s = 0.03 if sample_memory else 0.1
    try:
        while child.poll() is None:
            if time.monotonic() > deadline:
                ended = "timeout"
                break
            if memory_bytes("MemAvailable") < MIN_AVAILABLE_BYTES and memory_bytes() > 0:
                ended = "memory"
                break
            if sample_memory:
                samples.append((time.monotonic(), tree_pss_bytes(child.pid)))
            time.sleep(interval_s)
    finally:
        # A running child goes first: it would stay in its group, as a zombie, until it is waited for.
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        end_group(child.pid)
    tail = log.read_bytes()[-1500:].decode(errors="replace")
    return Watched(child.returncode, ended, tail, samples)


def end_group(group: int) -> None:
    """End what the child left behind (helper processes of its contender); first politely, then for certain.

    Python's resource tracker ignores the polite signal, sees its owners go, and removes their semaphores and shared
    memory.
    """
    try:
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.02)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
