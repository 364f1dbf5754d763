"""Small real file systems on loop devices, and overlays; where mounting is not allowed, a test skips."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

_MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"], "btrfs": ["mkfs.btrfs", "-q", "-f"]}
KINDS = tuple(_MAKE)


def run(*arguments: object) -> None:
    subprocess.run(list(map(str, arguments)), check=True, capture_output=True, timeout=60)


def can_make(kind: str) -> bool:
    return shutil.which(_MAKE[kind][0]) is not None


def make_image(kind: str, image: Path, size_bytes: int, *options: str) -> None:
    """An empty file system in a sparse file."""
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    run(*_MAKE[kind], *options, image)


@contextmanager
def attached(point: Path, *arguments: object) -> Iterator[Path]:
    """`mount ARGUMENTS point`, while the context lasts."""
    point.mkdir(exist_ok=True)
    run("mount", *arguments, point)
    try:
        yield point
    finally:
        run("umount", point)


def mounted_image(kind: str, image: Path, point: Path) -> AbstractContextManager[Path]:
    # A clone of an xfs has the identity of its original.
    return attached(point, "-t", kind, "-o", "loop,nouuid" if kind == "xfs" else "loop", image)


@contextmanager
def mounted(kind: str, where: Path, size_bytes: int) -> Iterator[Path]:
    """A fresh file system of `kind` ("ext4", "xfs", "btrfs", "tmpfs") of that size, unmounted at the end."""
    point, image = where / f"mnt-{kind}", where / f"{kind}.img"
    with ExitStack() as stack:
        try:
            if kind == "tmpfs":
                stack.enter_context(attached(point, "-t", kind, "-o", f"size={size_bytes}", kind))
            else:
                make_image(kind, image, size_bytes)
                stack.enter_context(mounted_image(kind, image, point))
        except (OSError, subprocess.SubprocessError) as error:
            _skip(kind, error)
        yield point


@contextmanager
def overlaid(lower: Path, where: Path) -> Iterator[Path]:
    """What `lower` looks like through an overlay, as the image of a container does: its own files are never changed."""
    upper, work, point = (where / name for name in ("upper", "work", "merged"))
    upper.mkdir()
    work.mkdir()
    options = f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=off"
    with ExitStack() as stack:
        try:
            stack.enter_context(attached(point, "-t", "overlay", "overlay", "-o", options))
        except (OSError, subprocess.SubprocessError) as error:
            _skip("overlay", error)
        yield point


def _skip(kind: str, error: Exception) -> None:
    pytest.skip(f"{kind} cannot be mounted here: {getattr(error, 'stderr', None) or error}")
