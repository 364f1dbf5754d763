"""The guard: steps and saves of different threads take turns, whatever becomes of the step, the optimizer or the
process.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, BackpressureTimeout, TransactionStateError
from tests.support.insides import arena_of, commits_of, exclusion_of, guard_of
from tests.support.stepping import Doing, gated, is_blocked, noted_waits, saved, until  # noqa: F401

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("noted_waits")


def make_engine(root: Path, **config: Any) -> AsyncCheckpointEngine:
    return AsyncCheckpointEngine(root, staging_bytes=1 << 20, chunk_bytes=16384, io_mode="buffered", **config)


class Net:
    """Two groups of parameters, so that a step can be stopped half way, and gradients."""

    def __init__(
        self, make: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5)
    ) -> None:
        self.first = torch.nn.Parameter(torch.zeros(5000))
        self.second = torch.nn.Parameter(torch.zeros(5000))
        self.optimizer = make([{"params": [self.first]}, {"params": [self.second]}])
        for parameter in (self.first, self.second):
            parameter.grad = torch.ones(5000)

    def state(self) -> dict[str, Any]:
        return {"first": self.first.detach(), "second": self.second.detach()}

    def steps_in(self, path: Path) -> tuple[float, float]:
        """How far each group was stepped in a saved state; plain SGD: one per step."""
        loaded = torch.load(path)
        for value in loaded.values():
            assert value.min() == value.max(), "a mixed tensor"
        return -loaded["first"][0].item(), -loaded["second"][0].item()


def plain_sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1.0)


@pytest.fixture
def net() -> Net:
    return Net(plain_sgd)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[AsyncCheckpointEngine]:
    with make_engine(tmp_path) as made:
        yield made


class Failing(torch.optim.SGD):
    """A step that raises after it has changed something."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        raise ArithmeticError("half way")


