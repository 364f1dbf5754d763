"""What the sweeps run: small jobs on a whole engine, and what each has been told about its commits.

A state says in every part which version it is, so that a mixture of two versions can never pass for one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from async_ckpt import AsyncCheckpointEngine, KeepLast
from async_ckpt.format.names import private_name
from async_ckpt.host.process import current_owner
from async_ckpt.storage.probe import Findings
from tests.support.comparing import unwarned
from tests.support.faulty_filesystem import FaultyFileSystem
from tests.support.insides import commits_of

NUM_FLOATS = 6000
"""24 KB: two chunks of 16 KiB per file."""
CHUNK_BYTES = 16384
TIMEOUT_S = 60.0
Point = TypeVar("Point")


def state(version: int, path: str = "model.pt", num_floats: int = NUM_FLOATS) -> dict[str, Any]:
    """Version `version` of one file."""
    return {
        "w": torch.full((num_floats,), float(version)),
        "i": torch.arange(50) + version,
        "step": version,
        "path": path,
    }


def version_of(loaded: Any, path: str) -> int:
    """The version of a loaded state; AssertionError when it is not exactly one."""
    version = loaded["step"]
    expected = state(version, path, loaded["w"].numel())
    assert loaded["path"] == path and isinstance(version, int)
    assert torch.equal(loaded["w"], expected["w"]) and torch.equal(loaded["i"], expected["i"])
    return version


@dataclass
class Told:
    """What the job was told: versions it tried to commit per tag, in order, and the last that was committed."""

    attempted: dict[str, list[int]] = field(default_factory=dict)
    committed: dict[str, int] = field(default_factory=dict)
    on_commit: Callable[[str, int], None] = lambda tag, version: None

    def attempt(self, tag: str, version: int) -> None:
        self.attempted.setdefault(tag, []).append(version)

    def commit(self, tag: str, version: int) -> None:
        self.committed[tag] = version
        self.on_commit(tag, version)


class Job:
    """An engine and what it was told; the methods are the steps of workloads."""

    def __init__(self, engine: AsyncCheckpointEngine, told: Told) -> None:
        self.engine = engine
        self.told = told
        self._kept: dict[str, Any] = {}

    def start(self, tag: str, version: int, files: tuple[str, ...] = ("model.pt",)) -> Any:
        """Create, save, commit; returns the pending commit."""
        self.told.attempt(tag, version)
        self.engine.create(tag)
        for path in files:
            self.engine.save(state(version, path), path)
        return self.engine.commit(tag, metadata={"step": version})

    def finish(self, pending: Any, version: int) -> None:
        """Wait, and note the success."""
        pending.result(TIMEOUT_S)
        self.told.commit(pending.tag, version)

    def give_up(self) -> list[Exception]:
        """Abort what is open; returns the failures that nobody had been told of yet."""
        failures: list[Exception] = []
        for _ in range(8):
            try:
                commits_of(self.engine).raise_unacknowledged()
                for checkpoint in commits_of(self.engine).opened():
                    self.engine.abort(checkpoint.tag)
                return failures
            except Exception as error:  # noqa: BLE001 - the caller judges it
                failures.append(error)
        raise AssertionError("failures without end")

    def again(self, tag: str, version: int) -> None:
        """As `whole`, from the same tensors each time: one of them never changes, the others where the version does."""
        self.told.attempt(tag, version)
        kept = self._kept
        if kept.setdefault("step", version) != version or "w" not in kept:
            kept.setdefault("w", torch.empty(NUM_FLOATS)).fill_(version)
            kept.setdefault("i", torch.arange(50)).copy_(torch.arange(50) + version)
            kept.setdefault("frozen", torch.arange(CHUNK_BYTES // 4))
            kept["step"], kept["path"] = version, "model.pt"
        self.engine.create(tag)
        self.engine.save(dict(kept), "model.pt")
        self.finish(self.engine.commit(tag), version)

    def whole(self, tag: str, version: int, files: tuple[str, ...] = ("model.pt",)) -> None:
        self.finish(self.start(tag, version, files), version)


def _several_files(job: Job) -> None:
    job.told.attempt("new", 10)
    job.engine.create("new")
    job.engine.makedirs("empty")
    for path in ("model.pt", "sub/optim.pt", "sub/deep/rng.pt"):
        job.engine.save(state(10, path), path)
    job.finish(job.engine.commit("new"), 10)


def _in_flight(job: Job, *tags: str) -> None:
    started = [job.start(tag, version) for version, tag in enumerate(tags, 10)]
    for version, pending in enumerate(started, 10):
        job.finish(pending, version)


def _in_turn(job: Job, *tags: str) -> None:
    for version, tag in enumerate(tags, 10):
        job.whole(tag, version)


def _given_up(job: Job) -> None:
    job.engine.create("gone")
    job.engine.save(state(9), "model.pt")
    job.engine.abort("gone")
    job.whole("new", 10)


def _shared_chunks(job: Job) -> None:
    fs = job.engine.config.filesystem
    if isinstance(fs, FaultyFileSystem) and fs.emulate_clones:
        fs.findings = Findings(clones=True)
    for k in range(3):
        job.again(f"new-{k}", 10 + k)


def _shared_files(job: Job) -> None:
    for tag in ("new", "older", "last"):
        job.again(tag, 10)


@dataclass(frozen=True)
class Workload:
    """A job, and the configuration it needs."""

    name: str
    run: Callable[[Job], None]
    config: dict[str, Any] = field(default_factory=dict)
    keeps: int | None = None
    """With retention: how many of the newest checkpoints must stay."""

    def engine(self, root: Path, fs: FaultyFileSystem, num_writers: int = 2) -> AsyncCheckpointEngine:
        """One with this configuration, and with direct I/O where `fs` says that there is a disk for it."""
        mode = "direct" if fs.fs_type(str(root)) == "ext4" else "buffered"
        return make_engine(root, fs, num_writers=num_writers, io_mode=mode, **self.config)

    def live(self, root: Path, told: Told, fs: FaultyFileSystem, num_writers: int = 2) -> None:
        """The whole life of one engine, as far as a fault lets it."""
        with contextlib.closing(self.engine(root, fs, num_writers)) as engine:
            self.run(Job(engine, told))


TWO = {"retention": KeepLast(2)}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("one file", lambda job: _in_turn(job, "new")),
        Workload("several files", _several_files),
        Workload("replace", lambda job: _in_turn(job, "older", "older"), {"overwrite": "replace"}),
        Workload("two in flight", lambda job: _in_flight(job, "new-a", "new-b")),
        Workload("one tag in flight twice", lambda job: _in_flight(job, "older", "older"), {"overwrite": "replace"}),
        Workload("retention", lambda job: _in_turn(job, "new-0", "new-1", "new-2"), TWO, keeps=2),
        Workload("given up", _given_up),
        Workload("shared chunks", _shared_chunks, {"reuse": "auto", **TWO}, keeps=2),
        Workload("shared files", _shared_files, {"reuse": "auto", "overwrite": "replace"}),
    )
}


def make_engine(root: Path, filesystem: Any = None, **config: Any) -> AsyncCheckpointEngine:
    """A small engine: eight chunks of staging, short timeouts."""
    given = {"staging_bytes": 8 * CHUNK_BYTES, "chunk_bytes": CHUNK_BYTES, "num_writers": 2, "io_mode": "buffered"}
    given |= {"backpressure_timeout_s": 30.0, "close_timeout_s": 30.0, "filesystem": filesystem, **config}
    return AsyncCheckpointEngine(root, **given)


def faulty_filesystem(*, direct: bool = False, keep_data: bool = False) -> FaultyFileSystem:
    """Faults below an engine; `direct`: tmpfs says that it is ext4, so that the path of O_DIRECT is taken."""
    fs = FaultyFileSystem(keep_data=keep_data)
    fs.emulate_clones = True
    fs.fs_type = (lambda path: "ext4") if direct else (lambda path: "tmpfs")  # type: ignore[method-assign]
    return fs


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines that a failing engine owes its user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with unwarned():
            yield
    finally:
        logging.disable(level)


class Folder:
    """Fresh roots in memory (else on disk), copies of a prepared one: tags "oldest" (version 1), "older" (2)."""

    def __init__(self, *, on_disk: str | None = None) -> None:
        base = on_disk or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        self.path = Path(tempfile.mkdtemp(prefix="async-ckpt-faults-", dir=base))
        self._number = 0
        self._template = self.path / "template"
        with make_engine(self._template) as engine:
            told = Told()
            for version, tag in enumerate(("oldest", "older"), 1):
                Job(engine, told).whole(tag, version)
        self.told = told

    def root(self, *, dirty: bool = False) -> tuple[Path, Told]:
        """A fresh root, and what its commits were; `dirty`: with what crashed processes leave behind."""
        self._number += 1
        root = self.path / f"r{self._number}"
        shutil.copytree(self._template, root)
        if dirty:
            leave_behind(root)
        return root, Told({tag: list(v) for tag, v in self.told.attempted.items()}, dict(self.told.committed))

    def drop(self, root: Path) -> None:
        shutil.rmtree(root)

    def each(self, points: Iterable[Point], *, dirty: bool = False) -> Iterator[tuple[Point, Path, Told]]:
        """Each point with a root of its own, which is deleted before the next."""
        for point in points:
            root, told = self.root(dirty=dirty)
            yield point, root, told
            self.drop(root)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.path)


def leave_behind(root: Path) -> None:
    """Staging and trash of a dead process."""
    me = current_owner()
    dead = dataclasses.replace(me, start_ticks=me.start_ticks + 10**12)
    for number, kind in enumerate(("staging", "trash")):
        path = root / private_name(kind, "new", dead, number)  # type: ignore[arg-type]
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "model.pt").write_bytes(b"a part" * 100)
        (path / "model.pt").write_bytes(b"")
