"""DeepSpeed's checkpoint engines on their own, without a training engine: torch, and fast with its writers."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from benchmarks.contenders.base import Contender, Unavailable, single_rank_environment
from benchmarks.workloads import State

# Read by DeepSpeed while it is imported.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
single_rank_environment()

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo  # noqa: E402
from deepspeed.runtime.checkpoint_engine.fast_checkpoint_engine import FastCheckpointEngine  # noqa: E402
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine  # noqa: E402
from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config  # noqa: E402
from deepspeed.runtime.model_checkpointing.data_parallel_writer_factory import DataParallelWriterConfig  # noqa: E402
from deepspeed.runtime.swap_tensor.aio_config import get_aio_config  # noqa: E402


class DeepspeedTorch(Contender):
    """The default engine: `torch.save` straight to the final path."""

    config = "TorchCheckpointEngine, zip serialization"

    def start(self) -> None:
        self.engine = self.make_engine()

    def make_engine(self) -> Any:
        return TorchCheckpointEngine(SimpleNamespace(checkpoint_config=get_checkpoint_config({})))

    def save(self, step: int, state: State) -> None:
        info = CheckpointCommitInfo(tag=f"step-{step}", save_dir=str(self.directory), save_latest=False)
        self.engine.create(info)
        self.engine.makedirs(self.produced(step), exist_ok=True)
        self.engine.save(state, str(self.produced(step) / "state.pt"))
        self.engine.commit(info)


class DeepspeedFast(DeepspeedTorch):
    """Double-buffered libaio with O_DIRECT; needs its compiled op and pinned memory."""

    config = "FastCheckpointEngine, writer type fast, 64 MiB double buffer"
    writer = "fast"

    def make_engine(self) -> Any:
        raw = {"checkpoint": {"writer": {"type": self.writer, "io_buffer_size": 64 << 20, "data_parallel": "replica"}}}
        config = SimpleNamespace(checkpoint_config=get_checkpoint_config(raw), aio_config=get_aio_config({}))
        rank = DataParallelWriterConfig(world_size=1, rank=0, global_rank=0, local_rank=0, pure_dp=True)
        try:
            return FastCheckpointEngine(config, rank, optimize_dp_state=False)
        except (RuntimeError, AssertionError, AttributeError, NotImplementedError) as error:
            raise Unavailable(f"does not start here: {type(error).__name__}: {error}") from error


class DeepspeedFastPython(DeepspeedFast):
    """The fast engine with the writer that needs no compiled op."""

    config = "FastCheckpointEngine, writer type python"
    writer = "python"
