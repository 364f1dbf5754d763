"""Puts one committed checkpoint into one store: its files, each looked at afterwards, then the manifest.

Steps, each of which may be cut short and is done again or gone on with later:

1. The state says which objects will be put. Those of an earlier attempt that never got its manifest are deleted first.
2. Every object is put, found in the store with the right size and checksum, and noted in the state.
3. All ranks have said that their objects are there (`context.Agreement`); the disk still has this very checkpoint.
4. The manifest is put if absent, or in place of one that may be replaced, and read back.
5. What the replaced manifest named is deleted. The state says "mirrored".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import time
from dataclasses import replace

from ..errors import CheckpointNotFoundError, MirrorError, report
from ..format.manifest import MAX_MANIFEST_BYTES
from ..format.names import MANIFEST_NAME
from ..metrics import MirrorMetrics, Span
from ..reading.committed import CommittedCheckpoint
from .context import MirrorContext
from .parts import PartStream, Slots
from .plan import ObjectPlan, UploadPlan, combined_md5, plan_upload
from .remote_manifest import delete_doomed, may_replace, publish, read_manifest
from .state import TagState
from .store import AbortedElsewhere, ConditionFailed, PassingFailure

_MAX_DAMAGED = 3
"""Times that an object is put where the store then holds other bytes."""
_PAUSE_S, _MAX_PAUSE_S = 0.1, 10.0


class Upload:
    """One checkpoint on its way. Made and run once, on one event loop."""

    def __init__(self, context: MirrorContext, tag: str, metrics: MirrorMetrics) -> None:
        self._context = context
        self._tag = tag
        self._metrics = metrics
        self._is_resumed = False

    async def run(self) -> None:
        """Mirror the checkpoint, unless it is mirrored already.

        Raises:
            CheckpointNotFoundError: it was deleted or replaced on disk meanwhile; nothing of it is left in the store.
            CorruptCheckpointError: it is damaged on disk. ConditionFailed: the store has another run's checkpoint of
                that tag.
            MirrorError: the store failed. WriteError: the state could not be written. What is there is gone on with
                later.
        """
        context = self._context
        try:
            with await context.opened(lambda: context.catalog.open(self._tag)) as checkpoint:
                if not context.states.is_mirrored(self._tag, checkpoint.manifest.created_unix_ns):
                    await self._run(checkpoint)
        except (CheckpointNotFoundError, ConditionFailed):
            state = context.states.get(self._tag)
            if state is not None and not state.mirrored:
                await context.in_thread(context.abandon, state)
            raise

    async def _run(self, checkpoint: CommittedCheckpoint) -> None:
        context = self._context
        raw = await context.in_thread(checkpoint.directory.read_file, (MANIFEST_NAME,), MAX_MANIFEST_BYTES)
        plan = plan_upload(
            checkpoint.manifest,
            raw,
            rank=context.agreement.rank,
            part_bytes=context.mirror.part_bytes,
            url=context.mirror.url,
        )
        state = await context.in_thread(self._begin, plan)
        self._metrics.size_bytes = sum(one.entry.size_bytes for one in plan.objects)
        self._metrics.num_objects = len(plan.objects)
        # Not while the ranks wait for each other: one of them may be waiting for its turn.
        async with context.turn():
            await self._put_all(checkpoint, plan, state)
        there = await context.in_thread(read_manifest, context.store, plan.tag)
        if there is not None and there.raw == plan.manifest:
            # By an earlier try, of which not every rank has heard.
            await context.in_thread(self._finish, plan)
            return
        name = f"{context.mirror.url}/{plan.tag}/{plan.attempt}"
        await context.in_thread(context.agreement.all_sent, name)
        if context.agreement.leads:
            await context.in_thread(self._publish_and_tell, checkpoint, plan, name)
        else:
            await context.in_thread(self._finish, plan)

    def _begin(self, plan: UploadPlan) -> TagState:
        states = self._context.states
        before = states.get(plan.tag)
        if before is not None and before.attempt == plan.attempt:
            self._is_resumed = True
            return before
        ours: tuple[str, ...] = ()
        if before is not None:
            ours = (*before.ours, before.attempt)
            if not before.mirrored:
                self._context.abandon(before)
        keys = tuple(one.key for one in plan.objects)
        state = TagState(plan.tag, plan.attempt, plan.created_unix_ns, keys, ours=ours)
        states.write(state)
        return state

    # The objects.

    async def _put_all(self, checkpoint: CommittedCheckpoint, plan: UploadPlan, state: TagState) -> None:
        context = self._context
        slots = Slots(context.mirror.parallel, context.mirror.part_bytes)
        at_once = asyncio.Semaphore(context.mirror.parallel)
        done = dict(state.done)
        writing = asyncio.Lock()

        async def put(one: ObjectPlan) -> None:
            async with at_once:
                e_tag = await self._put_object(checkpoint, one, slots, done.get(one.key))
            async with writing:
                if done.get(one.key) != e_tag:
                    done[one.key] = e_tag
                    await context.in_thread(context.states.write, replace(state, done=dict(done)))

        tasks = [asyncio.ensure_future(put(one)) for one in plan.objects]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _put_object(
        self, checkpoint: CommittedCheckpoint, one: ObjectPlan, slots: Slots, known_tag: str | None
    ) -> str:
        """Returns the entity tag of the object, once it is there and whole."""
        context = self._context
        if known_tag is not None:
            found = await context.in_thread(context.store.head, one.key)
            if found is not None and (found.size_bytes, found.e_tag) == (one.entry.size_bytes, known_tag):
                return known_tag
        if self._is_resumed:
            await context.in_thread(context.store.discard_parts, one.key)
        give_up_s, num_damaged, pause_s = time.monotonic() + context.mirror.retry_timeout_s, 0, _PAUSE_S
        while True:
            try:
                md5s = await self._send(checkpoint, one, slots)
                return await context.in_thread(self._look_at, one, md5s)
            except _ObjectDamaged as damaged:
                num_damaged += 1
                if num_damaged == _MAX_DAMAGED:
                    raise
                report(logging.WARNING, "%s; it is sent again", damaged)
            except PassingFailure as failure:
                found = await context.in_thread(context.store.head, one.key)
                is_whole = found is not None and found.size_bytes == one.entry.size_bytes
                if found is not None and is_whole and isinstance(failure, AbortedElsewhere):
                    # The other process has finished it, and looked at it.
                    return found.e_tag
                # What the library does not send again by itself: requests that begin and end an upload of several
                # parts, and bodies that arrived damaged.
                if time.monotonic() > give_up_s:
                    raise
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
                pause_s = min(_MAX_PAUSE_S, 2 * pause_s)

    async def _send(self, checkpoint: CommittedCheckpoint, one: ObjectPlan, slots: Slots) -> list[bytes]:
        context, started_s = self._context, time.perf_counter()
        size_bytes, part_bytes = one.entry.size_bytes, context.mirror.part_bytes
        file = await context.opened(lambda: checkpoint.open_raw(one.entry))
        stream = PartStream(context, file, one, slots, self._metrics)
        try:
            await context.store.put(
                one.key, stream, size_bytes=size_bytes, part_bytes=part_bytes, parallel=context.mirror.parallel
            )
            if size_bytes > part_bytes:
                # Where the reply to its beginning was lost, the library has begun a second upload, and nobody knows
                # the first.
                await context.in_thread(context.store.discard_parts, one.key)
            self._told("upload", started_s, one.entry.path, size_bytes)
            return await stream.md5s()
        except AbortedElsewhere:
            # Nothing of it is left, and what there is now is the other process's.
            raise
        except Exception:
            with contextlib.suppress(MirrorError):
                # Best effort: the next try, or the next start, does it again.
                await context.in_thread(context.store.discard_parts, one.key)
            failure = stream.failure
            if failure is None:
                raise
            is_lost = isinstance(failure, FileNotFoundError | ValueError)
            if is_lost and not await context.in_thread(checkpoint.is_current):
                told = f"checkpoint {self._tag!r} was deleted while it was being mirrored"
                raise CheckpointNotFoundError(told) from failure
            raise failure from None
        finally:
            await stream.close()
            file.close()

    def _look_at(self, one: ObjectPlan, md5s: list[bytes]) -> str:
        store, size_bytes = self._context.store, one.entry.size_bytes
        found = store.head(one.key)
        if found is None or found.size_bytes != size_bytes:
            there = "is not there" if found is None else f"has {found.size_bytes} bytes, {size_bytes} were sent"
            raise _ObjectDamaged(f"the store has accepted {one.key!r}, which {there}", url=store.url)
        is_single, e_tag = size_bytes <= self._context.mirror.part_bytes, found.e_tag.strip('"')
        # Of an object of several parts only S3 promises this form of the tag, and not all servers keep the promise.
        if md5s and (is_single or store.url.startswith("s3")):
            expected = md5s[0].hex() if is_single else combined_md5(md5s)
            form = "[0-9a-f]{32}" + ("" if is_single else f"-{len(md5s)}")
            if re.fullmatch(form, e_tag) and e_tag != expected:
                told = f"the store holds other bytes of {one.key!r} than were sent (checksum {e_tag})"
                raise _ObjectDamaged(told, url=store.url)
        return found.e_tag

    # The manifest.

    def _publish_and_tell(self, checkpoint: CommittedCheckpoint, plan: UploadPlan, name: str) -> None:
        error = "it was interrupted"
        try:
            self._publish(checkpoint, plan)
            error = ""
        except Exception as failure:
            error = str(failure) or type(failure).__name__
            raise
        finally:
            self._context.agreement.concluded(name, error)

    def _publish(self, checkpoint: CommittedCheckpoint, plan: UploadPlan) -> None:
        context, started_s = self._context, time.perf_counter()
        if not checkpoint.is_current():
            told = f"checkpoint {self._tag!r} was deleted or replaced while it was being mirrored"
            raise CheckpointNotFoundError(told)
        ours = self._own_state(plan).ours
        publish(
            context.store,
            plan,
            conditional=context.abilities is not None and context.abilities.conditional,
            may_replace=lambda found: may_replace(found, plan, ours, context.may_overwrite),
            on_replace=lambda found: self._doom(plan, found.keys),
            patience_s=context.mirror.retry_timeout_s,
        )
        self._told("upload manifest", started_s, MANIFEST_NAME, len(plan.manifest))
        self._finish(plan)

    def _finish(self, plan: UploadPlan) -> None:
        self._context.states.write(replace(self._own_state(plan), mirrored=True, ours=()))
        delete_doomed(self._context.store, self._context.states, plan.tag)

    def _doom(self, plan: UploadPlan, keys: tuple[str, ...]) -> None:
        state = self._own_state(plan)
        if not set(keys) <= set(state.doomed):
            self._context.states.write(replace(state, doomed=tuple(sorted({*state.doomed, *keys}))))

    def _own_state(self, plan: UploadPlan) -> TagState:
        state = self._context.states.get(plan.tag)
        assert state is not None and state.attempt == plan.attempt
        return state

    def _told(self, kind: str, started_s: float, path: str, num_bytes: int) -> None:
        span = Span(kind, started_s, time.perf_counter(), "async-ckpt-mirror", self._tag, path, 0, num_bytes)
        self._context.hooks.on_span(span)


class _ObjectDamaged(MirrorError):
    """What the store holds is not what was sent."""
