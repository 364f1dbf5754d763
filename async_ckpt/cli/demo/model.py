"""A character-level GPT (decoder-only transformer, pre-norm), small enough for two CPU cores, and the text it learns:
the Python standard library's own sources, which every machine that runs this has.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of the model; the defaults make about 3.3 million parameters."""

    num_tokens: int = 256
    context_length: int = 64
    num_layers: int = 4
    num_heads: int = 4
    width: int = 256


class GPT(nn.Module):
    """Bytes in, logits over the next byte out: [batch, length] int64 to [batch, length, num_tokens] float32."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.num_tokens, config.width)
        self.positions = nn.Embedding(config.context_length, config.width)
        block = nn.TransformerEncoderLayer(
            config.width, config.num_heads, 4 * config.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(config.width)
        self.blocks = nn.TransformerEncoder(block, config.num_layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(config.width, config.num_tokens, bias=False)
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


def read_corpus(max_bytes: int) -> Tensor:
    """Bytes of the standard library's top-level modules, in name order, as a uint8 tensor of at most `max_bytes`."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if len(text) < max_bytes:
            text += path.read_bytes()
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8)
