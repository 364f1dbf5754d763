"""Orbax AsyncCheckpointer, fed with numpy views of the torch tensors."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import orbax.checkpoint as ocp

from benchmarks.contenders.base import Contender
from benchmarks.workloads import State, flatten


class OrbaxAsync(Contender):
    """A flat dict of arrays; scalars travel as one array of JSON bytes."""

    config = "AsyncCheckpointer(PyTreeCheckpointHandler(use_compression=False)), tensors as numpy views"

    def start(self) -> None:
        self.checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))

    def save(self, step: int, state: State) -> None:
        tensors, scalars = flatten(state)
        tree = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        tree["scalars_json"] = np.frombuffer(scalars.encode(), dtype=np.uint8)
        self.checkpointer.save(self.produced(step).absolute(), args=ocp.args.PyTreeSave(tree))

    def wait_durable(self) -> None:
        self.checkpointer.wait_until_finished()

    def close(self) -> None:
        self.checkpointer.close()
