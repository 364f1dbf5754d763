"""Training, saves and other changes on several threads, in random order. ``python -m tests.faults.torn --full``

Every saved checkpoint must hold the state at the moment of its save, bit for bit, or be refused with
`TornSnapshotError`, and refused only where a tensor was changed behind the guard's back. Two kinds of schedules:

- *ordered*: four threads (training, saving, copying, meddling) do one thing after the other in an order drawn at
  random. Training stops between two of its param groups too, so a step is often half made when something else happens.
- *free*: one thread steps and one saves as fast as they can, with nothing between them but the guard.
"""

from __future__ import annotations

import argparse
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from async_ckpt import AsyncCheckpointEngine, PendingCommit, TornSnapshotError
from tests.snapshot.test_snapshots import assert_same, frozen
from tests.support.insides import commits_of, exclusion_of, guard_of
from tests.support.stepping import Doing, Gate, gated, saved, until, waits_for, waits_noted

from .report import command, extent_of
from .workloads import TIMEOUT_S, Folder, make_engine, quiet

Make = Callable[[Any], torch.optim.Optimizer]


def _kinds() -> dict[str, Make]:
    kinds: dict[str, Make] = {"lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)}
    for name, optimizer, options, can_fuse in (
        ("adam", torch.optim.Adam, {"lr": 0.01}, True),
        ("adamw", torch.optim.AdamW, {"lr": 0.01}, True),
        ("sgd-momentum", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, True),
        ("adagrad", torch.optim.Adagrad, {"lr": 0.1}, True),
        ("rmsprop", torch.optim.RMSprop, {"lr": 0.01}, False),
    ):
        for way in ("loop", "foreach", *(("fused",) if can_fuse else ())):
            chosen = {"foreach": way == "foreach"} | ({"fused": True} if way == "fused" else {})
            kinds[f"{name}-{way}"] = lambda p, o=optimizer, given={**options, **chosen}: o(p, **given)
    return kinds


KINDS = _kinds()
UNCOUNTED = (".data", "swapped", "fused")
MEDDLING = ("ema", "load_state_dict", "optimizer.load_state_dict", "in place", "wait_snapshot", *UNCOUNTED)


@dataclass
class Count:
    """What became of the checkpoints of some schedules."""

    name: str
    schedules: int = 0
    right: int = 0
    torn: int = 0
    wrong: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """What `report.command` asks for."""
        return self.wrong

    def judge(
        self, what: str, path: Path, pending: PendingCommit, allowed: list[Any], *, may_tear: bool, stop: bool
    ) -> None:
        """Count one checkpoint: it must hold one of `allowed`."""
        error = pending.exception(TIMEOUT_S)
        try:
            if isinstance(error, TornSnapshotError):
                assert may_tear and error.tensors and not path.exists(), "refused without need"
                self.torn += 1
                return
            assert error is None, repr(error)
            _assert_one_of(torch.load(path / "state.pt"), allowed)
            self.right += 1
        except AssertionError as wrong:
            self.note(what, wrong, stop=stop)

    def note(self, what: str, wrong: BaseException, *, stop: bool) -> None:
        """Count something that must not be; `stop` raises it."""
        self.wrong += 1
        self.notes.append(f"{what}: {wrong}")
        if stop:
            raise AssertionError(f"{self.name}, {self.notes[-1]}") from wrong


def _assert_one_of(found: Any, allowed: list[Any]) -> None:
    failure: AssertionError | None = None
    for expected in allowed:
        try:
            return assert_same(found, expected)
        except AssertionError as error:
            failure = error
    raise failure or AssertionError("no state was possible")


class Training:
    """A model in two param groups, where the optimizer allows it, and how it is trained."""

    def __init__(self, make: Make, chance: random.Random, width: int, *, is_scheduled: bool) -> None:
        torch.manual_seed(chance.randrange(1 << 30))
        self.model = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, width)
        )
        halves: Any = [
            {"params": list(self.model[0].parameters())},
            {"params": [*self.model[1].parameters(), *self.model[2].parameters()]},
        ]
        try:
            self.optimizer = make(halves)
        except ValueError:
            # LBFGS takes one group; its closure is stopped instead.
            self.optimizer = make(self.model.parameters())
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.9) if is_scheduled else None
        self.num_accumulated = chance.choice((1, 1, 3))
        self.data = torch.randn(8, width)
        self.gate: Gate | None = None
        self.is_stepping = False
        # Hooks run inside the step's turn.
        self.optimizer.register_step_post_hook(lambda *_: setattr(self, "is_stepping", False))

    def guard(self, engine: AsyncCheckpointEngine) -> None:
        engine.guard(self.optimizer)
        self.optimizer.register_step_pre_hook(lambda *_: setattr(self, "is_stepping", True))

    def step(self) -> None:
        """Forward and backward (several times, when gradients are accumulated), and one step."""
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(self._closure)  # type: ignore[arg-type]
        else:
            self.optimizer.zero_grad()
            for _ in range(self.num_accumulated):
                self._loss().backward()
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def _closure(self) -> Any:
        if self.gate is not None:
            self.gate.reach()
        self.optimizer.zero_grad()
        loss = self._loss()
        loss.backward()
        return loss

    def _loss(self) -> Any:
        return self.model(self.data).square().mean() / self.num_accumulated

    def meddle(self, how: str, engine: AsyncCheckpointEngine) -> None:
        """Change something by other means than a step."""
        if how == "ema":
            with torch.no_grad():
                for name, value in self.model.state_dict().items():
                    average = self.ema[name]
                    average.copy_(value) if not value.is_floating_point() else average.lerp_(value, 0.3)
        elif how == "load_state_dict":
            self.model.load_state_dict({name: value + 1 for name, value in self.model.state_dict().items()})
        elif how == "optimizer.load_state_dict":
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        elif how == "in place":
            with torch.no_grad():
                self.model[2].weight.mul_(1.5)
        elif how == ".data":
            self.model[2].weight.data.mul_(1.5)
        elif how == "swapped":
            for name, parameter in self.model.named_parameters():
                parameter.data.copy_(self.ema[name] + 1)
        elif how == "fused":
            weights = [self.model[0].weight.detach(), self.model[2].weight.detach()]
            numbers = {"lr": 0.5, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0}
            flags = {"nesterov": False, "maximize": False, "is_first_step": True}
            torch._fused_sgd_(weights, list(map(torch.ones_like, weights)), [], **numbers, **flags)
        else:
            engine.wait_snapshot()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema}


