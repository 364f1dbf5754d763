"""`attach`: puts the checkpoint engine into a DeepSpeed engine, and makes save, load and exit right."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...engine.interface import StrPath
from ...errors import ConfigError
from ..frameworks import require, wrapped
from ..guarding import check_guardable, torch_optimizer
from . import waiting
from .engine import AsyncDeepSpeedEngine

_INTERFACE = "deepspeed.runtime.checkpoint_engine.checkpoint_engine"
_NEEDED = (
    *("create", "save", "makedirs", "load", "commit", "cleanup"),
    *("is_decoupled", "get_commit_info", "preserves_storage_sharing"),
)


def attach(
    ds_engine: Any,
    save_dir: StrPath | None = None,
    *,
    guard: bool = False,
    overlap: bool = True,
    rank_timeout_s: float = 600.0,
    **config: Any,
) -> AsyncDeepSpeedEngine:
    """Make `ds_engine` (from ``deepspeed.initialize``) save its checkpoints asynchronously.

    Call it once, on every rank, after ``initialize``. From then on
    - ``save_checkpoint`` returns when the state is copied; files, rename and `latest` follow in the background;
    - ``load_checkpoint`` of any attached engine in this process first waits for what is pending, and so do ``destroy``,
      ``zero_to_fp32``, ``ds_to_universal`` and the end of the process; ``torch.load`` of a path in a checkpoint that is
      pending waits for that one;
    - a failed checkpoint raises, on every rank alike, at the next ``step``, save, load or ``destroy``.
    Who looks in other ways (``open``, ``glob``, ``os.listdir``, safetensors, other processes, another rank's tag) must
    call ``drain()`` of the result first, or say ``overlap=False``: the files are not there before.
    Files and names are DeepSpeed's own: its tools, and stock DeepSpeed, read them.

    Args:
        save_dir: where checkpoints usually go; others work too. Given, staging memory is prepared now, not at a save.
        guard: copy the optimizer's tensors behind the next forward and backward instead of inside ``save_checkpoint``.
            For ZeRO 0 to 3 as DeepSpeed itself trains, where nothing but the optimizer's own ``step`` changes them. Not
            the default, because your code may: between a save and the next step, do not write to parameters (stage 0),
            and do not call ``safe_set_full_fp32_param`` and its like, which write past the counters that tell of a torn
            copy.
        overlap: False lets ``save_checkpoint`` return only when the checkpoint is durable, for code that reads it then.
        rank_timeout_s: how much later than the first rank the last one may have its part on disk, in seconds; after
            that the checkpoint fails on all ranks.
        config: `EngineConfig` fields, except `root`, `overwrite` ("replace" here), `coordinator` and `format`.

    Returns the checkpoint engine, which is ``ds_engine.checkpoint_engine`` now.

    Raises:
        ImportError: DeepSpeed is missing or too old; names the extra to install.
        ConfigError: `ds_engine` is no DeepSpeed engine, a field of `config` is wrong, or `guard` cannot protect it.
    """
    interface = _interface_of(ds_engine)
    guarded = [_guardable(ds_engine)] if guard else []
    former = ds_engine.checkpoint_engine
    if former is not None and former.is_decoupled():
        former.cleanup()
    config.setdefault("compact_views", _cuts_buffers_up(ds_engine))
    node_local = bool(ds_engine.use_node_local_storage())
    checkpointer = AsyncDeepSpeedEngine(
        save_dir=save_dir, overlap=overlap, node_local=node_local, rank_timeout_s=rank_timeout_s, **config
    )
    interface.register(AsyncDeepSpeedEngine)
    ds_engine.checkpoint_engine = checkpointer
    checkpointer.guard(*guarded)
    _choose_writers(ds_engine, checkpointer)
    for name, around in (("save_checkpoint", _sealing), ("load_checkpoint", _draining), ("destroy", _finishing)):
        setattr(ds_engine, name, wrapped(getattr(ds_engine, name), partial(around, ds_engine)))
    if hasattr(ds_engine, "_copy_recovery_script"):
        ds_engine._copy_recovery_script = wrapped(ds_engine._copy_recovery_script, partial(_copying_once, set()))
    waiting.install()
    return checkpointer


def _interface_of(ds_engine: Any) -> Any:
    """What DeepSpeed's checkpoint engines derive from, once it and `ds_engine` are what is needed."""
    module = require("deepspeed", _INTERFACE)
    interface = getattr(module, "CheckpointEngine", None)
    missing = [name for name in _NEEDED if not hasattr(interface, name)]
    if missing or not hasattr(module, "CheckpointCommitInfo"):
        raise ImportError(
            f"deepspeed {require('deepspeed', 'deepspeed').__version__} is too old for the DeepSpeed integration: its "
            f"checkpoint engines lack {', '.join(missing) or 'CheckpointCommitInfo'}; install a newer one with: "
            "pip install 'async-ckpt[deepspeed]'"
        )
    if not isinstance(ds_engine, require("deepspeed", "deepspeed").DeepSpeedEngine):
        kind = type(ds_engine).__name__
        raise ConfigError(f"attach takes the engine that deepspeed.initialize returned, not {kind}")
    return interface


def _cuts_buffers_up(ds_engine: Any) -> bool:
    """Whether single files hold small parts of DeepSpeed's flat buffers: layers, experts, frozen fragments.

    Elsewhere a file's tensors cover their buffer, and finding that out again at each save would cost more than it
    saves.
    """
    from deepspeed.pipe import PipelineModule

    module = ds_engine.module
    has_frozen = any(not parameter.requires_grad for parameter in module.parameters())
    return isinstance(module, PipelineModule) or bool(ds_engine.has_moe_layers) or has_frozen


def _choose_writers(ds_engine: Any, checkpointer: AsyncDeepSpeedEngine) -> None:
    """Derive again which ranks write model states: the engine before may have answered differently."""
    from deepspeed.utils import groups

    rank = ds_engine.local_rank if ds_engine.use_node_local_storage() else groups._get_sequence_data_parallel_rank()
    ds_engine.save_non_zero_checkpoint = checkpointer.is_data_parallel_writer(rank) or (
        ds_engine.zero_optimization_partition_weights() and ds_engine.is_first_weights_partition_group()
    )


def _sealing(ds_engine: Any, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Only a save that has returned is complete."""
    checkpointer = ds_engine.checkpoint_engine
    try:
        result = save(*args, **kwargs)
    except BaseException as error:
        checkpointer.abandon(error)
        raise
    checkpointer.seal()
    return result


def _draining(ds_engine: Any, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """DeepSpeed looks at the files before it asks the engine to load them; another engine may have saved them."""
    ds_engine.checkpoint_engine.drain()
    waiting.wait(on_every_rank=True)
    return load(*args, **kwargs)


def _finishing(ds_engine: Any, destroy: Callable[[], object]) -> None:
    """A lost checkpoint is raised, after DeepSpeed has let go of everything."""
    try:
        ds_engine.checkpoint_engine.drain()
    finally:
        destroy()


def _copying_once(known: set[str], copy: Callable[[StrPath], object], save_path: StrPath) -> None:
    """DeepSpeed copies its recovery scripts at every save: truncating the old ones waits for a busy disk."""
    folder = os.path.abspath(os.fspath(save_path))
    if folder not in known or not os.path.exists(os.path.join(folder, "zero_to_fp32.py")):
        copy(save_path)
        known.add(folder)


# Read for each: gradients alone are touched before the inner step; half precision copies and gathered weights follow
# it.
_GUARDABLE = (
    *("BF16_Optimizer", "FP16_Optimizer", "FP16_UnfusedOptimizer"),
    *("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"),
)


def _guardable(ds_engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer at the bottom of DeepSpeed's wrappers. Raises ConfigError: there is none, a wrapper is not
    known here (SuperOffload steps in another process), or its tensors also change outside of its own step."""
    outer = ds_engine.optimizer
    is_known = isinstance(outer, torch.optim.Optimizer) or type(outer).__name__ in _GUARDABLE
    inner = torch_optimizer(outer) if is_known else None
    if inner is None:
        raise ConfigError(
            f"guard=True needs an engine with a torch optimizer, not {type(outer).__name__}; leave it out"
        )
    check_guardable(inner, ds_engine.module)
    reason = None
    if ds_engine.zero_nvme_offload_optimizer():
        reason = "its states are swapped through buffers that change before the step"
    elif getattr(outer, "zenflow", False) or getattr(ds_engine, "zenflow", False):
        reason = "ZenFlow steps in another process"
    elif "muon" in type(inner).__name__.lower() or getattr(outer, "use_muon", False):
        reason = "Muon's momentum changes before the step"
    if reason is not None:
        raise ConfigError(f"guard=True cannot protect this {type(inner).__name__}: {reason}; leave it out")
    return inner