class Hooked:
    """A state's leaf whose pickling calls `act`: the test is inside `save` then."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __reduce__(self) -> tuple[Any, ...]:
        self.act()
        # Which the restricted unpickler knows.
        return OrderedDict, ()


def see_it_wait(engine: AsyncCheckpointEngine, net: Net, step: Callable[[], Any], held_copies: Any) -> None:
    """A lazy save, and a step that waits for its copies."""
    held = held_copies(engine)
    pending = saved(engine, net.state())
    assert pending.metrics.saves[0].mode == "lazy"
    stepping = Doing(step).settle()
    assert stepping.blocked
    held.let_go()
    stepping.result()
    pending.result(60)


# Turns.


def test_save_waits_for_a_step_that_runs_on_another_thread(
    engine: AsyncCheckpointEngine, net: Net, tmp_path: Path
) -> None:
    """Version counters move when an operation ends: without the wait a half-made step was saved, and nobody noticed."""
    engine.guard(net.optimizer)
    with gated(net.optimizer) as gate:
        gate.close()
        stepping = Doing(net.optimizer.step)
        until(lambda: gate.is_held)
        engine.create("t")
        saving = Doing(lambda: engine.save(net.state(), "s.pt")).settle()
        assert saving.blocked and net.first[0] == -1 and net.second[0] == 0
        gate.open()
        stepping.result()
        saving.result()
    engine.commit("t").result(60)
    assert net.steps_in(tmp_path / "t" / "s.pt") == (1, 1)


def test_a_step_waits_for_a_save_on_another_thread(engine: AsyncCheckpointEngine, net: Net, tmp_path: Path) -> None:
    engine.guard(net.optimizer)
    reached, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        go_on.wait(60)

    engine.create("t")
    saving = Doing(lambda: engine.save({**net.state(), "x": Hooked(hold)}, "s.pt"))
    reached.wait(60)
    stepping = Doing(net.optimizer.step).settle()
    assert stepping.blocked and net.first[0] == 0
    go_on.set()
    saving.result()
    stepping.result()
    engine.commit("t").result(60)
    loaded = torch.load(tmp_path / "t" / "s.pt")
    assert not loaded["first"].any() and not loaded["second"].any() and net.first[0] == -1


def test_a_save_without_guarded_tensors_lets_other_threads_step(tmp_path: Path, net: Net) -> None:
    """Its own copy may wait long for the disk; that is no reason to hold a step up."""
    with make_engine(tmp_path) as engine:
        engine.guard(net.optimizer)
        taken = [arena_of(engine).acquire(1) for _ in range(arena_of(engine).num_chunks)]
        engine.create("t")
        saving = Doing(lambda: engine.save({"data": torch.arange(5000)}, "s.pt"))
        until(lambda: commits_of(engine).opened()[0].files)
        Doing(net.optimizer.step).result()
        assert not saving.ended and net.first[0] == -1
        for chunk in taken:
            arena_of(engine).release(chunk)
        saving.result()
        engine.commit("t").result(60)


def test_steps_of_two_optimizers_both_wait_for_the_copies(
    engine: AsyncCheckpointEngine, held_copies: Any, tmp_path: Path
) -> None:
    """The first one to wait took the list of copies away, so that the second stepped into the middle of them."""
    a, b = Net(plain_sgd), Net(plain_sgd)
    engine.guard(a.optimizer, b.optimizer)
    held = held_copies(engine)
    pending = saved(engine, {"a": a.state(), "b": b.state()})
    steps = [Doing(net.optimizer.step).settle() for net in (a, b)]
    assert all(step.blocked for step in steps)
    held.let_go()
    for step in steps:
        step.result()
    pending.result(60)
    loaded = torch.load(tmp_path / "t" / "s.pt")
    assert not any(value.any() for net in loaded.values() for value in net.values())


def test_a_step_waits_for_the_copies_that_another_thread_waits_for(
    engine: AsyncCheckpointEngine, net: Net, held_copies: Any
) -> None:
    engine.guard(net.optimizer)
    held = held_copies(engine)
    saved(engine, net.state())
    waiting = Doing(engine.wait_snapshot).settle()
    stepping = Doing(net.optimizer.step).settle()
    assert waiting.blocked and stepping.blocked
    held.let_go()
    waiting.result()
    stepping.result()


def test_steps_of_two_threads_run_side_by_side(engine: AsyncCheckpointEngine) -> None:
    a, b = Net(plain_sgd), Net(plain_sgd)
    engine.guard(a.optimizer, b.optimizer)
    with gated(a.optimizer) as gate:
        gate.close()
        stepping = Doing(a.optimizer.step)
        until(lambda: gate.is_held)
        b.optimizer.step()
        assert not stepping.ended and b.second[0] == -1
        gate.open()
        stepping.result()


def test_nobody_starves(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    """A save that waits goes before a step that comes later, although the step could run beside the one in progress."""
    a, b = Net(plain_sgd), Net(plain_sgd)
    engine.guard(a.optimizer, b.optimizer)
    with gated(a.optimizer) as gate:
        gate.close()
        first = Doing(a.optimizer.step)
        until(lambda: gate.is_held)
        engine.create("t")
        saving = Doing(lambda: engine.save({"a": a.state(), "b": b.state()}, "s.pt")).settle()
        later = Doing(b.optimizer.step).settle()
        assert saving.blocked and later.blocked
        gate.open()
        for doing in (first, saving, later):
            doing.result()
    engine.commit("t").result(60)
    loaded = torch.load(tmp_path / "t" / "s.pt")
    assert loaded["a"]["second"][0] == -1 and loaded["b"]["first"][0] == 0


def test_a_wait_for_a_step_is_bounded_and_names_its_thread(tmp_path: Path, net: Net) -> None:
    with make_engine(tmp_path, backpressure_timeout_s=0.05) as engine:
        engine.guard(net.optimizer)
        with gated(net.optimizer) as gate:
            gate.close()
            stepping = Doing(net.optimizer.step, name="the trainer")
            until(lambda: gate.is_held)
            engine.create("t")
            with pytest.raises(
                BackpressureTimeout, match=r"a save .* waited 0.05 s for an optimizer step on 'the trainer'.*nothing"
            ):
                engine.save(net.state(), "s.pt")
            gate.open()
            stepping.result()
        # Nothing came of it, so the checkpoint is still usable.
        engine.save(net.state(), "s.pt")
        engine.commit("t").result(60)
    assert net.steps_in(tmp_path / "t" / "s.pt") == (1, 1)


def test_a_step_that_waited_too_long_for_a_save_has_not_begun(tmp_path: Path, net: Net) -> None:
    reached, go_on = threading.Event(), threading.Event()
    with make_engine(tmp_path, backpressure_timeout_s=0.05) as engine:
        engine.guard(net.optimizer)
        engine.create("t")
        saving = Doing(
            lambda: engine.save({**net.state(), "x": Hooked(lambda: bool(reached.set() or go_on.wait(60)))}, "s.pt")
        )
        reached.wait(60)
        with pytest.raises(BackpressureTimeout, match=r"an optimizer step .*waited 0.05 s for a save.*not started"):
            net.optimizer.step()
        assert net.first[0] == 0
        go_on.set()
        saving.result()
        net.optimizer.step()
        engine.commit("t").result(60)
    assert net.first[0] == -1


# A save inside a step.


def test_save_in_a_closure_is_eager(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    """After it, the step goes on and changes the tensors, and no hook waits in between."""
    weight = torch.nn.Parameter(torch.full((5000,), 3.0))
    optimizer = torch.optim.LBFGS([weight], max_iter=3)
    engine.guard(optimizer)
    expected: list[torch.Tensor] = []

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (weight - 1).square().sum()
        loss.backward()
        tag = f"t{len(expected)}"
        engine.create(tag)
        engine.save({"w": weight.detach()}, "s.pt")
        expected.append(weight.detach().clone())
        assert engine.commit(tag).metrics.saves[0].mode == "eager"
        return loss

    optimizer.step(closure)
    pending = saved(engine, {"w": weight.detach()}, "after")
    assert pending.metrics.saves[0].mode == "lazy"
    for other in engine.pending():
        other.result(60)
    assert len(expected) > 1
    for k, value in enumerate(expected):
        assert torch.equal(torch.load(tmp_path / f"t{k}" / "s.pt")["w"], value)


def test_save_in_a_closure_while_another_thread_wants_to_save(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    """The one waits for the step, the step for the lock of the engine: whoever waits for a turn must not hold that
    lock.
    """
    weight = torch.nn.Parameter(torch.full((5000,), 3.0))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    engine.guard(optimizer)
    reached, go_on = threading.Event(), threading.Event()

    def closure() -> Any:
        reached.set()
        assert go_on.wait(60)
        engine.save({"w": weight.detach()}, "inside.pt")
        weight.grad = torch.ones(5000)
        return torch.zeros(())

    engine.create("t")
    stepping = Doing(lambda: optimizer.step(closure))
    reached.wait(60)
    saving = Doing(lambda: engine.save({"w": weight.detach()}, "outside.pt")).settle()
    assert saving.blocked
    go_on.set()
    stepping.result()
    saving.result()
    engine.commit("t").result(60)
    assert torch.load(tmp_path / "t" / "inside.pt")["w"].unique().tolist() == [3]
    assert torch.load(tmp_path / "t" / "outside.pt")["w"].unique().tolist() == [2]


# Steps that end in other ways.


def test_a_step_that_raised_holds_nobody_up(engine: AsyncCheckpointEngine, held_copies: Any, tmp_path: Path) -> None:
    net = Net(lambda p: Failing(p, lr=1.0))
    engine.guard(net.optimizer)
    with pytest.raises(ArithmeticError) as raised:
        net.optimizer.step()
    # Another thread's save; the traceback still holds the frames of the step.
    engine.create("t")
    assert raised.tb is not None
    Doing(lambda: engine.save(net.state(), "s.pt")).result()
    engine.commit("t").result(60)
    assert net.steps_in(tmp_path / "t" / "s.pt") == (1, 1)
    # On the thread it raised on: lazy as ever, since no step is running there.
    held = held_copies(engine)
    pending = saved(engine, net.state(), "u")
    assert pending.metrics.saves[0].mode == "lazy"
    stepping = Doing(net.optimizer.step).settle()
    assert stepping.blocked and net.first[0] == -1
    held.let_go()
    with pytest.raises(ArithmeticError):
        stepping.result()
    pending.result(60)
    assert net.steps_in(tmp_path / "u" / "s.pt") == (1, 1)


def test_a_thread_that_raised_in_its_step_and_ended(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    net = Net(lambda p: Failing(p, lr=1.0))
    engine.guard(net.optimizer)
    with pytest.raises(ArithmeticError):
        Doing(net.optimizer.step).result()
    saved(engine, net.state()).result(60)
    assert net.steps_in(tmp_path / "t" / "s.pt") == (1, 1)


def test_a_hook_of_somebody_else_that_raises(engine: AsyncCheckpointEngine, net: Net, tmp_path: Path) -> None:
    engine.guard(net.optimizer)

    def refuse(*_: Any) -> None:
        raise ArithmeticError("not now")

    handle = net.optimizer.register_step_pre_hook(refuse)
    with pytest.raises(ArithmeticError):
        net.optimizer.step()
    handle.remove()
    Doing(lambda: saved(engine, net.state()).result(60)).result()
    assert net.steps_in(tmp_path / "t" / "s.pt") == (0, 0)


def test_a_grad_scaler_that_skips_the_step(engine: AsyncCheckpointEngine, net: Net, tmp_path: Path) -> None:
    engine.guard(net.optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert net.second.grad is not None
    for value, steps in ((float("inf"), 0.0), (4.0, 0.5)):
        scaler.scale(torch.zeros(()))
        for parameter in (net.first, net.second):
            parameter.grad = torch.full((5000,), value)
        scaler.step(net.optimizer)
        scaler.update()
        tag = f"after-{value}"
        Doing(lambda tag=tag: saved(engine, net.state(), tag).result(60)).result()
        # The scale was halved by the infinite gradient.
        assert net.steps_in(tmp_path / tag / "s.pt") == (4 * steps, 4 * steps)


class Outer(torch.optim.Optimizer):
    """An optimizer around another one, as sharding and averaging wrappers are."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        self.inner.step()
        try:
            self.inner.step()
        finally:
            self.inner.step()


