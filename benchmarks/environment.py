"""What a figure was measured on: goes into every JSON file, so that no number travels without its machine.

Guarantees: reads only; nothing here changes the system, except `raise_open_files_limit`, for this process alone.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "numpy", "async-ckpt", "aiofiles", "zlib-ng", "safetensors", "torch_checkpointing", "torchsnapshot"),
    *("lightning", "transformers", "accelerate", "orbax-checkpoint", "jax", "nvidia-resiliency-ext", "dlrover"),
    "deepspeed",
)


def lines_of(path: str | Path) -> list[str]:
    """Of a file that the kernel may not have: then there are none."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def versions() -> dict[str, str]:
    """Installed versions of everything that can take part."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if shutil.which("fio"):
        found["fio"] = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return found


def cpu_model() -> str:
    """The processor's own name, or the architecture where the kernel does not tell."""
    names = [line.partition(":")[2].strip() for line in lines_of("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory_bytes(field: str = "MemTotal", source: str = "meminfo") -> int:
    """The lines of a file below /proc that begin so, together, in bytes; 0 where there are none, or no such file."""
    return sum(int(line.split()[1]) << 10 for line in lines_of(f"/proc/{source}") if line.startswith(field))


def resident_bytes() -> int:
    """The memory that this process has now."""
    return memory_bytes("VmRSS:", "self/status")


def mount_of(directory: Path) -> dict[str, str]:
    """Type, options and device of the file system below `directory` (the mount point itself is left out)."""
    best = ("", "unknown", "", "")
    where = str(directory.resolve())
    for line in lines_of("/proc/self/mounts"):
        device, point, kind, options = line.split()[:4]
        inside = where == point or where.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, kind, options, device)
    return {"fs_type": best[1], "mount_options": best[2], "device": best[3], **_queue_of(directory)}


def _queue_of(directory: Path) -> dict[str, str]:
    """Scheduler and depth of the block device, where the kernel shows them."""
    status = os.stat(directory)
    base = Path(f"/sys/dev/block/{os.major(status.st_dev)}:{os.minor(status.st_dev)}")
    queues = (base / "queue", base.resolve().parent / "queue")
    keys = ("scheduler", "nr_requests", "rotational")
    found = {key: next(filter(None, (_first_line(queue / key) for queue in queues)), "") for key in keys}
    return {key: value for key, value in found.items() if value}


def _first_line(path: str | Path) -> str:
    return (lines_of(path) or [""])[0].strip()


def describe(directory: Path) -> dict[str, Any]:
    """Everything that decides a figure: hardware, kernel, file system, versions, limits, load at the start."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return {
        "cpu": cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "memory_available_bytes": memory_bytes("MemAvailable"),
        "gpu": gpu,
        "kernel": platform.release(),
        "system": platform.system(),
        "transparent_hugepage": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "dirty_ratio": _first_line("/proc/sys/vm/dirty_ratio"),
        "dirty_background_ratio": _first_line("/proc/sys/vm/dirty_background_ratio"),
        "load_average": list(os.getloadavg()),
        "open_files_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "file_system": mount_of(directory),
        "versions": versions(),
        "python_implementation": sys.implementation.name,
    }


def raise_open_files_limit() -> None:
    """Give this process as many descriptors as it may have: some contenders need one per tensor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
