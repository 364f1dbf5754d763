"""nvidia-resiliency-ext: `torch.save` in its persistent worker process.

On the CPU its `TorchAsyncCheckpoint.async_save` cannot be used (it calls `torch.cuda.synchronize`), so the request goes
to the queue below it. CPU tensors are shared with the worker, not copied: they may change only when the file is
written.
"""

from __future__ import annotations

import time

import torch
from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue, AsyncRequest
from nvidia_resiliency_ext.checkpointing.utils import preload_tensors

from benchmarks.contenders.base import Contender, init_single_rank_group
from benchmarks.workloads import State

POLL_S = 0.002


class NvidiaResiliency(Contender):
    """Polled every 2 ms: its own blocking wait sleeps 100 ms at a time."""

    config = "AsyncCallsQueue(persistent=True) with torch.save; on the CPU safe to mutate only when written"

    def start(self) -> None:
        init_single_rank_group()
        self.queue = AsyncCallsQueue(persistent=True)

    def save(self, step: int, state: State) -> None:
        self.wait_durable()
        preloaded = preload_tensors(state)
        if self.workload.device.type == "cuda":
            torch.cuda.synchronize()
        self.queue.schedule_async_request(AsyncRequest(torch.save, (preloaded, str(self.produced(step))), []))

    def wait_safe(self) -> None:
        if self.workload.device.type == "cpu":
            self.wait_durable()

    def wait_durable(self) -> None:
        while self.queue.get_num_unfinalized_calls():
            self.queue.maybe_finalize_async_calls(blocking=False, no_dist=True)
            worker = self.queue.persistent_caller.process
            if worker is not None and not worker.is_alive():
                raise RuntimeError(f"the worker process died with exit code {worker.exitcode}")
            time.sleep(POLL_S)

    def close(self) -> None:
        self.queue.close()
