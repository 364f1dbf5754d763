"""Puts one committed checkpoint into one store: its files, each looked at afterwards, then the manifest.

Steps, each of which may be cut short and is done again or gone on with later:

1. The state says which objects will be put. Those of an earlier attempt that never got its manifest are deleted first.
2. Every object is put, found in the store with the right size and checksum, and noted in the state.
3. All ranks have said that their objects are there (`context.Agreement`); the disk still has this very checkpoint.
4. The manifest is put if absent, or in place of one that may be replaced, and read back.
5. What the replaced manifest named is deleted. The state says "mirrored".
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import re
import time
from concurrent.futures import FIRST_EXCEPTION, Executor, wait
from dataclasses import replace

from ..errors import CheckpointNotFoundError, MirrorError, report
from ..format.manifest import MAX_MANIFEST_BYTES
from ..format.names import MANIFEST_NAME
from ..metrics import MirrorMetrics, Span
from ..reading.committed import CommittedCheckpoint
from ..threads.locks import Lock
from .context import MirrorContext, Stopped
from .objects import FoundManifest, ObjectPlan, delete_doomed, plan_upload, read_manifest
from .parts import PartStream, Slots
from .state import TagState
from .store import ANY_VERSION, AbortedElsewhere, ConditionFailed, PassingFailure

_MAX_DAMAGED = 3
"""Times that an object is put where the store then holds other bytes."""
_PAUSE_S, _MAX_PAUSE_S = 0.1, 10.0


def upload(context: MirrorContext, executor: Executor, tag: str, metrics: MirrorMetrics) -> None:
    """Mirror the checkpoint, unless it is mirrored already; delete what it has replaced in the store. Blocks.

    Raises CheckpointNotFoundError: it was deleted or replaced on disk meanwhile; nothing of it is left in the store.
    CorruptCheckpointError: it is damaged on disk. ConditionFailed: the store has another run's checkpoint of that tag.
    MirrorError: the store failed. WriteError: the state could not be written. Stopped: the mirrors are being closed.
    What is there is gone on with later."""
    try:
        with context.catalog.open(tag) as checkpoint:
            if not context.states.is_mirrored(tag, checkpoint.manifest.created_unix_ns):
                _Upload(context, executor, checkpoint, metrics).run()
    except (CheckpointNotFoundError, ConditionFailed):
        state = context.states.get(tag)
        if state is not None and not state.mirrored:
            context.abandon(state)
        raise
    try:
        delete_doomed(context.store, context.states, tag)
    except MirrorError as error:
        told = "checkpoint %r is mirrored; what it has replaced in the store is deleted at the next start: %s"
        report(logging.WARNING, told, tag, error)


class _Upload:
    """One checkpoint on its way. Made and run once, on one thread; its objects on the executor's."""

    def __init__(
        self, context: MirrorContext, executor: Executor, checkpoint: CommittedCheckpoint, metrics: MirrorMetrics
    ) -> None:
        self._context = context
        self._executor = executor
        self._checkpoint = checkpoint
        self._metrics = metrics
        raw = checkpoint.directory.read_file((MANIFEST_NAME,), MAX_MANIFEST_BYTES)
        self._plan = plan_upload(checkpoint.manifest, raw, context.mirror, context.agreement.rank)
        self._slots = Slots(context)
        self._is_resumed = False
        self._writing = Lock()

    def run(self) -> None:
        context, plan = self._context, self._plan
        self._begin()
        self._metrics.size_bytes = sum(one.entry.size_bytes for one in plan.objects)
        self._metrics.num_objects = len(plan.objects)
        # Not while the ranks wait for each other: one of them may be waiting for its turn.
        with context.turn():
            self._put_all()
        context.sleep()
        there = None if context.agreement.rank is None else read_manifest(context.store, plan.tag)
        if there is not None and there.raw == plan.manifest:
            # By an earlier try, of which not every rank has heard.
            self._finish()
            return
        name = f"{context.mirror.url}/{plan.tag}/{plan.attempt}"
        context.agreement.all_sent(name)
        if context.agreement.leads:
            self._publish_and_tell(name)
        else:
            self._finish()

    def _begin(self) -> None:
        states, plan = self._context.states, self._plan
        before = states.get(plan.tag)
        if before is not None and before.attempt == plan.attempt:
            self._is_resumed = True
            # A directory has parts of it too.
            self._context.store.discard_parts(plan.manifest_key)
            return
        ours: tuple[str, ...] = ()
        if before is not None:
            ours = (*before.ours, before.attempt)
            if not before.mirrored:
                self._context.abandon(before)
        keys = tuple(one.key for one in plan.objects)
        states.write(TagState(plan.tag, plan.attempt, plan.created_unix_ns, keys, ours=ours))

    # The objects.

    def _put_all(self) -> None:
        """All objects, many at once; the first failure ends the others soon, and is raised when they have ended."""
        puts = [self._executor.submit(self._put, one) for one in self._plan.objects]
        wait(puts, return_when=FIRST_EXCEPTION)
        self._slots.close()
        for put in puts:
            put.cancel()
        wait(puts)
        failures = [error for put in puts if not put.cancelled() and (error := put.exception()) is not None]
        if failures:
            raise next((error for error in failures if not isinstance(error, Stopped)), failures[0])

    def _put(self, one: ObjectPlan) -> None:
        known_tag = self._own_state().done.get(one.key)
        e_tag = self._put_object(one, known_tag)
        with self._writing:
            state = self._own_state()
            if known_tag != e_tag and not self._context.is_stopping:
                self._context.states.write(replace(state, done={**state.done, one.key: e_tag}))

    def _put_object(self, one: ObjectPlan, known_tag: str | None) -> str:
        """Returns the entity tag of the object, once it is there and whole."""
        context, store = self._context, self._context.store
        if known_tag is not None:
            found = store.head(one.key)
            if found is not None and (found.size_bytes, found.e_tag) == (one.entry.size_bytes, known_tag):
                return known_tag
        if self._is_resumed:
            store.discard_parts(one.key)
        give_up_s, num_damaged, pause_s = time.monotonic() + context.mirror.retry_timeout_s, 0, _PAUSE_S
        while True:
            try:
                return self._look_at(one, self._send(one))
            except _ObjectDamaged as damaged:
                num_damaged += 1
                if num_damaged == _MAX_DAMAGED:
                    raise
                report(logging.WARNING, "%s; it is sent again", damaged)
            except PassingFailure as failure:
                context.sleep()
                found = store.head(one.key)
                is_whole = found is not None and found.size_bytes == one.entry.size_bytes
                if found is not None and is_whole and isinstance(failure, AbortedElsewhere):
                    # The other process has finished it, and looked at it.
                    return found.e_tag
                # What the library does not send again by itself: requests that begin and end an upload of several
                # parts, and bodies that arrived damaged.
                if time.monotonic() > give_up_s:
                    raise
                context.sleep(pause_s * random.uniform(0.5, 1.5))
                pause_s = min(_MAX_PAUSE_S, 2 * pause_s)

    def _send(self, one: ObjectPlan) -> list[bytes]:
        """Returns the MD5 of each part, where the store compares no checksums itself."""
        store, mirror, started_s = self._context.store, self._context.mirror, time.perf_counter()
        size_bytes, part_bytes = one.entry.size_bytes, mirror.part_bytes
        with contextlib.closing(self._checkpoint.open_raw(one.entry)) as file:
            stream = PartStream(self._slots, file, one, self._metrics)
            try:
                store.put(one.key, stream, size_bytes=size_bytes, part_bytes=part_bytes, parallel=mirror.parallel)
                if size_bytes > part_bytes:
                    # Where the reply to its beginning was lost, the library has begun a second upload, and nobody
                    # knows the first.
                    store.discard_parts(one.key)
            except AbortedElsewhere:
                # Nothing of it is left, and what there is now is the other process's.
                raise
            except Exception:
                failure = stream.failure
                self._context.sleep()
                if self._slots.is_closed:
                    raise
                with contextlib.suppress(MirrorError):
                    # Best effort: the next try, or the next start, does it again.
                    store.discard_parts(one.key)
                if failure is None:
                    raise
                if isinstance(failure, FileNotFoundError | ValueError) and not self._checkpoint.is_current():
                    told = f"checkpoint {self._plan.tag!r} was deleted while it was being mirrored"
                    raise CheckpointNotFoundError(told) from failure
                raise failure from None
        self._told("upload", started_s, one.entry.path, size_bytes)
        return stream.md5s

    def _look_at(self, one: ObjectPlan, md5s: list[bytes]) -> str:
        store, size_bytes = self._context.store, one.entry.size_bytes
        found = store.head(one.key)
        if found is None or found.size_bytes != size_bytes:
            there = "is not there" if found is None else f"has {found.size_bytes} bytes, {size_bytes} were sent"
            raise _ObjectDamaged(f"the store has accepted {one.key!r}, which {there}", url=store.url)
        is_single, e_tag = size_bytes <= self._context.mirror.part_bytes, found.e_tag.strip('"')
        # Of an object of several parts only S3 promises this form of the tag, and not all servers keep the promise.
        if md5s and (is_single or store.url.startswith("s3")):
            whole = md5s[0] if is_single else hashlib.md5(b"".join(md5s), usedforsecurity=False).digest()
            suffix = "" if is_single else f"-{len(md5s)}"
            if re.fullmatch(f"[0-9a-f]{{32}}{suffix}", e_tag) and e_tag != whole.hex() + suffix:
                told = f"the store holds other bytes of {one.key!r} than were sent (checksum {e_tag})"
                raise _ObjectDamaged(told, url=store.url)
        return found.e_tag

    # The manifest.

    def _publish_and_tell(self, name: str) -> None:
        error = "it was interrupted"
        try:
            self._publish()
            error = ""
        except Exception as failure:
            error = str(failure) or type(failure).__name__
            raise
        finally:
            self._context.agreement.concluded(name, error)

    def _publish(self) -> None:
        """Put the manifest and read it back. A conflict (409), a reply that was lost and a manifest that arrived
        damaged are tried again. Raises ConditionFailed, MirrorError."""
        context, store, plan, started_s = self._context, self._context.store, self._plan, time.perf_counter()
        if not self._checkpoint.is_current():
            told = f"checkpoint {self._plan.tag!r} was deleted or replaced while it was being mirrored"
            raise CheckpointNotFoundError(told)
        is_conditional = context.abilities is not None and context.abilities.conditional
        failure = MirrorError(f"the store accepts the manifest of {plan.tag!r} but holds other bytes", url=store.url)
        give_up_s, pause_s = time.monotonic() + context.mirror.retry_timeout_s, _PAUSE_S
        while (found := read_manifest(store, plan.tag)) is None or found.raw != plan.manifest:
            if found is not None:
                self._check_replaceable(found)
            if time.monotonic() > give_up_s:
                raise failure
            if found is not None:
                self._doom(found.keys)
            absent_or_this = found.info if found is not None else None
            try:
                store.put_if(plan.manifest_key, plan.manifest, absent_or_this if is_conditional else ANY_VERSION)
            except (ConditionFailed, PassingFailure) as error:
                # It may have been done all the same, or the other side be about to end: the store is asked before
                # anything is said.
                failure = error
                context.sleep(pause_s)
                pause_s = min(_MAX_PAUSE_S, 2 * pause_s)
        self._told("upload manifest", started_s, MANIFEST_NAME, len(plan.manifest))
        self._finish()

    def _check_replaceable(self, found: FoundManifest) -> None:
        """A damaged one is; an older one that this root has put; any older one where overwriting was asked for. Raises
        ConditionFailed."""
        if found.manifest is None:
            return
        is_newer = found.manifest.created_unix_ns >= self._plan.created_unix_ns
        if is_newer or not (self._context.may_overwrite or found.attempt in self._own_state().ours):
            raise ConditionFailed(
                f"the store has {'a newer' if is_newer else 'an older'} checkpoint {self._plan.tag!r} of another run "
                f"(attempt {found.attempt}), which stays. Give this run a prefix of its own, or overwrite='replace' to "
                "replace older ones",
                url=self._context.store.url,
            )

    def _finish(self) -> None:
        self._context.states.write(replace(self._own_state(), mirrored=True, ours=()))

    def _doom(self, keys: tuple[str, ...]) -> None:
        state = self._own_state()
        if not set(keys) <= set(state.doomed):
            self._context.states.write(replace(state, doomed=tuple(sorted({*state.doomed, *keys}))))

    def _own_state(self) -> TagState:
        state = self._context.states.get(self._plan.tag)
        assert state is not None and state.attempt == self._plan.attempt
        return state

    def _told(self, kind: str, started_s: float, path: str, num_bytes: int) -> None:
        span = Span(kind, started_s, time.perf_counter(), "async-ckpt-mirror", self._plan.tag, path, 0, num_bytes)
        self._context.hooks.on_span(span)


class _ObjectDamaged(MirrorError):
    """What the store holds is not what was sent."""
