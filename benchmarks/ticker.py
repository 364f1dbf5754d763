"""Finds holds of the interpreter lock: a thread that sleeps half a millisecond at a time and notes when it came back
late.

The same loop runs in a process of its own as the control: what is late there too was the machine, not the lock.
Times are `time.monotonic`, which processes of one Linux machine share.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

INTERVAL_S = 0.0005
NOTED_S = 0.001


def tick(stop: threading.Event, late: list[tuple[float, float]]) -> None:
    """Append (when, how late in seconds) for each wake-up later than 1 ms, until `stop` is set."""
    last = time.monotonic()
    while not stop.is_set():
        time.sleep(INTERVAL_S)
        now = time.monotonic()
        lateness = now - last - INTERVAL_S
        if lateness > NOTED_S:
            late.append((now, lateness))
        last = now


class Ticker:
    """The thread and its control process; use as a context, then ask `longest` and `control_longest` for a window."""

    def __enter__(self) -> Ticker:
        self.late: list[tuple[float, float]] = []
        self.control_late: list[tuple[float, float]] = []
        self.stop = threading.Event()
        command = [sys.executable, "-m", "benchmarks.ticker"]
        self.control = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.control.stdout is not None
        self.control.stdout.readline()
        self.thread = threading.Thread(target=tick, args=(self.stop, self.late), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop.set()
        self.thread.join()
        out, _ = self.control.communicate("stop\n")
        self.control_late = [(when, late) for when, late in json.loads(out)]

    def longest(self, start: float, end: float) -> float:
        """Longest lateness (seconds) of the thread that ended between two moments."""
        return _longest(self.late, start, end)

    def control_longest(self, start: float, end: float) -> float:
        return _longest(self.control_late, start, end)


def _longest(late: list[tuple[float, float]], start: float, end: float) -> float:
    return max((how_late for when, how_late in late if start < when and when - how_late < end), default=0.0)


def main() -> None:
    """The control: tick until standard input says stop."""
    late: list[tuple[float, float]] = []
    stop = threading.Event()
    thread = threading.Thread(target=tick, args=(stop, late), daemon=True)
    thread.start()
    print("ready", flush=True)
    sys.stdin.readline()
    stop.set()
    thread.join()
    print(json.dumps(late), flush=True)


if __name__ == "__main__":
    main()
