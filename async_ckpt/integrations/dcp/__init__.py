"""torch.distributed.checkpoint on this package: `DcpWriter`, `DcpReader`, `ArenaStager`; `save_sharded` and
`load_sharded` in one call.

Run with torch 2.13 (gloo, FSDP2, DTensor); the stock on-disk form, so no lock-in.
"""

from __future__ import annotations

from .reader import DcpReader
from .sharded import TrainingState, load_sharded, save_sharded
from .stager import ArenaStager
from .writer import DcpWriter

__all__ = ["ArenaStager", "DcpReader", "DcpWriter", "TrainingState", "load_sharded", "save_sharded"]
