"""How the ranks of a job agree on one checkpoint: the protocol alone, without store, disk, clock or thread.

Every step is a generator that yields requests (`Put`, `Add`, `Claim`, `Get`, `Await`, ...) and is sent their answers, so that
the same code runs over a `torch.distributed` store (`store_link`) and in a simulation of 16,384 ranks.

Keys, all below the run's prefix; n is the attempt, counted by rank 0, never used twice:

- "seq", "head": how many attempts were begun; the newest one that may be read.
- "n/open": rank 0's announcement: tag, staging name, world size, or why it could not begin. "n/open/g": node g's staging name.
- "n/part/r": rank r's part is durable, and its digest. "n/count": how many parts. "n/gate": wakes rank 0: all are there, or one failed.
- "n/verdict": claimed once, by rank 0 ("publish") or by the first rank that gives up. Nothing is renamed without that claim.
- "n/result": what became of it. "n/done", "n/done/g": nodes that have renamed. "n/seen": how many other ranks have read the result.
- "note/r": what rank r waits for, where that takes long.

Guarantees:
- Whoever loses the claim of "n/verdict" obeys the winner: no rank reports a failure of a checkpoint that is then published.
- Each rank sends a constant number of requests per checkpoint (rank 0 one more that names all parts), plus the polls of its waits.
- Every wait is bounded by `timeout_s`, whose end names the ranks that were not heard of.
- Rank 0 drops an attempt's keys when all ranks have seen its result, or `timeout_s` later; a rank that asks after that is told that
  the outcome is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from .rank_requests import (
    Add,
    Announcements,
    AttemptFailed,
    Await,
    AwaitCount,
    Claim,
    Drop,
    Get,
    GetMany,
    Put,
    Seat,
    Step,
    Verdict,
)

DISAGREE_S = 5.0
"""How long after rank 0 another rank may begin a checkpoint if it has begun another one first."""

# Rank 0 begins.


def announce(seat: Seat, tag: str, staging_name: str | None, error: str = "") -> Step:
    """Rank 0: tell the others where to write (or why not); returns the attempt's number."""
    attempt = yield Add("seq")
    announcement = {"tag": tag, "name": staging_name, "world_size": seat.world_size, "num_nodes": seat.num_nodes}
    announcement |= {"node": seat.node, "error": error}
    if error:
        verdict = Verdict(False, seat.rank, error, seat.rank).encode()
        yield Put(f"{attempt}/verdict", verdict)
        yield Put(f"{attempt}/result", verdict)
    yield Put(f"{attempt}/open", json.dumps(announcement))
    yield Put("head", str(attempt))
    return attempt


# The other ranks join.


