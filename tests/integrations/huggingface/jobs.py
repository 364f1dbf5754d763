"""A tiny language model with dropout and tied weights, trained by `Trainer`: every number depends on all of a
checkpoint.

``python -m tests.integrations.huggingface.jobs <output_dir> <hold_at>`` trains, and holds the commit of
``checkpoint-<hold_at>`` for ever; with ``ranks`` for <hold_at> it trains as one of several ranks (their number and so
on in the environment), stops, and resumes.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from async_ckpt.integrations.huggingface import attach
from async_ckpt.storage.filesystem import FileSystem

SMALL: dict[str, Any] = {"staging_bytes": 4 << 20, "chunk_bytes": 65536}


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"w{n}": n for n in range(50)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0", pad_token="w1"
    )


def rows(num: int = 64, seed: int = 1) -> list[dict[str, Any]]:
    tokens = torch.randint(0, 50, (num, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(
    output_dir: Path, *, asynchronous: bool = True, kind: type[Trainer] = Trainer, max_steps: int = 8, **options: Any
) -> Trainer:
    config = options.pop("config", {})
    guard = options.pop("guard", False)
    made = options.pop("model", None)
    callbacks = options.pop("callbacks", None)
    settings: dict[str, Any] = {
        "max_steps": max_steps,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    found = kind(
        model() if made is None else made,
        TrainingArguments(output_dir=str(output_dir), **settings),
        train_dataset=rows(),
        eval_dataset=rows(8, 2),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )
    if asynchronous:
        attach(found, guard=guard, **{**SMALL, **config})
    return found


def losses(trained: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trained.state.log_history if "loss" in entry}


class HoldingFileSystem(FileSystem):
    """Stops for ever before the manifest of one tag; `reached` tells that it has come so far."""

    def __init__(self, tag: str) -> None:
        super().__init__()
        self.tag = tag
        self.reached = threading.Event()
        self.gate = threading.Event()

    def create_file(self, path: str, data: bytes) -> None:
        if f".staging.{self.tag}." in path:
            self.reached.set()
            assert self.gate.wait(600)
        super().create_file(path, data)


class StopAt(TrainerCallback):
    """Ends training at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def as_rank(output_dir: Path) -> None:
    """Whole run, then a run that stops at step 4 and another that resumes; says on standard output what came out."""
    whole = trainer(output_dir / "whole")
    whole.train()
    trainer(output_dir / "parts", callbacks=[StopAt(4)], save_total_limit=2).train()
    second = trainer(output_dir / "parts", save_total_limit=2)
    second.train(resume_from_checkpoint=True)
    equal = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    print(
        f"rank {whole.args.process_index} of {whole.args.world_size}: {'equal' if equal else 'different'}", flush=True
    )
    torch.distributed.destroy_process_group()


def main() -> None:
    if sys.argv[2] == "ranks":
        as_rank(Path(sys.argv[1]))
        return
    held = HoldingFileSystem(f"checkpoint-{sys.argv[2]}")

    def tell() -> None:
        held.reached.wait()
        print("reached", flush=True)

    threading.Thread(target=tell, daemon=True).start()
    # One at a time: what came before the held one is committed.
    trainer(Path(sys.argv[1]), config={"filesystem": held, "max_pending_commits": 1}).train()


if __name__ == "__main__":
    main()
