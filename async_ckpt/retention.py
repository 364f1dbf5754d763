"""Which checkpoints to keep: policies over plain data, decisions with reasons, and their execution.

Guarantees:
- `decide` is pure: the same list, policy and time give the same answer, and nothing is touched.
- The newest checkpoint is always kept, whatever the policy says; so nothing is deleted before a newer one is durable.
- A policy that cannot judge (a metric that no checkpoint has) is an error; a single checkpoint it cannot judge is kept.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import CheckpointNotFoundError, ConfigError, MirrorError, WriteError, check_int, check_positive, is_number
from .format.manifest import CLOCK_KEY, Manifest
from .reading.catalog import Catalog
from .storage import transaction
from .storage.filesystem import FileSystem


@dataclass(frozen=True)
class CheckpointInfo:
    """What policies look at."""

    tag: str
    created_unix_ns: int
    """The order among checkpoints: later than all before, also when a clock ran ahead and was set back."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    clock_unix_ns: int | None = None
    """What the writer's clock said; None is `created_unix_ns`."""

    @classmethod
    def of(cls, manifest: Manifest) -> CheckpointInfo:
        """The part of a manifest that policies look at."""
        clock = manifest.writer.get(CLOCK_KEY, "")
        clock_unix_ns = int(clock) if re.fullmatch("[0-9]{1,19}", clock) else None
        return cls(manifest.tag, manifest.created_unix_ns, manifest.metadata, clock_unix_ns)

    @property
    def step(self) -> int | None:
        """metadata["step"], else the number at the end of the tag, else None."""
        step = self.metadata.get("step")
        if isinstance(step, int) and not isinstance(step, bool):
            return step
        match = re.search(r"(\d{1,18})$", self.tag)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Decision:
    """Whether to keep one checkpoint, and why; `reasons` are those for keeping, or the one for deleting."""

    tag: str
    keep: bool
    reasons: tuple[str, ...]
    failure: WriteError | MirrorError | None = None
    """Why the disk would not delete it; it is to be tried again."""


class RetentionPolicy:
    """Says which checkpoints to keep; `a | b` keeps what either keeps."""

    @property
    def num_kept(self) -> int:
        """How many it keeps at least, once there are so many."""
        return 1

    def kept(self, checkpoints: Sequence[CheckpointInfo], now_unix_ns: int) -> dict[str, str]:
        """Tags to keep, each with the reason. `checkpoints` are ordered from the oldest commit to the newest. Raises
        ConfigError: the policy cannot judge them."""
        raise NotImplementedError

    def __or__(self, other: RetentionPolicy) -> AnyOf:
        return AnyOf(self, other) if isinstance(other, RetentionPolicy) else NotImplemented


class AnyOf(RetentionPolicy):
    """Keeps what any of its policies keeps."""

    def __init__(self, *policies: RetentionPolicy) -> None:
        self.policies = policies
        for policy in policies:
            if not isinstance(policy, RetentionPolicy):
                raise ConfigError(f"AnyOf takes retention policies, not {policy!r}")

    def kept(self, checkpoints: Sequence[CheckpointInfo], now_unix_ns: int) -> dict[str, str]:
        reasons: dict[str, str] = {}
        for policy in self.policies:
            for tag, reason in policy.kept(checkpoints, now_unix_ns).items():
                reasons[tag] = f"{reasons[tag]}; {reason}" if tag in reasons else reason
        return reasons

    @property
    def num_kept(self) -> int:
        return max((policy.num_kept for policy in self.policies), default=1)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))


@dataclass(frozen=True)
class KeepLast(RetentionPolicy):
    """Keeps the `num` newest."""

    num: int

    def __post_init__(self) -> None:
        check_int("KeepLast: num", self.num)

    @property
    def num_kept(self) -> int:
        return self.num

    def kept(self, checkpoints: Sequence[CheckpointInfo], now_unix_ns: int) -> dict[str, str]:
        return {info.tag: f"among the last {self.num}" for info in checkpoints[-self.num :]}


@dataclass(frozen=True)
class KeepEvery(RetentionPolicy):
    """Keeps those whose step (metadata "step", or the number that ends the tag) is a multiple of `num_steps`."""

    num_steps: int

    def __post_init__(self) -> None:
        check_int("KeepEvery: num_steps", self.num_steps)

    def kept(self, checkpoints: Sequence[CheckpointInfo], now_unix_ns: int) -> dict[str, str]:
        kept: dict[str, str] = {}
        for info in checkpoints:
            if info.step is None:
                kept[info.tag] = "its step is not known"
            elif info.step % self.num_steps == 0:
                kept[info.tag] = f"step {info.step} is a multiple of {self.num_steps}"
        return kept


@dataclass(frozen=True)
class KeepBest(RetentionPolicy):
    """Keeps the `num` best by a number in their metadata; checkpoints without it, or where it is null, are not among
    the best."""

    metric: str
    num: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        check_int("KeepBest: num", self.num)
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError(f"KeepBest: metric must name a metadata field, not {self.metric!r}")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"KeepBest: mode must be 'min' or 'max', not {self.mode!r}")

    def kept(self, checkpoints: Sequence[CheckpointInfo], now_unix_ns: int) -> dict[str, str]:
        values: list[tuple[float, int, str]] = []
        for age, info in enumerate(reversed(checkpoints)):
            value = info.metadata.get(self.metric)
            # A commit writes null for NaN and infinity, other writers may not.
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                continue
            if not is_number(value):
                raise ConfigError(
                    f"KeepBest: metadata {self.metric!r} of checkpoint {info.tag!r} is {value!r}, not a number"
                )
            values.append((value if self.mode == "min" else -value, age, info.tag))
        if checkpoints and not any(self.metric in info.metadata for info in checkpoints):
            known = sorted({name for info in checkpoints for name in info.metadata})
            raise ConfigError(
                f"KeepBest: no checkpoint has metadata {self.metric!r}; they have {', '.join(known) or 'none'}. "
                f'Give it to commit: engine.commit(tag, metadata={{"{self.metric}": ...}})'
            )
        best = sorted(values)[: self.num]
        return {tag: f"among the best {self.num} by {self.metric} ({self.mode})" for _, _, tag in best}