def join(seat: Seat, tag: str, known: Announcements) -> Step:
    """Another rank: wait until rank 0 has begun `tag`; returns the attempt and its announcement.

    Raises:
        AttemptFailed: rank 0 did not begin this tag in time or could not, or the jobs differ in size.
    """
    patience_s = seat.timeout_s
    grace_s = min(1.0, patience_s / 4)
    noted = disputed = False
    ended: AttemptFailed | None = None
    while True:
        found, failure = yield from _next_open(tag, known)
        ended = failure or ended
        if found is not None:
            break
        patience = patience_s if noted and ended is None else grace_s
        if noted and (known.waiting or disputed):
            patience = min(patience, DISAGREE_S)
        head = yield Await("head", patience, str(known.last) if known.last else None)
        if head is not None:
            yield from _read_announcements(known, int(head))
        elif ended is not None:
            # Not an older try whose successor is about to be announced: this very attempt failed before we came.
            raise ended
        elif noted and known.waiting and not disputed:
            # Rank 0 waits for us there, as we wait for it here: none of us would end before its timeout.
            disputed, newest = True, ", ".join(map(repr, list(known.waiting)[-3:]))
            yield from _refuse_waiting(seat, known, f"it has opened tag {tag!r} instead")
        elif noted:
            known.in_vain = tag
            cause = f"rank 0 has not opened tag {tag!r} within {seat.timeout_s:g} s"
            if disputed:
                cause = f"rank 0 has opened tag {newest}, not {tag!r}"
            raise AttemptFailed(None, Verdict(False, 0, cause, seat.rank))
        else:
            noted = True
            patience_s -= grace_s
            in_vain = f", after it has waited in vain for tag {known.in_vain!r}" if known.in_vain else ""
            yield Put(f"note/{seat.rank}", f"it waits for tag {tag!r}{in_vain}")
    if noted or known.in_vain:
        known.in_vain = ""
        yield Drop(f"note/{seat.rank}")
    attempt, announcement = found
    if announcement["error"]:
        raise AttemptFailed(attempt, Verdict(False, 0, announcement["error"], 0))
    if (announcement["world_size"], announcement["num_nodes"]) != (seat.world_size, seat.num_nodes):
        theirs = f"{announcement['world_size']} on {announcement['num_nodes']}"
        cause = f"it counts {seat.world_size} ranks on {seat.num_nodes} nodes, rank 0 counts {theirs}"
        raise AttemptFailed(attempt, (yield from fail(seat, attempt, cause)))
    return attempt, announcement


def _refuse_waiting(seat: Seat, known: Announcements, cause: str) -> Step:
    """Give up, for all ranks, what rank 0 has announced and this rank has not begun."""
    waiting, known.waiting = known.waiting, {}
    for attempt, announcement in (found for queue in waiting.values() for found in queue):
        if not announcement["error"]:
            yield from fail(seat, attempt, cause)
        yield from settle(seat, attempt)


def _next_open(tag: str, known: Announcements) -> Step:
    """The oldest announced attempt of `tag` that has not ended, or None; and how the newest that has ended failed, or None."""
    failure = None
    while (found := known.take(tag)) is not None:
        attempt, announcement = found
        raw = None if announcement["error"] else (yield Get(f"{attempt}/result"))
        if raw is None:
            return found, failure
        verdict = Verdict.decode(raw)
        failure = None if verdict.ok else AttemptFailed(attempt, verdict)
    return None, failure


def _read_announcements(known: Announcements, head: int) -> Step:
    if not known.last:
        # A rank that starts late has no part in what was begun long before.
        known.last = max(0, head - Announcements.MAX_KEPT)
    while known.last < head:
        known.last += 1
        raw = yield Get(f"{known.last}/open")
        if raw is not None:
            known.add(known.last, json.loads(raw))


def open_node(seat: Seat, attempt: int, staging_name: str) -> Step:
    """A node's leader: tell the ranks of its node where to write."""
    yield Put(f"{attempt}/open/{seat.node}", staging_name)


def await_node(seat: Seat, attempt: int) -> Step:
    """A rank of a node that rank 0 is not on: wait for its leader's staging name.

    Raises:
        AttemptFailed: the leader has not made one in time.
    """
    name = yield Await(f"{attempt}/open/{seat.node}", seat.timeout_s)
    if name is None:
        cause = f"it has made no staging directory on its node within {seat.timeout_s:g} s"
        raise AttemptFailed(attempt, (yield from fail(seat, attempt, cause, blamed=seat.group[0])))
    return name


# Every rank reports.


def report(seat: Seat, attempt: int, digest: str) -> Step:
    """This rank's part is durable.

    Raises:
        AttemptFailed: the attempt is over already.
    """
    if (yield Get(f"{attempt}/open")) is None:
        raise AttemptFailed(
            attempt, Verdict(False, seat.rank, f"it came later than {seat.timeout_s:g} s: the others have given up", seat.rank)
        )
    yield Put(f"{attempt}/part/{seat.rank}", digest)
    if (yield Add(f"{attempt}/count")) == seat.world_size:
        yield Put(f"{attempt}/gate", "full")


