"""Any order of create, save, commit, abort, fault, close: what is on disk is always exactly what was committed."""

from __future__ import annotations

import errno
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from async_ckpt import AsyncCheckpointEngine, Catalog, CheckpointError, TransactionStateError
from tests.support.faulty_filesystem import FaultyFileSystem

TAGS = st.sampled_from(["a", "b", "c"])
FILES = st.sampled_from(["m.pt", "sub/o.pt"])
FAULTS = st.sampled_from(
    [("pwrite", errno.ENOSPC), ("fsync", errno.EIO), ("renameat2", errno.EIO), ("open", errno.EMFILE)]
)


class Checkpoints(RuleBasedStateMachine):
    """The model: what is open, and what was committed, as plain dicts of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.filesystem = FaultyFileSystem()
        self.open: dict[str, dict[str, int]] = {}
        self.committed: dict[str, dict[str, int]] = {}
        self.faulty = False
        self.value = 0

    @initialize(guarded=st.booleans())
    def start(self, guarded: bool) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(3000))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.guarded = guarded
        self.restart()

    def restart(self) -> None:
        self.engine = AsyncCheckpointEngine(
            self.root, staging_bytes=1 << 20, chunk_bytes=4096, overwrite="replace", filesystem=self.filesystem
        )
        if self.guarded:
            self.engine.guard(self.optimizer)

    @rule(tag=TAGS)
    def create(self, tag: str) -> None:
        if tag in self.open:
            try:
                self.engine.create(tag)
                # Only a checkpoint that has failed may be opened anew.
                assert self.faulty
                self.open[tag] = {}
            except CheckpointError as error:
                assert isinstance(error, TransactionStateError) or self.faulty
            return
        try:
            self.engine.create(tag)
            self.open[tag] = {}
        except CheckpointError:
            assert self.faulty

    @precondition(lambda self: self.open)
    @rule(data=st.data(), path=FILES)
    def save(self, data: st.DataObject, path: str) -> None:
        tag = data.draw(st.sampled_from(sorted(self.open)))
        self.value += 1
        with torch.no_grad():
            self.engine.wait_snapshot()
            self.weight.fill_(self.value)
        try:
            self.engine.save({"w": self.weight.detach(), "n": self.value}, self.root / tag / path)
            assert path not in self.open[tag]
            self.open[tag][path] = self.value
        except CheckpointError as error:
            assert self.faulty or (isinstance(error, FileExistsError) and path in self.open[tag])

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        tag = data.draw(st.sampled_from(sorted(self.open)))
        files = self.open.pop(tag)
        error = self.engine.commit(tag, metadata={"files": files}).exception(60)
        if error is None:
            self.committed[tag] = files
        else:
            assert self.faulty and isinstance(error, CheckpointError)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        tag = data.draw(st.sampled_from(sorted(self.open)))
        del self.open[tag]
        self.engine.abort(tag)

    @precondition(lambda self: not self.faulty)
    @rule(fault=FAULTS)
    def break_disk(self, fault: tuple[str, int]) -> None:
        name, code = fault
        self.filesystem.fail_when(
            lambda operation: operation.name == name and "staging" in (operation.path or ""), code
        )
        self.faulty = True

    @precondition(lambda self: self.faulty)
    @rule()
    def heal_disk(self) -> None:
        # What failed while the disk was broken stays failed.
        for tag in sorted(self.open):
            self.engine.abort(tag)
        self.open.clear()
        self.filesystem.heal()
        self.faulty = False

    @rule()
    def close_and_start_again(self) -> None:
        self.close()
        self.open.clear()
        if self.faulty:
            self.filesystem.heal()
            self.faulty = False
        self.restart()

    @invariant()
    def only_what_was_committed_is_visible(self) -> None:
        catalog = Catalog(self.root)
        assert sorted(catalog.tags()) == sorted(self.committed)
        for tag, files in self.committed.items():
            assert catalog.verify(tag).ok
            assert catalog.manifest(tag).metadata["files"] == files
            for path, value in files.items():
                loaded = torch.load(self.root / tag / path)
                assert loaded["n"] == value
                assert loaded["w"].unique().tolist() == [value]

    def close(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                self.engine.close()
            except CheckpointError:
                assert self.faulty

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.close()
        self.filesystem.dispose()
        shutil.rmtree(self.root)


Checkpoints.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
TestCheckpoints = pytest.mark.wide(Checkpoints.TestCase)
