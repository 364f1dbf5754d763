"""Which checkpoint to resume from: the newest one that is whole, to the last byte."""

from __future__ import annotations

import logging
import os
import re

from ...engine.interface import StrPath
from ...errors import CheckpointError, ConfigError, report
from ...format.manifest import Manifest
from ...format.names import MANIFEST_NAME
from ...reading.catalog import Catalog
from ...storage.filesystem import FileSystem, ReadSide
from ..adopting import ADOPTED, adopt

_NAME = re.compile("checkpoint-([0-9]+)")
JIT_MARKER = "checkpoint-is-incomplete.txt"
_LAST_FILE_OF_STOCK = "trainer_state.json"


def last_committed_checkpoint(output_dir: StrPath) -> str | None:
    """The newest ``checkpoint-<step>`` below `output_dir` whose every byte is as committed; None if there is none.

    Damaged ones are skipped, and so are directories without a manifest (stock `Trainer`'s, which may be parts), with a
    warning. Only where nothing has a manifest, the newest directory that stock `Trainer` has completed is taken. Blocks
    for the reading.

    Raises:
        CorruptCheckpointError: there are checkpoints with a manifest, and all are damaged.
    """
    root = os.path.abspath(os.fspath(output_dir))
    fs: FileSystem = FileSystem()
    foreign: list[str] = []
    damaged: CheckpointError | None = None
    for path in _newest_first(root):
        if fs.stat(os.path.join(path, MANIFEST_NAME)).kind != "file":
            foreign.append(path)
            continue
        try:
            if ADOPTED in verify_directory(path, fs).metadata:
                foreign.append(path)
                continue
        except CheckpointError as error:
            report(logging.WARNING, "%s is not resumed from: %s", path, error)
            damaged = damaged or error
            continue
        if foreign:
            report(
                logging.WARNING,
                "%s and %d others have no manifest and are not resumed from",
                foreign[0],
                len(foreign) - 1,
            )
        return path
    if damaged is not None:
        raise damaged
    for path in foreign:
        if fs.stat(os.path.join(path, _LAST_FILE_OF_STOCK)).kind == "file":
            report(logging.WARNING, "%s was saved by stock Trainer: it cannot be verified", path)
            return path
    return None


def adopt_ahead(run_dir: str, step: int, last_step: int, *, adopts: bool) -> None:
    """Give stock `Trainer`'s checkpoints that training after `step` will come to a manifest, so that they can be
    replaced. Blocks.

    Every rank calls it, so that all of them refuse alike; one of those that share the directory `adopts`.

    Raises:
        ConfigError: one of them is not complete, or holds what cannot be read: it would stop training where it comes
            there.
    """
    fs: FileSystem = FileSystem()
    for path in _newest_first(run_dir):
        folder, name = os.path.split(path)
        if (
            not step < int(name.rpartition("-")[2]) <= last_step
            or fs.stat(os.path.join(path, MANIFEST_NAME)).kind != "missing"
        ):
            continue
        if os.listdir(path) == [JIT_MARKER]:
            continue
        try:
            if fs.stat(os.path.join(path, _LAST_FILE_OF_STOCK)).kind != "file":
                raise ConfigError(f"it has no {_LAST_FILE_OF_STOCK}")
            if adopts:
                adopt(fs, folder, name)
        except (CheckpointError, OSError) as error:
            message = (
                f"training will come to {name}, but {path!r} is no complete checkpoint ({error}); move or "
                "delete it. Nothing was changed"
            )
            raise ConfigError(message) from error


def verify_directory(path: str, fs: ReadSide) -> Manifest:
    """Compare every file of a checkpoint directory with its manifest; other files in it, and another name of it, are
    fine.

    Raises:
        CorruptCheckpointError: something is not as it was committed. CheckpointNotFoundError: there is no manifest.
    """
    folder, name = os.path.split(os.path.abspath(path))
    catalog = Catalog(folder, fs)
    catalog.verify(name).raise_if_bad()
    return catalog.manifest(name)


def _newest_first(root: str) -> list[str]:
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = {
        int(match[1]): name
        for name in names
        if (match := _NAME.fullmatch(name)) and os.path.isdir(os.path.join(root, name))
    }
    return [os.path.join(root, steps[step]) for step in sorted(steps, reverse=True)]
