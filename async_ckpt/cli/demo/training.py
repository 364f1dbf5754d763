"""The training loop of the demo: resumes from the newest good checkpoint, bit for bit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch.nn import functional as F

from ...engine.engine import AsyncCheckpointEngine
from ...engine.pending import PendingCommit
from .data import BatchSampler, read_corpus
from .model import GPT, GPTConfig


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What to train and how often to save."""

    root: str = "runs/demo"
    num_steps: int = 250
    save_every: int = 10
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    corpus_bytes: int = 2_000_000
    seed: int = 1337
    keep_last: int = 3
    device: str = "auto"
    loss_log: str | None = None
    model: GPTConfig = field(default_factory=GPTConfig)


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

    steps: list[StepRecord] = field(default_factory=list)
    commits: list[PendingCommit] = field(default_factory=list)
    resumed_from: str | None = None
    num_parameters: int = 0
    device: str = "cpu"
    wall_s: float = 0.0


class Trainer:
    """Everything that must be in a checkpoint for training to go on bit-identically."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = (found or torch.device("cpu")) if config.device == "auto" else torch.device(config.device)
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(config.seed)
        self.model = GPT(config.model).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        corpus = read_corpus(config.corpus_bytes)
        self.batches = BatchSampler(
            corpus, batch_size=config.batch_size, context_length=config.model.context_length, seed=config.seed
        )
        self.step = 0

    def _rate(self, step: int) -> float:
        warmup = self.config.warmup_steps
        return (step + 1) / warmup if step < warmup else max(0.1, 1 - (step - warmup) / max(1, self.config.num_steps))

    def train_step(self) -> float:
        """One optimizer step; returns the loss."""
        inputs, targets = (t.to(self.device) for t in self.batches.next())
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return float(loss.detach())

    def save(self, engine: AsyncCheckpointEngine, loss: float) -> PendingCommit:
        """Save model, optimizer, schedule, RNG and data position under a tag of their own; returns at once."""
        tag = f"step-{self.step:06d}"
        engine.create(tag)
        engine.save(self.model.state_dict(), "model.pt")
        engine.save(self.optimizer.state_dict(), "optim.pt")
        engine.save(self._progress(), "progress.pt")
        return engine.commit(tag, metadata={"step": self.step, "loss": loss})

    def _progress(self) -> dict[str, Any]:
        random: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            random[self.device.type] = torch.get_device_module(self.device).get_rng_state(self.device)
        return {
            "step": self.step,
            "schedule": self.schedule.state_dict(),
            "random": random,
            "batches": self.batches.state_dict(),
        }

    def resume(self, engine: AsyncCheckpointEngine) -> str | None:
        """Load the newest checkpoint that verifies; returns its tag, or None when there is none."""
        tag = engine.latest()
        if tag is None:
            return None
        engine.load_into(self.model.state_dict(), f"{tag}/model.pt")
        self.optimizer.load_state_dict(engine.load(f"{tag}/optim.pt", map_location=self.device))
        progress = engine.load(f"{tag}/progress.pt", map_location="cpu")
        self.schedule.load_state_dict(progress["schedule"])
        self.batches.load_state_dict(progress["batches"])
        torch.set_rng_state(progress["random"]["cpu"])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(progress["random"][self.device.type], self.device)
        self.step = progress["step"]
        return tag


def train(
    config: DemoConfig, on_step: Callable[[StepRecord], None] | None = None, observers: tuple[Any, ...] = ()
) -> DemoResult:
    """Train to `config.num_steps`, resuming where an earlier run in the same root ended, however it ended."""
    from ...retention import KeepLast

    trainer = Trainer(config)
    result = DemoResult(num_parameters=sum(p.numel() for p in trainer.model.parameters()), device=str(trainer.device))
    started = time.perf_counter()
    with (
        AsyncCheckpointEngine(
            config.root, overwrite="replace", retention=KeepLast(config.keep_last), observers=observers
        ) as engine,
        open(config.loss_log or os.devnull, "a", encoding="ascii") as log,
    ):
        result.resumed_from = trainer.resume(engine)
        engine.guard(trainer.optimizer)
        while trainer.step < config.num_steps:
            record = _one_step(trainer, engine, result)
            _log_loss(log, record)
            if on_step is not None:
                on_step(record)
    result.wall_s = time.perf_counter() - started
    return result


def _one_step(trainer: Trainer, engine: AsyncCheckpointEngine, result: DemoResult) -> StepRecord:
    began = time.perf_counter()
    in_flight = bool(engine.pending())
    loss = trainer.train_step()
    is_save = trainer.step % trainer.config.save_every == 0 or trainer.step == trainer.config.num_steps
    if is_save:
        result.commits.append(trainer.save(engine, loss))
    record = StepRecord(trainer.step, loss, time.perf_counter() - began, is_save, in_flight)
    result.steps.append(record)
    return record


def _log_loss(log: TextIO, record: StepRecord) -> None:
    # Hexadecimal floats: two runs are the same only if every bit is.
    log.write(f"{record.step} {record.loss.hex()}\n")
    log.flush()
