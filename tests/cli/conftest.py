"""One root with two small checkpoints, made once; tests that damage something work on a copy."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine
from async_ckpt.cli import main


@dataclass
class Ran:
    """What one command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command line in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = left.value.code
        return Ran(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def states() -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=generator)
    first = {
        "model": {"layer.weight": weight, "layer.bias": torch.zeros(64), "tied": weight, "half": weight[:10]},
        "step": 1,
    }
    changed = dict(first["model"], **{"layer.bias": torch.ones(64), "new": torch.arange(5)})
    changed.pop("half")
    return first, {"model": changed, "step": 2}


@pytest.fixture(scope="session")
def made_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli") / "root"
    first, second = states()
    with AsyncCheckpointEngine(root, staging_bytes=4 << 20, chunk_bytes=64 << 10) as engine:
        for number, state in ((100, first), (200, second)):
            engine.create(f"step-{number}")
            engine.save(state, "model.pt")
            engine.save({"lr": 0.1, "momentum": torch.ones(3000)}, "sub/optim.pt")
            engine.commit(f"step-{number}", {"step": number, "loss": 3.0 / number, "note": "\x1b[31mred"})
    return root


@pytest.fixture
def root(made_root: Path, tmp_path: Path) -> Path:
    """A root of one's own."""
    return Path(shutil.copytree(made_root, tmp_path / "root"))


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Every name under `root` with size and time of change: read-only commands leave it as it is."""
    return {
        str(path.relative_to(root)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
    }


PYTHON = sys.executable