@dataclass(frozen=True)
class KeepNewerThan(RetentionPolicy):
    """Keeps those committed less than `age_s` seconds ago.

    A checkpoint dated in the future was made before the one after it, whose date is taken instead.
    """

    age_s: float

    def __post_init__(self) -> None:
        check_positive("KeepNewerThan: age_s", self.age_s)

    def kept(self, checkpoints: Sequence[CheckpointInfo], now_unix_ns: int) -> dict[str, str]:
        kept: dict[str, str] = {}
        made_unix_ns = now_unix_ns
        for info in reversed(checkpoints):
            clock_unix_ns = info.created_unix_ns if info.clock_unix_ns is None else info.clock_unix_ns
            made_unix_ns = clock_unix_ns if clock_unix_ns <= now_unix_ns else made_unix_ns
            if (now_unix_ns - made_unix_ns) / 1e9 < self.age_s:
                kept[info.tag] = f"newer than {self.age_s:g} s"
        return kept


Hold = Callable[[CheckpointInfo], "str | None"]
"""Says why a checkpoint must not be deleted yet, whatever the policy says; None where it may be."""


def decide(
    checkpoints: Sequence[CheckpointInfo],
    policy: RetentionPolicy,
    *,
    now_unix_ns: int | None = None,
    hold: Hold = lambda info: None,
) -> list[Decision]:
    """What to do with each checkpoint, oldest commit first. Pure, apart from the clock when no time is given. Raises
    ConfigError: the policy cannot judge these checkpoints (unknown metric, or not a number)."""
    ordered = sorted(checkpoints, key=lambda info: (info.created_unix_ns, info.tag))
    reasons = policy.kept(ordered, time.time_ns() if now_unix_ns is None else now_unix_ns)
    decisions: list[Decision] = []
    for info in ordered:
        why = [reasons[info.tag]] if info.tag in reasons else []
        if info is ordered[-1]:
            why.append("the newest is always kept")
        if not why and (held := hold(info)) is not None:
            why.append(held)
        decisions.append(Decision(info.tag, bool(why), tuple(why) or (f"not kept by {policy!r}",)))
    return decisions


def apply(filesystem: FileSystem, root: str, policy: RetentionPolicy, hold: Hold = lambda info: None) -> list[Decision]:
    """`carry_out` on a disk. Whoever published the newest one, its name is made durable before the first deletion.
    Raises ConfigError: the policy cannot judge these checkpoints. OSError: the root cannot be read or synced. Nothing
    was deleted then."""
    catalog = Catalog(root, filesystem)

    def remove(manifest: Manifest) -> None:
        transaction.remove(filesystem, catalog.root, manifest.tag, expected=manifest)

    # Another process may have renamed the newest one just now and not have synced the root yet.
    return carry_out(catalog, policy, remove, hold=hold, before=lambda: filesystem.fsync_dir(catalog.root))


def carry_out(
    catalog: Catalog,
    policy: RetentionPolicy,
    remove: Callable[[Manifest], object],
    *,
    hold: Hold = lambda info: None,
    before: Callable[[], object] = lambda: None,
) -> list[Decision]:
    """Delete what the policy does not keep, on a disk or in a store, oldest first; returns what was done. Blocks.

    Checkpoints with a damaged manifest are left alone. The newest checkpoint must hold all its files at their committed
    sizes, else nothing is deleted: an older one may be the newest good one. One that cannot be deleted does not keep
    the others from being deleted; its decision says so.

    Args:
        remove: deletes exactly this checkpoint. CheckpointNotFoundError: it is another one, or gone. OSError: it cannot
            be.
        before: called once, before the first deletion.
    """
    manifests = {manifest.tag: manifest for manifest in catalog.committed()}
    decisions = decide([CheckpointInfo.of(manifest) for manifest in manifests.values()], policy, hold=hold)
    doomed = [decision for decision in decisions if not decision.keep]
    if doomed and not _is_good(catalog, decisions[-1].tag):
        reason = f"the newest checkpoint {decisions[-1].tag!r} is damaged; nothing is deleted before it is replaced"
        return [decision if decision.keep else Decision(decision.tag, True, (reason,)) for decision in decisions]
    if doomed:
        before()
    carried_out = {decision.tag: decision for decision in decisions}
    for decision in doomed:
        try:
            remove(manifests[decision.tag])
        except CheckpointNotFoundError:
            # Another process deleted it first: that is what was wanted. Or replaced it: then nothing was decided about
            # it.
            if decision.tag in catalog.tags():
                carried_out[decision.tag] = Decision(decision.tag, True, ("another process replaced it meanwhile",))
        except (WriteError, MirrorError) as error:
            carried_out[decision.tag] = Decision(decision.tag, True, (f"it cannot be deleted: {error}",), error)
    return list(carried_out.values())


def _is_good(catalog: Catalog, tag: str) -> bool:
    with contextlib.suppress(CheckpointNotFoundError):
        return catalog.verify(tag, level="size").ok
    return False
