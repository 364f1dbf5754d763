"""What the machine can do at all: a copy into warm memory, the disk by fio, pinned D2H. Run between the contenders, in
the same way.

Guarantees: each function gives samples of the same form as a save (`durable_s` or `stall_s`, and `num_bytes`).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders.base import Unavailable
from benchmarks.results import timed

MIB = 1 << 20
Sample = dict[str, Any]


def _block_bytes(num_bytes: int) -> int:
    """16 MiB blocks, smaller for small files so that a queue can fill."""
    block = 16 * MIB
    while block > 64 * 1024 and block * 16 > num_bytes:
        block //= 2
    return block


def run_fio(path: Path, num_bytes: int, arguments: list[str]) -> dict[str, Any]:
    """One fio job on one file; returns its JSON. Raises `Unavailable` where fio is missing or refuses."""
    if shutil.which("fio") is None:
        raise Unavailable("not installed: fio (a system package, not a Python one)")
    block = _block_bytes(num_bytes)
    size = max(block, num_bytes // block * block)
    command = ["fio", "--name=limit", f"--filename={path}", f"--size={size}", f"--bs={block}", "--output-format=json"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"fio: {(done.stderr or done.stdout).strip()[:300]}")
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return job


FIO = {
    "direct_qd4": ["--direct=1", "--ioengine=libaio", "--iodepth=4"],
    "direct_qd16": ["--direct=1", "--ioengine=libaio", "--iodepth=16"],
    "buffered": ["--direct=0", "--ioengine=psync"],
}
"""The ways of doing input and output that are limits, as fio is told."""


def fio_write(directory: Path, num_bytes: int, way: str) -> Sample:
    path = directory / "fio.dat"
    try:
        job = run_fio(path, num_bytes, ["--rw=write", "--end_fsync=1", "--fallocate=posix", *FIO[way]])
    finally:
        path.unlink(missing_ok=True)
    # The file is a whole number of blocks: scale to the bytes of the state.
    return {"durable_s": _seconds(job["write"], num_bytes), "num_bytes": num_bytes}


def fio_read_s(path: Path, num_bytes: int, way: str) -> float:
    """Seconds for as many bytes of a file that is there."""
    return _seconds(run_fio(path, num_bytes, ["--rw=read", "--readonly", *FIO[way]])["read"], num_bytes)


def _seconds(done: dict[str, Any], num_bytes: int) -> float:
    return float(done["runtime"] / 1e3 * num_bytes / done["io_bytes"])


def memcpy_warm(directory: Path, num_bytes: int) -> Sample:
    """One contiguous torch copy between buffers that were both touched before, with torch's threads."""
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.zeros(num_bytes, dtype=torch.uint8)
    target.copy_(source)
    return {"stall_s": timed(partial(target.copy_, source)), "num_bytes": num_bytes}


def pinned_d2h(directory: Path, num_bytes: int) -> Sample:
    """Device to pinned host memory, one contiguous copy."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        raise Unavailable("no accelerator")
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.accelerator.synchronize(device)

    copy()
    return {"stall_s": timed(copy), "num_bytes": num_bytes}


LIMITS: dict[str, tuple[Callable[[Path, int], Sample], str]] = {
    "limit_memcpy_warm": (memcpy_warm, "torch copy_ between warm contiguous buffers"),
    "limit_fio_direct_qd4": (
        partial(fio_write, way="direct_qd4"),
        "fio write, O_DIRECT, libaio, depth 4, end_fsync, preallocated",
    ),
    "limit_fio_direct_qd16": (
        partial(fio_write, way="direct_qd16"),
        "fio write, O_DIRECT, libaio, depth 16, end_fsync, preallocated",
    ),
    "limit_fio_buffered_fsync": (
        partial(fio_write, way="buffered"),
        "fio write, buffered, end_fsync, preallocated",
    ),
    "limit_pinned_d2h": (pinned_d2h, "one contiguous copy from the device into pinned memory"),
}


def evict(path: Path) -> float:
    """Sync a file and push it out of the page cache; returns the fraction that stayed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return resident_fraction(descriptor)
    finally:
        os.close(descriptor)


def resident_fraction(descriptor: int) -> float:
    """Share of a file's pages in the page cache, by mincore; 0 for an empty file."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return 0.0
    num_pages = -(-size // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
        residency = (ctypes.c_ubyte * num_pages)()
        anchor = ctypes.c_char.from_buffer(view)
        try:
            if libc.mincore(ctypes.addressof(anchor), size, residency) != 0:
                raise OSError(ctypes.get_errno(), "mincore failed")
        finally:
            del anchor
        return sum(page & 1 for page in bytes(residency)) / num_pages
