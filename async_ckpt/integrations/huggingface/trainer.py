"""The `Trainer` mixin: stock saving code, with the engine under it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..frameworks import require
from .capture import CapturedDestination, capture
from .resume import JIT_MARKER, STATE_NAME, adopt_ahead, resume_point
from .saver import BEST, Saver

_Base: Any = object


class AsyncCheckpointTrainerMixin(_Base):  # type: ignore[misc]
    """Put it before `Trainer` (or a subclass) in a class's bases, or use `attach`. Everything else stays as it is.

    Guarantees:
    - A save has copied the state when training goes on (with ``guard=True``: protected it until the next optimizer
      step).
    - ``checkpoint-<step>`` appears in one rename, complete and durable; a killed save leaves nothing under such a name.
    - ``resume_from_checkpoint=True`` takes the newest checkpoint whose every byte verifies; a path that is given is
      verified too.
    - ``save_total_limit`` deletes only after the newer checkpoint is durable, never the best one;
      ``load_best_model_at_end`` waits.
    - A failed commit raises at the next step, and at the end of `train` at the latest.

    ``on_save`` comes when the snapshot is taken, as the checkpoint is still on its way; files that it writes into the
    folder of that name stay there. Callbacks that want the files
    (to upload them, say) define ``on_checkpoint_committed(args, state, control, checkpoint, **kwargs)``: it is called
    on the training thread, at the end of a step, with the path of each committed checkpoint. ``push_to_hub`` works that
    way too.

    Args:
        async_ckpt: `EngineConfig` fields, such as ``{"staging_bytes": 4 << 30}``; not root, format and overwrite.
        guard: copy parameters and optimizer state behind the next forward and backward instead of inside the save. Not
            the default: only for training in which nothing but the optimizer's own step changes them. `train` refuses
            optimizers and layers that are known to change weights otherwise; others fail a checkpoint with
            `TornSnapshotError`.
    """

    _scratch: str | None = None
    """Where stock code believes its directory to be while it saves."""
    _saver: Saver

    def __init__(
        self, *args: Any, async_ckpt: Mapping[str, Any] | None = None, guard: bool = False, **kwargs: Any
    ) -> None:
        require("huggingface", "transformers")
        super().__init__(*args, **kwargs)
        self._set_up_async(Saver(async_ckpt or {}, guard))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; returns when every checkpoint is committed.

        Raises:
            CheckpointError: a checkpoint could not be committed. CorruptCheckpointError: there is nothing whole to
                resume from.
        """
        resume = resume_from_checkpoint
        if resume is not None and resume is not False:
            resume = resume_point(resume, self.args)
        try:
            output = super().train(resume, *args, **kwargs)
        except BaseException as error:
            self._saver.close(behind=error)
            raise
        self._saver.close()
        return output

    # What `Trainer` calls.

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        self._saver.poll()
        run_dir = os.path.abspath(super()._get_output_dir(trial))
        tag = f"checkpoint-{self.state.global_step}"
        engine = self._saver.open(run_dir, self)
        _remove_jit_marker(os.path.join(run_dir, tag))
        self._push_wanted = False
        engine.create(CapturedDestination(engine.root, tag))
        try:
            with capture(engine, tag) as scratch:
                self._scratch = scratch
                super()._save_checkpoint(model, trial, *args, **kwargs)
                self._name_best(scratch, run_dir, tag)
            pending = engine.commit(tag, metadata=self._metadata(run_dir))
        except BaseException:
            engine.abort(tag)
            raise
        finally:
            self._scratch = None
        push = self._push_wanted
        self._saver.follow(os.path.join(run_dir, tag), pending, lambda path: self._committed(path, push))

    def _get_output_dir(self, trial: Any) -> str:
        if self._scratch is not None:
            return self._scratch
        # At the end of training, `Trainer` looks there for what was saved.
        self._saver.drain()
        return str(super()._get_output_dir(trial))

    def _load_best_model(self) -> None:
        self._saver.drain()
        super()._load_best_model()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._scratch is not None:
            self._push_wanted = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    # Inside.

    def _set_up_async(self, saver: Saver) -> None:
        # A relative directory means the same to all of `Trainer`, also after an `os.chdir`.
        self.args.output_dir = os.path.abspath(self.args.output_dir)
        self._saver = saver
        self._push_wanted = False
        self.add_callback(_watcher(self))

    def _name_best(self, scratch: str, run_dir: str, tag: str) -> None:
        """Stock code has seen the scratch directory: give the best checkpoint its final path, in the saved state
        too.
        """
        best = self.state.best_model_checkpoint
        if best is not None and os.path.dirname(os.path.abspath(best)) == scratch:
            self.state.best_model_checkpoint = os.path.join(run_dir, os.path.basename(best))
            saved = os.path.join(scratch, tag, STATE_NAME)
            if os.path.exists(saved):
                self.state.save_to_json(saved)

    def _metadata(self, run_dir: str) -> dict[str, Any]:
        found: dict[str, Any] = {"framework": "transformers", "step": self.state.global_step, "epoch": self.state.epoch}
        best = self.state.best_model_checkpoint
        if best is not None and os.path.dirname(os.path.abspath(best)) == run_dir:
            found[BEST] = os.path.basename(best)
        return found

    def _committed(self, path: str, push: bool) -> None:
        if push:
            self._push_from_checkpoint(path)
        for callback in self.callback_handler.callbacks:
            hook = getattr(callback, "on_checkpoint_committed", None)
            if hook is not None:
                hook(self.args, self.state, self.control, checkpoint=path)


def attach(trainer: Any, *, guard: bool = False, **config: Any) -> Any:
    """Make an existing `Trainer` (or SFTTrainer, Seq2SeqTrainer, ...) save asynchronously; returns it.

    Its class becomes one that derives from `AsyncCheckpointTrainerMixin` and from its own class. Call it before
    ``train``.

    Args:
        guard: as in `AsyncCheckpointTrainerMixin`.
        config: `EngineConfig` fields, such as ``staging_bytes``.

    Raises:
        ImportError: transformers is missing; names the extra. ConfigError: no `Trainer`, attached already, or a wrong
            field.
    """
    stock = require("huggingface", "transformers").Trainer
    if not isinstance(trainer, stock) or isinstance(trainer, AsyncCheckpointTrainerMixin):
        raise ConfigError(f"attach takes a transformers.Trainer that is not attached yet, not {type(trainer).__name__}")
    saver = Saver(config, guard)
    kind = type(trainer)
    trainer.__class__ = type(
        f"Async{kind.__name__}", (AsyncCheckpointTrainerMixin, kind), {"__module__": kind.__module__}
    )
    trainer._set_up_async(saver)
    return trainer


def _watcher(trainer: AsyncCheckpointTrainerMixin) -> Any:
    """A callback that prepares the engine before the first step and reports commits after each."""

    class AsyncCheckpointWatcher(require("huggingface", "transformers").TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            is_saving = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
            if is_saving and not state.is_hyper_param_search:
                trainer._saver.open(args.output_dir, trainer)
                adopt_ahead(args.output_dir, state.global_step, state.max_steps, adopts=args.should_save)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer._saver.poll()

    return AsyncCheckpointWatcher()


def _remove_jit_marker(path: str) -> None:
    """Trainer's just-in-time saving marks a directory as incomplete before it saves there; ours is never incomplete."""
    if os.path.isdir(path) and os.listdir(path) == [JIT_MARKER]:
        os.unlink(os.path.join(path, JIT_MARKER))
        os.rmdir(path)
