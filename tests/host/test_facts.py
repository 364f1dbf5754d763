"""What this process may use: control groups of both versions, nested, seen from containers, with a warm page cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from async_ckpt import EngineConfig
from async_ckpt.errors import ConfigError
from async_ckpt.host.facts import available_memory_bytes, local_world_size, num_cores

GIB = 1 << 30
HOST_GIB = 64


class MadeUp:
    """A tree of control groups and the /proc that leads to it."""

    def __init__(self, where: Path) -> None:
        self.proc = where / "proc"
        self.mount = where / "cg roup"
        (self.proc / "self").mkdir(parents=True)
        self.mount.mkdir()
        (self.proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {HOST_GIB << 20} kB\n")

    def mounted(self, *lines: str) -> None:
        escaped = str(self.mount).replace(" ", "\\040")
        (self.proc / "self" / "mountinfo").write_text("".join(line.replace("MOUNT", escaped) + "\n" for line in lines))

    def member(self, *lines: str) -> None:
        (self.proc / "self" / "cgroup").write_text("\n".join(lines) + "\n")

    def v2(self, path: str, limit: str, used_gib: float, *, high: str = "max", **stat: float) -> None:
        self._write(path, {"memory.max": limit, "memory.high": high, "memory.current": int(used_gib * GIB)}, stat)

    def v1(self, path: str, limit: int, used_gib: float, **stat: float) -> None:
        self._write(path, {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": int(used_gib * GIB)}, stat)

    def _write(self, path: str, values: dict[str, object], stat: dict[str, float]) -> None:
        folder = self.mount / path.strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text("".join(f"{name} {int(gib * GIB)}\n" for name, gib in stat.items()))

    def available_gib(self) -> float:
        return available_memory_bytes(str(self.proc), str(self.mount)) / GIB


@pytest.fixture
def made_up(tmp_path: Path) -> MadeUp:
    return MadeUp(tmp_path)


V2_MOUNT = "30 1 0:26 / MOUNT rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "31 1 0:27 / MOUNT rw - cgroup cgroup rw,memory"


@pytest.mark.wide
def test_the_groups_own_limit_is_seen(made_up: MadeUp) -> None:
    made_up.mounted(V2_MOUNT)
    made_up.member("0::/system.slice/job_1")
    made_up.v2("/system.slice/job_1", str(4 * GIB), 1)
    assert made_up.available_gib() == 3
    made_up.v2("/system.slice/job_1", "max", 1)
    assert made_up.available_gib() == HOST_GIB
    made_up.v2("/system.slice/job_1", str(4 * GIB), 1, high=str(2 * GIB))
    assert made_up.available_gib() == 1


def test_every_parent_counts(made_up: MadeUp) -> None:
    """Under Slurm the step has no limit, its job has one; the use is that of the group with the limit."""
    made_up.mounted(V2_MOUNT)
    made_up.member("0::/slurm/uid_1/job_2/step_0/task_0")
    made_up.v2("/slurm/uid_1/job_2/step_0/task_0", "max", 1)
    made_up.v2("/slurm/uid_1/job_2/step_0", "max", 2)
    made_up.v2("/slurm/uid_1/job_2", str(8 * GIB), 5)
    made_up.v2("/slurm/uid_1", str(100 * GIB), 50)
    made_up.v2("/slurm", "max", 60)
    assert made_up.available_gib() == 3
    made_up.v2("/slurm/uid_1", str(51 * GIB), 50)
    assert made_up.available_gib() == 1
    made_up.v2("/slurm/uid_1", str(40 * GIB), 50)
    assert made_up.available_gib() == 0


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_that_can_be_given_up_is_not_used_memory(made_up: MadeUp, version: int) -> None:
    """A container whose cache is warm stands at its limit; shared memory, which cannot be given up, is on no file
    list."""
    if version == 2:
        made_up.mounted(V2_MOUNT)
        made_up.member("0::/pod")
        made_up.v2("/pod", str(4 * GIB), 3.9, file=3.5, shmem=0.5, inactive_file=2, active_file=1)
    else:
        made_up.mounted(V1_MOUNT)
        made_up.member("4:memory:/pod")
        made_up.v1(
            "/pod", 4 * GIB, 3.9, cache=3.5, inactive_file=0, active_file=0, total_inactive_file=2, total_active_file=1
        )
    assert made_up.available_gib() == pytest.approx(3.1)


def test_a_pods_limit_is_seen_from_a_container_without_one(made_up: MadeUp) -> None:
    """Version 1, where the container's own part is mounted as the root; the pod above it cannot be seen."""
    made_up.mounted("31 1 0:27 /kubepods/burstable/pod1/abc MOUNT ro - cgroup cgroup rw,memory")
    made_up.member("5:memory:/kubepods/burstable/pod1/abc")
    made_up.v1("/", 9223372036854771712, 1, hierarchical_memory_limit=2)
    assert made_up.available_gib() == 1


def test_version_1_beside_version_2(made_up: MadeUp) -> None:
    """A hybrid host: version 2 without controllers, memory in version 1, several controllers on one mount."""
    made_up.mounted(
        "29 1 0:25 / /nowhere rw - cgroup2 cgroup2 rw", "31 1 0:27 / MOUNT rw - cgroup cgroup rw,cpu,memory"
    )
    made_up.member("9:name=systemd:/", "4:cpu,memory:/job", "0::/")
    made_up.v1("/", 9223372036854771712, 20)
    made_up.v1("/job", 2 * GIB, 0.5)
    assert made_up.available_gib() == 1.5


@pytest.mark.parametrize(
    ("root", "member"),
    [
        ("/docker/abc", "/docker/abc"),
        ("/docker/abc", "/docker/abc/inner"),
        ("/", "/../../other"),
        ("/docker/abc", "/elsewhere"),
    ],
)
def test_a_container_sees_its_own_part_as_the_root(made_up: MadeUp, root: str, member: str) -> None:
    made_up.mounted(f"30 1 0:26 {root} MOUNT ro - cgroup2 cgroup rw")
    made_up.member(f"0::{member}")
    made_up.v2("/", str(4 * GIB), 1)
    made_up.v2("/inner", str(3 * GIB), 1)
    assert made_up.available_gib() == (2 if member.endswith("inner") else 3)


def test_without_mountinfo_the_usual_places_are_looked_at(made_up: MadeUp) -> None:
    made_up.member("4:memory:/docker/abc", "0::/job")
    made_up.v1("/memory", 2 * GIB, 0.5)
    made_up.v2("/job", str(4 * GIB), 3)
    assert made_up.available_gib() == 1
    made_up.v2("/job", "max", 3)
    assert made_up.available_gib() == 1.5


def test_a_host_that_says_nothing_has_a_conservative_figure(tmp_path: Path) -> None:
    assert available_memory_bytes(str(tmp_path), str(tmp_path)) == 4 * GIB


def test_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open("/proc/meminfo", encoding="ascii") as file:
        total = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemTotal:"))
    limits = [total]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        where, name = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
        for folder in [Path(path), *Path(path).parents]:
            limit = Path("/sys/fs/cgroup", where, str(folder).lstrip("/"), name)
            if controllers in ("", "memory") and limit.is_file() and (text := limit.read_text().strip()) != "max":
                limits.append(int(text))
    assert 0 < available_memory_bytes() <= min(limits)
    assert num_cores() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert local_world_size() == 8
    assert EngineConfig(root=tmp_path).resolved_staging_bytes() <= max(total // 32, 32 << 20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "none")
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE"):
        local_world_size()
