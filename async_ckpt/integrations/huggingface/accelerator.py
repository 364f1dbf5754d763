"""Accelerate: ``save_state`` into an engine's checkpoint, and ``load_state`` from a verified one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ...engine.engine import AsyncCheckpointEngine
from ...engine.interface import StrPath
from ...engine.pending import PendingCommit
from ...errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    RankFailedError,
    report,
)
from ...reading.catalog import Catalog
from .capture import capture, require
from .resume import verify_directory


def save_accelerator_state(
    accelerator: Any,
    engine: AsyncCheckpointEngine,
    tag: str,
    *,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> PendingCommit:
    """``accelerator.save_state`` as checkpoint `tag` of `engine`: same files, written in the background.

    Models, optimizers, schedulers, scaler, samplers, random states, registered objects and hooks, as Accelerate saves
    them. Blocks for the copy (less with ``engine.guard``). On many ranks, call it on each, with engines that share a
    coordinator.

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


def load_accelerator_state(
    accelerator: Any, engine: AsyncCheckpointEngine | StrPath, tag: str | None = None, **options: Any
) -> str:
    """Verify a checkpoint, then ``accelerator.load_state`` from it. Returns the tag. Blocks; waits for pending commits.

    On many ranks, call it on each: one rank of each node reads, and all take the same checkpoint or raise alike.

    Args:
        engine: the engine, or the root of its checkpoints.
        tag: None is the newest checkpoint that every rank sees and that verifies on every node.
        options: of ``load_state``.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError. CheckpointError: the pending commit of this tag failed, or
        another rank's
            look at it.
    """
    require("accelerate")
    if isinstance(engine, AsyncCheckpointEngine):
        for pending in engine.pending():
            if tag in (None, pending.tag):
                pending.result()
        engine.wait_snapshot()
    catalog = Catalog(engine.root if isinstance(engine, AsyncCheckpointEngine) else engine)
    found = _agree(accelerator, catalog, tag)
    accelerator.load_state(str(catalog.path(found)), **options)
    return found


def _agree(accelerator: Any, catalog: Catalog, tag: str | None) -> str:
    """The tag to load, verified, the same on all ranks. Blocks for the slowest rank."""
    gather = require("accelerate.utils").gather_object

    def together(work: Callable[[], Any]) -> list[Any]:
        """What `work` gives on each rank; a failure of one raises on all."""
        mine, failure = None, None
        try:
            mine = work()
        except (CheckpointError, OSError) as error:
            failure = error
        said = gather([(mine, None if failure is None else str(failure))])
        if failure is not None:
            raise failure
        told = next(((rank, text) for rank, (_, text) in enumerate(said) if text is not None), None)
        if told is not None:
            raise RankFailedError(
                f"rank {told[0]} could not read the checkpoints: {told[1]}", rank=told[0], step="load"
            )
        return [found for found, _ in said]

    def verify(name: str) -> str:
        """Why `name` is not as it was committed, or ""."""
        try:
            if accelerator.is_local_main_process:
                verify_directory(str(catalog.path(name)), catalog.filesystem)
        except CorruptCheckpointError as error:
            if tag is not None:
                raise
            return str(error)
        return ""

    if tag is not None:
        together(lambda: verify(tag))
        return tag
    tags = together(catalog.tags)
    for name in reversed(tags[0]):
        if all(name in others for others in tags):
            bad = [why for why in together(partial(verify, name)) if why]
            if not bad:
                return str(name)
            report(logging.WARNING, "%s is not loaded: %s", name, bad[0])
    raise CheckpointNotFoundError(f"no checkpoint below {catalog.root!r} verifies on all ranks")


def _check(accelerator: Any) -> None:
    if accelerator.project_configuration.automatic_checkpoint_naming:
        raise ConfigError(
            "automatic_checkpoint_naming names and deletes checkpoints itself; leave it off: the tag is the "
            "name, `retention` deletes"
        )
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TPU"):
        raise ConfigError(
            f"{kind} state is sharded by its own writers; use async_ckpt.integrations.dcp or .deepspeed for it"
        )
