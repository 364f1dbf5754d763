"""One run of one contender, as plain data: what the parent asks and the child does; kept in its line of JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

SCENARIOS = ("save", "training", "gil", "restore", "memory", "planning")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides what a child process does."""

    scenario: str
    contender: str
    workload: str
    size_mib: int
    directory: str
    repeat: int = 0
    seed: int = 0
    device: str = "cpu"
    num_warmups: int = 1
    """Saves between the first one (reported on its own) and the measured ones."""
    num_saves: int = 3
    num_steps: int = 30
    """Training steps per segment."""
    every: int = 10
    """Steps between two checkpoints."""
    num_segments: int = 2
    """Pairs of segments, one with checkpoints and one without; their order alternates."""
    num_tokens: int = 64
    drop_caches: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        return cls(**json.loads(text))
