"""What this process may use of its host: memory, cores, and how many ranks share them. Any thread; reads of /proc and
/sys alone."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ConfigError

_UNKNOWN_MEMORY_BYTES = 4 << 30
"""Where the system does not say (no /proc): a conservative figure is better than none."""


@dataclass(frozen=True)
class _Hierarchy:
    """How one version of control groups writes down limits, use, and the page cache that counts as use."""

    limits: tuple[str, ...]
    used: str
    cache: tuple[str, ...]
    mount: str
    """Where it is usually mounted, below /sys/fs/cgroup."""


_V1 = _Hierarchy(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"), "memory"
)
# Above memory.high, every allocation waits for reclaim: that is a limit too.
_V2 = _Hierarchy(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"), "")


@dataclass(frozen=True)
class Node:
    """This node among those with a root of their own: its number, how many there are, and the ranks that run on it."""

    number: int
    num_nodes: int
    ranks: tuple[int, ...]


def node_from_env(rank: int, world_size: int) -> Node:
    """From the variables of torchrun, or else of DeepSpeed's launcher: both deal ranks node by node. Raises
    ConfigError: one of them is missing or no number."""
    names = ("GROUP_RANK", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE")
    if "GROUP_RANK" not in os.environ and "CROSS_RANK" in os.environ:
        names = ("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE")
    try:
        number, num_nodes, local_size, local_rank = (int(os.environ[name]) for name in (*names, "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "roots of each node's own need the variables of torchrun or DeepSpeed's launcher, or node=Node(...): "
            f"{error} is missing or no number"
        ) from error
    first = rank - local_rank
    return Node(number, num_nodes, tuple(range(first, min(first + local_size, world_size))))


def is_first_of_node() -> bool:
    """Whether a launcher has numbered this process as its first one on this node."""
    return os.environ.get("LOCAL_RANK") == "0"


def local_world_size() -> int:
    """Ranks that share this host's memory, from LOCAL_WORLD_SIZE; 1 when unset. Raises ConfigError: the variable is set
    and is no positive integer."""
    raw = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not raw.isdigit() or int(raw) < 1:
        raise ConfigError(f"environment variable LOCAL_WORLD_SIZE must be a positive integer, not {raw!r}")
    return int(raw)


def num_cores() -> int:
    """Cores that this process may run on, at least 1."""
    # A sandbox may refuse the question; EINVAL makes Python look for a larger and larger set.
    with contextlib.suppress(AttributeError, OSError, OverflowError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int:
    """Memory that a new allocation may take now, in bytes: the least of what the host has available and of what each
    control group of this process, up to the root, leaves below its limit. Page cache does not count as used: it is
    given up when the memory is asked for. Control groups are mounted at `cgroups`, unless `proc` names another place.
    """
    available = _meminfo_available_bytes(proc)
    for hierarchy, folder in _own_groups(proc, cgroups):
        stat = _read_table(os.path.join(folder, "memory.stat"))
        found = [_read_int(os.path.join(folder, name)) for name in hierarchy.limits]
        # Version 1 tells a container of the limits above it (a pod's), which it cannot see.
        found.append(stat.get("hierarchical_memory_limit"))
        limits = [limit for limit in found if limit is not None]
        used = _read_int(os.path.join(folder, hierarchy.used))
        if limits and used is not None:
            held = max(0, used - sum(stat.get(name, 0) for name in hierarchy.cache))
            available = min(available, max(0, min(limits) - held))
    return available


def mount_type(path: str) -> str:
    """The type that `path` is mounted with, as the mount table has it ("fuse.rclone"); "" where the system does not
    tell."""
    where, longest, found = f"{os.path.realpath(path)}/", 0, ""
    for mount in _mounts("/proc"):
        point = f"{mount.point.rstrip('/')}/"
        # Of two mounts in one place, the later hides the earlier.
        if where.startswith(point) and len(point) >= longest:
            longest, found = len(point), mount.kind
    return found


def _own_groups(proc: str, cgroups: str) -> Iterator[tuple[_Hierarchy, str]]:
    """Directories of the control groups that this process is in, and of all their parents that can be seen from
    here."""
    mounts: dict[_Hierarchy, list[tuple[str, str]]] = {}
    for mount in _mounts(proc):
        if mount.kind == "cgroup2" or (mount.kind == "cgroup" and "memory" in mount.options):
            mounts.setdefault(_V2 if mount.kind == "cgroup2" else _V1, []).append((mount.root, mount.point))
    for line in read_text(os.path.join(proc, "self/cgroup")).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and "memory" not in controllers.split(","):
            continue
        hierarchy = _V2 if number == "0" else _V1
        for root, point in mounts.get(hierarchy, [("/", os.path.join(cgroups, hierarchy.mount))]):
            # A container may see only its own part of the tree, mounted as if it were the root.
            inside = path[len(root.rstrip("/")) :] if f"{path}/".startswith(f"{root.rstrip('/')}/") else ""
            parts = [part for part in inside.split("/") if part]
            parts = parts if ".." not in parts else []
            for depth in range(len(parts), -1, -1):
                yield hierarchy, os.path.join(point, *parts[:depth])


class _Mount(NamedTuple):
    """A line of the mount table: what of the file system is shown, where, its type, and its own options."""

    root: str
    point: str
    kind: str
    options: list[str]


def _mounts(proc: str) -> Iterator[_Mount]:
    for line in read_text(os.path.join(proc, "self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        fields, own = before.split(), after.split()
        if len(fields) > 4 and len(own) > 2:
            yield _Mount(_unescaped(fields[3]), _unescaped(fields[4]), own[0], own[2].split(","))


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _meminfo_available_bytes(proc: str) -> int:
    for line in read_text(os.path.join(proc, "meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _UNKNOWN_MEMORY_BYTES


def _read_table(path: str) -> dict[str, int]:
    pairs = (line.split() for line in read_text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _read_int(path: str) -> int | None:
    """The number in a file; None where it is missing or says "max"."""
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def read_text(path: str) -> str:
    """A file of the system's; "" where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
