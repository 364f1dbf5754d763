"""The end of an engine whose last waits fail: it is closed all the same, and says why."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine
from async_ckpt.errors import BackpressureTimeout, TransactionStateError
from tests.support.stepping import saved


def commit_lazily(engine: AsyncCheckpointEngine, held_copies: Any) -> Any:
    """What lets the copies of a guarded save go on, whose commit is pending."""
    parameter = torch.nn.Parameter(torch.ones(20_000))
    engine.guard(torch.optim.SGD([parameter], lr=0.1))
    held = held_copies(engine)
    saved(engine, {"x": parameter}, "a", path="x.pt")
    return held


def test_copies_that_do_not_end_in_time_leave_no_engine_open(tmp_path: Path, held_copies: Any) -> None:
    engine = AsyncCheckpointEngine(
        tmp_path, staging_bytes=1 << 20, chunk_bytes=1 << 16, close_timeout_s=0.2, backpressure_timeout_s=0.1
    )
    held = commit_lazily(engine, held_copies)
    with pytest.raises(BackpressureTimeout, match="not visible; older checkpoints are untouched"):
        engine.close()
    with pytest.raises(TransactionStateError, match="is closed"):
        engine.create("b")
    held.let_go()
    engine.close()


def test_the_first_of_two_errors_is_raised_and_the_second_is_its_context(tmp_path: Path, held_copies: Any) -> None:
    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=1 << 16, close_timeout_s=0.2)

    def fail() -> None:
        raise ZeroDivisionError("in the hook")

    engine.on_preemption((signal.SIGUSR1,), deadline_s=0.2, save=fail)
    held = commit_lazily(engine, held_copies)
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(ZeroDivisionError) as caught:
        engine.close()
    assert isinstance(caught.value.__context__, BackpressureTimeout)
    with pytest.raises(TransactionStateError, match="is closed"):
        engine.create("b")
    held.let_go()
    engine.close()
