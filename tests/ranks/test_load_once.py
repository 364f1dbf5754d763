"""`load_once`: real processes, of which one reads; all get the same bytes of the same checkpoint, or all raise."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from async_ckpt import AsyncCheckpointEngine, CheckpointError, ConfigError, Node, RankFailedError
from async_ckpt.ranks import load_once, wire
from async_ckpt.ranks.rank_coordinator import RankCoordinator
from async_ckpt.reading.scatter import Scatter
from tests.support.processes import context, run_ranks

pytestmark = [pytest.mark.wide, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
NUMEL = 300_000


def state_of(number: int) -> dict[str, Any]:
    """Extents of several tensors, tensors of several extents, and other leaves."""
    return {
        "model": {"w": torch.arange(NUMEL) + number, "t": torch.arange(12.0).view(3, 4).t() + number},
        "small": [torch.full((5,), number)] * 2,
        "step": number,
    }


def target() -> dict[str, Any]:
    return {
        "model": {"w": torch.zeros(NUMEL, dtype=torch.int64), "t": torch.zeros(4, 3)},
        "small": [torch.zeros(5, dtype=torch.int64)] * 2,
        "step": -1,
    }


def is_state(state: Any, number: int) -> bool:
    expected = state_of(number)
    return bool(
        all(torch.equal(state["model"][name], expected["model"][name]) for name in "wt")
        and torch.equal(state["small"][1], expected["small"][1])
    )


def commit(root: Path, *tags: str, **options: Any) -> None:
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20, chunk_bytes=64 << 10, **options) as engine:
        for tag in tags:
            engine.create(tag)
            engine.save(state_of(int(tag)), "m.pt")
            engine.commit(tag).result()


def damage(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def load(rank: int, root: str, path: str, options: dict[str, Any], coordination: dict[str, Any]) -> Any:
    """What a rank learns: the number that its tensors have, the tag, what it read, or the error."""
    coordination = {"timeout_s": 30.0, "linger_s": 1.0} | coordination
    if coordination.pop("split", False):
        coordination["node"] = Node(rank // 2, 2, (rank // 2 * 2, rank // 2 * 2 + 1))
        root = f"{root}/{rank // 2}"
    coordinator = RankCoordinator.from_env(**coordination)
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20, coordinator=coordinator):
        given = target()
        try:
            done = coordinator.load_once(path, given, **options)
        except CheckpointError as error:
            return type(error).__name__, str(error)
        number = int(done.tag)
        assert is_state(given, number)
        if "select" not in options:
            assert done.state["step"] == number and done.state["model"]["w"] is given["model"]["w"]
        return done.tag, done.read_bytes


HOSTS = {2: ["xx", "xy", "--"], 3: ["xx-"], 4: ["xxxx", "xyxy", "xyyx", "-xx-", "----"]}
"""By number of ranks, a letter for each: those of one letter are on one host, those with a dash on none that shares."""


@pytest.mark.parametrize(("world_size", "hosts"), [(size, hosts) for size, cases in HOSTS.items() for hosts in cases])
def test_one_rank_reads_for_all(tmp_path: Path, world_size: int, hosts: str) -> None:
    commit(tmp_path / "root", "1", "2")
    size = (tmp_path / "root/2/m.pt").stat().st_size
    found = run_ranks(tmp_path / "r", world_size, load_on_hosts, str(tmp_path / "root"), hosts)
    between_hosts = [rank for rank in range(world_size) if hosts[rank] == "-" or hosts.index(hosts[rank]) == rank]
    for rank, (done, num_groups) in enumerate(found):
        assert done == ("2", size if rank == 0 else 0)
        assert num_groups == (rank in between_hosts and len(between_hosts) > 1)


def be_on(host: str) -> None:
    """Let this process be on that host, for the other ranks."""
    load_once.host_key = lambda: host.strip("-")  # type: ignore[attr-defined]


def load_on_hosts(rank: int, root: str, hosts: str) -> Any:
    """What it learns, and how many process groups it made for that."""
    be_on(hosts[rank])
    num_groups = 0

    class Counted(dist.ProcessGroupGloo):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            nonlocal num_groups
            num_groups += 1
            super().__init__(*args)

    dist.ProcessGroupGloo = Counted  # type: ignore[misc]
    return load(rank, root, "2/m.pt", {}, {}), num_groups


def test_select_rename_and_mismatches_are_as_in_load_into(tmp_path: Path) -> None:
    commit(tmp_path / "root", "1")
    found = run_ranks(tmp_path / "r", 2, load_part, str(tmp_path / "root"))
    for part, differing in found:
        assert part == ["model.t"]
        assert differing[0] == "StateMismatchError" and "no tensor was changed" in differing[1]


def load_part(rank: int, root: str) -> Any:
    coordinator = RankCoordinator.from_env(timeout_s=30.0, linger_s=1.0)
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20, coordinator=coordinator):
        part = {"new": torch.zeros(4, 3)}
        done = coordinator.load_once("1/m.pt", part, select="model.t", rename={"model.t": "new"})
        assert torch.equal(part["new"], state_of(1)["model"]["t"])
        try:
            # One rank alone is given another shape: no rank is changed.
            given = target() | ({"small": [torch.zeros(4)] * 2} if rank else {})
            coordinator.load_once("1/m.pt", given)
        except CheckpointError as error:
            assert not given["model"]["w"].any()
            return list(done.state), (type(error).__name__, str(error))
        raise AssertionError


def commit_one(root: Path, state: dict[str, Any]) -> None:
    with AsyncCheckpointEngine(root, staging_bytes=8 << 20, chunk_bytes=256 << 10) as engine:
        engine.create("1")
        engine.save(state, "m.pt")
        engine.commit("1").result()


def test_a_pickle_that_was_sent_in_many_pieces_is_read(tmp_path: Path) -> None:
    commit_one(tmp_path / "root", {"w": torch.arange(NUMEL), "numbers": [k / 3 for k in range(100_000)]})
    assert run_ranks(tmp_path / "r", 2, load_with_small_pieces, str(tmp_path / "root")) == [100_000] * 2


def load_with_small_pieces(rank: int, root: str) -> int:
    wire.PIECE_BYTES = load_once.PIECE_BYTES = 64 << 10  # type: ignore[attr-defined]
    coordinator = RankCoordinator.from_env(timeout_s=30.0, linger_s=1.0)
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20, coordinator=coordinator):
        given = {"w": torch.zeros(NUMEL, dtype=torch.int64), "numbers": []}
        done = coordinator.load_once("1/m.pt", given)
        assert torch.equal(given["w"], torch.arange(NUMEL))
        return sum(number == k / 3 for k, number in enumerate(done.state["numbers"]))


def test_given_tensors_that_share_memory_are_told_from_a_missing_part(tmp_path: Path) -> None:
    commit_one(tmp_path / "root", {"a": torch.arange(NUMEL), "b": torch.arange(NUMEL)})
    for kind, text in run_ranks(tmp_path / "r", 2, load_into_one, str(tmp_path / "root")):
        assert kind == "UnsupportedStateError"
        assert "given tensors share memory, and the file holds them apart" in text


def load_into_one(rank: int, root: str) -> Any:
    coordinator = RankCoordinator.from_env(timeout_s=30.0, linger_s=1.0)
    shared = torch.zeros(NUMEL, dtype=torch.int64)
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20, coordinator=coordinator):
        try:
            coordinator.load_once("1/m.pt", {"a": shared, "b": shared})
        except CheckpointError as error:
            return type(error).__name__, str(error)
        raise AssertionError


def test_a_reader_that_fails_before_the_first_tensor_is_named_at_once(tmp_path: Path) -> None:
    commit(tmp_path / "root", "1")
    found = run_ranks(tmp_path / "r", 2, load_without_memory, str(tmp_path / "root"))
    assert found == ["MemoryError: no place", "RankFailedError: commit failed at step 'load_once': rank 0: no place"]


def load_without_memory(rank: int, root: str) -> str:
    def place(self: wire.Wire, num_bytes: int) -> memoryview:
        raise MemoryError("no place")

    if rank == 0:
        wire.Wire.place = place  # type: ignore[method-assign]
    # Far longer than the test may take.
    coordinator = RankCoordinator.from_env(timeout_s=3600.0, linger_s=1.0)
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20, coordinator=coordinator):
        try:
            coordinator.load_once("1/m.pt", target())
        except (MemoryError, CheckpointError) as error:
            return f"{type(error).__name__}: {error}"
        raise AssertionError


WRONG = {
    "damaged": ("4/m.pt", "3"),
    "damaged head": ("3/m.pt", "2"),
    "no file": ("2/m.pt", "1"),
    # How old what is missing was, nobody knows: the newest is taken, and what is wrong with it found as well.
    "no manifest": ("5/m.pt", "1"),
    "missing": ("9/m.pt", "1"),
}


def test_what_cannot_be_read_is_passed_over_on_all(tmp_path: Path) -> None:
    root = tmp_path / "root"
    commit(root, *"12345")
    found = run_ranks(tmp_path / "r", 2, load_wrong, str(root))
    assert found == [[tag for _, tag in WRONG.values()]] * 2


def load_wrong(rank: int, root: str) -> list[str]:
    coordinator = RankCoordinator.from_env(timeout_s=30.0, linger_s=1.0)
    found = []
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20, coordinator=coordinator):
        for what, (path, _) in WRONG.items():
            if rank == 0 and what == "no file":
                Path(root, path).unlink()
            elif rank == 0 and what != "missing":
                file = Path(root, path[0], "manifest.json") if what == "no manifest" else Path(root, path)
                damage(file, 0.999 if what == "damaged head" else 0.5)
            dist.barrier()
            given = target()
            done = coordinator.load_once(path, given)
            assert is_state(given, int(done.tag))
            found.append(done.tag)
    return found


def test_where_there_is_no_older_one_all_raise_alike(tmp_path: Path) -> None:
    root = tmp_path / "root"
    commit(root, "1")
    damage(root / "1/m.pt", 0.5)
    found = run_ranks(tmp_path / "r", 2, load, str(root), "1/m.pt", {}, {})
    assert [kind for kind, _ in found] == ["ExtentMismatch", "CorruptCheckpointError"]
    assert all("m.pt is damaged" in text and "partly overwritten" in text for _, text in found)
    found = run_ranks(tmp_path / "r", 2, load, str(root), "1/other.pt", {}, {})
    assert [kind for kind, _ in found] == ["CheckpointNotFoundError"] * 2


def test_a_node_whose_file_is_damaged_takes_all_to_the_older_one(tmp_path: Path) -> None:
    for node in (0, 1):
        os.makedirs(tmp_path / "root" / str(node))
    found = run_ranks(tmp_path / "r", 4, save_and_load_by_node, str(tmp_path / "root"))
    assert [tag for tag, _ in found] == ["1"] * 4
    assert [read > 0 for _, read in found] == [True, False] * 2


def save_and_load_by_node(rank: int, root: str) -> Any:
    node = Node(rank // 2, 2, (rank // 2 * 2, rank // 2 * 2 + 1))
    own = Path(root, str(node.number))
    with AsyncCheckpointEngine(
        own, staging_bytes=1 << 20, chunk_bytes=64 << 10, coordinator=RankCoordinator.from_env(node=node, linger_s=5.0)
    ) as engine:
        for tag in ("1", "2"):
            engine.create(tag)
            if rank % 2 == 0:
                engine.save(state_of(int(tag)), "m.pt")
            engine.commit(tag).result()
    if rank == 2:
        damage(own / "2/m.pt", 0.5)
    dist.barrier()
    return load(rank, root, "2/m.pt", {}, {"split": True, "channel": "again"})


def run_and_fall(rank: int, root: str, results: str, port: int, falling: int, how: int, hosts: str) -> None:
    torch.set_num_threads(1)
    be_on(hosts[rank])
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    coordinator = RankCoordinator.from_env(timeout_s=4.0, linger_s=0.1)
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20, coordinator=coordinator):
        if rank == falling:
            num_calls, scatter = itertools.count(), Scatter.__call__

            def fall(self: Scatter, offset: int, view: memoryview) -> None:
                if next(num_calls) == 2:
                    os.kill(os.getpid(), how)
                scatter(self, offset, view)

            Scatter.__call__ = fall  # type: ignore[method-assign]
        wire.PIECE_BYTES = load_once.PIECE_BYTES = 64 << 10  # type: ignore[attr-defined]
        dist.barrier()
        try:
            coordinator.load_once("1/m.pt", target())
        except RankFailedError as error:
            Path(results, str(rank)).write_text(f"{error.rank} {error}")


@pytest.mark.parametrize(
    ("falling", "how", "hosts"),
    [
        *((0, signal.SIGKILL, "xxx"), (1, signal.SIGKILL, "xxx"), (2, signal.SIGSTOP, "xxx")),
        *((0, signal.SIGKILL, "xyy"), (1, signal.SIGKILL, "xyy"), (2, signal.SIGKILL, "xyy")),
    ],
)
def test_a_rank_that_falls_in_the_middle_is_named_on_the_others(
    tmp_path: Path, falling: int, how: int, hosts: str
) -> None:
    commit(tmp_path / "root", "1")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    args = str(tmp_path / "root"), str(tmp_path), store.port, falling, how, hosts
    processes = [context.Process(target=run_and_fall, args=(rank, *args)) for rank in range(3)]
    for process in processes:
        process.start()
    others = [process for rank, process in enumerate(processes) if rank != falling]
    for process in others:
        process.join(60)
    processes[falling].kill()
    processes[falling].join()
    assert [process.exitcode for process in others] == [0, 0]
    for rank in {0, 1, 2} - {falling}:
        said = (tmp_path / str(rank)).read_text()
        assert said.startswith(f"{falling} ") and f"rank {falling} has not answered within 4 s" in said


def test_a_place_is_read_into_again_only_when_its_piece_was_taken() -> None:
    wires = [wire.Wire("test", [[0, 1]], rank, timeout_s=0.5) for rank in (0, 1)]
    joining = threading.Thread(target=wires[1].connect)
    joining.start()
    wires[0].connect()
    joining.join()
    for k in range(wire.NUM_PIECES):
        piece = wires[0].place(4)
        piece[:] = bytes([k] * 4)
        wires[0].send(k, piece)
    received = wires[1].receive()
    assert [(at, bytes(view)) for at, view in itertools.islice(received, 2)] == [(0, b"\0" * 4), (1, b"\1" * 4)]
    # The second piece is still being looked at.
    assert bytes(wires[0].place(4)) == b"\0" * 4
    with pytest.raises(wire.LostError):
        wires[0].place(4)
    for one in wires:
        one.close()


def test_without_a_process_group_or_an_engine_it_says_so(tmp_path: Path) -> None:
    coordinator = RankCoordinator(dist.HashStore(), 0, 1)
    with pytest.raises(ConfigError, match="has no engine"):
        coordinator.load_once("1/m.pt", target())
    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, coordinator=coordinator)
    with engine, pytest.raises(ConfigError, match="init_process_group"):
        coordinator.load_once("1/m.pt", target())
