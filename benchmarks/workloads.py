"""The states that are saved: real modules and real optimizers, sized by the caller, the same for every contender.

Guarantees:
- The same name, size and seed give the same tensors (names, shapes, dtypes, values).
- `state()` builds fresh containers on every call, as `state_dict()` in a training loop does; the storages stay the
  same.
- `advance()` changes every tensor in place, so that no contender can get away with yesterday's bytes.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from async_ckpt import AsyncCheckpointEngine, PendingCommit
from benchmarks.environment import memory_bytes

MIB = 1 << 20
DEFAULT_SIZE_MIB = {"transformer": 1024, "adamw": 1024, "many": 256, "small": 16, "huge": 0}
NAMES = tuple(DEFAULT_SIZE_MIB)
State = dict[str, Any]


class Block(nn.Module):
    """One transformer layer: 12 parameters."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        grown: torch.Tensor = x + self.contract(functional.gelu(self.expand(self.norm_mlp(x))))
        return grown


class Transformer(nn.Module):
    """A small decoder; `width` is chosen so that the parameters fill the wanted number of bytes."""

    def __init__(self, width: int, num_layers: int, vocabulary: int = 512) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, num_heads=4) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Pile(nn.Module):
    """Many parameters of mixed small sizes, or few large ones; nothing to compute."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(torch.empty(size)) for size in sizes)


@dataclass
class Workload:
    """A state to save, the optimizer that owns it, and how to change it."""

    name: str
    size_mib: int
    seed: int
    module: nn.Module
    optimizer: torch.optim.Optimizer
    with_optimizer_state: bool
    device: torch.device
    tensors: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def state(self) -> State:
        """What a training loop hands over: fresh containers, the live storages."""
        if not self.with_optimizer_state:
            return {"model": self.module.state_dict()}
        return {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def advance(self) -> None:
        """Change every tensor in place (what a training step does, without the training)."""
        for tensor in self.tensors:
            tensor.add_(1e-3)

    def train_step(self, generator: torch.Generator, num_tokens: int) -> None:
        """Forward and backward on random tokens; the caller runs the optimizer."""
        assert isinstance(self.module, Transformer)
        tokens = torch.randint(self.module.vocabulary, (1, num_tokens + 1), generator=generator).to(self.device)
        logits = self.module(tokens[:, :-1])
        functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size_mib": self.size_mib,
            "num_bytes": self.num_bytes,
            "num_tensors": len(self.tensors),
            "seed": self.seed,
            "device": str(self.device),
        }


def commit(engine: AsyncCheckpointEngine, tag: str, state: State, file: str = "m.pt") -> PendingCommit:
    """One checkpoint of one file, on its way."""
    engine.create(tag)
    engine.save(state, file)
    return engine.commit(tag)


def default_size_mib(name: str) -> int:
    """The size a workload has when none is asked for; `huge` is more than half the memory."""
    if name == "huge":
        return int(memory_bytes() * 0.52) // MIB
    return DEFAULT_SIZE_MIB[name]


def _transformer(num_bytes: int, num_layers: int) -> Transformer:
    width = max(8, int(math.sqrt(num_bytes / 4 / (12 * num_layers))) // 8 * 8)
    return Transformer(width, num_layers)


def _sizes(num_bytes: int, count: int, seed: int) -> list[int]:
    """`count` mixed sizes (elements) that add up to about `num_bytes`, most of them small."""
    draw = random.Random(seed)
    shares = [draw.paretovariate(1.5) for _ in range(count)]
    return [max(1, int(num_bytes / 4 * share / sum(shares))) for share in shares]


def _fill_optimizer(optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """The state AdamW has after a step, without the memory that a backward pass would take."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.empty_like(parameter).normal_(generator=generator).requires_grad_(False),
                "exp_avg_sq": torch.empty_like(parameter).uniform_(generator=generator).requires_grad_(False),
            }


def flatten(state: State) -> tuple[dict[str, torch.Tensor], str]:
    """A flat name → tensor dict and the rest as JSON, for formats that hold tensors only."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[prefix] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(f"{prefix}.{index}", item)
        else:
            scalars[prefix] = value

    walk("", state)
    return tensors, json.dumps(scalars)


def build(name: str, size_mib: int | None = None, *, seed: int = 0, device: str = "cpu") -> Workload:
    """Build a workload of `size_mib` MiB of state (model and, where it has one, optimizer state together)."""
    size = size_mib or default_size_mib(name)
    num_bytes = size * MIB
    with_state = name in ("adamw", "small")
    torch.manual_seed(seed)
    with torch.device("meta"):
        if name == "many":
            module: nn.Module = Pile(_sizes(num_bytes, 10_000, seed))
        elif name == "huge":
            module = Pile([num_bytes // 4 // 64] * 64)
        elif name in ("transformer", "adamw", "small"):
            layers = 24 if size >= 32 and name != "small" else 4
            module = _transformer(num_bytes // 3 if with_state else num_bytes, layers)
        else:
            raise ValueError(f"unknown workload {name!r}; known: {', '.join(NAMES)}")
    module = module.to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1 and not isinstance(module, Pile):
                parameter.fill_(1.0 / 64)
            elif name == "huge":
                parameter.fill_(float(seed) + 0.5)
            else:
                parameter.normal_(std=0.02, generator=generator)
    optimizer: torch.optim.Optimizer
    if with_state:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        _fill_optimizer(optimizer, generator)
    else:
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    workload = Workload(name, size, seed, module, optimizer, with_state, torch.device(device))
    workload.tensors = list(flatten(workload.state())[0].values())
    return workload
