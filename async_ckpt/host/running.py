"""What the threads of this process are doing, as the kernel sees them."""

from __future__ import annotations

import contextlib
import os
import platform

# By machine; 455 (futex_wait) has one number everywhere.
_FUTEX_CALLS = {"x86_64": {b"202", b"449", b"455"}, "aarch64": {b"98", b"449", b"455"}}.get(platform.machine())


def running_threads() -> frozenset[int] | None:
    """Native ids of this process's threads that run, wait for a core, or wait for the disk: all others sleep.

    None where the system does not say: no /proc, or no descriptors left to read it. Any thread.
    """
    running = set()
    try:
        for name in os.listdir("/proc/self/task"):
            # A thread may end meanwhile.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # The thread's name, in parentheses, may itself hold spaces and parentheses.
                if _read(name, "stat").rpartition(b") ")[2][:1] in (b"R", b"D"):
                    running.add(int(name))
    except OSError:
        return None
    return frozenset(running)


def may_wait_for_threads(native_id: int) -> bool:
    """Whether a sleeping thread may be waiting for other threads (at a futex), and not for time, a socket, a pipe or a process.

    True where the system does not say. Any thread.
    """
    try:
        call = _read(str(native_id), "syscall").split(maxsplit=1)[:1]
    except OSError:
        return True
    return _FUTEX_CALLS is None or not call or not call[0].isdigit() or call[0] in _FUTEX_CALLS


def _read(thread: str, name: str) -> bytes:
    with open(f"/proc/self/task/{thread}/{name}", "rb", buffering=0) as file:
        return file.read(512)
