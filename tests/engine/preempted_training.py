"""A small training for tests/test_preemption_processes.py: says where it is, so that the test can send its signal
there.

    python -m tests.engine.preempted_training ROOT WHERE [option]...

WHERE: step (between steps), save, commit (inside the call), c_call (a long operation of torch's), sleep (in
time.sleep). Options: exit, chain=python, chain=ignore, chain=default (the handler before ours), deadline=SECONDS, slow
(a disk whose syncs wait for the file ROOT/go). Prints "at <where>" and goes on at once; the signal arrives somewhere in
what follows. At the end it prints the outcome.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import time

import torch

from async_ckpt import AsyncCheckpointEngine
from async_ckpt.storage.filesystem import FileSystem


def say(*words: object) -> None:
    print(*words, flush=True)


def main(root: str, where: str, *options: str) -> None:
    logging.basicConfig(stream=sys.stdout, format="LOG %(levelname)s %(message)s")
    rank = os.environ.get("RANK", "0")
    root = f"{root}/rank-{rank}"
    os.makedirs(root, exist_ok=True)
    model = torch.nn.Linear(1024, 1024)
    optimizer = torch.optim.AdamW(model.parameters())
    position = {"step": 0}

    chosen = dict(option.split("=") for option in options if "=" in option)
    earlier = {"python": lambda *_: say("earlier handler"), "ignore": signal.SIG_IGN, "default": signal.SIG_DFL}
    if "chain" in chosen:
        signal.signal(signal.SIGTERM, earlier[chosen["chain"]])
    deadline_s = float(chosen.get("deadline", "20"))
    filesystem = SlowDisk(f"{root}/../go") if "slow" in options else None
    close_timeout_s = 1.0 if filesystem else 1800.0
    with AsyncCheckpointEngine(
        root, staging_bytes=64 << 20, chunk_bytes=1 << 20, filesystem=filesystem, close_timeout_s=close_timeout_s
    ) as engine:

        def save(tag: str) -> None:
            engine.create(tag)
            engine.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": position["step"]}, "state.pt"
            )
            engine.commit(tag, {"step": position["step"]})

        engine.on_preemption(
            deadline_s=deadline_s, save=lambda: save(f"last-{position['step']}"), exit_after="exit" in options
        )
        engine.guard(optimizer)
        while position["step"] < 100_000:
            model(torch.randn(8, 1024)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            position["step"] += 1
            if position["step"] == 3:
                say("at", where, os.getpid())
            if position["step"] >= 3:
                # From here on, the process is nearly always inside the call that the test wants to hit.
                busy(where, engine, save, position["step"])
            if engine.poll_preemption():
                break
        digest = hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest()
        say("stopped at", position["step"], digest, engine.preempted)
    say("closed", engine.preemption_outcome)


class SlowDisk(FileSystem):
    """Its directories are not synced before somebody lets them."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self._gate = gate

    def fsync_dir(self, path: str) -> None:
        while ".staging.last-" in path and not os.path.exists(self._gate):
            time.sleep(0.01)
        super().fsync_dir(path)


def busy(where: str, engine: AsyncCheckpointEngine, save, step: int) -> None:
    if where == "save":
        save(f"step-{step}")
    elif where == "commit":
        engine.create(f"step-{step}")
        engine.save({"step": step, "x": torch.zeros(1000)}, "state.pt")
        engine.commit(f"step-{step}").result()
    elif where == "c_call":
        # One call of C that does not look at signals for a while.
        torch.linalg.svd(torch.randn(400, 400))
    elif where == "sleep":
        # Woken by the signal and put to sleep again for the rest (PEP 475): the flag is seen when it ends.
        time.sleep(1.0)
    else:
        time.sleep(0.01)


if __name__ == "__main__":
    main(*sys.argv[1:])
