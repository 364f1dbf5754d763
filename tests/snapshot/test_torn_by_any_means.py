"""Changes of whole tensors that move no version counter, or another tensor's: torn by name, or the right bytes."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, TornSnapshotError
from async_ckpt.snapshot.owned_storages import storage_ids
from tests.snapshot.test_snapshots import assert_same, frozen
from tests.support.insides import arena_of, guard_of
from tests.support.stepping import TIMEOUT_S, Doing, noted_waits, saved, until  # noqa: F401


class Training:
    """A model with BatchNorm, an optimizer with state, and averaged weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 512))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.average = {name: value.detach() + 1 for name, value in self.model.named_parameters()}
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 64)).square().mean().backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def clamp(training: Training) -> None:
    for parameter in training.model.parameters():
        parameter.data.clamp_(-0.01, 0.01)


def swap_averages(training: Training) -> None:
    """As averaging wrappers do around an evaluation."""
    for name, parameter in training.model.named_parameters():
        parameter.data.copy_(training.average[name])


def fused_adamw(training: Training) -> None:
    weights = [p.detach() for p in training.model.parameters()]
    states = [training.optimizer.state[p] for p in training.model.parameters()]
    torch._fused_adamw_(
        weights,
        list(map(torch.ones_like, weights)),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        lr=0.5,
        beta1=0.9,
        beta2=0.99,
        weight_decay=0.1,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


def fused_sgd(training: Training) -> None:
    weights = [p.detach() for p in training.model.parameters()]
    options = {"weight_decay": 0.0, "momentum": 0.0, "lr": 0.5, "dampening": 0.0, "nesterov": False, "maximize": False}
    torch._fused_sgd_(weights, list(map(torch.ones_like, weights)), [], **options, is_first_step=True)


def owner_in_place(training: Training) -> None:
    """The state holds aliases with counters of their own."""
    with torch.no_grad():
        training.model[2].weight[5, 5] += 1


CHANGES = (clamp, swap_averages, fused_adamw, fused_sgd, owner_in_place)

pytestmark = pytest.mark.usefixtures("noted_waits")


@pytest.fixture
def training() -> Training:
    return Training()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[AsyncCheckpointEngine]:
    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20, chunk_bytes=16384, io_mode="buffered")
    yield engine
    engine.close()


def save_and_change(
    engine: AsyncCheckpointEngine, held: Any, state: Any, change: Callable[[], object], **options: Any
) -> Any:
    """How the commit of a guarded save ended, whose state was changed before a byte of it was copied in the
    background.
    """
    engine.create("t")
    engine.save(state, "s.pt", **options)
    change()
    held.let_go()
    return engine.commit("t").exception(60)


@pytest.mark.wide
@pytest.mark.parametrize("change", CHANGES[:-1])
def test_a_change_before_the_copy_is_torn_by_name(
    engine: AsyncCheckpointEngine, training: Training, held_copies: Any, change: Callable[[Training], None]
) -> None:
    engine.guard(training.optimizer)
    error = save_and_change(engine, held_copies(engine), training.state(), lambda: change(training))
    assert isinstance(error, TornSnapshotError)
    assert "['model']['0.weight']" in error.tensors and "['model']['2.weight']" in error.tensors
    assert all("running" not in name for name in error.tensors)


@pytest.mark.wide
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_copy_tears_nothing(
    engine: AsyncCheckpointEngine, training: Training, tmp_path: Path, change: Callable[[Training], None]
) -> None:
    engine.guard(training.optimizer)
    expected = frozen(training.state())
    engine.create("t")
    engine.save(training.state(), "s.pt")
    engine.wait_snapshot()
    change(training)
    engine.commit("t").result(60)
    assert_same(torch.load(tmp_path / "t" / "s.pt"), expected)


@pytest.mark.parametrize("change", [owner_in_place, clamp])
def test_aliases_are_torn_by_a_change_of_their_owner(
    engine: AsyncCheckpointEngine, training: Training, held_copies: Any, change: Callable[[Training], None]
) -> None:
    """One number in the middle, by counted means: no probe sees it, and the alias keeps its own counter."""
    engine.guard(training.optimizer)
    aliases = {name: parameter.data for name, parameter in training.model.named_parameters()}
    error = save_and_change(engine, held_copies(engine), aliases, lambda: change(training))
    assert isinstance(error, TornSnapshotError) and "['2.weight']" in error.tensors
    assert change is clamp or error.tensors == ("['2.weight']",)


