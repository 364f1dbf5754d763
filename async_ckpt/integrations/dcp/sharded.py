"""Sharded state (FSDP2, DTensor) through an engine: DCP plans and reshards, the engine snapshots, writes and commits in
the background.

Guarantees:
- `save_sharded` returns when the state is planned and copied; its collectives run on the calling thread only, and only
  where a structure is planned for the first time.
- The pending commit succeeds on all ranks or fails on all; see `RankCoordinator`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from ...engine.engine import AsyncCheckpointEngine
from ...engine.pending import PendingCommit
from ...errors import CheckpointError, ConfigError, RankFailedError, StateMismatchError, UnsupportedStateError
from ...format.metadata import check_metadata
from ...format.names import DCP_METADATA_NAME
from ...ranks.rank_coordinator import RankCoordinator
from .blobs import join_blobs, raw_plan
from .cached_plans import KnownPlan, KnownPlans, PlannedDestination
from .reader import DcpReader

_plans: weakref.WeakKeyDictionary[AsyncCheckpointEngine, KnownPlans] = weakref.WeakKeyDictionary()


class TrainingState(Stateful):
    """A model and its optimizers as one entry of a state dict, sharded or not; told apart by their full names."""

    def __init__(
        self, model: torch.nn.Module, optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = ()
    ) -> None:
        self._model = model
        self._optimizers = (optimizers,) if isinstance(optimizers, torch.optim.Optimizer) else tuple(optimizers)
        if not isinstance(model, torch.nn.Module) or not all(
            isinstance(known, torch.optim.Optimizer) for known in self._optimizers
        ):
            kinds = ", ".join(type(known).__name__ for known in (model, *self._optimizers))
            raise UnsupportedStateError(f"TrainingState takes a module and its optimizers, not ({kinds})")

    def state_dict(self) -> dict[str, Any]:
        """Model and optimizer state. A collective where the model is sharded.

        Raises:
            UnsupportedStateError: an optimizer holds parameters that are not the model's (made before the model was
                sharded?).
        """
        known = set(map(id, self._model.parameters()))
        for optimizer in self._optimizers:
            if any(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"]):
                kind = type(optimizer).__name__
                raise UnsupportedStateError(
                    f"{kind} holds parameters that are not the model's; make it after the model was sharded"
                )
        model, optimizers = get_state_dict(self._model, self._optimizers)
        return {"model": model, "optim": optimizers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a loaded state into model and optimizers."""
        set_state_dict(
            self._model, self._optimizers, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optim"]
        )


def save_sharded(
    engine: AsyncCheckpointEngine,
    tag: str,
    state_dict: dict[str, Any],
    *,
    metadata: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    planner: SavePlanner | None = None,
    plan: Literal["cached", "collective"] = "cached",
) -> PendingCommit:
    """Save `state_dict` (tensors, DTensors, plain objects, `Stateful` ones) as checkpoint `tag`, in DCP's own form. All
    ranks call it.

    Blocks for the copy, and for planning: the first save of a structure (told apart by the keys of `state_dict`) is
    planned through DCP, by two small gathers on `process_group`. Later ones use that plan again and run no collective:
    each rank compares its own part, and its vote in the commit says whether that is as it was. If it is not (another
    sharding, a new parameter, an object that has outgrown twice its size), that commit fails on all ranks and says why,
    and the next save is planned anew, as after any failure. So a save first waits for the last commit of its structure.
    The engine needs a `RankCoordinator` where there is more than one rank. Objects that `load_sharded` takes only with
    ``weights_only=False`` are named in a logged warning.

    Args:
        plan: "collective" plans every save through DCP, for states that change their structure; so does a `planner` of
            your own, and a coordinator with node-local roots.

    Raises:
        RankFailedError: another rank's failure. CheckpointError: this rank's own (`TagExistsError`, ...).
    """
    _check_arguments(engine, state_dict)
    check_metadata(metadata)
    if plan not in ("cached", "collective"):
        raise ConfigError(f"plan must be 'cached' or 'collective', not {plan!r}")
    world_size = dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1
    coordinator = engine.config.coordinator
    num_ranks = 1 if coordinator is None else coordinator.world_size
    if world_size != num_ranks:
        raise ConfigError(
            f"the engine commits for {num_ranks} rank(s), the process group has {world_size}: "
            "give the engine coordinator=RankCoordinator.from_env()"
        )
    is_alike = num_ranks == 1 or (isinstance(coordinator, RankCoordinator) and coordinator.info.num_nodes == 1)
    caches = plan == "cached" and planner is None and is_alike
    plans, key = _plans.setdefault(engine, KnownPlans()), (process_group, *map(str, state_dict))
    known = plans.take(key, coordinator, engine.config.backpressure_timeout_s) if caches else None
    if known is None or not _save_by(known, engine, tag, state_dict):
        # What is used again names no place.
        meta = None if caches else StorageMeta(checkpoint_id=os.path.join(engine.root, tag))
        known = KnownPlan(caches=caches, meta=meta)
        _save_with_all(known, engine, tag, state_dict, process_group, planner)
    pending = engine.commit(tag, metadata)
    if caches:
        plans.keep(key, known, pending)
    return pending


