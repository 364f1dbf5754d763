"""Power cuts on real ext4, xfs and btrfs. ``python -m tests.faults.realdisks --full`` (as root, on Linux)

Each file system lives in an image behind a loop device. At every file call of a whole engine, and as soon as a commit
has been reported, the image is cloned while the file system is mounted and at work: that is what the disk holds if the
power fails now, with nothing that the kernel has not written out yet. The image lies on an xfs of its own, whose clones
are made in one instant. Later each clone is mounted, which replays its journal, and must pass the oracle of every
sweep. Engines that leave out a sync run too, and must be caught where the file system does not hide it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.support.faulty_filesystem import FaultyFileSystem, Operation
from tests.support.mounts import KINDS, can_make, make_image, mounted_image

from .oracle import check_recovery
from .powerloss import BROKEN
from .report import ALL, Extent, Row, command, extent_of
from .workloads import WORKLOADS, Folder, Job, Told, Workload, make_engine, quiet

MiB = 1 << 20
SIZES = {"ext4": 64 * MiB, "xfs": 320 * MiB, "btrfs": 160 * MiB}
HOST_BYTES = 4096 * MiB
"""Of the file system that holds the images; a sparse file."""
CAUGHT_ON = {"no fsync of the files": ("xfs", "btrfs"), "no fsync of the root": ("ext4", "xfs", "btrfs")}
"""Broken variants, and who does not hide them."""
_FICLONE = 0x40049409


@functools.lru_cache(maxsize=1)
def why_not() -> str | None:
    """Why images cannot be mounted here; None when they can."""
    if os.geteuid() != 0:
        return "only root may mount images"
    missing = [tool for tool in ("mount", "umount", "mkfs.xfs") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    try:
        with tempfile.TemporaryDirectory() as folder, host(Path(folder)) as place:
            (place / "a").write_bytes(b"a")
            clone(place / "a", place / "b")
    except (OSError, subprocess.SubprocessError) as error:
        return f"no loop devices, or no clones: {getattr(error, 'stderr', None) or error}"
    return None


@contextlib.contextmanager
def host(folder: Path) -> Iterator[Path]:
    """A new xfs, on which files can be cloned in one instant."""
    image = folder / "host.img"
    make_image("xfs", image, HOST_BYTES, "-m", "reflink=1")
    with mounted_image("xfs", image, folder / "host") as place:
        yield place


def clone(image: Path, to: Path) -> None:
    """A copy of `image` as it is now: no write to it is in the copy by halves."""
    with open(image, "rb") as source, open(to, "xb") as target:
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())


class Camera:
    """Clones the image before every file call and after every report, and remembers what had been reported by then."""

    def __init__(self, image: Path, folder: Path, told: Told) -> None:
        self.shots: list[tuple[str, Path, Told]] = []
        self._image = image
        self._folder = folder
        self._told = told
        self._lock = threading.Lock()

    def before(self, op: Operation) -> None:
        if op.index >= 0:
            self.take(f"before call {op.index} ({op.name} {os.path.basename(op.path)})")

    def take(self, what: str) -> None:
        with self._lock:
            # What is reported while the clone is made need not be in it.
            told = Told({}, dict(self._told.committed))
            path = self._folder / f"shot-{len(self.shots)}.img"
            clone(self._image, path)
            self.shots.append((what, path, told))


def film(place: Path, kind: str, workload: Workload, fs: FaultyFileSystem, *, direct: bool) -> Camera:
    """Run the workload on a new file system of that kind; its image at every moment."""
    image, folder = place / "disk.img", place / "shots"
    folder.mkdir()
    make_image(kind, image, SIZES[kind])
    with Folder() as template, mounted_image(kind, image, place / "disk") as disk:
        made, told = template.root()
        root = disk / "root"
        shutil.copytree(made, root)
        os.sync()
        camera = Camera(image, folder, told)
        mode = "direct" if direct else "buffered"
        with quiet(), make_engine(root, fs, num_writers=4, io_mode=mode, **workload.config) as engine:
            fs.before = camera.before
            told.on_commit = lambda tag, version: camera.take(f"{tag} in version {version} was reported")
            workload.run(Job(engine, told))
            fs.before = None
    for _, _, shot in camera.shots:
        shot.attempted = told.attempted
    image.unlink()
    return camera


def develop(row: Row, kind: str, workload: Workload, fs: FaultyFileSystem, how: Extent, *, direct: bool) -> Row:
    """Film the workload, mount each shot as after a reboot, and look."""

    def look(image: Path, told: Told) -> None:
        with mounted_image(kind, image, place / "after") as disk:
            check_recovery(disk / "root", told, workload)

    with tempfile.TemporaryDirectory() as folder, host(Path(folder)) as place:
        shots = film(place, kind, workload, fs, direct=direct).shots
        row.operations = len(shots)
        for number in how.of(range(len(shots))):
            what, image, told = shots[number]
            with quiet():
                row.check(how, what, look, image, told)
    return row


def sweep(kind: str, name: str, how: Extent = ALL, *, direct: bool) -> Row:
    """One workload on one file system."""
    row = Row(f"{kind}, {name}{', direct' if direct else ''}")
    return develop(row, kind, WORKLOADS[name], FaultyFileSystem(), how, direct=direct)


def sweep_broken(kind: str, name: str) -> Row:
    """A broken variant: caught when any shot loses data; `survived` is 1 for that."""
    workload, make = BROKEN[name]
    row = Row(f"{kind}, broken: {name}")
    seen = develop(row, kind, WORKLOADS[workload], make(), Extent(stop=False), direct=False)
    return Row(row.name, seen.operations, 1, int(seen.lost > 0), int(seen.lost == 0))


def main(options: argparse.Namespace) -> Iterator[Row]:
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    for kind in filter(can_make, KINDS) if options.kind is None else [options.kind]:
        for number, name in enumerate(WORKLOADS):
            yield sweep(kind, name, extent_of(options, 10), direct=number % 2 == 0)
        yield from (sweep_broken(kind, name) for name, caught_on in CAUGHT_ON.items() if kind in caught_on)


if __name__ == "__main__":
    kind = {"default": None, "choices": KINDS, "help": "only this file system"}
    command("Power cut on real file systems", __doc__, main, ("--kind", kind))