def test_batchnorm_statistics_and_observers_are_copied_at_once(
    engine: AsyncCheckpointEngine, training: Training, held_copies: Any, tmp_path: Path
) -> None:
    from torch.ao.quantization import FakeQuantize

    fake = FakeQuantize()
    fake(torch.randn(10))
    engine.guard(training.optimizer)
    expected = frozen({"model": training.model.state_dict(), "fake": fake.state_dict()})

    def forward() -> None:
        training.model(torch.randn(8, 64) + 5)
        fake(100 * torch.randn(10))

    assert (
        save_and_change(
            engine, held_copies(engine), {"model": training.model.state_dict(), "fake": fake.state_dict()}, forward
        )
        is None
    )
    assert_same(torch.load(tmp_path / "t" / "s.pt"), expected)
    assert not torch.equal(fake.state_dict()["scale"], expected["fake"]["scale"])


def test_small_payloads_are_copied_at_once(engine: AsyncCheckpointEngine, held_copies: Any, tmp_path: Path) -> None:
    weights = {f"w{k}": torch.nn.Parameter(torch.full((k + 1,), 1.0)) for k in range(300)}
    optimizer = torch.optim.SGD(list(weights.values()), lr=0.1)
    engine.guard(optimizer)
    before = {name: weight.detach().clone() for name, weight in weights.items()}

    def change() -> None:
        for weight in list(weights.values())[:64]:
            weight.data.fill_(9.0)

    state = {name: weight.detach() for name, weight in weights.items()}
    assert save_and_change(engine, held_copies(engine), state, change) is None
    assert_same(torch.load(tmp_path / "t" / "s.pt"), before)


@pytest.mark.parametrize("alignment", [1, 64])
@pytest.mark.parametrize("offset", range(5))
def test_payloads_at_odd_addresses(tmp_path: Path, held_copies: Any, alignment: int, offset: int) -> None:
    """Neither in memory nor in the file do they begin at a multiple of eight."""
    owner = torch.ones(5000, dtype=torch.uint8)
    weight = owner[offset : offset + 4001]
    with AsyncCheckpointEngine(
        tmp_path, staging_bytes=1 << 20, chunk_bytes=4096, storage_alignment=alignment, compact_views=True
    ) as engine:
        optimizer = torch.optim.SGD([weight], lr=0.1)
        engine.guard(optimizer)
        engine.create("right")
        engine.save({"x": "padding", "w": weight}, "s.pt")
        engine.wait_snapshot()
        engine.commit("right").result(60)
        held = held_copies(engine)
        engine.create("t")
        engine.save({"x": "padding", "w": weight}, "s.pt")
        weight.data.fill_(9)
        held.let_go()
        assert isinstance(engine.commit("t").exception(60), TornSnapshotError)
    assert torch.load(tmp_path / "right" / "s.pt")["w"].unique().tolist() == [1]


def test_a_dtensors_local_part(engine: AsyncCheckpointEngine, held_copies: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = torch.nn.Parameter(distribute_tensor(torch.ones(5000), mesh))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        engine.guard(optimizer)
        error = save_and_change(
            engine,
            held_copies(engine),
            {"w": weight},
            lambda: weight.to_local().data.fill_(9.0),  # type: ignore[attr-defined]
        )
    finally:
        dist.destroy_process_group()
    assert isinstance(error, TornSnapshotError) and error.tensors[0] == "['w']"


def test_views_of_one_large_storage_are_named_one_by_one(engine: AsyncCheckpointEngine, held_copies: Any) -> None:
    flat = torch.nn.Parameter(torch.zeros(40_000))
    optimizer = torch.optim.SGD([flat], lr=0.1)
    engine.guard(optimizer)
    state = {f"w{k}": flat.detach()[10_000 * k : 10_000 * (k + 1)] for k in range(4)}
    error = save_and_change(engine, held_copies(engine), state, lambda: flat.data[:10_000].fill_(9.0))
    assert isinstance(error, TornSnapshotError) and error.tensors == ("['w0']",)


def test_an_eager_save_beside_a_thread_that_changes_by_data(tmp_path: Path) -> None:
    """While it waits for staging memory: what was copied before the change and what is copied after it do not go
    together.
    """
    weights = {f"w{k}": torch.full((50_000,), 1.0) for k in range(4)}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=256 << 10, chunk_bytes=64 << 10, io_mode="buffered") as engine:
        arena, reached = arena_of(engine), threading.Event()
        acquire = arena.acquire
        taken = [acquire(1) for _ in range(arena.num_chunks)]
        arena.acquire = lambda timeout_s: (reached.set(), acquire(timeout_s))[1]
        engine.create("t")
        saving = Doing(lambda: engine.save(weights, "s.pt"))
        # It has begun, and stands before its first chunk.
        assert reached.wait(TIMEOUT_S)
        weights["w3"].data.fill_(9.0)
        for chunk in taken:
            arena_of(engine).release(chunk)
        with pytest.raises(TornSnapshotError, match="'w3'"):
            saving.result()
        with pytest.raises(TornSnapshotError):
            engine.commit("t").result(60)


