"""Retention after each commit of an engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from ..errors import CheckpointError, ConfigError, report
from ..retention import Hold, RetentionPolicy, apply
from ..storage import transaction
from ..storage.filesystem import FileSystem


class Rotation:
    """A policy at work after each commit of one engine; what the disk will not delete is told once and tried again.

    Args:
        hold: what must not be deleted yet, whatever the policy says.
        tell: logs a warning.
        policy: None keeps all; what was replaced, or could not be deleted before, is deleted all the same.
    """

    def __init__(
        self,
        filesystem: FileSystem,
        root: str,
        policy: RetentionPolicy | None,
        hold: Hold = lambda info: None,
        tell: Callable[..., object] = report,
    ) -> None:
        self._hold = hold
        self._tell = tell
        self._filesystem = filesystem
        self._root = root
        self._policy = policy
        self._undeleted: set[str] = set()
        self.has_work = policy is not None
        """Whether there is, or may be, something to delete."""

    def apply(self) -> int:
        """Delete what could not be deleted before, then what the policy does not keep. Blocks on the disk.

        Returns how many could not be deleted: that is the end of no training.

        Raises:
            ConfigError: the policy cannot judge these checkpoints, or raised; it has deleted nothing.
        """
        failures: dict[str, object] = {}
        try:
            swept = transaction.sweep(self._filesystem, self._root, only_own=True)
            failures.update({left.tag: left.reason for left in swept if left.action == "left"})
            decisions = (
                apply(self._filesystem, self._root, self._policy, self._hold) if self._policy is not None else []
            )
            failures.update({decision.tag: decision.failure for decision in decisions if decision.failure is not None})
        except OSError as error:
            failures[os.path.basename(self._root)] = error
        except CheckpointError:
            raise
        except BaseException as error:
            # SystemExit would end the writer.
            raise ConfigError(
                f"the retention policy raised {error!r}: nothing is deleted in {self._root!r}; the new "
                "checkpoint is committed"
            ) from error
        new, self._undeleted = failures.keys() - self._undeleted, set(failures)
        if new:
            name = min(new)
            self._tell(
                logging.WARNING,
                "%d old checkpoint(s) in %r cannot be deleted now, such as %r (%s); tried again after each commit",
                len(failures),
                self._root,
                name,
                failures[name],
            )
        return len(failures)
