"""What the ranks of the DCP tests do; each function runs in its own process, with a gloo group around it."""

from __future__ import annotations

import contextlib
import errno
import inspect
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from async_ckpt import AsyncCheckpointEngine, Catalog
from async_ckpt.errors import CheckpointError, CorruptCheckpointError, OutOfSpaceError
from async_ckpt.integrations.dcp import ArenaStager, DcpReader, DcpWriter, TrainingState, load_sharded, save_sharded
from async_ckpt.ranks.rank_coordinator import RankCoordinator
from async_ckpt.storage.filesystem import FileSystem
from async_ckpt.storage.write_file import WritableFile
from tests.support.faulty_filesystem import FaultyFileSystem

COLLECTIVES = (
    *("allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base", "allreduce"),
    *("allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "monitored_barrier"),
    *("recv", "recv_anysource", "reduce", "reduce_scatter", "_reduce_scatter_base", "scatter", "send"),
)
OPTIONS: dict[str, Any] = {"staging_bytes": 1 << 20, "chunk_bytes": 8192, "num_writers": 2}


class FullOnRank(FileSystem):
    """No space for data files on one rank."""

    async def open_write(self, path: str, size_bytes: int, *, direct: bool, executor: Executor) -> WritableFile:
        raise OutOfSpaceError("the disk is full", path=path, needed_bytes=size_bytes, free_bytes=0)


def sharded_model(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A small FSDP2 model, one step old, the same for any number of ranks."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(13, 32), torch.nn.ReLU(), torch.nn.Linear(32, 7))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(4, 13)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def full(state: Any) -> Any:
    """Every DTensor gathered, so that states of jobs of different size can be compared."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, dict):
        return {key: full(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def other_state(rank: int) -> dict[str, Any]:
    """What is no model: a DTensor on its other dimension, a replicated one, flags, views, plain objects."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = torch.arange(60.0).reshape(6, 10)
    return {
        "columns": distribute_tensor(values, mesh, [Shard(1)]),
        "replicated": distribute_tensor(values + 1, mesh, [Replicate()]),
        "conj": torch.arange(8.0).to(torch.complex64).mul(1 + 2j).conj(),
        "view": values.clone()[2:4, 3:9],
        "bf16": torch.arange(5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "plain": {"lr": 0.1, "steps": [1, 2, 3], "name": "run"},
    }


def blank(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    return torch.zeros_like(state) if isinstance(state, torch.Tensor) else None


def save(rank: int, path: str, seed: int, how: str) -> Any:
    model, optimizer = sharded_model(seed)
    state: dict[str, Any] = {"app": TrainingState(model, optimizer), "other": other_state(rank)}
    expected = full({"app": state["app"].state_dict(), "other": state["other"]})
    writer = DcpWriter(**OPTIONS)
    if how == "sync":
        dcp.save(state, checkpoint_id=path, storage_writer=writer)
    else:
        kind = getattr(dcp.state_dict_saver.AsyncCheckpointerType, how)
        stager = ArenaStager(to_process=how == "PROCESS")
        # torch 2.7 has no stagers of their own.
        takes_one = "async_stager" in inspect.signature(dcp.async_save).parameters
        options = {"async_stager": stager} if takes_one else {}
        pending: Any = dcp.async_save(
            state, checkpoint_id=path, storage_writer=writer, async_checkpointer_type=kind, **options
        )
        # The snapshot must not see this.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(-1)
        pending.result()
        del pending
        stager.close()
    writer.close()
    return expected if rank == 0 else None


def load(rank: int, path: str, reader: str) -> Any:
    model, optimizer = sharded_model(99)
    state: dict[str, Any] = {"app": TrainingState(model, optimizer), "other": blank(other_state(rank))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, storage_reader=DcpReader() if reader == "ours" else None)
    return full({"app": state["app"].state_dict(), "other": state["other"]})


def save_while_one_fails(rank: int, path: str, what: str) -> Any:
    options: dict[str, Any] = dict(OPTIONS)
    state: dict[str, Any] = {"x": other_state(rank)["columns"]}
    if rank == dist.get_world_size() - 1:
        if what == "full":
            options["filesystem"] = FullOnRank()
        else:
            state["bad"] = _Unpicklable()
    writer = DcpWriter(overwrite="replace", **options)
    try:
        dcp.save(state, checkpoint_id=path, storage_writer=writer)
        return None
    except CheckpointException as error:
        return sorted(error.failures), str(error)
    finally:
        writer.close()


class _Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


def save_with_cached_plans(rank: int, folder: str) -> Any:
    writer = DcpWriter(**OPTIONS)
    values = torch.arange(60.0).reshape(6, 10)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for n in range(3):
        state = {"x": distribute_tensor(values + n, mesh, [Shard(0)])}
        dcp.save(
            state,
            checkpoint_id=f"{folder}/s{n}",
            storage_writer=writer,
            planner=DefaultSavePlanner(enable_plan_caching=True),
        )
    writer.close()
    found = []
    for n in range(3):
        state = {"x": distribute_tensor(values * 0, mesh, [Shard(0)])}
        dcp.load(state, checkpoint_id=f"{folder}/s{n}", storage_reader=DcpReader())
        found.append(bool(state["x"].full_tensor().equal(values + n)))
    return found


def engine_of(root: str, **options: Any) -> AsyncCheckpointEngine:
    coordinator = RankCoordinator.from_env(timeout_s=20.0, linger_s=5.0)
    return AsyncCheckpointEngine(root, coordinator=coordinator, **{**OPTIONS, **options})


def save_sharded_steps(rank: int, root: str) -> Any:
    model, optimizer = sharded_model(3)
    expected, modes = {}, []
    with engine_of(root) as engine:
        engine.guard(optimizer)
        for step in range(3):
            expected[f"s{step}"] = full(TrainingState(model, optimizer).state_dict())
            pending = save_sharded(
                engine, f"s{step}", {"app": TrainingState(model, optimizer), "step": step}, metadata={"step": step}
            )
            model(torch.ones(4, 13) * step).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            modes.append([one.mode for one in pending.metrics.saves])
        tags = [pending.result(60) for pending in engine.pending()]
        assert len(tags) <= 3
    return (expected, modes) if rank == 0 else None


def load_sharded_step(rank: int, root: str, tag: str) -> Any:
    model, optimizer = sharded_model(98)
    state: dict[str, Any] = {"app": TrainingState(model, optimizer), "step": -1}
    with engine_of(root) as engine:
        load_sharded(engine, tag, state)
    return full(state["app"].state_dict()), state["step"]


def save_sharded_that_fails(rank: int, root: str) -> Any:
    outcomes = []
    with engine_of(root) as engine:
        for tag, bad in (("a", False), ("a", False), ("b", True), ("c", False)):
            state: dict[str, Any] = {"x": other_state(rank)["columns"]}
            if bad and rank == 1:
                state["bad"] = _Unpicklable()
            try:
                save_sharded(engine, tag, state).result(60)
                outcomes.append("ok")
            except (CheckpointError, TypeError) as error:
                outcomes.append(f"{type(error).__name__} {getattr(error, 'rank', '')}".strip())
    return outcomes, Catalog(root).tags()


def save_sharded_that_cannot_begin(rank: int, root: str) -> Any:
    """What the call itself raises on each rank: where rank 1 names no tag, where rank 0's exists, where neither does
    wrong."""
    outcomes = []
    with engine_of(root) as engine:
        for name, tag in (("x", "../a" if rank else "a"), ("x", "b"), ("y", "b"), ("x", "c")):
            try:
                pending = save_sharded(engine, tag, {name: other_state(rank)["columns"]})
            except CheckpointError as error:
                outcomes.append(type(error).__name__)
            else:
                outcomes.append(f"saved {pending.result(60)}")
    return outcomes


def load_own_rows(rank: int, path: str) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"x": distribute_tensor(torch.zeros(1 << 10, 1 << 10, dtype=torch.long), mesh, [Shard(0)])}
    try:
        dcp.load(state, checkpoint_id=path, storage_reader=DcpReader())
    except CheckpointException as error:
        cause = error.failures.get(rank)
        if cause is not None:
            return isinstance(cause[0], CorruptCheckpointError)
    return state["x"].to_local()


def odd_state(fill: bool) -> dict[str, Any]:
    """Shapes that do not divide: ranks with an empty shard, with one row, with all of it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {}
    for name, shape, placement in (
        ("one row", (1, 5), Shard(0)),
        ("five rows", (5, 3), Shard(0)),
        ("columns", (3, 7), Shard(1)),
        ("no rows", (0, 3), Shard(0)),
        ("replicated", (2, 2), Replicate()),
        ("0-dim", (), Replicate()),
        ("large", (1001, 301), Shard(1)),
    ):
        size = int(torch.Size(shape).numel())
        whole = torch.arange(float(size)).reshape(shape) if fill else torch.zeros(shape)
        state[name] = distribute_tensor(whole, mesh, [placement])
    return state | {"plain": torch.arange(4.0) if fill else torch.zeros(4), "step": 5 if fill else 0}


def save_odd_shards(rank: int, root: str) -> Any:
    state = odd_state(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=f"{root}/stock")
    writer = DcpWriter(**OPTIONS)
    dcp.save(state, checkpoint_id=f"{root}/ours", storage_writer=writer)
    writer.close()
    return full(state)


def load_odd_shards(rank: int, readings: list[tuple[str, bool]]) -> list[Any]:
    """What each of (path, whether by our reader) gives."""
    states = []
    for path, ours in readings:
        state = odd_state(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=path, storage_reader=DcpReader() if ours else None)
        states.append(full(state))
    return states


def trained(kind: str, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The same small model, plain, under DDP or under FSDP2, two steps old."""
    torch.manual_seed(seed)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.ones(4, 7)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_face(rank: int, root: str, kind: str) -> Any:
    model, optimizer = trained(kind, 5)
    state = {"train": TrainingState(model, optimizer), "step": 2}
    with engine_of(root) as engine:
        expected = full(state["train"].state_dict())  # type: ignore[attr-defined]
        save_sharded(engine, "s1", state).result(60)
    return expected


def load_face(rank: int, root: str, kind: str) -> Any:
    model, optimizer = trained(kind, 6)
    state: dict[str, Any] = {"train": TrainingState(model, optimizer), "step": 0}
    with engine_of(root) as engine:
        load_sharded(engine, "s1", state)
    assert state["step"] == 2
    return full(state["train"].state_dict())


@contextlib.contextmanager
def no_collectives() -> Iterator[None]:
    """Every process group raises when it is used."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a collective was run")

    kind = dist.ProcessGroup
    real = {name: vars(kind)[name] for name in COLLECTIVES if name in vars(kind)}
    group: Any = dist.distributed_c10d._get_default_group()
    number = group._get_sequence_number_for_group()
    try:
        for name in real:
            setattr(kind, name, refuse)
        with pytest.raises(AssertionError, match="a collective was run"):
            dist.barrier()
        yield
    finally:
        for name, method in real.items():
            setattr(kind, name, method)
    # What goes past Python is counted.
    assert group._get_sequence_number_for_group() == number


def save_without_collectives(rank: int, root: str) -> Any:
    model, optimizer = sharded_model(3)
    state: dict[str, Any] = {"app": TrainingState(model, optimizer), "other": other_state(rank), "log": [1]}
    with engine_of(root) as engine:
        save_sharded(engine, "s0", {**state, "step": 0}, metadata={"step": 0}).result(60)
        expected = []
        for step in (300, 70_000):
            model(torch.ones(4, 13) * step).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(full({"app": state["app"].state_dict(), "other": state["other"]}))
            with no_collectives():
                save_sharded(engine, f"s{step}", {**state, "step": step, "log": [1, step, "x"]}).result(60)
    return expected


def load_saved(rank: int, root: str, tag: str, how: str) -> Any:
    model, optimizer = sharded_model(98)
    app = TrainingState(model, optimizer)
    state: dict[str, Any] = {"app": app, "other": blank(other_state(rank)), "log": [], "step": -1}
    if how == "stock":
        dcp.load(state, checkpoint_id=f"{root}/{tag}")
    else:
        with engine_of(root) as engine:
            load_sharded(engine, tag, state)
    return full({"app": app.state_dict(), "other": state["other"]}), state["step"], state["log"]


def save_what_changes_on_one_rank(rank: int, root: str, what: str) -> Any:
    mine = other_state(rank)
    states: dict[str, dict[str, Any]] = {
        "tensor": {"x": {**mine, "new": torch.ones(2)}},
        "key": {"x": mine, "new": 1},
        "object": {"x": {**mine, "plain": {**mine["plain"], "steps": list(range(9000))}}},
    }
    told: list[Any] = []
    with engine_of(root) as engine:
        for tag in ("a", "b", "c", "d", "e"):
            state = states[what] if rank == 1 and tag != "a" else {"x": mine}
            with no_collectives() if tag in "be" else contextlib.nullcontext():
                error = save_sharded(engine, tag, state).exception(60)
            told.append(None if error is None else f"{type(error).__name__}: {error}")
    return told, Catalog(root).tags()


def save_while_one_disk_fails(rank: int, root: str) -> Any:
    fs, told, state = FaultyFileSystem(), [], {"x": other_state(rank)}
    if rank == 1:
        fs.fail_when(lambda op: op.name == "fsync" and ".b." in op.path and op.path.endswith("distcp"), errno.EIO)
    with engine_of(root, filesystem=fs, reuse="off") as engine:
        for tag in ("a", "b", "c", "d"):
            with no_collectives() if tag in "bd" else contextlib.nullcontext():
                error = save_sharded(engine, tag, state).exception(60)
            told.append(type(error).__name__)
    return told, Catalog(root).tags()
