"""Accelerate: ``save_state`` into an engine's checkpoint, and ``load_state`` from a verified one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from ...engine.engine import AsyncCheckpointEngine
from ...engine.interface import StrPath
from ...engine.pending import PendingCommit
from ...errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, report
from ...reading.catalog import Catalog
from ...threads.outcome import name_pending
from .capture import CapturedDestination, capture
from .resume import on_all_ranks

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TPU")


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
    them. Blocks for the copy (less with ``engine.guard(optimizer)``, which takes the prepared one). On many ranks, call
    it on each, with engines that share a coordinator.

    Args:
        metadata: JSON values for the manifest.
        options: of ``save_state``, such as ``safe_serialization``.

    Raises:
        ConfigError: automatic naming (the tag is the name), or sharded state (FSDP, DeepSpeed, Megatron).
        CheckpointError: as `AsyncCheckpointEngine.create`, `save` and `commit`.
    """
    if accelerator.project_configuration.automatic_checkpoint_naming:
        raise ConfigError(
            "automatic_checkpoint_naming names and deletes checkpoints itself; leave it off: the tag is the "
            "name, `retention` deletes"
        )
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in _SHARDED:
        raise ConfigError(
            f"{kind} state is sharded by its own writers; use async_ckpt.integrations.dcp or .deepspeed for it"
        )
    engine.create(CapturedDestination(engine.root, tag))
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
        CheckpointNotFoundError, CorruptCheckpointError. CheckpointError: the pending commit of this tag failed.
        RankFailedError: any of this on another rank.
    """
    catalog = Catalog(engine.root if isinstance(engine, AsyncCheckpointEngine) else engine)

    def settle() -> list[str]:
        """The tags of this rank once what is pending has ended."""
        if isinstance(engine, AsyncCheckpointEngine):
            for pending in engine.pending():
                if tag == pending.tag:
                    pending.result()
                elif tag is None and (loss := pending.loss()) is not None:
                    raise loss
            engine.wait_snapshot()
        name_pending(catalog.root)
        return catalog.tags() if tag is None else [tag]

    def verify(name: str) -> str:
        """Why `name` is not as it was committed, or ""."""
        try:
            if accelerator.is_local_main_process:
                catalog.verify(name).raise_if_bad()
        except CorruptCheckpointError as error:
            if tag is not None:
                raise
            return str(error)
        return ""

    first, *others = on_all_ranks(settle)
    for name in reversed(first):
        if not all(name in tags for tags in others):
            continue
        bad = [why for why in on_all_ranks(partial(verify, name)) if why]
        if not bad:
            accelerator.load_state(str(catalog.path(name)), **options)
            return str(name)
        report(logging.WARNING, "%s is not loaded: %s", name, bad[0])
    raise CheckpointNotFoundError(f"no checkpoint below {catalog.root!r} verifies on all ranks")
