"""How the ranks of a job agree on one checkpoint: the protocol alone, without store, disk, clock or thread.

Every step is a generator that yields requests (`Put`, `Add`, `Claim`, `Get`, ...) and is sent their answers, so that
the same code runs over a `torch.distributed` store (`store_link`) and in a simulation of 16,384 ranks. Where it finds
the attempt given up, or gives it up, it raises `AttemptFailed`, unless it says otherwise.

Keys, all below the run's prefix; n is the attempt, counted by rank 0, never used twice:

- "seq", "head": how many attempts were begun; the newest one that may be read.
- "n/open": rank 0's announcement: tag, staging name, world size, or why it could not begin. "n/open/g": node g's
  staging name.
- "n/files": how many bytes of the manifest the files of all ranks take that are written or about to be.
- "n/part/r": rank r's part is durable, its digest, and its vote where the destination has one. "n/count": how many
  parts. "n/gate": wakes rank 0: all are there, or one failed.
- "n/decision": claimed once, by rank 0 ("publish") or by the first rank that gives up. Nothing is renamed without that
  claim.
- "n/result": what became of it. "n/done", "n/done/g": nodes that have renamed. "n/seen": how many other ranks have read
  the result.
- "note/r": what rank r waits for, where that takes long.

Guarantees:
- Whoever loses the claim of "n/decision" obeys the winner: no rank reports a failure of a checkpoint that is then
  published.
- Each rank sends a constant number of requests per checkpoint (rank 0 one more that names all parts) and one per file,
  plus the polls of its waits.
- Every wait is bounded by `timeout_s`, whose end names the ranks that were not heard of.
- Rank 0 drops an attempt's keys when all ranks have seen its result, or `timeout_s` later; a rank that asks after that
  is told that the outcome is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from ..errors import some_of
from ..format import manifest
from .rank_requests import Add, AttemptFailed, AwaitCount, Claim, CommitOutcome, Drop, Get, GetMany, Put, RankInfo, Step

# As no directory can be called.
_NO_NAME = "/"

# Rank 0 begins.


def announce(info: RankInfo, tag: str, staging_name: str | None, error: str = "") -> Step:
    """Rank 0: tell the others where to write (or why not); returns the attempt's number."""
    attempt = yield Add("seq")
    announcement = {"tag": tag, "name": staging_name, "world_size": info.world_size, "num_nodes": info.num_nodes}
    announcement |= {"node": info.node, "error": error}
    if error:
        outcome = CommitOutcome(False, info.rank, error, info.rank).encode()
        yield Put(f"{attempt}/decision", outcome)
        yield Put(f"{attempt}/result", outcome)
    yield Put(f"{attempt}/open", json.dumps(announcement))
    yield Put("head", str(attempt))
    return attempt


# A node's ranks learn where to write.


def open_node(info: RankInfo, attempt: int, staging_name: str | None) -> Step:
    """A node's leader: tell the ranks of its node where to write; None where it has given the attempt up."""
    yield Put(f"{attempt}/open/{info.node}", staging_name or _NO_NAME)


def await_node(info: RankInfo, attempt: int) -> Step:
    """A rank of a node that rank 0 is not on: wait for its leader's staging name, which may never come."""
    name = yield Get(f"{attempt}/open/{info.node}", info.timeout_s)
    if name in (None, _NO_NAME):
        cause = f"it has made no staging directory on its node within {info.timeout_s:g} s"
        raise AttemptFailed(attempt, (yield from fail(info, attempt, cause, blamed=info.group[0])))
    return name


# Every rank writes and reports.


def admit(info: RankInfo, attempt: int, path: str, manifest_bytes: int) -> Step:
    """A file of this rank is about to be written, if the manifest has room for it beside the files of all ranks."""
    num_bytes = yield Add(f"{attempt}/files", manifest_bytes)
    if num_bytes > manifest.MAX_FILES_BYTES:
        cause = (
            f"{path!r} does not fit: with it, the manifest of all ranks' files would have {num_bytes} bytes (at most "
            f"{manifest.MAX_FILES_BYTES}); use larger chunk_bytes or fewer files. Nothing of this file was written"
        )
        raise AttemptFailed(attempt, (yield from fail(info, attempt, cause)))


