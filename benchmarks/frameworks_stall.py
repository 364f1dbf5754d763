"""How long a save blocks training in Lightning and in Hugging Face's Trainer: stock against this package, on this
machine.

    python -m benchmarks.frameworks_stall DIRECTORY [--megabytes 200] [--saves 5] [--out FOLDER]

One process per row. A save is timed from the framework's call to its return; three training steps lie between any two,
and no save starts before the one before it is on disk (what stock code leaves in the page cache is synced for that,
outside the timing). The first save is a row's own column: it plans the files and meets cold memory. Stock Lightning and
stock Trainer sync nothing: what they block for is the page cache's speed, not the disk's. ``steps`` is what three
training steps take right after a save, beside the background work.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.results import in_own_process, keep, parser_of

WIDTH = 512
ROWS = ("lightning stock", "lightning AsyncCheckpointIO", "lightning AsyncCkptIO")
ROWS += ("trainer stock", "trainer attached", "trainer attached, guard=False")


def layers(megabytes: int) -> Any:
    """Linear layers whose weights and two Adam moments have about that size."""
    import torch

    depth = max(1, round(megabytes * 1e6 / (12 * WIDTH * (WIDTH + 1))))
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(depth)))


class Stopwatch:
    """Times saves, and the three steps behind each."""

    def __init__(self, num_saves: int) -> None:
        self.num_saves = num_saves
        self.saves_s: list[float] = []
        self.steps_s: list[float] = []
        self._after = 0.0

    def time(self, save: Any) -> None:
        """Save once; everything earlier must be on disk."""
        if self._after:
            self.steps_s.append(time.perf_counter() - self._after)
        os.sync()
        started = time.perf_counter()
        save()
        self._after = time.perf_counter()
        self.saves_s.append(self._after - started)


def run_lightning(row: str, directory: Path, megabytes: int, watch: Stopwatch) -> None:
    """Saves by hand every three steps, as ModelCheckpoint would."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.plugins.io import AsyncCheckpointIO
    from torch.utils.data import DataLoader

    from async_ckpt.integrations.lightning import AsyncCkptIO

    plugins = {"lightning AsyncCheckpointIO": AsyncCheckpointIO, "lightning AsyncCkptIO": AsyncCkptIO}
    plugin = plugins[row]() if row in plugins else None

    class Job(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = layers(megabytes)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-4)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % 3:
                return
            if isinstance(plugin, AsyncCkptIO):
                plugin.wait()
            elif plugin is not None and plugin._executor is not None:
                plugin._executor.submit(int).result()
            number = len(watch.saves_s)
            watch.time(lambda: self.trainer.save_checkpoint(directory / f"{number}.ckpt"))
            (directory / f"{number - 2}.ckpt").unlink(missing_ok=True)

    silent = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    options: dict[str, Any] = dict.fromkeys(silent, False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, plugins=None if plugin is None else [plugin], **options)
    trainer.fit(Job(), DataLoader(torch.randn(3 * watch.num_saves * 4, WIDTH), batch_size=4))


def run_trainer(row: str, directory: Path, megabytes: int, watch: Stopwatch) -> None:
    """save_steps=3; the save is timed from outside `_save_checkpoint`."""
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

    from async_ckpt.integrations.huggingface import attach

    class Net(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.net = layers(megabytes)
            self.post_init()

        def forward(self, x: Any) -> Any:
            return {"loss": self.net(x).square().mean()}

    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=3 * watch.num_saves,
        save_steps=3,
        save_total_limit=2,
        per_device_train_batch_size=4,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(Net(), arguments, train_dataset=[{"x": row} for row in torch.randn(64, WIDTH)])
    if row != "trainer stock":
        attach(trainer, guard="guard=False" not in row)
    save = trainer._save_checkpoint

    def timed(*args: Any, **kwargs: Any) -> None:
        if row != "trainer stock":
            trainer._saver.drain()  # type: ignore[attr-defined]
        watch.time(lambda: save(*args, **kwargs))

    trainer._save_checkpoint = timed
    trainer.train()


def measure(row: str, directory: Path, megabytes: int, num_saves: int) -> dict[str, Any]:
    """One row, in this process."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    watch = Stopwatch(num_saves)
    directory.mkdir(parents=True)
    (run_lightning if row.startswith("lightning") else run_trainer)(row, directory, megabytes, watch)
    return {
        "row": row,
        "first_s": watch.saves_s[0],
        "saves_s": watch.saves_s[1:],
        "median_s": statistics.median(watch.saves_s[1:]),
        "max_s": max(watch.saves_s[1:]),
        "steps_s": statistics.median(watch.steps_s),
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    options = parser_of(__doc__, megabytes=200, saves=5).parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    results, measured_on = [], describe(options.directory)
    print(f"| {options.megabytes} MB | first save, s | median, s | max, s | 3 steps after, s |\n|---|---|---|---|---|")
    for row in ROWS:
        folder = options.directory / "frameworks_stall"
        try:
            found = in_own_process(measure, row, folder, options.megabytes, options.saves)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        results.append(found)
        figures = (found[name] for name in ("first_s", "median_s", "max_s", "steps_s"))
        print(f"| {row} | {' | '.join(f'{seconds:.3f}' for seconds in figures)} |", flush=True)
    keep(options, "frameworks_stall", {"megabytes": options.megabytes, "rows": results}, measured_on)


if __name__ == "__main__":
    main()
