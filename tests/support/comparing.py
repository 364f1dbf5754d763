"""What torch itself writes, whether two states are the same, and one damaged byte."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Without what torch warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@unwarned()
def torch_bytes(state: Any) -> bytes:
    """The reference: what torch.save writes into a file object."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def same(a: Any, b: Any) -> bool:
    """Whether two states hold the same: keys in their order, types and bits of tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool((a == b).all()) if hasattr(a, "shape") else bool(a == b)


def flip(path: Path, offset: int, mask: int = 1) -> None:
    """Damage one byte of a file, in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ mask]))
