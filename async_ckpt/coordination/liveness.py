"""Signs of life: how a rank that was killed, stopped or closed is noticed in seconds, not at the end of a timeout.

Keys, below the run's prefix: "life/r" is rank r's last sign, "<state> <generation> <count> <owner>"; "engines/r" counts its engines,
from which it has its generation; "lives" counts the ranks that have given a sign. States: "up" (rewritten every `beat_s`), "left" (its
engine was closed), "gone" (a rank of the same host saw its process end).

- Every rank beats, always. While it has a checkpoint in flight, it also looks, every `tick_s`: rank 0 at all ranks (in one request), the
  others at rank 0 and at their neighbour on the ring of ranks. A neighbour on the same host is looked up in the process table, so that a
  kill is noticed within about two ticks; a rank on another host is given up when its sign has not changed for `silence_s`.
- Rank 0 gives an attempt up for a lost rank that has not reported its part; the others give it up for a lost rank 0.

Guarantees:
- Constant cost per rank and second (rank 0 has one request that names all ranks); intervals grow with the job, so that the store sees
  at most about 2,000 of these requests per second, in a job of any size.
- A rank that is only slow or busy is not given up: its sign is renewed by a thread of its own. Time in which this process was itself
  stopped does not count against others.
- Nobody is judged by what an earlier engine over the same store has left there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .rank_protocol import fail
from .rank_requests import Add, Get, GetMany, Put, Seat, Sleep, Step, Verdict

_TICK_S = 1.0
_TICKS_PER_S = 2000
_BEATS_PER_S = 1000
_BEATS_PER_SILENCE = 4

# A process that the system shows no more, or as ended.
GONE = "its process has ended: it was killed, or has crashed"
LEFT = "it has left: its engine was closed"


@dataclass
class Signs:
    """What this rank knows of the others' lives. Used by the steps below, on the link's thread."""

    seat: Seat
    owner: str
    is_gone: Callable[[str], bool]
    """Whether the process of such an owner has certainly ended, as seen from here."""
    silence_s: float
    generation: int = 0
    """Counts this rank's engines over one store and channel; all ranks make them in the same order. 0: not known yet."""
    closed: bool = False
    attempts: dict[int, int | None] = field(default_factory=dict)
    """Checkpoints in flight on this rank: any number for each, and the attempt once it is known."""
    lost: dict[int, str] = field(default_factory=dict)
    """Ranks that will not answer, and why."""
    owners: dict[int, str] = field(default_factory=dict)
    all_up: bool = False
    neighbour: int = -1
    watching: bool = False
    last: dict[int, str] = field(default_factory=dict)
    quiet_ticks: dict[int, int] = field(default_factory=dict)
    given_up: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.neighbour = (self.seat.rank - 1) % self.seat.world_size

    @property
    def tick_s(self) -> float:
        """Between two looks."""
        return max(min(_TICK_S, self.silence_s / _BEATS_PER_SILENCE), self.seat.world_size / _TICKS_PER_S)

    @property
    def beat_s(self) -> float:
        """Between two signs of this rank."""
        return max(self.silence_s / _BEATS_PER_SILENCE, self.seat.world_size / _BEATS_PER_S)

    def sign(self, state: str, count: int = 0) -> str:
        """This rank's value of its own key."""
        return f"{state} {self.generation} {count} {self.owner}"

    def first_lost(self) -> str | None:
        """Why rank 0 will not answer, where it is lost."""
        return self.lost.get(0)


def _key(rank: int) -> str:
    return f"life/{rank}"


def beat(signs: Signs) -> Step:
    """Give signs of life until `signs.closed`."""
    signs.generation = yield Add(f"engines/{signs.seat.rank}")
    yield Put(_key(signs.seat.rank), signs.sign("up"))
    if signs.generation == 1:
        yield Add("lives")
    count = 0
    while True:
        yield Sleep(signs.beat_s)
        if signs.closed:
            return
        count += 1
        yield Put(_key(signs.seat.rank), signs.sign("up", count))


def leave(signs: Signs) -> Step:
    """Say that this rank takes part in nothing any more."""
    yield Put(_key(signs.seat.rank), signs.sign("left"))


def watch(signs: Signs) -> Step:
    """Look at the others while this rank has a checkpoint in flight, and give up what lost ranks keep from ending."""
    signs.quiet_ticks.clear()
    while not signs.closed:
        if not signs.attempts:
            signs.watching = False
            # Begun in between: whoever has set it again looks; else we do.
            if not signs.attempts or signs.watching:
                return
            signs.watching = True
        if signs.generation:
            yield from _look(signs)
            yield from _give_up(signs)
        yield Sleep(signs.tick_s)


def _look(signs: Signs) -> Step:
    seat = signs.seat
    values: dict[int, str | None] = {}
    if seat.rank == 0:
        if not signs.all_up:
            signs.all_up = int((yield Get("lives")) or 0) >= seat.world_size
        if signs.all_up:
            # Only now: this request waits for keys that are missing.
            values = dict(enumerate((yield GetMany(tuple(map(_key, range(seat.world_size)))))))
    else:
        values[0] = yield Get(_key(0))
    if signs.neighbour not in values:
        values[signs.neighbour] = yield Get(_key(signs.neighbour))
    values.pop(seat.rank, None)
    for rank, value in values.items():
        cause = _judge(signs, rank, value)
        if cause is None:
            signs.lost.pop(rank, None)
        elif rank not in signs.lost:
            signs.lost[rank] = cause
            if cause == GONE and value is not None and not value.startswith("gone"):
                yield Put(_key(rank), "gone" + value[value.index(" ") :])
    if signs.lost.get(signs.neighbour) in (GONE, LEFT):
        # Whom that one has watched is watched by us from now on.
        signs.neighbour = (signs.neighbour - 1) % seat.world_size


def _judge(signs: Signs, rank: int, value: str | None) -> str | None:
    """Why this rank is lost; None while it may be well."""
    state, generation, _, owner = (value or "none 0 0 -").split(" ", 3)
    if int(generation) < signs.generation:
        return None
    signs.owners[rank] = owner
    if state == "left":
        return LEFT
    if state == "gone" or (rank in (0, signs.neighbour) and signs.is_gone(owner)):
        return GONE
    assert value is not None
    signs.quiet_ticks[rank] = signs.quiet_ticks.get(rank, 0) + 1 if value == signs.last.get(rank) else 0
    signs.last[rank] = value
    if signs.quiet_ticks[rank] * signs.tick_s < max(signs.silence_s, _BEATS_PER_SILENCE * signs.beat_s):
        return None
    return f"it has given no sign of life for {signs.silence_s:g} s: killed, stopped, or cut off"


def _give_up(signs: Signs) -> Step:
    seat = signs.seat
    for rank, cause in tuple(signs.lost.items()):
        if 0 not in (rank, seat.rank):
            # Rank 0 learns it from the key, and gives up for all.
            continue
        for attempt in tuple(signs.attempts.values()):
            if attempt is None or (attempt, rank) in signs.given_up:
                continue
            signs.given_up.add((attempt, rank))
            # Its part is durable already, and it has nothing to rename: it is not needed any more.
            if rank != 0 and seat.num_nodes == 1 and (yield Get(f"{attempt}/part/{rank}")) is not None:
                continue
            verdict = yield from fail(seat, attempt, cause, blamed=rank)
            if verdict.ok and rank == 0 and (yield Get(f"{attempt}/result")) is None:
                begun = Verdict(False, 0, f"it began to publish, then it was lost: {cause}", seat.rank, None)
                yield Put(f"{attempt}/result", begun.encode())
