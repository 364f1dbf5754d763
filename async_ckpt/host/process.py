"""Who owns a staging directory, and whether that process can still be alive.

An owner is written into the directory's *name*, so that it appears in the same instant as the directory. The
fields, in order: hash of the host (machine id + node name), boot id, inode of the pid namespace, pid, start time
of the process in clock ticks. A pid alone says nothing: pids are reused, and containers count from one.

Guarantees:
- "dead" is only said of a process of this kernel and pid namespace that is gone, a zombie, or whose pid has
  passed to a process with another start time.
- Everything that cannot be decided from here is "unknown", "rebooted" or "foreign", never "dead".
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import platform
import re
from dataclasses import dataclass

from .facts import read_text

_NO_BOOT = "0" * 8
_PATTERN = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})-([0-9]{1,12})-([0-9]{1,10})-([0-9]{1,20})")


class OwnerState(enum.Enum):
    """What can be said about an owner from this process."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"
    """Same kernel, but another pid namespace, or no /proc to look into."""
    REBOOTED = "rebooted"
    """Same host, another boot: gone, unless two hosts share their machine id and name."""
    FOREIGN = "foreign"
    """Another host."""


@dataclass(frozen=True)
class Owner:
    """The identity of one process, as written into staging names."""

    host: str
    boot: str
    pid_namespace: int
    pid: int
    start_ticks: int

    def __str__(self) -> str:
        return f"{self.host}-{self.boot}-{self.pid_namespace}-{self.pid}-{self.start_ticks}"

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The owner that prints exactly as `text`, or None."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            return None
        owner = cls(match[1], match[2], int(match[3]), int(match[4]), int(match[5]))
        return owner if str(owner) == text else None


@functools.lru_cache(maxsize=1)
def current_owner() -> Owner:
    """The identity of this process; right in a forked child too. Any thread."""
    pid = os.getpid()
    machine = read_text("/etc/machine-id").strip()
    host = hashlib.sha256(f"{machine}\0{platform.node()}".encode()).hexdigest()[:8]
    boot = read_text("/proc/sys/kernel/random/boot_id").strip()[:8]
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    status = _process_status(pid)
    return Owner(
        host, boot if re.fullmatch("[0-9a-f]{8}", boot) else _NO_BOOT, namespace, pid, status[1] if status else 0
    )


os.register_at_fork(after_in_child=current_owner.cache_clear)


def owner_state(owner: Owner, me: Owner | None = None) -> OwnerState:
    """Whether `owner` can still be alive, as far as `me` (this process) can tell. Any thread, no blocking I/O."""
    me = current_owner() if me is None else me
    if owner == me:
        return OwnerState.ALIVE
    same_kernel = owner.boot == me.boot and (me.boot != _NO_BOOT or owner.host == me.host)
    if not same_kernel:
        return OwnerState.REBOOTED if owner.host == me.host else OwnerState.FOREIGN
    if owner.pid_namespace != me.pid_namespace or not me.pid_namespace or not me.start_ticks:
        return OwnerState.UNKNOWN
    return OwnerState.ALIVE if _is_running(owner.pid, owner.start_ticks) else OwnerState.DEAD


def _is_running(pid: int, start_ticks: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # It exists and belongs to someone else; its start time below may still be readable.
        pass
    status = _process_status(pid)
    if status is None:
        # /proc may hide other users' processes: not seen is not the same as gone.
        return True
    state, ticks = status
    return ticks == start_ticks and state not in ("Z", "X")


def _process_status(pid: int) -> tuple[str, int] | None:
    """State letter and start time of `pid`, or None if /proc does not show it."""
    text = read_text(f"/proc/{pid}/stat")
    # The command name, in parentheses, may itself hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return (fields[0], int(fields[19])) if len(fields) > 19 else None
