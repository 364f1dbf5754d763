"""Every kind of damage to every region of a committed checkpoint. ``python -m tests.faults.corruption --full``

Each byte region of each file is flipped, cut, extended, swapped with another checkpoint's, or deleted. `verify` must
name the file, `load` must refuse or give exactly the right state (never anything else), `latest` must move on.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from async_ckpt import Catalog, CheckpointError, CorruptCheckpointError
from async_ckpt.format.names import MANIFEST_NAME
from async_ckpt.format.zip_directory import read_directory
from async_ckpt.reading.load import load_committed

from .report import Part, Row, command, sampled
from .workloads import Folder, quiet, version_of

Damage = tuple[str, Callable[[Path], None]]


def flips(data: bytes, chance: random.Random, num: int | None, at: Sequence[int] | None = None) -> Iterator[Damage]:
    """One flipped bit, at every offset, at `num` of them, or `at` these."""
    offsets: Sequence[int] = (
        at
        if at is not None
        else range(len(data))
        if num is None or num >= len(data)
        else sorted(chance.sample(range(len(data)), num))
    )
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
        yield f"cut to {length}", lambda path, length=length: _write(path, data[:length])  # type: ignore[misc]
    for more in (1, 4096):
        yield f"{more} bytes longer", lambda path, more=more: _write(path, data + bytes(more))  # type: ignore[misc]
    yield "of another checkpoint", lambda path: _write(path, other.read_bytes())
    yield "zeros", lambda path: _write(path, bytes(size))
    yield "deleted", lambda path: path.unlink()
    yield "a link", lambda path: (path.unlink(), path.symlink_to(other))[1]
    yield "a directory", lambda path: (path.unlink(), path.mkdir())[1]
    for _ in range(4):
        start, length = chance.randrange(size), 1 + chance.randrange(512)
        yield (
            f"zeros from {start}",
            lambda path, start=start, length=length: _write(  # type: ignore[misc]
                path, data[:start] + bytes(len(data[start : start + length])) + data[start + length :]
            ),
        )


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def check(root: Path, name: str, what: str, is_same: bool) -> None:
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


def sweep(
    folder: Folder, name: str, *, num_flips: int | None, part: Part | None = None, seed: int = 1, stop: bool = True
) -> Row:
    """All damage (or a part of it) to one file of the newer checkpoint."""
    row = Row(name)
    chance = random.Random(seed)
    root, _ = folder.root()
    path, data = root / "older" / name, (root / "older" / name).read_bytes()
    damages = [*shapes(data, root / "oldest" / name, chance), *flips(data, chance, num_flips)]
    if name != MANIFEST_NAME:
        # Every header and every record of the container, whatever the sample.
        directory = read_directory(lambda offset, size: data[offset : offset + size], len(data))
        starts = {(record.offset, record.offset + record.num_bytes) for record in directory.values()}
        edges = {at for first, end in starts for at in (first - 1, first, end) if at < len(data)}
        damages += flips(data, chance, None, sorted(edges))
    row.operations = len(damages)
    for what, damage in sampled(damages, part, chance):
        damage(path)
        is_same = path.is_file() and not path.is_symlink() and path.read_bytes() == data
        with quiet():
            row.check(what, check, root, name, what, is_same, stop=stop)
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
        names = (MANIFEST_NAME, "model.pt")
        return [sweep(folder, name, num_flips=num, part=options.part, seed=options.seed, stop=False) for name in names]


if __name__ == "__main__":
    command("Damage to committed files", __doc__, main)
