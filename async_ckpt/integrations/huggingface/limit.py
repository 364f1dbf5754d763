"""``save_total_limit`` as a retention policy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ConfigError
from ...retention import CheckpointInfo, RetentionPolicy

BEST = "best_model_checkpoint"
"""Metadata: the tag of the best checkpoint, as of this one."""

_NAME = re.compile("checkpoint-[0-9]+")


@dataclass(frozen=True)
class SaveTotalLimit(RetentionPolicy):
    """Keeps the newest `num` ``checkpoint-<step>`` and, as one of them, the best one that the newest knows of.

    As in `Trainer`: the newest and the best stay even where that makes one more than `num`. Other names are left alone.
    """

    num: int

    def __post_init__(self) -> None:
        if isinstance(self.num, bool) or not isinstance(self.num, int) or self.num < 1:
            raise ConfigError(f"SaveTotalLimit: num must be a positive integer, not {self.num!r}")

    def kept(self, checkpoints: Sequence[CheckpointInfo], now_unix_ns: int) -> dict[str, str]:
        """See the class."""
        reasons = {info.tag: "not a checkpoint of Trainer" for info in checkpoints if not _NAME.fullmatch(info.tag)}
        ours = [info for info in checkpoints if _NAME.fullmatch(info.tag)]
        if not ours:
            return reasons
        protected = {ours[-1].tag: "the newest"}
        best = ours[-1].metadata.get(BEST)
        if any(info.tag == best for info in ours):
            protected.setdefault(str(best), "the best")
        others = [info.tag for info in ours if info.tag not in protected]
        room = max(0, self.num - len(protected))
        reasons.update(dict.fromkeys(others[len(others) - room :], f"among the last {self.num}"))
        return {**reasons, **protected}
