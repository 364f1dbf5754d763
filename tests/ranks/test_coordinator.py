"""The coordinator in one process: ranks as threads over a HashStore, so that many situations cost little time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from async_ckpt import (
    AsyncCheckpointEngine,
    Catalog,
    CheckpointError,
    CommitError,
    ConfigError,
    KeepLast,
    PathExistsError,
    RankFailedError,
    TagExistsError,
)
from async_ckpt.format import manifest
from async_ckpt.host.facts import node_from_env
from async_ckpt.ranks.joining import Announcements
from async_ckpt.ranks.protocol import announce, retire
from async_ckpt.ranks.rank_coordinator import Node, RankCoordinator
from async_ckpt.ranks.rank_requests import RankInfo
from async_ckpt.ranks.store_link import LinkLostError, StoreLink, default_run_id
from async_ckpt.storage.filesystem import FileSystem
from async_ckpt.storage.staged import Destination


def engine_of(
    root: Path, store: Any, rank: int, world_size: int, node: Node | None = None, **options: Any
) -> AsyncCheckpointEngine:
    coordinator = RankCoordinator(store, rank, world_size, timeout_s=30.0, linger_s=2.0, node=node)
    options = {"staging_bytes": 1 << 20, "chunk_bytes": 4096} | options
    return AsyncCheckpointEngine(root, coordinator=coordinator, **options)


def together(world_size: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work` returned or raised, per rank."""

    def guarded(rank: int) -> Any:
        try:
            return work(rank)
        except Exception as error:  # noqa: BLE001 - an outcome like any other
            return error

    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(guarded, range(world_size)))


@pytest.mark.wide
def test_many_tags_in_flight_begun_in_another_order_on_each_rank(tmp_path: Path) -> None:
    store = dist.PrefixStore("x", dist.HashStore())
    tags = [f"t{n}" for n in range(4)]

    def work(rank: int) -> list[str]:
        mine = tags[rank:] + tags[:rank]
        with engine_of(tmp_path, store, rank, 3) as engine:
            for tag in mine:
                engine.create(tag)
                engine.save({"x": torch.full((2000,), rank)}, f"{rank}/x.pt")
            pending = [engine.commit(tag) for tag in reversed(mine)]
            return sorted(commit.result(20) for commit in pending)

    assert together(3, work) == [tags] * 3
    catalog = Catalog(tmp_path)
    assert sorted(catalog.tags()) == tags
    assert all(catalog.verify(tag).ok for tag in tags)


def test_the_store_does_not_grow_and_engines_follow_each_other_over_one_store(tmp_path: Path) -> None:
    store = dist.HashStore()
    sizes = []
    for run in range(3):

        def work(rank: int, run: int = run) -> None:
            with engine_of(tmp_path, store, rank, 2) as engine:
                for n in range(5):
                    tag = f"r{run}n{n}"
                    engine.create(tag)
                    engine.save({"x": torch.ones(10)}, f"{rank}.pt")
                    if n == 2 and rank == 1:
                        engine.abort(tag)
                        continue
                    pending = engine.commit(tag)
                    if n == 2:
                        with pytest.raises(RankFailedError):
                            pending.result(20)

        assert together(2, work) == [None, None]
        sizes.append(store.num_keys())
    # Two counters for the run.
    assert sizes == [2, 2, 2]
    assert len(Catalog(tmp_path).tags()) == 12


def test_the_same_tag_again_after_a_failure_and_as_a_replacement(tmp_path: Path) -> None:
    store = dist.HashStore()

    def work(rank: int) -> list[Any]:
        outcomes: list[Any] = []
        with engine_of(tmp_path, store, rank, 2, overwrite="replace") as engine:
            for attempt in range(4):
                engine.create("same")
                engine.save({"attempt": attempt}, f"{rank}.pt")
                if attempt == 1 and rank == 1:
                    engine.abort("same")
                    outcomes.append("aborted")
                    continue
                error = engine.commit("same").exception(20)
                outcomes.append(type(error).__name__ if error else "ok")
        return outcomes

    assert together(2, work) == [["ok", "RankFailedError", "ok", "ok"], ["ok", "aborted", "ok", "ok"]]
    with AsyncCheckpointEngine(tmp_path) as engine:
        assert {engine.load(f"same/{rank}.pt")["attempt"] for rank in (0, 1)} == {3}


