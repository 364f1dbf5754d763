"""Every kind of damage to every region of a committed checkpoint. ``python -m tests.faults.corruption --full``

Each byte region of each file is flipped, cut, extended, swapped with another checkpoint's, or deleted. `verify` must
name the file, `load` must refuse or give exactly the right state (never anything else), `latest` must move on.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from async_ckpt import Catalog, CheckpointError, CorruptCheckpointError
from async_ckpt.format.names import MANIFEST_NAME
from async_ckpt.format.zip_directory import read_directory
from async_ckpt.reading.load import load_committed

from .report import ALL, Extent, Row, command, extent_of
from .workloads import Folder, quiet, version_of

Damage = tuple[str, Callable[[Path], object]]


def flips(data: bytes, chance: random.Random, offsets: Iterable[int]) -> Iterator[Damage]:
    """One flipped bit at each of these offsets."""
    for offset in offsets:
        mask = 1 << chance.randrange(8)

        def flip(path: Path, offset: int = offset, mask: int = mask) -> None:
            damaged = bytearray(data)
            damaged[offset] ^= mask
            path.write_bytes(damaged)

        yield f"bit flipped at {offset}", flip


def shapes(data: bytes, other: Path, chance: random.Random) -> Iterator[Damage]:
    """Lengths, neighbours and kinds that are wrong."""
    size = len(data)
    for length in sorted({0, 1, size // 2, size - 1, *(chance.randrange(size) for _ in range(4))}):
        yield f"cut to {length}", lambda path, length=length: path.write_bytes(data[:length])
    for more in (1, 4096):
        yield f"{more} bytes longer", lambda path, more=more: path.write_bytes(data + bytes(more))
    yield "of another checkpoint", lambda path: path.write_bytes(other.read_bytes())
    yield "zeros", lambda path: path.write_bytes(bytes(size))
    yield "deleted", lambda path: path.unlink()
    yield "a link", lambda path: (path.unlink(), path.symlink_to(other))[1]
    yield "a directory", lambda path: (path.unlink(), path.mkdir())[1]
    for _ in range(4):
        start, length = chance.randrange(size), 1 + chance.randrange(512)
        damaged = data[:start] + bytes(len(data[start : start + length])) + data[start + length :]
        yield f"zeros from {start}", lambda path, damaged=damaged: path.write_bytes(damaged)


def check(root: Path, name: str, is_same: bool) -> None:
    """The damaged tag is "older", the good one "oldest"."""
    catalog = Catalog(root)
    if is_same:
        assert catalog.verify("older").ok
        return
    assert catalog.latest() == "oldest", f"latest() is {catalog.latest()}"
    try:
        problems = catalog.verify("older").problems
        assert problems, "verify has seen nothing"
        # The manifest of another checkpoint is whole in itself: it is the files that are not its own.
        assert name == MANIFEST_NAME or any(problem.path == name for problem in problems), problems
    except CheckpointError as error:
        assert name == MANIFEST_NAME and ("older" in str(error)), str(error)
    try:
        loaded = load_committed(catalog, "older", "model.pt")
    except CorruptCheckpointError as error:
        assert name == MANIFEST_NAME or name in str(error) or error.path == name, str(error)
    except CheckpointError as error:
        assert name == MANIFEST_NAME, repr(error)
    else:
        raise AssertionError(f"loaded as version {version_of(loaded, 'model.pt')}")


def sweep(folder: Folder, name: str, how: Extent = ALL, *, num_flips: int | None) -> Row:
    """All damage (or a part of it) to one file of the newer checkpoint."""
    row = Row(name)
    chance = random.Random(how.seed)
    root, _ = folder.root()
    path, data = root / "older" / name, (root / "older" / name).read_bytes()
    damages = list(shapes(data, root / "oldest" / name, chance))
    damages += flips(data, chance, Extent(num_flips, how.seed).of(range(len(data))))
    if name != MANIFEST_NAME:
        # Every header and every record of the container, whatever the sample.
        directory = read_directory(lambda offset, size: data[offset : offset + size], len(data))
        starts = {(record.offset, record.offset + record.num_bytes) for record in directory.values()}
        edges = {at for first, end in starts for at in (first - 1, first, end) if at < len(data)}
        damages += flips(data, chance, sorted(edges))
    row.operations = len(damages)
    for what, damage in how.of(damages):
        damage(path)
        is_same = path.is_file() and not path.is_symlink() and path.read_bytes() == data
        with quiet():
            row.check(how, what, check, root, name, is_same)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
    assert Catalog(root).latest() == "older"
    folder.drop(root)
    return row


def main(options: argparse.Namespace) -> list[Row]:
    with Folder() as folder:
        num = None if options.full else 300
        return [sweep(folder, name, extent_of(options), num_flips=num) for name in (MANIFEST_NAME, "model.pt")]


if __name__ == "__main__":
    command("Damage to committed files", __doc__, main)