# Tensors that are written row by row.

STRIDED: dict[str, dict[str, Any]] = {
    "safetensors": {"format": "safetensors"},
    "compact": {"compact_views": True},
    "compact, recorded": {"compact_views": True},
}


def by_counter(weight: torch.Tensor) -> None:
    weight.detach()[0, 0] += 1


def by_data(weight: torch.Tensor) -> None:
    weight.data.fill_(9.0)


@pytest.mark.parametrize("shape", [(100, 300), (4, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("kind", STRIDED)
def test_a_tensor_with_gaps_is_copied_lazily_and_a_change_of_it_is_seen(
    tmp_path: Path, held_copies: Any, kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    owner = torch.ones(shape[0] + 1, shape[1] * 2, dtype=dtype)
    weight = owner.t()[::2, 1:]
    state = {"w": weight, "x": torch.zeros(50)}
    if kind == "safetensors" and dtype is torch.complex128:
        state["w"] = weight = weight.to(torch.complex64)[::2] if weight.size(0) > 1 else weight.to(torch.complex64)
    if kind == "compact, recorded":
        state["sparse"] = torch.eye(3).to_sparse()
    wanted = weight.clone()
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=4096, **STRIDED[kind]) as engine:
        optimizer = torch.optim.SGD([weight.detach()], lr=0.1)
        engine.guard(optimizer)
        pending = saved(engine, state, "right")
        pending.result(60)
        assert pending.metrics.saves[0].mode == "lazy"
        assert torch.equal(engine.load("right/s.pt")["w"], wanted)
        for change in (by_counter, by_data):
            error = save_and_change(engine, held_copies(engine), state, partial(change, weight))
            assert isinstance(error, TornSnapshotError) and error.tensors == ("['w']",)


def test_a_conjugate_view_is_copied_at_once(tmp_path: Path, held_copies: Any) -> None:
    weight = torch.nn.Parameter(torch.zeros(3000, dtype=torch.complex64))
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, format="safetensors") as engine:
        engine.guard(torch.optim.SGD([weight], lr=0.1))
        state = {"w": weight.detach().conj()}
        assert save_and_change(engine, held_copies(engine), state, lambda: weight.detach().numpy().__iadd__(1)) is None
        assert torch.equal(engine.load("t/s.pt")["w"], torch.zeros(3000, dtype=torch.complex64))


def test_what_was_copied_in_a_guarded_save_may_be_resized(
    engine: AsyncCheckpointEngine, training: Training, held_copies: Any, tmp_path: Path
) -> None:
    engine.guard(training.optimizer)
    other = torch.ones(5000)
    state = {"training": training.state(), "other": other}
    assert save_and_change(engine, held_copies(engine), state, lambda: other.untyped_storage().resize_(0)) is None
    assert torch.equal(torch.load(tmp_path / "t" / "s.pt")["other"], torch.ones(5000))


# Every optimizer of the process.


def test_an_optimizer_of_a_device_that_is_no_accelerator_steps(
    engine: AsyncCheckpointEngine, training: Training
) -> None:
    engine.guard(training.optimizer)
    parameter = torch.nn.Parameter(torch.empty(4, device="meta"))
    parameter.grad = torch.empty(4, device="meta")
    torch.optim.SGD([parameter], lr=0.1).step()


@pytest.fixture
def held_save(engine: AsyncCheckpointEngine, training: Training, held_copies: Any) -> Any:
    """A guarded save whose copies are held."""
    engine.guard(training.optimizer)
    held = held_copies(engine)
    held.expected = frozen(training.state())
    held.pending = saved(engine, training.state())
    return held


def assert_waits(step: Callable[[], object], training: Training, held: Any, tmp_path: Path) -> None:
    """`step` waits for the copies, and the checkpoint is right."""
    stepping = Doing(step).settle()
    assert stepping.blocked
    assert_same(frozen(training.state()), held.expected)
    held.let_go()
    stepping.result()
    held.pending.result(60)
    assert_same(torch.load(tmp_path / "t" / "s.pt"), held.expected)


@pytest.mark.parametrize("fused", [False, True])
def test_an_unguarded_optimizer_over_the_same_parameters_waits(
    training: Training, held_save: Any, tmp_path: Path, fused: bool
) -> None:
    other = torch.optim.SGD(training.model.parameters(), lr=0.1, fused=fused)
    assert_waits(other.step, training, held_save, tmp_path)


def test_a_hook_that_was_registered_before_the_guard_waits(
    engine: AsyncCheckpointEngine, training: Training, held_copies: Any, tmp_path: Path
) -> None:
    """Torch calls an optimizer's own hooks in the order of their registration."""

    def perturb(*_: object) -> None:
        for parameter in training.model.parameters():
            parameter.data.mul_(2)

    other = torch.optim.SGD(training.model.parameters(), lr=0.1)
    other.register_step_pre_hook(perturb)
    training.optimizer.register_step_pre_hook(perturb)
    engine.guard(training.optimizer)
    for tag, optimizer in (("t", other), ("u", training.optimizer)):
        held = held_copies(engine)
        expected = frozen(training.state())
        pending = saved(engine, training.state(), tag)
        stepping = Doing(optimizer.step).settle()
        assert stepping.blocked
        assert_same(frozen(training.state()), expected)
        held.let_go()
        stepping.result()
        pending.result(60)
        assert_same(torch.load(tmp_path / tag / "s.pt"), expected)


def test_an_optimizer_of_another_engines_guard_waits(
    training: Training, held_save: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = torch.optim.SGD(training.model.parameters(), lr=0.1)
    with AsyncCheckpointEngine(tmp_path_factory.mktemp("other"), staging_bytes=1 << 20) as second:
        second.guard(other)
        assert_waits(other.step, training, held_save, tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_unguarded_step_waits(training: Training, held_save: Any, tmp_path: Path) -> None:
    other = torch.optim.SGD(training.model.parameters(), lr=0.1)
    assert_waits(torch.compile(other.step, backend="eager"), training, held_save, tmp_path)


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("is_guarded", [False, True])
def test_a_step_that_was_compiled_before_the_guard_waits(
    engine: AsyncCheckpointEngine, training: Training, held_copies: Any, tmp_path: Path, is_guarded: bool
) -> None:
    other = torch.optim.SGD(training.model.parameters(), lr=0.1)
    step = torch.compile((training.optimizer if is_guarded else other).step, backend="eager")
    step()
    engine.guard(training.optimizer)
    held = held_copies(engine)
    held.expected = frozen(training.state())
    held.pending = saved(engine, training.state())
    assert_waits(step, training, held, tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_guarded_step_is_compiled_all_the_same(engine: AsyncCheckpointEngine, training: Training) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    engine.guard(training.optimizer)
    torch.compile(training.optimizer.step, backend=backend)()
    assert any(
        "foreach" in str(node.target) or "add" in str(node.target) for graph in graphs for node in graph.graph.nodes
    )


@pytest.mark.wide
def test_a_forked_child_waits_for_no_copy(training: Training, held_save: Any) -> None:
    other = torch.optim.SGD(training.model.parameters(), lr=0.1)
    child = os.fork()
    if child == 0:
        try:
            # OpenMP's threads did not survive the fork.
            torch.set_num_threads(1)
            other.step()
            training.optimizer.step()
            os._exit(42)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


def test_a_copy_of_the_optimizer_is_a_plain_one(training: Training, held_save: Any) -> None:
    twin = copy.deepcopy(training.optimizer)
    assert type(twin) is torch.optim.AdamW and "step" not in vars(twin) and "step" in vars(training.optimizer)


# Storages.


def test_a_storage_where_a_dropped_subclass_lay_is_not_taken_for_guarded(
    engine: AsyncCheckpointEngine, tmp_path: Path, held_copies: Any
) -> None:
    """Its identity was known by number alone; the next storage got the number, and was copied after it had been
    changed.
    """

    class Wrapped(torch.Tensor):
        pass

    weight = torch.nn.Parameter(torch.zeros(3000))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {f"x{k}": torch.zeros(3000).as_subclass(Wrapped) for k in range(50)}
    engine.guard(optimizer)
    saved(engine, {"w": weight.detach()}, "first").result(60)
    optimizer.state.clear()
    strangers = {f"s{k}": torch.ones(3000) for k in range(200)}
    # Nothing has looked at the optimizer since.
    identities = [*chain.from_iterable(map(storage_ids, strangers.values()))]
    assert guard_of(engine).owned([*identities, *storage_ids(weight)]).ids.isdisjoint(identities)