def fail(seat: Seat, attempt: int, cause: str, *, blamed: int | None = None) -> Step:
    """Give the attempt up for all ranks, unless it is decided already; returns the verdict that holds."""
    mine = Verdict(False, seat.rank if blamed is None else blamed, cause, seat.rank).encode()
    held = yield Claim(f"{attempt}/verdict", mine)
    if held == mine:
        if (yield Get(f"{attempt}/open")) is None:
            # The others have given it up long ago.
            yield Drop(f"{attempt}/verdict")
            return Verdict.decode(mine)
        yield Put(f"{attempt}/result", mine)
        yield Put(f"{attempt}/gate", "failed")
    return Verdict.decode(held)


def _time_out(seat: Seat, attempt: int) -> Step:
    """Give up waiting. Only the rank that wins the claim looks for the missing ones: all of them looking would cost N * N requests."""
    mine = Verdict(False, None, "timeout", seat.rank).encode()
    held = yield Claim(f"{attempt}/verdict", mine)
    if held != mine:
        verdict = Verdict.decode(held)
        return verdict if verdict.ok else (yield from _final_verdict(seat, attempt))
    if (yield Get(f"{attempt}/open")) is None:
        # This rank was away for so long that the attempt ended without it, and its keys were dropped.
        yield Drop(f"{attempt}/verdict")
        return Verdict(False, seat.rank, "it did not ask for the outcome before the others had forgotten it", seat.rank, None)
    missing = []
    for rank in range(seat.world_size):
        if (yield Get(f"{attempt}/part/{rank}")) is None:
            missing.append(rank)
    if missing:
        note = yield Get(f"note/{missing[0]}")
        more = f" (missing: {', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''})" if len(missing) > 1 else ""
        cause = f"it has not reported its part durable within {seat.timeout_s:g} s{more}" + (f"; {note}" if note else "")
        verdict = Verdict(False, missing[0], cause, seat.rank)
    else:
        verdict = Verdict(False, 0, f"all parts are durable, but it has not decided within {seat.timeout_s:g} s", seat.rank)
    yield Put(f"{attempt}/result", verdict.encode())
    yield Put(f"{attempt}/gate", "failed")
    return verdict


# Rank 0 decides, leaders rename, all learn it.


def gather(seat: Seat, attempt: int) -> Step:
    """Rank 0: wait until every rank's part is durable; returns the digests of its group, in the order of `seat.group`.

    Raises:
        AttemptFailed: a rank failed or is missing.
    """
    gate = yield Await(f"{attempt}/gate", seat.timeout_s)
    if gate != "full":
        verdict = (yield from _final_verdict(seat, attempt)) if gate is not None else (yield from _time_out(seat, attempt))
        raise AttemptFailed(attempt, verdict)
    return (yield from parts(seat, attempt))


def parts(seat: Seat, attempt: int) -> Step:
    """The digests of a group whose parts are all there."""
    return (yield GetMany(tuple(f"{attempt}/part/{rank}" for rank in seat.group)))


def decide(seat: Seat, attempt: int, created_unix_ns: int) -> Step:
    """Rank 0: win the right to rename.

    Raises:
        AttemptFailed: somebody gave up first; nothing may be renamed.
    """
    mine = Verdict(True, None, "", seat.rank, None, created_unix_ns).encode()
    held = yield Claim(f"{attempt}/verdict", mine)
    if held != mine:
        raise AttemptFailed(attempt, (yield from _final_verdict(seat, attempt)))


def await_decision(seat: Seat, attempt: int) -> Step:
    """Another node's leader: wait for rank 0's decision; returns the verdict to publish.

    Raises:
        AttemptFailed: the attempt was given up.
    """
    held = yield Await(f"{attempt}/verdict", seat.timeout_s)
    verdict = Verdict.decode(held) if held is not None else (yield from _time_out(seat, attempt))
    if not verdict.ok:
        raise AttemptFailed(attempt, verdict if held is None else (yield from _final_verdict(seat, attempt)))
    return verdict


