"""How a file is written: through the page cache or past it, and with how many writes in flight.

Which way is faster depends on disk, hour and file size: past the cache (O_DIRECT) reaches a disk's rate without a copy;
through the cache small files return sooner, and some virtual disks like it better. Nothing tells but the disk, so the
chooser learns from the files it writes anyway, never from extra ones:

- Files under `SMALL_BYTES` go through the cache in one write: alignment and preallocation cost more than they bring.
- Every other file belongs to a class of similar sizes. A class starts with the first arm (direct, deep queue); after
  `NUM_FIRST` results it tries each other arm once, then stays with the best median of the last three results, where
  another must be better by `CLEARLY_BETTER`.
- Through the cache is tried only where losing is cheap: for files up to `TRIAL_BYTES`, or where it has won in the class
  of files one smaller; its advantage only shrinks with size.
- Disks change: an arm that lost is tried again after `NUM_BETWEEN` files, and when the time it cost last time is at
  most one percent of the time the class has spent writing since.

No clock, no disk, no randomness in here: the same results give the same choices.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

MiB = 1 << 20
SMALL_BYTES = 1 * MiB
TRIAL_BYTES = 256 * MiB
CLASS_LIMITS = (64 * MiB, 512 * MiB, 2048 * MiB)
"""Upper bounds of the size classes; the last class has none."""
NUM_FIRST = 4
NUM_BETWEEN = 32
CLEARLY_BETTER = 1.1
TRIAL_SHARE = 0.01
NUM_WRITERS = 4
"""The shallow queue, for disks that a deep one slows."""
MAX_WRITERS = 16


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to write a file: `direct` (past the page cache) with `depth` writes of this file in flight."""

    direct: bool
    depth: int


# Writes through the cache hold the inode's lock: a second one in flight would only spin on it.
BUFFERED = Arm(False, 1)


@dataclass(slots=True)
class _Record:
    """What one class has seen of one arm."""

    rates: deque[float] = field(default_factory=lambda: deque(maxlen=3))
    num_results: int = 0
    num_since: int = 0
    """Files that the class has written since this arm's last result."""
    lost_s: float = 0.0
    """What its last trial cost beyond the best arm."""
    spent_s: float = 0.0
    """What the class has spent on writing since that trial."""

    @property
    def rate(self) -> float:
        return median(self.rates)


class ModeChooser:
    """Chooses an arm per file and learns from files that had the disk to themselves. One thread at a time.

    Args:
        io_mode: "direct" and "buffered" leave nothing to choose but the depth.
        num_writers: "auto", or the depth of every direct file.
    """

    def __init__(self, io_mode: Literal["auto", "direct", "buffered"], num_writers: int | Literal["auto"]) -> None:
        self._io_mode = io_mode
        depths = (MAX_WRITERS, NUM_WRITERS) if num_writers == "auto" else (num_writers,)
        direct = [Arm(True, depth) for depth in depths]
        self._arms = {"auto": [*direct, BUFFERED], "direct": direct, "buffered": [BUFFERED]}[io_mode]
        self._classes: list[dict[Arm, _Record]] = [{} for _ in range(len(CLASS_LIMITS) + 1)]

        self.max_writers = MAX_WRITERS if num_writers == "auto" else num_writers
        """Writes in flight over all files."""

    def choose(self, size_bytes: int) -> Arm:
        """The arm for a file of `size_bytes` bytes."""
        if self._io_mode == "auto" and size_bytes < SMALL_BYTES:
            return BUFFERED
        index = _class_of(size_bytes)
        seen = self._classes[index]
        first = self._arms[0]
        if first not in seen or seen[first].num_results < NUM_FIRST:
            return first
        for arm in self._arms[1:]:
            if self._may_try(arm, index, size_bytes):
                return arm
        return self._best(seen)

    def observe(self, arm: Arm, size_bytes: int, seconds: float) -> None:
        """Learn that a file of `size_bytes`, alone on the disk and never waiting for data, was synced after `seconds`."""
        if size_bytes < SMALL_BYTES or seconds <= 0 or arm not in self._arms:
            return
        seen = self._classes[_class_of(size_bytes)]
        for record in seen.values():
            record.spent_s += seconds
            record.num_since += 1
        record = seen.setdefault(arm, _Record())
        record.rates.append(size_bytes / seconds)
        record.num_results += 1
        record.spent_s, record.num_since = 0.0, 0
        record.lost_s = max(0.0, seconds - size_bytes / seen[self._best(seen)].rate)

    def _may_try(self, arm: Arm, index: int, size_bytes: int) -> bool:
        seen = self._classes[index]
        if arm not in seen:
            return arm.direct or size_bytes <= TRIAL_BYTES if index == 0 else self._promises(arm, index, size_bytes)
        record = seen[arm]
        return arm != self._best(seen) and record.num_since >= NUM_BETWEEN and record.lost_s <= TRIAL_SHARE * record.spent_s

    def _promises(self, arm: Arm, index: int, size_bytes: int) -> bool:
        """Whether a first trial is worth its price: told by the class of smaller files where that has tried it."""
        smaller = self._classes[index - 1]
        if arm in smaller and len(smaller) > 1:
            return arm.direct or self._best(smaller) == arm
        return arm.direct or size_bytes <= TRIAL_BYTES

    def _best(self, seen: dict[Arm, _Record]) -> Arm:
        best = self._arms[0] if self._arms[0] in seen else next(iter(seen))
        for arm in self._arms:
            if arm in seen and seen[arm].rate > CLEARLY_BETTER * seen[best].rate:
                best = arm
        return best


def _class_of(size_bytes: int) -> int:
    return sum(size_bytes > limit for limit in CLASS_LIMITS)


# A file that waited longer than this share for data says nothing about the disk.
_STARVED_SHARE = 0.05


class DiskTime:
    """How long one file kept the disk busy, and whether that says something about the disk. Times are given in."""

    def __init__(self) -> None:
        self.had_company = False
        """Whether another file was written at the same time."""
        self.busy_s = 0.0
        """From the first write to synced; 0.0 when that was not the disk's doing alone."""
        self._first_s: float | None = None
        self._idle_since_s: float | None = None
        self._starved_s = 0.0
        self._num_writing = 0

    def begin_write(self, now_s: float) -> None:
        if self._first_s is None:
            self._first_s = now_s
        if self._idle_since_s is not None:
            self._starved_s += now_s - self._idle_since_s
            self._idle_since_s = None
        self._num_writing += 1

    def end_write(self, now_s: float) -> None:
        self._num_writing -= 1
        if self._num_writing == 0:
            self._idle_since_s = now_s

    def end(self, now_s: float) -> None:
        """Synced."""
        if self._first_s is not None and not self.had_company:
            taken_s = now_s - self._first_s
            self.busy_s = taken_s if self._starved_s <= _STARVED_SHARE * taken_s else 0.0
