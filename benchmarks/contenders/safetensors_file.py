"""`safetensors.torch.save_file` of the flattened state; scalars go into the metadata as JSON."""

from __future__ import annotations

from safetensors.torch import save_file

from benchmarks.contenders.base import Contender, fsync_path
from benchmarks.workloads import State, flatten


class SafetensorsFile(Contender):
    """Synchronous; flattening is part of the stall, because the caller has to do it."""

    config = "safetensors.torch.save_file(flat state, scalars as JSON metadata)"

    def save(self, step: int, state: State) -> None:
        tensors, scalars = flatten(state)
        save_file(tensors, self.produced(step), metadata={"scalars": scalars})


class SafetensorsFileFsync(SafetensorsFile):
    """The same, with the file and its directory synced."""

    config = "safetensors.torch.save_file(flat state); os.fsync(file); os.fsync(directory)"
    syncs = "all"

    def save(self, step: int, state: State) -> None:
        super().save(step, state)
        fsync_path(self.produced(step))
        fsync_path(self.directory)
