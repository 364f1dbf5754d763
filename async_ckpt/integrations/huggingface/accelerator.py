"""Accelerate: ``save_state`` into an engine's checkpoint, and ``load_state`` from a verified one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ...engine.engine import AsyncCheckpointEngine
from ...engine.interface import StrPath
from ...engine.pending import PendingCommit
from ...errors import CheckpointNotFoundError, ConfigError
from ...reading.catalog import Catalog
from .capture import capture, require


def save_accelerator_state(
    accelerator: Any, engine: AsyncCheckpointEngine, tag: str, *, metadata: Mapping[str, Any] | None = None, **options: Any
) -> PendingCommit:
    """``accelerator.save_state`` as checkpoint `tag` of `engine`: same files, written in the background.

    Models, optimizers, schedulers, scaler, samplers, random states, registered objects and hooks, as Accelerate saves
    them. Blocks for the copy (less with ``engine.guard``). On many ranks, call it on each, with engines that share a coordinator.

    Args:
        metadata: JSON values for the manifest.
        options: of ``save_state``, such as ``safe_serialization``.

    Raises:
        ConfigError: automatic naming (the tag is the name), or sharded state (FSDP, DeepSpeed, Megatron).
        CheckpointError: as `AsyncCheckpointEngine.create`, `save` and `commit`.
    """
    require("accelerate")
    _check(accelerator)
    engine.create(tag)
    try:
        with capture(engine, tag) as scratch:
            accelerator.save_state(os.path.join(scratch, tag), **options)
        return engine.commit(tag, metadata={"framework": "accelerate", **(metadata or {})})
    except BaseException:
        engine.abort(tag)
        raise


def load_accelerator_state(accelerator: Any, engine: AsyncCheckpointEngine | StrPath, tag: str | None = None, **options: Any) -> str:
    """Verify a checkpoint, then ``accelerator.load_state`` from it. Returns the tag. Blocks; waits for pending commits.

    Args:
        engine: the engine, or the root of its checkpoints.
        tag: None is the newest checkpoint that verifies.
        options: of ``load_state``.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError. CheckpointError: the pending commit of this tag failed.
    """
    require("accelerate")
    if isinstance(engine, AsyncCheckpointEngine):
        for pending in engine.pending():
            if tag in (None, pending.tag):
                pending.result()
        engine.wait_snapshot()
    catalog = Catalog(engine.root if isinstance(engine, AsyncCheckpointEngine) else engine)
    found = catalog.latest() if tag is None else tag
    if found is None:
        raise CheckpointNotFoundError(f"no checkpoint below {catalog.root!r} verifies")
    if tag is not None:
        catalog.verify(tag).raise_if_bad()
    accelerator.load_state(str(catalog.path(found)), **options)
    return found


def _check(accelerator: Any) -> None:
    if accelerator.project_configuration.automatic_checkpoint_naming:
        raise ConfigError(
            "automatic_checkpoint_naming names and deletes checkpoints itself; leave it off: the tag is the name, `retention` deletes"
        )
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TPU"):
        raise ConfigError(f"{kind} state is sharded by its own writers; use async_ckpt.integrations.dcp or .deepspeed for it")
