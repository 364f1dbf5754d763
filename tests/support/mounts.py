"""Small real file systems on loop devices; tests that need one skip, with the reason, where mounting is not allowed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"], "btrfs": ["mkfs.btrfs", "-q", "-f"]}


@contextmanager
def overlaid(lower: Path, where: Path) -> Iterator[Path]:
    """What `lower` looks like through an overlay, as the image of a container does: its own files are never changed."""
    upper, work, point = (where / name for name in ("upper", "work", "merged"))
    for folder in (upper, work, point):
        folder.mkdir()
    options = f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=off"
    done = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, str(point)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mounting an overlay is not allowed here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True, capture_output=True)


@contextmanager
def mounted(kind: str, where: Path, size_bytes: int) -> Iterator[Path]:
    """A fresh file system of `kind` ("ext4", "xfs", "btrfs", "tmpfs") of that size, unmounted at the end."""
    point = where / f"mnt-{kind}"
    point.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(point)]
    else:
        if shutil.which(_MAKE[kind][0]) is None:
            pytest.skip(f"{_MAKE[kind][0]} is not installed")
        image = where / f"{kind}.img"
        with open(image, "wb") as file:
            file.truncate(size_bytes)
        made = subprocess.run([*_MAKE[kind], str(image)], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            pytest.skip(f"{_MAKE[kind][0]} failed: {made.stderr.strip()}")
        command = ["mount", "-o", "loop", str(image), str(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting {kind} is not allowed here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True, capture_output=True)
