"""Preemption with signals sent to this very process; tests/test_preemption_processes.py kills real trainings."""

from __future__ import annotations

import logging
import os
import signal
import threading

import pytest
import torch

from async_ckpt.engine.preemption import Preemption
from async_ckpt.errors import ConfigError, TagExistsError, TransactionStateError, WriteError


class Commit:
    """A pending commit that ends when told, or when first waited for."""

    def __init__(self, tag: str, error: BaseException | None = None, *, endless: bool = False) -> None:
        self.tag, self.error, self.endless = tag, error, endless
        self.waits: list[float] = []

    def wait(self, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        return not self.endless

    def failure(self) -> BaseException | None:
        return self.error


@pytest.fixture
def watch():
    """Makes `Preemption`s and gives the signals back afterwards."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    made = []

    def make(*, signals=(signal.SIGUSR1,), deadline_s=20.0, save=None, agree=None, exit_after=False, pending=list):
        made.append(
            Preemption(
                signals=signals, deadline_s=deadline_s, save=save, agree=agree, exit_after=exit_after, pending=pending
            )
        )
        return made[-1]

    yield make
    for preemption in made:
        preemption.leave_with(RuntimeError())
        preemption.leave()
    for signum, handler in before.items():
        signal.signal(signum, handler)


def send(signum: int = signal.SIGUSR1) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.wide
def test_nothing_happens_before_a_signal(watch):
    preemption = watch(save=lambda: pytest.fail("saved without a signal"))
    assert not preemption.preempted
    assert not preemption.poll()
    assert preemption.outcome is None


def test_a_signal_only_sets_the_flag_until_a_safe_point(watch):
    saved = []
    preemption = watch(save=lambda: saved.append(1))
    send()
    assert preemption.preempted
    assert saved == []
    assert preemption.poll()
    assert preemption.poll()
    assert saved == [1]


def test_a_signal_in_the_middle_of_a_poll_does_not_wait_for_it(watch):
    def signalled_meanwhile(mine: bool) -> bool:
        send()
        assert preemption.preempted and preemption.poll()
        return False

    preemption = watch(save=lambda: None, agree=signalled_meanwhile)
    assert not preemption.poll()
    assert preemption.outcome is None


def test_hook_runs_after_what_was_pending_and_its_commit_is_waited_for(watch):
    order = []

    class Noted(Commit):
        def wait(self, timeout_s):
            order.append(self.tag)
            return super().wait(timeout_s)

    pending = [Noted("old")]

    def save() -> None:
        order.append("hook")
        pending[:] = [Noted("last")]
        preemption.after_commit(pending[0])

    preemption = watch(save=save, pending=lambda: pending)
    send()
    preemption.poll()
    assert order[:2] == ["old", "hook"]
    assert "last" in order[2:]
    assert preemption.outcome.committed == ("old", "last")
    assert preemption.outcome.ok


def test_draining_stops_at_the_deadline_and_names_what_is_lost(watch, caplog):
    stuck, bad, good = Commit("stuck", endless=True), Commit("bad", WriteError("no")), Commit("good")
    preemption = watch(deadline_s=3.0, pending=lambda: [stuck, bad, good])
    send()
    with caplog.at_level(logging.INFO, logger="async_ckpt"):
        assert preemption.poll()
    outcome = preemption.outcome
    assert (outcome.committed, outcome.failed, outcome.unfinished) == (("good",), ("bad",), ("stuck",))
    assert not outcome.ok
    assert max(stuck.waits) <= 3.0
    error = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(error) == 1
    assert all(word in error[0].getMessage() for word in ("SIGUSR1", "stuck", "bad", "good"))


def test_hook_gets_half_of_the_time(watch):
    stuck = Commit("stuck", endless=True)
    waited_before_hook = []
    preemption = watch(deadline_s=8.0, save=lambda: waited_before_hook.extend(stuck.waits), pending=lambda: [stuck])
    send()
    preemption.poll()
    assert max(waited_before_hook) <= 4.0


def test_a_tag_that_is_committed_already_is_no_failure(watch):
    def save() -> None:
        raise TagExistsError("there", step="create")

    preemption = watch(save=save)
    send()
    assert preemption.poll()
    assert preemption.outcome.ok


def test_a_failing_hook_is_raised_after_the_others_are_safe(watch):
    other = Commit("other")

    def save() -> None:
        raise WriteError("disk gone")

    preemption = watch(save=save, pending=lambda: [other])
    send()
    with pytest.raises(WriteError, match="disk gone"):
        preemption.poll()
    assert preemption.outcome.committed == ("other",)
    assert not preemption.outcome.ok
    assert preemption.poll()


def test_chains_the_earlier_handler(watch):
    seen = []
    signal.signal(signal.SIGUSR1, lambda signum, frame: seen.append(signum))
    preemption = watch()
    send()
    assert preemption.preempted
    assert seen == [signal.SIGUSR1]


def test_two_watchers_both_learn(watch):
    first, second = watch(), watch()
    send()
    assert first.preempted
    assert second.preempted


def test_leaving_gives_the_signal_back(watch):
    earlier = signal.getsignal(signal.SIGUSR1)
    preemption = watch()
    assert signal.getsignal(signal.SIGUSR1) is not earlier
    preemption.leave()
    assert signal.getsignal(signal.SIGUSR1) is earlier


def test_leaving_under_a_later_handler_keeps_the_chain(watch):
    seen = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append("first"))
    preemption = watch()
    ours = signal.getsignal(signal.SIGUSR1)

    def later(signum, frame):
        seen.append("later")
        ours(signum, frame)

    signal.signal(signal.SIGUSR1, later)
    preemption.leave()
    send()
    assert signal.getsignal(signal.SIGUSR1) is later
    assert seen == ["later", "first"]
    assert not preemption.preempted


def test_leaving_is_a_safe_point(watch):
    saved = []
    preemption = watch(save=lambda: saved.append(1))
    send()
    preemption.leave()
    assert saved == [1]


def death(inside_step: bool) -> RuntimeError:
    """What torch raises where a worker was killed, as it comes out of a loop."""

    def closure() -> torch.Tensor:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")

    with pytest.raises(RuntimeError) as caught:
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).step(closure) if inside_step else closure()
    return caught.value


@pytest.mark.parametrize(("inside_step", "saved"), [(False, ["last"]), (True, [])])
def test_leaving_by_a_workers_death_saves_unless_a_step_was_cut(watch, inside_step, saved):
    made = []
    preemption = watch(save=lambda: made.append("last"))
    send()
    preemption.leave_with(death(inside_step))
    preemption.leave()
    assert made == saved


def test_leaving_by_an_exception_drains_but_does_not_save(watch):
    other = Commit("other")
    preemption = watch(
        save=lambda: pytest.fail("saved a state that is half way through a step"), pending=lambda: [other]
    )
    send()
    preemption.leave_with(ValueError())
    preemption.leave()
    assert preemption.outcome.committed == ("other",)


def test_first_interrupt_preempts_and_the_second_interrupts(watch):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    preemption = watch(signals=(signal.SIGINT,))
    send(signal.SIGINT)
    assert preemption.preempted
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_second_sigterm_within_the_deadline_is_only_counted(watch):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    preemption = watch(signals=(signal.SIGTERM,))
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    preemption.poll()
    assert preemption.outcome.num_signals == 2


def test_exit_after_leaves_with_the_signals_exit_code(watch):
    preemption = watch(exit_after=True)
    send()
    with pytest.raises(SystemExit) as left:
        preemption.poll()
    assert left.value.code == 128 + signal.SIGUSR1
    assert preemption.outcome is not None


def test_ranks_act_together(watch):
    anywhere = [False]
    asked = []

    def agree(mine: bool) -> bool:
        asked.append(mine)
        return mine or anywhere[0]

    saved = []
    preemption = watch(save=lambda: saved.append(1), agree=agree)
    assert not preemption.poll()
    anywhere[0] = True
    assert preemption.poll()
    assert preemption.preempted
    assert saved == [1]
    assert preemption.outcome.signal_name == "another rank"
    assert asked == [False, False]


def test_a_signal_while_the_ranks_agree_is_for_the_next_safe_point(watch):
    """One rank alone would leave the loop, and the others wait for it in their next collective."""
    said: list[bool] = []

    def agree(mine: bool) -> bool:
        said.append(mine)
        if len(said) == 1:
            send()
        return mine

    preemption = watch(agree=agree)
    assert not preemption.poll()
    assert preemption.poll()
    assert said == [False, True]


def test_a_rank_that_leaves_asks_nobody_and_does_not_save_alone(watch):
    preemption = watch(
        save=lambda: pytest.fail("one rank saved alone"), agree=lambda _: pytest.fail("a collective while leaving")
    )
    send()
    preemption.leave()


def test_forked_child_has_the_earlier_handler_and_dies_of_the_signal(watch):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    watch(signals=(signal.SIGTERM,))
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write_end, b"1" if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else b"0")
        signal.pause()
        os._exit(0)
    assert os.read(read_end, 1) == b"1"
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    os.close(read_end)
    os.close(write_end)
    assert os.WTERMSIG(status) == signal.SIGTERM


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"signals": (signal.SIGKILL,)}, "SIGKILL cannot be caught"),
        ({"signals": (signal.SIGSEGV,)}, "SIGSEGV"),
        ({"signals": (4711,)}, "4711 is no signal"),
        ({"signals": ("SIGTERM",)}, "is no signal"),
        ({"signals": "SIGTERM"}, "tuple"),
        ({"signals": signal.SIGTERM}, "tuple"),
        ({"signals": ()}, "empty"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"save": 3}, "save must be callable"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_change_no_handler(watch, options, named):
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(ConfigError, match=named):
        watch(**options)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_handlers_from_another_thread_are_refused_with_the_fix(watch):
    raised: list[BaseException] = []

    def work() -> None:
        try:
            watch()
        except TransactionStateError as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="trainer")
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])
    assert "trainer" in str(raised[0])