class Actor:
    """A thread that does its next thing when it is told to."""

    def __init__(self, work: Callable[[], Iterator[None]], gate: Gate) -> None:
        self.gate = gate
        self.doing = Doing(lambda: self._run(work))

    def _run(self, work: Callable[[], Iterator[None]]) -> None:
        self.gate.reach()
        for _ in work():
            self.gate.reach()

    def rests(self, engine: AsyncCheckpointEngine, is_copying: bool) -> bool:
        """Whether nothing of it will happen before somebody else does something."""
        if self.doing.ended or self.gate.is_held:
            return True
        exclusion = exclusion_of(guard_of(engine))
        # One that waits for what has come to pass already is only slow to notice. A turn is taken under this lock.
        with exclusion._changed:
            if waits_for("turn", self.doing.thread):
                return any(not turn.is_over for turn in exclusion._running)
        return waits_for("copies", self.doing.thread) and not is_copying


def ordered(folder: Path, make: Make, chance: random.Random, count: Count, *, is_guarded: bool, stop: bool) -> None:
    """One ordered schedule."""
    training = Training(make, chance, 24, is_scheduled=chance.random() < 0.3)
    gate = Gate()
    taken: list[tuple[str, PendingCommit, Any, int]] = []
    changes = [0]
    with make_engine(folder, staging_bytes=1 << 20) as engine, _stops_half_way(training, gate):
        training.step()
        if is_guarded:
            training.guard(engine)
        gate.close()

        def train() -> Iterator[None]:
            for _ in range(2):
                training.step()
                yield

        def save() -> Iterator[None]:
            for k in range(2):
                try:
                    engine.create(f"t{k}")
                except TornSnapshotError:
                    # The first one's failure, told once; it is judged below.
                    engine.create(f"t{k}")
                state = training.state()

                # The reference is taken in the same turn as the snapshot.
                def in_turn(_: object, k: int = k, state: Any = state) -> None:
                    submit(copying.reach)
                    engine.save(state, "state.pt")
                    assert not training.is_stepping, "a save came into a guarded step"
                    taken.append((f"t{k}", engine.commit(f"t{k}"), frozen(state), changes[0]))

                guard_of(engine).save(in_turn)
                yield

        def meddle() -> Iterator[None]:
            for _ in range(2):
                how = chance.choice(MEDDLING)
                log.append(how)
                training.meddle(how, engine)
                changes[0] += how != "wait_snapshot"
                yield

        log: list[str] = []
        submit = commits_of(engine).pool.copier.submit
        copying, saves, meddles = Gate(), Gate(), Gate()
        for closed in (copying, saves, meddles):
            closed.close()
        actors = [Actor(train, gate), Actor(save, saves), Actor(meddle, meddles)]

        def is_at_rest() -> bool:
            """Everybody stands still, the copy thread too."""
            is_copied = not any(not copy.copied.done() for copy in guard_of(engine).copies)
            return (is_copied or copying.is_held) and all(actor.rests(engine, is_copied) for actor in actors)

        until(is_at_rest)
        while not all(actor.doing.ended for actor in actors):
            who = chance.randrange(4)
            if who == 3:
                log.append("copy")
                copying.let_one_pass()
            elif actors[who].gate.is_held:
                log.append(("train", "save", "meddle")[who])
                actors[who].gate.let_one_pass()
            elif all(actor.doing.ended or actor.doing.blocked for actor in actors):
                log.append("copy")
                copying.open()
            until(is_at_rest)
        copying.open()
        for actor in actors:
            try:
                actor.doing.result()
            except (AssertionError, TornSnapshotError) as error:
                count.note(f"{log}", error, stop=stop)
                return
        for tag, pending, expected, before in taken:
            may_tear = is_guarded and changes[0] > before
            count.judge(f"{tag} of {log}", folder / tag, pending, [expected], may_tear=may_tear, stop=stop)
    count.schedules += 1