def _save_with_all(
    known: KnownPlan,
    engine: AsyncCheckpointEngine,
    tag: str,
    state_dict: dict[str, Any],
    process_group: dist.ProcessGroup | None,
    planner: SavePlanner | None,
) -> None:
    """Plan with all ranks, and save this rank's part by it; what fails on one of them is raised on all."""
    is_open = False

    def begin() -> None:
        nonlocal is_open
        engine.create(tag)
        is_open = True

    try:
        with known.saving(begin, lambda: _save(known, engine, tag)):
            state_dict_saver.save(state_dict, storage_writer=known, process_group=process_group, planner=planner)
    except BaseException as error:
        if is_open:
            engine.abort(tag)
        if not isinstance(error, (CheckpointException, ValueError)):
            raise
        # Outside of its own exceptions the planner raises a ValueError, and collectives a RuntimeError.
        failure = _own_or_first(error, process_group) if isinstance(error, CheckpointException) else error
        raise _unplannable(failure) from error


def _save_by(known: KnownPlan, engine: AsyncCheckpointEngine, tag: str, state_dict: dict[str, Any]) -> bool:
    """Save this rank's part by a known plan, or have it vote against that; False where it is alone, and may plan
    anew.
    """
    destination = PlannedDestination(engine.root, tag, known.name)
    engine.create(destination)
    try:
        why = known.again(state_dict)
        if why and getattr(engine.config.coordinator, "world_size", 1) == 1:
            engine.abort(tag)
            return False
        if why:
            destination.against.append(why)
        else:
            _save(known, engine, tag)
    except BaseException as error:
        engine.abort(tag)
        if isinstance(error, CheckpointError):
            raise
        raise _unplannable(error) from error
    return True


def _save(known: KnownPlan, engine: AsyncCheckpointEngine, tag: str) -> None:
    """Save in an open checkpoint what was planned."""
    state, known.state = known.state, None
    if state is not None:
        engine.save(state, f"{engine.root}/{tag}/{known.path}")
    if known.metadata:
        raw, _ = join_blobs([(raw_plan(known.metadata), None)])
        engine.save(raw, f"{engine.root}/{tag}/{DCP_METADATA_NAME}")


def load_sharded(
    engine: AsyncCheckpointEngine,
    tag: str,
    state_dict: dict[str, Any],
    *,
    process_group: dist.ProcessGroup | None = None,
    planner: LoadPlanner | None = None,
    verify: str = "full",
    weights_only: bool = True,
) -> None:
    """Load checkpoint `tag` into `state_dict`, in place, whatever number of ranks has saved it. All ranks call it;
    blocks.

    A pending commit of that tag is waited for first. What the disk lacks is read from the engine's mirrors.

    Args:
        weights_only: False loads objects of any class, and runs their code: only for checkpoints whose writer you
            trust.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError: this rank's. RankFailedError: another rank's.
        UnsupportedStateError: the checkpoint holds objects of classes that `weights_only` refuses; names them all.
        StateMismatchError: `state_dict` wants what the checkpoint does not hold, or in another size. Give
            ``planner=DefaultLoadPlanner(allow_partial_load=True)`` to load what is there.
    """
    _check_arguments(engine, state_dict)
    catalog = engine.catalog_of(tag)
    reader = DcpReader(os.path.join(catalog.root, tag), verify=verify, weights_only=weights_only, catalog=catalog)
    try:
        state_dict_loader.load(state_dict, storage_reader=reader, process_group=process_group, planner=planner)
    except CheckpointException as error:
        raise (reader.failure or _mismatch(_own_or_first(error, process_group), tag)) from error


def _check_arguments(engine: Any, state_dict: Any) -> None:
    if not isinstance(engine, AsyncCheckpointEngine):
        raise ConfigError(f"the first argument must be an AsyncCheckpointEngine, not {type(engine).__name__}")
    if not isinstance(state_dict, dict):
        hint = (
            ': wrap it, {"train": TrainingState(model, optimizer)}' if isinstance(state_dict, torch.nn.Module) else ""
        )
        raise UnsupportedStateError(
            f"the state must be a dict, not {type(state_dict).__name__}{hint}; nothing was read or written"
        )


def _unplannable(error: BaseException) -> BaseException:
    """DCP's planner fails in torch's own words where it has no way to save a tensor (nested ones, say), or where two
    key paths have one dotted name.
    """
    kinds = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)
    if isinstance(error, kinds) and not isinstance(error, CheckpointError):
        told = f"DCP cannot save this state: {type(error).__name__}: {error}; nothing is visible of this checkpoint"
        return UnsupportedStateError(told)
    return error


def _mismatch(error: BaseException, tag: str) -> BaseException:
    """DCP's planner says by a bare RuntimeError or ValueError that state and checkpoint do not fit."""
    message = str(error)
    if not isinstance(error, CheckpointError) and message.startswith(("Missing key", "Size mismatch")):
        hint = ""
        if message.startswith("Missing key"):
            hint = (
                "; a parameter without a gradient has no optimizer state. "
                "DefaultLoadPlanner(allow_partial_load=True) loads what is there"
            )
        return StateMismatchError(f"checkpoint {tag!r} does not fit the given state: {message}{hint}", (message,))
    return error


def _own_or_first(error: CheckpointException, process_group: dist.ProcessGroup | None) -> BaseException:
    """This rank's failure, where it has one; else who failed first and why."""
    causes = {failed: wrapped[0] for failed, wrapped in error.failures.items()}
    # Not what DCP tells the storage writer: torch 2.7 tells it no rank.
    own = causes.get(dist.get_rank(process_group) if dist.is_available() and dist.is_initialized() else 0)
    if own is not None:
        return own
    first = min(causes)
    return RankFailedError(
        f"rank {first} failed: {type(causes[first]).__name__}: {causes[first]}; this rank's part was dropped",
        rank=first,
    )
