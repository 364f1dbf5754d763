"""Which checkpoint to resume from: the newest one that is whole, to the last byte, and the same on all ranks."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

from ...engine.interface import StrPath
from ...errors import CheckpointError, CheckpointNotFoundError, ConfigError, RankFailedError, report
from ...format.manifest import Manifest
from ...format.names import MANIFEST_NAME
from ...reading.catalog import Catalog
from ...storage.filesystem import FileSystem
from ...threads.outcome import name_pending
from ..adopting import ADOPTED, adopt
from ..frameworks import require

T = TypeVar("T")

_NAME = re.compile("checkpoint-([0-9]+)")
JIT_MARKER = "checkpoint-is-incomplete.txt"
STATE_NAME = "trainer_state.json"
"""The last file that stock `Trainer` writes into a checkpoint."""


def last_committed_checkpoint(output_dir: StrPath) -> str | None:
    """The newest ``checkpoint-<step>`` below `output_dir` whose every byte is as committed; None if there is none.

    Damaged ones are skipped, and so are directories without a manifest (stock `Trainer`'s, which may be parts), with a
    warning, and so is what this process has pending. Only where nothing has a manifest, the newest directory that stock
    `Trainer` has completed is taken. Blocks for the reading.

    Raises:
        CorruptCheckpointError: there are checkpoints with a manifest, and all are damaged.
    """
    name_pending(os.fspath(output_dir))
    foreign: list[str] = []
    damaged: CheckpointError | None = None
    for path in filter(os.path.isdir, _newest_first(os.path.abspath(os.fspath(output_dir)))):
        try:
            is_ours = _has(path, MANIFEST_NAME) and ADOPTED not in _verify(path).metadata
        except CheckpointError as error:
            report(logging.WARNING, "%s is not resumed from: %s", path, error)
            damaged = damaged or error
            continue
        if is_ours:
            if foreign:
                message = "%s and %d others have no manifest and are not resumed from"
                report(logging.WARNING, message, foreign[0], len(foreign) - 1)
            return path
        foreign.append(path)
    if damaged is not None:
        raise damaged
    for path in foreign:
        if _has(path, STATE_NAME):
            report(logging.WARNING, "%s was saved by stock Trainer: it cannot be verified", path)
            return path
    return None


def resume_point(resume: Any, args: Any) -> Any:
    """What `Trainer` is to resume from, verified: the same on all ranks, or an error on all of them. Blocks.

    `resume` is a path, or True for the newest. Where there is none, True comes back: stock code raises what its users
    know.

    Raises:
        CorruptCheckpointError: there is nothing whole. CheckpointNotFoundError: not every node has one.
        RankFailedError: any of this on another rank.
    """
    # Where each node has a directory of its own, one rank of each looks.
    looks = (args.local_process_index if args.save_on_each_node else args.process_index) == 0

    def look() -> str | bool | None:
        """The name of the newest here, False for none; for a path that was given, whether it is whole."""
        if not looks:
            return None
        if resume is True:
            newest = last_committed_checkpoint(args.output_dir)
            return newest is not None and os.path.basename(newest)
        path = os.path.abspath(os.fspath(resume))
        return not _has(path, MANIFEST_NAME) or bool(_verify(path))

    found = {answer for answer in on_all_ranks(look) if answer is not None}
    if resume is not True or found == {False}:
        return resume
    if False in found:
        raise CheckpointNotFoundError(f"{args.output_dir!r} holds checkpoints on some nodes, and none on others")
    oldest = os.path.join(args.output_dir, min(map(str, found), key=step_of))
    if len(found) > 1:
        on_all_ranks(lambda: looks and bool(_verify(oldest)))
    return oldest


def on_all_ranks(work: Callable[[], T]) -> list[T]:
    """What `work` gives on each rank of Accelerate's; its CheckpointError or OSError on one raises on all, on others as
    RankFailedError. Blocks for the slowest rank."""
    mine: T | None = None
    failure: CheckpointError | OSError | None = None
    try:
        mine = work()
    except (CheckpointError, OSError) as error:
        failure = error
    said = require("huggingface", "accelerate.utils").gather_object([(mine, None if failure is None else str(failure))])
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(said):
        if text is not None:
            raise RankFailedError(f"rank {rank} could not read its checkpoints: {text}", rank=rank, step="load")
    return [found for found, _ in said]


def adopt_ahead(run_dir: str, step: int, last_step: int, *, adopts: bool) -> None:
    """Give stock `Trainer`'s checkpoints that training after `step` will come to a manifest, so that they can be
    replaced. Every rank calls it; one of those that share the directory `adopts`. Blocks for the slowest rank. Raises
    ConfigError: one of them would stop training where it comes there. RankFailedError: so on another rank."""

    def check(path: str) -> None:
        if FileSystem().stat(path).kind != "dir":
            raise ConfigError("it is a link or a file")
        if _has(path, MANIFEST_NAME) or os.listdir(path) == [JIT_MARKER]:
            return
        if not _has(path, STATE_NAME):
            raise ConfigError(f"it has no {STATE_NAME}")
        if adopts:
            adopt(FileSystem(), *os.path.split(path))

    def check_all() -> None:
        for path in _newest_first(run_dir):
            if step < step_of(path) <= last_step:
                try:
                    check(path)
                except (CheckpointError, OSError) as error:
                    told = f"training will come to {path!r}, but that is no complete checkpoint ({error}); move or"
                    raise ConfigError(f"{told} delete it. Nothing was changed") from error

    on_all_ranks(check_all)


def _has(path: str, name: str) -> bool:
    return FileSystem().stat(os.path.join(path, name)).kind == "file"


def _verify(path: str) -> Manifest:
    """Compare every file of a checkpoint directory with its manifest; other files in it, and another name of it, are
    fine. Raises CorruptCheckpointError, CheckpointNotFoundError."""
    folder, name = os.path.split(path)
    catalog = Catalog(folder)
    catalog.verify(name).raise_if_bad()
    return catalog.manifest(name)


def step_of(path: str) -> int:
    """The number in a path or tag ``checkpoint-<step>``; -1 for every other name."""
    match = _NAME.fullmatch(os.path.basename(path))
    return -1 if match is None else int(match[1])


def _newest_first(root: str) -> list[str]:
    try:
        paths = [os.path.join(root, name) for name in os.listdir(root)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((path for path in paths if step_of(path) >= 0), key=step_of, reverse=True)
