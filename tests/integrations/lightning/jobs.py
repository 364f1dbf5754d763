"""A tiny Lightning job whose every number depends on the state that a checkpoint must keep."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from async_ckpt.storage.filesystem import FileSystem


class Job(pl.LightningModule):
    """AdamW, a scheduler, BatchNorm statistics and dropout; logs every training loss."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
        )
        self.losses: list[float] = []
        self.at_step: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = ((self.net(batch[0]) - batch[1]) ** 2).mean()
        self.losses.append(float(loss))
        self.log("loss", loss)
        self.log("wave", torch.tensor(float((7 * self.global_step) % 5)))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.at_step is not None:
            self.at_step(self.trainer)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def job() -> Job:
    torch.manual_seed(0)
    return Job()


def data(num_batches: int = 6) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_batches * 4, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def trainer(
    folder: Path, plugin: Any = None, *, callbacks: Any = (), max_epochs: int = 1, **options: Any
) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=None if plugin is None else [plugin],
        callbacks=list(callbacks),
        max_epochs=max_epochs,
        **options,
    )


class GatedFileSystem(FileSystem):
    """Holds every manifest back until `gate` is set, so that tests look at pending checkpoints; and fails on
    request.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.fail_manifest: OSError | None = None
        self.fail_move: OSError | None = None

    def create_file(self, path: str, data: bytes) -> None:
        if path.endswith("manifest.json"):
            assert self.gate.wait(60)
            if self.fail_manifest is not None:
                raise self.fail_manifest
        super().create_file(path, data)

    def rename(self, src: str, dst: str) -> None:
        if self.fail_move is not None:
            raise self.fail_move
        super().rename(src, dst)
