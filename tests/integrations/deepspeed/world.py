"""Real DeepSpeed on CPU: models, training, and what a state consists of. Imported by the worker processes only."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Executor
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule

from async_ckpt.storage.filesystem import FileSystem

# Without this DeepSpeed compiles its shared-memory reduction for a minute; gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

FEATURES = 24


class Norm(torch.nn.BatchNorm1d):
    """BatchNorm whose statistics stay float32, as DeepSpeed leaves them, beside bfloat16 parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None and self.bias is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        weight, bias = self.weight.float(), self.bias.float()
        found = torch.nn.functional.batch_norm(
            x.float(), self.running_mean, self.running_var, weight, bias, training=True
        )
        normal: torch.Tensor = found.to(x.dtype)
        return normal


class Net(torch.nn.Module):
    """Linear and BatchNorm layers (whose statistics change in every forward), with two tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(FEATURES, FEATURES)
        self.norm = Norm(FEATURES)
        self.second = torch.nn.Linear(FEATURES, FEATURES)
        self.tied = torch.nn.Linear(FEATURES, FEATURES, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.tied(self.second(torch.relu(self.norm(self.first(x)))))
        return out


def config(stage: int, dtype: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1000000,
    }
    if dtype == "bf16":
        found["bf16"] = {"enabled": True}
    return found


def make(stage: int, dtype: str = "fp32", seed: int = 0, **more: Any) -> Any:
    """A DeepSpeed engine with its stock checkpoint engine."""
    torch.manual_seed(seed)
    engine, *_ = deepspeed.initialize(model=Net(), config={**config(stage, dtype), **more})
    return engine


def make_pipeline(num_stages: int, seed: int = 0) -> Any:
    deepspeed.init_distributed("gloo")
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(FEATURES, FEATURES), Norm(FEATURES), torch.nn.ReLU(), torch.nn.Linear(FEATURES, FEATURES)]
    model = PipelineModule(
        layers=layers, num_stages=num_stages, loss_fn=torch.nn.functional.mse_loss, partition_method="uniform"
    )
    engine, *_ = deepspeed.initialize(model=model, config={**config(0, "fp32"), "gradient_accumulation_steps": 1})
    return engine


def train(engine: Any, num_steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        x = torch.randn(8, FEATURES, generator=generator)
        loss = engine(x.to(next(engine.module.parameters()).dtype)).float().pow(2).mean()
        engine.backward(loss)
        engine.step()


def train_pipeline(engine: Any, num_steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        batch = (torch.randn(8, FEATURES, generator=generator), torch.randn(8, FEATURES, generator=generator))
        engine.train_batch(iter([batch]))


def state_of(engine: Any) -> dict[str, Any]:
    """A deep copy of all that a checkpoint has to bring back."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        model = {name: tensor.detach().clone() for name, tensor in engine.module.named_parameters()}
    buffers = {name: tensor.detach().clone() for name, tensor in engine.module.named_buffers()}
    return {
        "model": model,
        "buffers": buffers,
        "optimizer": _copied(engine.optimizer.state_dict()),
        "scheduler": engine.lr_scheduler.state_dict(),
        "steps": (engine.global_steps, engine.skipped_steps, engine.global_samples),
    }


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    # LossScaler and the like: what they hold counts, not who they are.
    return _copied(vars(value)) if hasattr(value, "__dict__") else str(value)


def differences(a: Any, b: Any, where: str = "state") -> list[str]:
    """Where two states differ, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        )
        return [] if same else [where]
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}[{key!r}]")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} items"]
        return [
            found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{where}[{i}]")
        ]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]


class GatedFileSystem(FileSystem):
    """Lets no checkpoint file be opened for writing before `gate` is set; then fails with `error`, if there is one."""

    def __init__(self, *, is_open: bool = False) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.error: OSError | None = None
        if is_open:
            self.gate.set()

    async def open_write(self, path: str, size_bytes: int, *, direct: bool, executor: Executor) -> Any:
        await asyncio.get_running_loop().run_in_executor(executor, self.gate.wait)
        if self.error is not None:
            raise self.error
        return await super().open_write(path, size_bytes, direct=direct, executor=executor)


class RecordingFileSystem(FileSystem):
    """Notes renames, new small files and directory syncs, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def rename(self, src: str, dst: str) -> None:
        self.calls.append(("rename", dst))
        super().rename(src, dst)

    def rename_noreplace(self, src: str, dst: str) -> None:
        self.calls.append(("rename_noreplace", dst))
        super().rename_noreplace(src, dst)

    def create_file(self, path: str, data: bytes) -> None:
        self.calls.append(("create_file", path))
        super().create_file(path, data)

    def fsync_dir(self, path: str) -> None:
        self.calls.append(("fsync_dir", path))
        super().fsync_dir(path)