def renamed(seat: Seat, attempt: int, error: str = "") -> Step:
    """A leader has renamed, or failed to."""
    yield Put(f"{attempt}/done/{seat.node}", error or "ok")
    if (yield Add(f"{attempt}/done")) == seat.num_nodes:
        yield Put(f"{attempt}/all_done", "yes")


def conclude_nodes(seat: Seat, attempt: int) -> Step:
    """Rank 0: wait until all nodes have renamed; returns and announces the outcome."""
    yield Await(f"{attempt}/all_done", seat.timeout_s)
    bad = []
    for node in range(seat.num_nodes):
        done = yield Get(f"{attempt}/done/{node}")
        if done != "ok":
            bad.append(f"node {node}: {done or 'no answer'}")
    verdict = Verdict(True, None, "", seat.rank, True)
    if bad:
        verdict = Verdict(
            False, None, f"all parts are durable, but not every node has renamed its own ({'; '.join(bad[:4])})", seat.rank, None
        )
    yield Put(f"{attempt}/result", verdict.encode())
    return verdict


def conclude(seat: Seat, attempt: int, verdict: Verdict) -> Step:
    """Rank 0: announce the outcome of its rename."""
    yield Put(f"{attempt}/result", verdict.encode())


def await_result(seat: Seat, attempt: int) -> Step:
    """Another rank: wait for the outcome.

    Raises:
        AttemptFailed: with `committed=None` in the verdict where rank 0 stopped after it had begun to rename.
    """
    raw = yield Await(f"{attempt}/result", seat.timeout_s)
    verdict = Verdict.decode(raw) if raw is not None else (yield from _time_out(seat, attempt))
    if raw is None and verdict.ok:
        raw = yield Await(f"{attempt}/result", seat.timeout_s)
        cause = f"it began to publish but has not said within {seat.timeout_s:g} s what became of it"
        verdict = Verdict.decode(raw) if raw is not None else Verdict(False, 0, cause, seat.rank, None)
    if not verdict.ok:
        raise AttemptFailed(attempt, verdict)
    return verdict


def _final_verdict(seat: Seat, attempt: int) -> Step:
    """The detailed failure, which its finder sets a moment after the claim."""
    raw = yield Await(f"{attempt}/result", min(seat.timeout_s, 10.0))
    if raw is None:
        raw = yield Get(f"{attempt}/verdict")
    return Verdict.decode(raw) if raw is not None else Verdict(False, None, "the attempt is over", seat.rank, None)


# Tidying up.


def settle(seat: Seat, attempt: int) -> Step:
    """Another rank: it has read the result and does not touch the staging directory any more."""
    yield Drop(f"{attempt}/part/{seat.rank}")
    yield Add(f"{attempt}/seen")


def await_quit(seat: Seat, attempt: int) -> Step:
    """A leader, after a failure: wait until no other rank writes into a staging directory; False when some did not answer."""
    return (yield AwaitCount(f"{attempt}/seen", seat.world_size - seat.num_nodes, seat.timeout_s))


def retire(seat: Seat, attempt: int, wait_s: float | None = None) -> Step:
    """Rank 0: drop the attempt's keys once the others have seen the result, or after `wait_s` (by default `timeout_s`)."""
    all_seen = yield AwaitCount(f"{attempt}/seen", seat.world_size - 1, seat.timeout_s if wait_s is None else wait_s)
    names = ["open", "count", "gate", "verdict", "result", "seen"]
    if seat.num_nodes > 1:
        names += ["done", "all_done", *(f"{kind}/{node}" for node in range(seat.num_nodes) for kind in ("open", "done"))]
    leftover: Sequence[int] = (seat.rank,) if all_seen else range(seat.world_size)
    for name in (*names, *(f"part/{rank}" for rank in leftover)):
        yield Drop(f"{attempt}/{name}")
