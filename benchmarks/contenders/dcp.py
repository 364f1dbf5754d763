"""torch.distributed.checkpoint: `save`, and `async_save` with its executors and stagers, in one process.

A reused stager overwrites its previous snapshot, so these contenders wait for the last upload before they stage again.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import Future
from typing import Any, Literal

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save

from benchmarks.contenders.base import Contender, init_single_rank_group
from benchmarks.workloads import State

NUM_WRITE_THREADS = max(1, os.cpu_count() or 1)


class DcpSave(Contender):
    """The synchronous save."""

    config = f"dcp.save(FileSystemWriter(thread_count={NUM_WRITE_THREADS}, sync_files=True))"
    syncs = "files"

    def start(self) -> None:
        warnings.filterwarnings("ignore", module="torch.distributed.*")

    def writer(self, step: int) -> FileSystemWriter:
        return FileSystemWriter(self.produced(step), thread_count=NUM_WRITE_THREADS)

    def save(self, step: int, state: State) -> None:
        save(state, storage_writer=self.writer(step))


class DcpAsyncThread(DcpSave):
    """`async_save` as it comes: a fresh pageable copy on the caller's thread, upload in a thread."""

    config = f"dcp.async_save(THREAD, default stager, thread_count={NUM_WRITE_THREADS})"
    kind = AsyncCheckpointerType.THREAD
    staging: Literal["shared", "reused", "in a thread"] | None = None
    """What the stager that is kept over all saves copies into, or where it copies; None: there is none."""

    def start(self) -> None:
        super().start()
        self.staged: Future[Any] | None = None
        self.stager: DefaultStager | None = None
        if self.staging is not None:
            is_shared, in_thread = self.staging == "shared", self.staging == "in a thread"
            gpu = self.workload.device.type == "cuda" and not is_shared
            self.stager = DefaultStager(StagingOptions(gpu, is_shared, in_thread, use_non_blocking_copy=gpu))

    def save(self, step: int, state: State) -> None:
        self.wait_durable()
        response = async_save(
            state, storage_writer=self.writer(step), async_checkpointer_type=self.kind, async_stager=self.stager
        )
        if isinstance(response, AsyncSaveResponse):
            self.staged, self.pending = response.staging_completion, response.upload_completion
        else:
            self.pending = response

    def wait_safe(self) -> None:
        if self.staged is not None:
            self.staged.result()
            self.staged = None

    def close(self) -> None:
        super().close()
        if self.stager is not None:
            self.stager.close()


class DcpAsyncProcess(DcpAsyncThread):
    """Upload in a daemon process; its start-up falls into the first save."""

    config = f"dcp.async_save(PROCESS, DefaultStager(shared memory, reused), thread_count={NUM_WRITE_THREADS})"
    kind = AsyncCheckpointerType.PROCESS
    staging = "shared"

    def start(self) -> None:
        init_single_rank_group()
        super().start()


class DcpStagerCached(DcpAsyncThread):
    """One stager kept over all saves: copies go into memory that is warm after the first."""

    config = (
        f"dcp.async_save(THREAD, DefaultStager reused, staged on the caller's thread, thread_count={NUM_WRITE_THREADS})"
    )
    staging = "reused"


class DcpStagerLazy(DcpAsyncThread):
    """The stager copies in its own thread: the caller must wait before the tensors change."""

    config = f"dcp.async_save(THREAD, DefaultStager reused, staged in a thread, thread_count={NUM_WRITE_THREADS})"
    staging = "in a thread"