@pytest.mark.parametrize("which", ["outer", "inner", "both"])
def test_nested_steps(engine: AsyncCheckpointEngine, net: Net, tmp_path: Path, which: str) -> None:
    outer = Outer(net.optimizer)
    engine.guard(*{"outer": [outer], "inner": [net.optimizer], "both": [outer, net.optimizer]}[which])
    with gated(net.optimizer) as gate:
        gate.close()
        stepping = Doing(outer.step)
        engine.create("t")
        until(lambda: gate.is_held)
        gate.let_one_pass()
        until(lambda: gate.num_reached == 2 and gate.is_held)
        saving = Doing(lambda: engine.save(net.state(), "s.pt")).settle()
        assert saving.blocked
        gate.open()
        stepping.result()
        saving.result()
    engine.commit("t").result(60)
    first, second = net.steps_in(tmp_path / "t" / "s.pt")
    # Where only the inner one is guarded, a save may come between its steps, but never into one.
    assert first == second and (first in (2, 3) if which == "inner" else first == 3)
    assert exclusion_of(guard_of(engine)).idle


def test_a_nested_step_that_raised_and_was_caught(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    net = Net(lambda p: Failing(p, lr=1.0))

    class Catching(Outer):
        def step(self, closure: Any = None) -> Any:
            with pytest.raises(ArithmeticError):
                self.inner.step()

    outer = Catching(net.optimizer)
    engine.guard(outer, net.optimizer)
    outer.step()
    assert exclusion_of(guard_of(engine)).idle


def test_accelerates_wrapper(engine: AsyncCheckpointEngine, net: Net, held_copies: Any) -> None:
    """It is an Optimizer without hooks, around the one that has them."""
    accelerate = pytest.importorskip("accelerate")
    wrapped = accelerate.Accelerator(cpu=True).prepare(net.optimizer)
    assert wrapped is not net.optimizer
    engine.guard(wrapped)
    see_it_wait(engine, net, wrapped.step, held_copies)


def test_what_is_no_optimizer_is_refused(engine: AsyncCheckpointEngine, net: Net) -> None:
    class Bare(torch.optim.Optimizer):
        def __init__(self) -> None:
            pass

    with pytest.raises(TransactionStateError, match="with `step` and `param_groups`, not Bare"):
        engine.guard(Bare())


class Homemade:
    """An optimizer without torch's base class, hence without its hooks."""

    def __init__(self, net: Net) -> None:
        self.param_groups = net.optimizer.param_groups

    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= parameter.grad


def test_a_guarded_optimizer_without_torchs_base_class_waits_too(
    engine: AsyncCheckpointEngine, net: Net, held_copies: Any, tmp_path: Path
) -> None:
    optimizer = Homemade(net)
    engine.guard(optimizer)
    see_it_wait(engine, net, optimizer.step, held_copies)
    assert net.steps_in(tmp_path / "t" / "s.pt") == (0, 0) and net.first[0] == -1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_zero_redundancy_optimizer(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = torch.nn.Parameter(torch.zeros(5000))
        optimizer = ZeroRedundancyOptimizer([weight], torch.optim.SGD, lr=1.0)
        engine.guard(optimizer)
        weight.grad = torch.ones(5000)
        optimizer.step()
        pending = saved(engine, {"w": weight.detach()})
        optimizer.step()
        assert pending.metrics.saves[0].mode == "lazy"
        pending.result(60)
    finally:
        dist.destroy_process_group()
    assert torch.load(tmp_path / "t" / "s.pt")["w"].unique().tolist() == [-1]


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_step(engine: AsyncCheckpointEngine, net: Net, held_copies: Any, tmp_path: Path) -> None:
    engine.guard(net.optimizer)
    step = torch.compile(net.optimizer.step, backend="eager")
    step()
    see_it_wait(engine, net, step, held_copies)
    assert net.steps_in(tmp_path / "t" / "s.pt") == (1, 1) and net.first[0] == -2
    assert exclusion_of(guard_of(engine)).idle


# The end of things.


@pytest.mark.parametrize("while_it", ["runs", "waits"])
def test_close_during_a_step(tmp_path: Path, net: Net, held_copies: Any, while_it: str) -> None:
    """Taking a hook away while torch iterates over the hooks makes the step raise, on the other thread."""
    engine = make_engine(tmp_path)
    engine.guard(net.optimizer)
    with gated(net.optimizer) as gate:
        held = held_copies(engine)
        saved(engine, net.state())
        if while_it == "runs":
            held.let_go()
            gate.close()
        stepping = Doing(net.optimizer.step)
        until(lambda: gate.is_held or is_blocked(stepping.thread))
        closing = Doing(engine.close)
        held.let_go()
        closing.result()
        gate.open()
        stepping.result()
        net.optimizer.step()
    assert net.first[0] == -2


def test_close_gives_the_step_back(tmp_path: Path, net: Net) -> None:
    with make_engine(tmp_path) as engine:
        own = net.optimizer.step
        engine.guard(net.optimizer)
        guarded = net.optimizer.step
        engine.guard(net.optimizer)
        assert net.optimizer.step == guarded != own
    assert net.optimizer.step == own


def test_a_scheduler_and_a_scaler_see_the_step_that_they_know(engine: AsyncCheckpointEngine, net: Net) -> None:
    """Schedulers wrap `step` and mark it, scalers and trainers read its signature."""
    before = inspect.signature(net.optimizer.step)
    earlier = torch.optim.lr_scheduler.StepLR(net.optimizer, 1, 0.5)
    engine.guard(net.optimizer)
    later = torch.optim.lr_scheduler.StepLR(net.optimizer, 1, 0.5)
    assert inspect.signature(net.optimizer.step) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.optimizer.step()
        earlier.step()
        later.step()
    assert net.first[0] == -1


def test_a_dropped_optimizer_is_gone(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    """Also after a step that raised: nothing of it is kept."""
    net = Net(lambda p: Failing(p, lr=1.0))
    engine.guard(net.optimizer)
    with pytest.raises(ArithmeticError):
        net.optimizer.step()
    saved(engine, net.state()).result(60)
    known, state = weakref.ref(net.optimizer), net.state()
    del net
    gc.collect()
    assert known() is None
    pending = saved(engine, state, "u")
    assert pending.metrics.saves[0].mode == "eager"
    pending.result(60)


@pytest.mark.filterwarnings("ignore:.*never closed:ResourceWarning")
def test_a_dropped_engine_leaves_a_harmless_hook(tmp_path: Path, net: Net) -> None:
    engine = make_engine(tmp_path)
    engine.guard(net.optimizer)
    del engine
    gc.collect()
    net.optimizer.step()
    assert net.first[0] == -1


class Keeping(torch.optim.SGD):
    """An optimizer that pickles all it has, hooks included."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Keeping])
def test_a_guarded_optimizer_can_be_copied_and_pickled(
    engine: AsyncCheckpointEngine, kind: type[torch.optim.SGD], held_copies: Any
) -> None:
    net = Net(lambda p: kind(p, lr=1.0))
    engine.guard(net.optimizer)
    held = held_copies(engine)
    saved(engine, net.state())
    buffer = io.BytesIO()
    torch.save(net.optimizer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(net.optimizer),
        pickle.loads(pickle.dumps(net.optimizer)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        # It is not guarded: a save on another thread does not wait for its step.
        assert not guard_of(engine).guards(other)
        weight = other.param_groups[0]["params"][0]
        weight.grad = torch.ones(5000)
        # Like the step of any optimizer, it waits for the copies.
        stepping = Doing(other.step).settle()
        assert stepping.blocked and weight[0] == 0
    held.let_go()
    for other in copies:
        other.step()
        assert other.param_groups[0]["params"][0][0] <= -1
    assert net.first[0] == 0


FORKING = """
import os, sys, threading, torch
sys.path.insert(0, {package!r})
from async_ckpt import AsyncCheckpointEngine, TransactionStateError
from tests.snapshot.test_guard import Net, plain_sgd, make_engine
from tests.support.insides import commits_of, exclusion_of, guard_of
from tests.support.stepping import Doing, gated, until, waits_noted
from pathlib import Path
noting = waits_noted()
noting.__enter__()
net = Net(plain_sgd)
engine = make_engine(Path({root!r}))
engine.guard(net.optimizer)
gate = threading.Event()
commits_of(engine).pool.copier.submit(gate.wait)
engine.create("t")
with gated(net.optimizer) as step_gate:
    step_gate.close()
    stepping = Doing(net.optimizer.step)
    until(lambda: step_gate.is_held)
    saving = Doing(lambda: engine.save(net.state(), "s.pt")).settle()
    assert saving.blocked
    # One thread is in its step, another waits in a save; every lock of the guard may be taken.
    guard = guard_of(engine)
    with exclusion_of(guard)._changed, guard._lock, commits_of(engine).lock:
        child = os.fork()
    if child == 0:
        step_gate.open()
        before = net.second[0].item()
        net.optimizer.step()
        engine.wait_snapshot()
        assert net.second[0].item() == before - 1
        try:
            engine.save(net.state(), "s.pt")
        except TransactionStateError:
            os._exit(42)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    step_gate.open()
    gate.set()
    stepping.result()
    saving.result()
engine.commit("t").result(60)
engine.close()
assert net.steps_in(Path({root!r}) / "t" / "s.pt") == (1, 1)
print("parent unharmed")
"""


@pytest.mark.wide
def test_a_forked_child_steps_and_waits_for_nothing(tmp_path: Path) -> None:
    script = FORKING.format(package=str(ROOT), root=str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "parent unharmed\n", done.stderr


def test_guarding_costs_nothing_without_an_optimizer(engine: AsyncCheckpointEngine, net: Net) -> None:
    assert guard_of(engine).save(lambda turn: exclusion_of(guard_of(engine)).idle)