def report(info: RankInfo, attempt: int, digest: str) -> Step:
    """This rank's part is durable."""
    if (yield Get(f"{attempt}/open")) is None:
        cause = f"it came later than {info.timeout_s:g} s: the others have given up"
        raise AttemptFailed(attempt, CommitOutcome(False, info.rank, cause, info.rank))
    yield Put(f"{attempt}/part/{info.rank}", digest)
    if (yield Add(f"{attempt}/count")) == info.world_size:
        yield Put(f"{attempt}/gate", "full")


def fail(info: RankInfo, attempt: int, cause: str, *, blamed: int | None = None) -> Step:
    """Give the attempt up for all ranks, unless it is decided; returns the outcome that holds, raises none."""
    mine = CommitOutcome(False, info.rank if blamed is None else blamed, cause, info.rank)
    held = CommitOutcome.decode((yield Claim(f"{attempt}/decision", mine.encode())))
    if held == mine:
        if (yield Get(f"{attempt}/open")) is None:
            # The others have given it up long ago.
            yield Drop(f"{attempt}/decision")
            return held
        yield Put(f"{attempt}/result", held.encode())
        yield Put(f"{attempt}/gate", "failed")
    return held


def _time_out(info: RankInfo, attempt: int) -> Step:
    """Give up waiting. Only the rank that wins the claim looks for the missing ones: all of them looking would cost N *
    N requests.
    """
    mine = CommitOutcome(False, None, "timeout", info.rank)
    held = CommitOutcome.decode((yield Claim(f"{attempt}/decision", mine.encode())))
    if held != mine:
        return held if held.ok else (yield from _final_outcome(info, attempt))
    if (yield Get(f"{attempt}/open")) is None:
        # This rank was away for so long that the attempt ended without it, and its keys were dropped.
        yield Drop(f"{attempt}/decision")
        cause = "it did not ask for the outcome before the others had forgotten it"
        return CommitOutcome(False, info.rank, cause, info.rank, None)
    missing = []
    for rank in range(info.world_size):
        if (yield Get(f"{attempt}/part/{rank}")) is None:
            missing.append(rank)
    if missing:
        note = yield Get(f"note/{missing[0]}")
        cause = f"it has not reported its part durable within {info.timeout_s:g} s"
        cause += f" (missing: {some_of([*map(str, missing)], 8)})" if len(missing) > 1 else ""
        outcome = replace(mine, rank=missing[0], cause=f"{cause}; {note}" if note else cause)
    else:
        cause = f"all parts are durable, but it has not decided within {info.timeout_s:g} s"
        outcome = replace(mine, rank=0, cause=cause)
    yield Put(f"{attempt}/result", outcome.encode())
    yield Put(f"{attempt}/gate", "failed")
    return outcome


# Rank 0 decides, leaders rename, all learn it.


def gather(info: RankInfo, attempt: int) -> Step:
    """Rank 0: wait until every rank's part is durable; returns the digests of its group, as `parts`."""
    gate = yield Get(f"{attempt}/gate", info.timeout_s)
    if gate is None:
        raise AttemptFailed(attempt, (yield from _time_out(info, attempt)))
    if gate != "full":
        raise AttemptFailed(attempt, (yield from _final_outcome(info, attempt)))
    return (yield from parts(info, attempt))


def parts(info: RankInfo, attempt: int) -> Step:
    """The digests of a group whose parts are all there, in the order of `info.group`."""
    return (yield GetMany(tuple(f"{attempt}/part/{rank}" for rank in info.group)))


def decide(info: RankInfo, attempt: int, created_unix_ns: int) -> Step:
    """Rank 0: win the right to rename."""
    mine = CommitOutcome(True, None, "", info.rank, None, created_unix_ns).encode()
    held = yield Claim(f"{attempt}/decision", mine)
    if held != mine:
        raise AttemptFailed(attempt, (yield from _final_outcome(info, attempt)))