@contextmanager
def _stops_half_way(training: Training, gate: Gate) -> Iterator[None]:
    if len(training.optimizer.param_groups) > 1:
        with gated(training.optimizer, gate):
            yield
        return
    training.gate = gate
    try:
        yield
    finally:
        gate.open()


def free(folder: Path, make: Make, chance: random.Random, count: Count, *, num_saves: int, stop: bool) -> None:
    """One free schedule: each guarded save must hold the state after some number of steps that was possible."""
    training = Training(make, chance, 300, is_scheduled=False)
    training.step()
    after: list[Any] = []
    # What a step does not change, and BatchNorm's statistics, are not the guard's business.
    parameters = dict(training.model.named_parameters())
    state = {
        "model": {name: value.detach() for name, value in parameters.items()},
        "optimizer": training.optimizer.state_dict()["state"],
    }

    def note(*_: object) -> None:
        after.append(frozen(state))

    is_over = threading.Event()
    taken: list[tuple[str, PendingCommit, int, int]] = []
    with make_engine(folder, staging_bytes=8 << 20, chunk_bytes=256 << 10) as engine:
        note()
        # Hooks run while the guard still excludes saves.
        handle = training.optimizer.register_step_post_hook(note)
        engine.guard(training.optimizer)

        def train() -> None:
            while not is_over.is_set():
                training.step()

        stepping = Doing(train)
        try:
            for k in range(num_saves):
                before = len(after)
                until(lambda now=before: len(after) > now or stepping.ended)
                for _ in range(chance.randrange(200)):
                    pass
                first = len(after)
                pending = saved(engine, state, f"t{k}", path="state.pt")
                taken.append((f"t{k}", pending, first, len(after)))
        finally:
            is_over.set()
        stepping.result()
        handle.remove()
        for tag, pending, first, last in taken:
            count.judge(f"{tag} (free)", folder / tag, pending, after[first - 1 : last], may_tear=False, stop=stop)
    count.schedules += 1


def sweep(
    seed: int, *, num_ordered: int, num_free: int, stop: bool = False, kinds: dict[str, Make] | None = None
) -> list[Count]:
    """`num_ordered` and `num_free` schedules for each kind of optimizer, half of the ordered ones guarded."""
    counts = []
    with Folder() as folder, quiet(), waits_noted():
        for number, (name, make) in enumerate((kinds or KINDS).items()):
            chance = random.Random(f"{seed}-{name}")
            for is_guarded in (True, False):
                count = Count(f"{name}, {'guarded' if is_guarded else 'not guarded'}")
                for k in range(num_ordered):
                    place = folder.path / f"o{number}-{is_guarded}-{k}"
                    ordered(place, make, chance, count, is_guarded=is_guarded, stop=stop)
                counts.append(count)
            if num_free and name != "lbfgs":
                # LBFGS keeps Python numbers and lists, which this test's references cannot follow.
                count = Count(f"{name}, free")
                for k in range(num_free):
                    free(folder.path / f"f{number}-{k}", make, chance, count, num_saves=20, stop=stop)
                counts.append(count)
    return counts


def main(options: argparse.Namespace) -> list[Any]:
    kinds = dict(extent_of(options).of(KINDS.items()))
    return sweep(options.seed, num_ordered=200 if options.full else 12, num_free=10 if options.full else 1, kinds=kinds)


if __name__ == "__main__":
    command("Torn snapshots", __doc__, main, columns=("schedules", "right", "torn", "wrong"))