def test_a_try_that_was_given_up_before_rank_zero_began_takes_its_first_try(tmp_path: Path) -> None:
    """The second try could take rank 0's first, and a checkpoint of two different tries was committed."""
    store, has_given_up = dist.HashStore(), threading.Event()

    def work(rank: int) -> list[str]:
        outcomes = []
        with engine_of(tmp_path, store, rank, 2) as engine:
            if rank == 1:
                engine.create("same")
                engine.save({"attempt": 0}, "1.pt")
                engine.abort("same")
            for attempt in (0, 1) if rank == 0 else (1,):
                if rank == 0:
                    has_given_up.wait(20)
                engine.create("same")
                has_given_up.set()
                engine.save({"attempt": attempt}, f"{rank}.pt")
                error = engine.commit("same").exception(20)
                outcomes.append(type(error).__name__ if error else "ok")
        return outcomes

    assert together(2, work) == [["RankFailedError", "ok"], ["ok"]]
    with AsyncCheckpointEngine(tmp_path) as engine:
        assert {engine.load(f"same/{rank}.pt")["attempt"] for rank in (0, 1)} == {1}


def test_a_tag_that_exists_is_refused_on_every_rank(tmp_path: Path) -> None:
    store = dist.HashStore()

    def work(rank: int) -> Any:
        with engine_of(tmp_path, store, rank, 2) as engine:
            for _ in range(2):
                engine.create("a")
                engine.save({"rank": rank}, f"{rank}.pt")
                engine.commit("a").result(20)

    zero, one = together(2, work)
    assert isinstance(zero, TagExistsError)
    assert isinstance(one, RankFailedError)
    assert one.rank == 0
    assert "TagExistsError" in str(one)
    assert Catalog(tmp_path).verify("a").ok


class Refusing(Destination):
    """What an integration does at its destination fails."""

    def prepare(self, filesystem: FileSystem, *, leads: bool, overwrite: str) -> None:
        raise PathExistsError("it cannot be prepared")


class Unfinished(Destination):
    """What an integration does after the rename fails."""

    def published(self, filesystem: FileSystem) -> None:
        raise CommitError("it is there, but unfinished", step="by hand", committed=None)


def commit_to(tmp_path: Path, destinations: dict[int, Destination]) -> list[Any]:
    """How rank 0 and rank 1 fared at tag "a", where some of them go to destinations of their own, and then at "b"."""
    store = dist.HashStore()

    def work(rank: int) -> list[Any]:
        outcomes: list[Any] = []
        with engine_of(tmp_path, store, rank, 2) as engine:
            for tag in (destinations.get(rank, "a"), "b"):
                try:
                    engine.create(tag)
                    engine.save({"x": 1}, f"{rank}.pt")
                    outcomes.append(engine.commit(tag).result(20))
                except CheckpointError as error:
                    outcomes.append(error)
        return outcomes

    return together(2, work)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_destination_that_one_rank_cannot_prepare_fails_on_all(tmp_path: Path, rank: int) -> None:
    found = commit_to(tmp_path, {rank: Refusing(str(tmp_path), "a")})
    own, told = found[rank][0], found[1 - rank][0]
    assert isinstance(own, PathExistsError)
    assert isinstance(told, RankFailedError) and told.rank == rank and "it cannot be prepared" in str(told)
    assert [outcomes[1] for outcomes in found] == ["b", "b"]
    assert Catalog(tmp_path).tags() == ["b"]


@pytest.mark.parametrize("given_up", [False, True], ids=["it cannot begin either", "it had given up before"])
def test_rank_zero_does_not_linger_for_a_rank_that_failed_too(tmp_path: Path, given_up: bool) -> None:
    store, has_failed = dist.HashStore(), threading.Event()

    def work(rank: int) -> None:
        coordinator = RankCoordinator(store, rank, 2, timeout_s=60.0, linger_s=60.0)
        with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, coordinator=coordinator) as engine:
            if rank == 1 and given_up:
                engine.create("a")
                engine.abort("a")
            else:
                if rank == 0 and given_up:
                    has_failed.wait(20)
                with pytest.raises(PathExistsError):
                    engine.create(Refusing(str(tmp_path), "a"))
            has_failed.set()

    started = time.monotonic()
    assert together(2, work) == [None, None]
    assert time.monotonic() - started < 30
    assert store.num_keys() == 2


