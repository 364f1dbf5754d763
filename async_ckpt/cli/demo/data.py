"""The training text: the Python standard library's own sources, which every machine that runs this has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def read_corpus(max_bytes: int) -> Tensor:
    """Bytes of the standard library's top-level modules, in name order, as a uint8 tensor of at most `max_bytes`."""
    parts: list[bytes] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_bytes()
        parts.append(text)
        size += len(text)
        if size >= max_bytes:
            break
    return torch.frombuffer(bytearray(b"".join(parts)[:max_bytes]), dtype=torch.uint8)


class BatchSampler:
    """Random windows of the text. Its position in the data is its generator's state, so it can be saved and resumed."""

    def __init__(self, corpus: Tensor, *, batch_size: int, context_length: int, seed: int) -> None:
        self._corpus = corpus
        self._batch_size = batch_size
        self._length = context_length
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each int64 of shape [batch_size, context_length]."""
        starts = torch.randint(len(self._corpus) - self._length - 1, (self._batch_size,), generator=self._generator)
        windows = torch.stack([self._corpus[s : s + self._length + 1] for s in starts.tolist()]).long()
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])
