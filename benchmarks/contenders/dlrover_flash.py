"""DLRover flash checkpoint: copy into shared memory on the caller's thread, written by a saver process.

It skips a save without a word while the previous one is being written, so each save first waits for the last.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

# Names its shared memory and sockets: without it, two runs on one machine share them.
os.environ["TORCHELASTIC_RUN_ID"] = os.environ["ELASTIC_JOB_NAME"] = os.environ.get(
    "BENCH_RUN_ID", f"bench-{uuid.uuid4().hex[:12]}"
)

from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType
from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

from benchmarks.contenders.base import Contender, single_rank_environment
from benchmarks.workloads import State

POLL_S = 0.002
TIMEOUT_S = 300.0


class DlroverFlash(Contender):
    """Its own wait polls a tracker file every 3 s; the harness polls the same file every 2 ms."""

    config = "DdpCheckpointer.save_checkpoint(StorageType.DISK), saver process"

    def start(self) -> None:
        single_rank_environment()
        self.checkpointer = DdpCheckpointer(str(self.directory))
        self.last: int | None = None

    def save(self, step: int, state: State) -> None:
        self.wait_durable()
        # Steps must be above 0: it takes 0 for "nothing saved yet".
        self.checkpointer.save_checkpoint(step + 1, state, storage_type=StorageType.DISK)
        self.last = step + 1

    def produced(self, step: int) -> Path:
        return self.directory / str(step + 1)

    def wait_durable(self) -> None:
        tracker = self.directory / "dlrover_latest.txt"
        deadline = time.monotonic() + TIMEOUT_S
        while self.last is not None:
            if tracker.exists() and tracker.read_text().strip() == str(self.last):
                self.last = None
            elif time.monotonic() > deadline:
                raise TimeoutError(
                    f"step {self.last} was not written within {TIMEOUT_S} s (skipped or failed in silence)"
                )
            else:
                time.sleep(POLL_S)

    def close(self) -> None:
        self.wait_durable()
        handler = self.checkpointer._engine._shm_handler
        if handler.shared_memory is not None:
            handler.shared_memory.unlink()
        self.checkpointer._engine.close()
