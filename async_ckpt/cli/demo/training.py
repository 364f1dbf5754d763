"""The training of the demo: a character-level GPT (decoder-only transformer, pre-norm), small enough for two CPU cores,
learns the Python standard library's own sources, and resumes from the newest good checkpoint, bit for bit.
"""

from __future__ import annotations

import os
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.engine import AsyncCheckpointEngine
from ...engine.pending import PendingCommit
from ...errors import ConfigError
from ...retention import KeepLast

_SEED = 1337
_WARMUP_STEPS = 20
_NUM_TOKENS = 256
_NUM_HEADS = 4


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What to train and how often to save; the defaults make a model of about 3.3 million parameters."""

    root: str
    num_steps: int
    save_every: int
    keep_last: int = 3
    device: str = "auto"
    batch_size: int = 8
    corpus_bytes: int = 2_000_000
    context_length: int = 64
    num_layers: int = 4
    width: int = 256
    loss_log: str | None = None


@dataclass(slots=True)
class StepRecord:
    """One training step: its time includes create, save and commit when it saved."""

    step: int
    loss: float
    seconds: float
    saved: bool
    in_flight: bool
    """A save was being written at some moment of this step."""


@dataclass(slots=True)
class DemoResult:
    """What a run did: its steps, its commits, where it resumed."""

    num_parameters: int
    resumed_from: str | None
    steps: list[StepRecord] = field(default_factory=list)
    commits: list[PendingCommit] = field(default_factory=list)
    wall_s: float = 0.0


class GPT(nn.Module):
    """Bytes in, logits over the next byte out: [batch, length] int64 to [batch, length, 256] float32."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_NUM_TOKENS, config.width)
        self.positions = nn.Embedding(config.context_length, config.width)
        block = nn.TransformerEncoderLayer(
            config.width, _NUM_HEADS, 4 * config.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(config.width)
        self.blocks = nn.TransformerEncoder(block, config.num_layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(config.width, _NUM_TOKENS, bias=False)
        # Tied, as in GPT-2: the checkpoint keeps the tie, because storages are saved once.
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        logits: Tensor = self.head(self.blocks(hidden, causal, is_causal=True))
        return logits


def _read_corpus(max_bytes: int) -> Tensor:
    """Bytes of the standard library's top-level modules, in name order, as a uint8 tensor of at most `max_bytes`."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if len(text) < max_bytes:
            text += path.read_bytes()
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8)


class Trainer:
    """Everything that must be in a checkpoint for training to go on bit-identically."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kinds = ["cpu"] if found is None else ["cpu", found.type]
        if config.device != "auto" and config.device.partition(":")[0] not in kinds:
            raise ConfigError(f"this torch has no device {config.device!r} here; it has {', '.join(kinds)}")
        self.device = (found or torch.device("cpu")) if config.device == "auto" else torch.device(config.device)
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(_SEED)
        self.model = GPT(config).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.corpus = _read_corpus(config.corpus_bytes)
        # Its state is the position in the data.
        self.sampler = torch.Generator().manual_seed(_SEED)
        self.step = 0

    def _rate(self, step: int) -> float:
        return min((step + 1) / _WARMUP_STEPS, max(0.1, 1 - step / self.config.num_steps))

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Random windows of the text, and the same one byte later: int64 of shape [batch_size, context_length]."""
        length = self.config.context_length
        starts = torch.randint(len(self.corpus) - length - 1, (self.config.batch_size,), generator=self.sampler)
        windows = torch.stack([self.corpus[s : s + length + 1] for s in starts.tolist()]).long().to(self.device)
        return windows[:, :-1], windows[:, 1:]

    def train_step(self) -> float:
        """One optimizer step; returns the loss."""
        inputs, targets = self._batch()
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return float(loss.detach())

    def save(self, engine: AsyncCheckpointEngine, loss: float) -> PendingCommit:
        """Save model, optimizer, schedule and data position under a tag of their own; returns at once."""
        tag = f"step-{self.step:06d}"
        # Nothing but the sampler is random here; with dropout, torch's own generators would belong into it too.
        progress = {"step": self.step, "schedule": self.schedule.state_dict(), "sampler": self.sampler.get_state()}
        engine.create(tag)
        engine.save(self.model.state_dict(), "model.pt")
        engine.save(self.optimizer.state_dict(), "optim.pt")
        engine.save(progress, "progress.pt")
        return engine.commit(tag, metadata={"step": self.step, "loss": loss})

    def resume(self, engine: AsyncCheckpointEngine) -> str | None:
        """Load the newest checkpoint that verifies; returns its tag, or None when there is none."""
        tag = engine.latest()
        if tag is None:
            return None
        engine.load_into(self.model.state_dict(), f"{tag}/model.pt")
        self.optimizer.load_state_dict(engine.load(f"{tag}/optim.pt", map_location=self.device))
        progress = engine.load(f"{tag}/progress.pt", map_location="cpu")
        self.schedule.load_state_dict(progress["schedule"])
        self.sampler.set_state(progress["sampler"])
        self.step = progress["step"]
        return tag


def train(
    config: DemoConfig, on_step: Callable[[StepRecord], None] | None = None, observers: tuple[Any, ...] = ()
) -> DemoResult:
    """Train to `config.num_steps`, resuming where an earlier run in the same root ended, however it ended."""
    trainer = Trainer(config)
    started = time.perf_counter()
    with (
        AsyncCheckpointEngine(
            config.root, overwrite="replace", retention=KeepLast(config.keep_last), observers=observers
        ) as engine,
        open(config.loss_log or os.devnull, "a", encoding="ascii") as log,
    ):
        result = DemoResult(sum(p.numel() for p in trainer.model.parameters()), trainer.resume(engine))
        engine.guard(trainer.optimizer)
        while trainer.step < config.num_steps:
            began = time.perf_counter()
            in_flight = bool(engine.pending())
            loss = trainer.train_step()
            is_save = trainer.step % config.save_every == 0 or trainer.step == config.num_steps
            if is_save:
                result.commits.append(trainer.save(engine, loss))
            record = StepRecord(trainer.step, loss, time.perf_counter() - began, is_save, in_flight)
            result.steps.append(record)
            # Hexadecimal floats: two runs are the same only if every bit is.
            print(record.step, loss.hex(), file=log, flush=True)
            if on_step is not None:
                on_step(record)
    result.wall_s = time.perf_counter() - started
    return result
