"""Which threads of this process the kernel is running."""

from __future__ import annotations

import contextlib
import os


def running_threads() -> frozenset[int] | None:
    """Native ids of this process's threads that run, wait for a core, or wait for the disk: all others sleep.

    None where the system does not say: no /proc, or no descriptors left to read it. Any thread.
    """
    running = set()
    try:
        for name in os.listdir("/proc/self/task"):
            # A thread may end meanwhile.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{name}/stat", "rb") as stat:
                # The thread's name, in parentheses, may itself hold spaces and parentheses.
                if stat.read(512).rpartition(b") ")[2][:1] in (b"R", b"D"):
                    running.add(int(name))
    except OSError:
        return None
    return frozenset(running)