class Watched:
    """A store that tells when somebody asks for a node's staging name."""

    clone = None

    def __init__(self, store: Any, asked: threading.Event) -> None:
        self._store, self._asked = store, asked

    def compare_set(self, key: str, expected: str, desired: str) -> Any:
        if "/open/" in key:
            self._asked.set()
        return self._store.compare_set(key, expected, desired)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_leader_that_cannot_begin_ends_the_wait_of_its_node(tmp_path: Path) -> None:
    store, asked = dist.HashStore(), threading.Event()

    class RefusingLate(Refusing):
        def prepare(self, filesystem: FileSystem, *, leads: bool, overwrite: str) -> None:
            asked.wait(20)
            super().prepare(filesystem, leads=leads, overwrite=overwrite)

    def work(rank: int) -> Any:
        own: Any = Watched(store, asked) if rank == 2 else store
        node = Node(0, 2, (0,)) if rank == 0 else Node(1, 2, (1, 2))
        coordinator = RankCoordinator(own, rank, 3, timeout_s=60.0, linger_s=60.0, node=node)
        root = tmp_path / str(node.number)
        with AsyncCheckpointEngine(root, staging_bytes=1 << 20, coordinator=coordinator) as engine:
            engine.create(RefusingLate(str(root), "a") if rank == 1 else "a")
            engine.save({"x": 1}, f"{rank}.pt")
            engine.commit("a").result(40)

    started = time.monotonic()
    zero, one, two = together(3, work)
    assert time.monotonic() - started < 30
    assert isinstance(one, PathExistsError)
    for told in (zero, two):
        assert isinstance(told, RankFailedError) and told.rank == 1 and "it cannot be prepared" in str(told)


def test_what_fails_after_the_rename_is_told_to_all(tmp_path: Path) -> None:
    destination = Unfinished(str(tmp_path), "a")
    found = commit_to(tmp_path, {0: destination, 1: destination})
    for outcomes in found:
        assert isinstance(outcomes[0], CommitError) and outcomes[0].committed is None
        assert "it is there, but unfinished" in str(outcomes[0])
        assert outcomes[1] == "b"
    assert Catalog(tmp_path).tags() == ["a", "b"]