def await_decision(info: RankInfo, attempt: int) -> Step:
    """Another node's leader: wait for rank 0's decision; returns the outcome to publish."""
    held = yield Get(f"{attempt}/decision", info.timeout_s)
    outcome = CommitOutcome.decode(held) if held is not None else (yield from _time_out(info, attempt))
    if not outcome.ok:
        raise AttemptFailed(attempt, outcome if held is None else (yield from _final_outcome(info, attempt)))
    return outcome


def renamed(info: RankInfo, attempt: int, error: str = "") -> Step:
    """A leader has renamed, or failed to."""
    yield Put(f"{attempt}/done/{info.node}", error or "ok")
    if (yield Add(f"{attempt}/done")) == info.num_nodes:
        yield Put(f"{attempt}/all_done", "yes")


def conclude(info: RankInfo, attempt: int, outcome: CommitOutcome) -> Step:
    """Rank 0: announce the outcome of its rename, where there are several nodes that of all; returns it."""
    if info.num_nodes > 1:
        yield from renamed(info, attempt, outcome.cause)
        yield Get(f"{attempt}/all_done", info.timeout_s)
        bad = []
        for node in range(info.num_nodes):
            done = yield Get(f"{attempt}/done/{node}")
            if done != "ok":
                bad.append(f"node {node}: {done or 'no answer'}")
        if bad:
            cause = f"all parts are durable, but not every node has renamed its own ({'; '.join(bad[:4])})"
            outcome = CommitOutcome(False, None, cause, info.rank, None)
    yield Put(f"{attempt}/result", outcome.encode())
    return outcome


def await_result(info: RankInfo, attempt: int) -> Step:
    """Another rank: wait for the outcome; `committed=None` in it where rank 0 stopped after it had begun to rename."""
    raw = yield Get(f"{attempt}/result", info.timeout_s)
    outcome = CommitOutcome.decode(raw) if raw is not None else (yield from _time_out(info, attempt))
    if raw is None and outcome.ok:
        raw = yield Get(f"{attempt}/result", info.timeout_s)
        cause = f"it began to publish but has not said within {info.timeout_s:g} s what became of it"
        outcome = CommitOutcome.decode(raw) if raw is not None else CommitOutcome(False, 0, cause, info.rank, None)
    if not outcome.ok:
        raise AttemptFailed(attempt, outcome)
    return outcome


def _final_outcome(info: RankInfo, attempt: int) -> Step:
    """The detailed failure, which its finder sets a moment after the claim."""
    raw = yield Get(f"{attempt}/result", min(info.timeout_s, 10.0))
    if raw is None:
        raw = yield Get(f"{attempt}/decision")
    if raw is None:
        return CommitOutcome(False, None, "the attempt is over", info.rank, None)
    return CommitOutcome.decode(raw)


# Tidying up.


def settle(info: RankInfo, attempt: int) -> Step:
    """Another rank: it has read the result and does not touch the staging directory any more."""
    yield Drop(f"{attempt}/part/{info.rank}")
    yield Add(f"{attempt}/seen")


def await_quit(info: RankInfo, attempt: int) -> Step:
    """A leader, after a failure: wait until no other rank writes to its staging; False when some did not answer."""
    return (yield AwaitCount(f"{attempt}/seen", info.world_size - info.num_nodes, info.timeout_s))


def retire(info: RankInfo, attempt: int) -> Step:
    """Rank 0: drop the attempt's keys once all have seen the result, after `timeout_s`, or when the link ends: a later
    engine over this store must not take them for its own.
    """
    all_seen = yield AwaitCount(f"{attempt}/seen", info.world_size - 1, info.timeout_s, ends_with_link=True)
    names = ["open", "files", "count", "gate", "decision", "result", "seen"]
    if info.num_nodes > 1:
        of_nodes = (f"{kind}/{node}" for node in range(info.num_nodes) for kind in ("open", "done"))
        names += ["done", "all_done", *of_nodes]
    leftover: Sequence[int] = (info.rank,) if all_seen else range(info.world_size)
    for name in (*names, *(f"part/{rank}" for rank in leftover)):
        yield Drop(f"{attempt}/{name}")