def test_files_that_only_all_together_do_not_fit_are_refused_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of the manifest is that of all ranks' files; each rank's own would fit."""
    monkeypatch.setattr(manifest, "MAX_FILES_BYTES", 16_000)
    written: list[str] = []

    class Noting(FileSystem):
        async def open_write(self, path: str, size_bytes: int, **options: Any) -> Any:
            written.append(path)
            return await super().open_write(path, size_bytes, **options)

    store = dist.HashStore()

    def work(rank: int) -> list[Any]:
        with engine_of(tmp_path, store, rank, 2, filesystem=Noting()) as engine:
            outcomes: list[Any] = []
            for tag, num_chunks in (("large", 1200), ("small", 600)):
                engine.create(tag)
                try:
                    engine.save({"x": torch.zeros(num_chunks * 1024)}, f"{rank}.pt")
                    outcomes.append(engine.commit(tag).result(20))
                except CheckpointError as error:
                    outcomes.append(error)
            return outcomes

    for error, second in together(2, work):
        assert isinstance(error, RankFailedError)
        assert "does not fit: with it, the manifest of all ranks' files would have" in str(error)
        assert "Nothing of this file was written" in str(error)
        assert second == "small"
    assert len([path for path in written if ".large." in path]) <= 1
    assert store.num_keys() == 2


def test_two_ranks_that_save_one_path_are_named(tmp_path: Path) -> None:
    store = dist.HashStore()

    def work(rank: int) -> Any:
        with engine_of(tmp_path, store, rank, 2) as engine:
            engine.create("a")
            engine.save({"rank": rank}, "model.pt")
            return engine.commit("a").exception(20)

    errors = together(2, work)
    assert all(errors)
    assert Catalog(tmp_path).tags() == []


def test_a_rank_that_gives_up_before_rank_zero_has_begun(tmp_path: Path) -> None:
    store = dist.HashStore()
    gave_up = threading.Event()

    def work(rank: int) -> Any:
        with engine_of(tmp_path, store, rank, 2) as engine:
            if rank == 0:
                gave_up.wait(20)
            engine.create("a")
            if rank == 1:
                engine.abort("a")
                gave_up.set()
                return None
            engine.save({"rank": rank}, f"{rank}.pt")
            started = time.monotonic()
            error = engine.commit("a").exception(20)
            # It is told, not timed out.
            assert time.monotonic() - started < 20
            return error

    zero, _ = together(2, work)
    assert isinstance(zero, RankFailedError)
    assert zero.rank == 1


def test_closing_ends_every_wait(tmp_path: Path) -> None:
    link = StoreLink(dist.HashStore, "p/", RankInfo(1, 2, 600.0))
    waiting = link.submit(Announcements(link.info).join("never"))
    link.close()
    assert isinstance(waiting.exception(20), LinkLostError)
    assert isinstance(link.submit(Announcements(link.info).join("never")).exception(20), LinkLostError)


def test_what_no_rank_will_read_is_dropped_when_the_link_closes() -> None:
    store = dist.HashStore()
    link = StoreLink(lambda: store, "p/", RankInfo(0, 2, 600.0))
    attempt = link.submit(announce(link.info, "t", "name")).result(20)
    link.later(retire(link.info, attempt))
    started = time.monotonic()
    link.close(0.1)
    assert time.monotonic() - started < 20
    # Two counters for the run.
    assert store.num_keys() == 2


def test_a_store_that_breaks_is_an_error_on_the_rank_that_sees_it(tmp_path: Path) -> None:
    class Broken:
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Connection reset by peer")

    coordinator = RankCoordinator(Broken(), 0, 2, timeout_s=2.0, linger_s=0.1)
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, coordinator=coordinator) as engine:
        engine.create("a")
        engine.save({"x": 1}, "x.pt")
        error = engine.commit("a").exception(20)
    assert isinstance(error, RankFailedError)
    assert "Connection reset" in str(error)
    assert Catalog(tmp_path).tags() == []


@pytest.mark.wide
def test_a_slow_connection_is_not_a_store_that_does_not_answer() -> None:
    connected = threading.Event()

    def connect() -> dist.HashStore:
        # The watching thread has looked several times when this ends.
        connected.wait(0.5)
        return dist.HashStore()

    link = StoreLink(connect, "p/", RankInfo(0, 2, 0.1))
    assert link.submit(announce(link.info, "t", "name")).result(20) == 1
    link.close()


def test_a_request_without_an_answer_ends_every_wait() -> None:
    released = threading.Event()

    class Stopped(dist.HashStore):
        def add(self, key: str, amount: int) -> int:
            released.wait(60)
            return 1

    link = StoreLink(Stopped, "p/", RankInfo(0, 2, 0.1))
    with pytest.raises(LinkLostError, match="has not answered for 0"):
        link.submit(announce(link.info, "t", "name")).result(20)
    released.set()
    link.close()


def test_steps_do_not_interleave_between_waits() -> None:
    link = StoreLink(dist.HashStore, "p/", RankInfo(0, 2, 1.0))
    futures = [link.submit(announce(link.info, f"t{n}", "name")) for n in range(50)]
    assert [future.result(20) for future in futures] == list(range(1, 51))
    link.close()


def test_keys_of_two_engines_over_one_store_stay_apart(tmp_path: Path) -> None:
    store = dist.HashStore()

    def work(rank: int) -> None:
        with engine_of(tmp_path / "one", store, rank, 2) as one, engine_of(tmp_path / "two", store, rank, 2) as two:
            for engine in (one, two) if rank else (two, one):
                engine.create("a")
                engine.save({"root": str(engine.root)}, f"{rank}.pt")
            commits = [engine.commit("a") for engine in (one, two)]
            assert [commit.result(20) for commit in commits] == ["a", "a"]

    assert together(2, work) == [None, None]
    assert Catalog(tmp_path / "one").verify("a").ok
    assert Catalog(tmp_path / "two").verify("a").ok


def test_retention_is_rank_zeros_work(tmp_path: Path) -> None:
    store = dist.HashStore()

    def work(rank: int) -> None:
        with engine_of(tmp_path, store, rank, 2, retention=KeepLast(1)) as engine:
            for tag in ("a", "b", "c"):
                engine.create(tag)
                engine.save({"x": 1}, f"{rank}.pt")
                engine.commit(tag).result(20)

    assert together(2, work) == [None, None]
    assert Catalog(tmp_path).tags() == ["c"]


def test_bad_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ConfigError, match="not in a job"):
        RankCoordinator(store, 2, 2)
    with pytest.raises(ConfigError, match="timeout_s"):
        RankCoordinator(store, 0, 2, timeout_s=0)
    with pytest.raises(ConfigError, match="not among the ranks"):
        RankCoordinator(store, 0, 2, node=Node(0, 2, (1,)))
    with pytest.raises(ConfigError, match="run_id"):
        RankCoordinator(dist.PrefixStore("p", dist.FileStore(str(tmp_path / "store"), 2)), 0, 2)
    coordinator = RankCoordinator(store, 0, 1, run_id="1")
    with pytest.raises(ConfigError, match="has no engine"):
        coordinator.latest_on_all()
    coordinator.bind(FileSystem(), str(tmp_path))
    with pytest.raises(ConfigError, match="has an engine already"):
        coordinator.bind(FileSystem(), str(tmp_path))
    coordinator.close()


def test_torchruns_environment_tells_run_and_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"GROUP_RANK": 1, "GROUP_WORLD_SIZE": 3, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert node_from_env(6, 12) == Node(1, 3, (4, 5, 6, 7))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert default_run_id(dist.FileStore(str(tmp_path / "store"), 2)) == "job.2"
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        node_from_env(6, 12)
