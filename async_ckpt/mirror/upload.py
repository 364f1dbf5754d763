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
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import CheckpointNotFoundError, MirrorError, report
from ..format.manifest import MAX_MANIFEST_BYTES
from ..format.names import MANIFEST_NAME
from ..metrics import MirrorMetrics, Span
from ..reading.committed import CommittedCheckpoint
from .context import UploadContext, abandon
from .parts import PartStream, Slots, opened
from .plan import ObjectPlan, UploadPlan, combined_md5, plan_upload
from .remote_manifest import delete_doomed, may_replace, publish, read_manifest
from .state import TagState
from .store import AbortedElsewhere, ConditionFailed, PassingFailure

T = TypeVar("T")
_MAX_DAMAGED = 3
"""Times that an object is put where the store then holds other bytes."""
_PAUSE_S, _MAX_PAUSE_S = 0.1, 10.0


class Upload:
    """One checkpoint on its way. Made and run once, on one event loop."""

    def __init__(self, context: UploadContext, tag: str, metrics: MirrorMetrics) -> None:
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
        try:
            checkpoint = await opened(self._context.executor, lambda: self._context.catalog.open(self._tag))
            try:
                if not self._context.states.is_mirrored(self._tag, checkpoint.manifest.created_unix_ns):
                    await self._run(checkpoint)
            finally:
                checkpoint.close()
        except (CheckpointNotFoundError, ConditionFailed):
            await self._in_thread(self._abandon_own)
            raise

    async def _run(self, checkpoint: CommittedCheckpoint) -> None:
        context = self._context
        raw = await self._in_thread(checkpoint.directory.read_file, (MANIFEST_NAME,), MAX_MANIFEST_BYTES)
        plan = plan_upload(
            checkpoint.manifest,
            raw,
            rank=context.agreement.rank,
            part_bytes=context.mirror.part_bytes,
            url=context.mirror.url,
        )
        state = await self._in_thread(self._begin, plan)
        self._metrics.size_bytes = sum(one.entry.size_bytes for one in plan.objects)
        self._metrics.num_objects = len(plan.objects)
        # Not while the ranks wait for each other: one of them may be waiting for its turn.
        async with context.turns.taken(context.executor):
            await self._put_all(checkpoint, plan, state)
        there = await self._in_thread(read_manifest, context.store, plan.tag)
        if there is not None and there.raw == plan.manifest:
            # By an earlier try, of which not every rank has heard.
            await self._in_thread(self._finish, plan)
            return
        name = f"{context.mirror.url}/{plan.tag}/{plan.attempt}"
        await self._in_thread(context.agreement.all_sent, name)
        if context.agreement.leads:
            await self._in_thread(self._publish_and_tell, checkpoint, plan, name)
        else:
            await self._in_thread(self._finish, plan)

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
                abandon(self._context, before)
        state = TagState(
            plan.tag, plan.attempt, plan.created_unix_ns, tuple(one.key for one in plan.objects), ours=ours
        )
        states.write(state)
        return state

    # The objects.

    async def _put_all(self, checkpoint: CommittedCheckpoint, plan: UploadPlan, state: TagState) -> None:
        context = self._context
        slots = Slots(context.mirror.parallel, context.mirror.part_bytes)
        turn = asyncio.Semaphore(context.mirror.parallel)
        done = dict(state.done)
        writing = asyncio.Lock()

        async def put(one: ObjectPlan) -> None:
            async with turn:
                e_tag = await self._put_object(checkpoint, one, slots, done.get(one.key))
            async with writing:
                if done.get(one.key) != e_tag:
                    done[one.key] = e_tag
                    await self._in_thread(context.states.write, replace(state, done=dict(done)))

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
            found = await self._in_thread(context.store.head, one.key)
            if found is not None and (found.size_bytes, found.e_tag) == (one.entry.size_bytes, known_tag):
                return known_tag
        if self._is_resumed:
            await self._in_thread(context.store.discard_parts, one.key)
        give_up_s, num_damaged, pause_s = time.monotonic() + context.mirror.retry_timeout_s, 0, _PAUSE_S
        while True:
            try:
                md5s = await self._send(checkpoint, one, slots)
                return await self._in_thread(self._look_at, one, md5s)
            except _ObjectDamaged as damaged:
                num_damaged += 1
                if num_damaged == _MAX_DAMAGED:
                    raise
                report(logging.WARNING, "%s; it is sent again", damaged)
            except PassingFailure as failure:
                found = await self._in_thread(context.store.head, one.key)
                if (
                    isinstance(failure, AbortedElsewhere)
                    and found is not None
                    and found.size_bytes == one.entry.size_bytes
                ):
                    # The other process has finished it, and looked at it.
                    return found.e_tag
                # What the library does not send again by itself: requests that begin and end an upload of several
                # parts.
                if time.monotonic() > give_up_s:
                    raise
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
                pause_s = min(_MAX_PAUSE_S, 2 * pause_s)

    async def _send(self, checkpoint: CommittedCheckpoint, one: ObjectPlan, slots: Slots) -> list[bytes]:
        context, started_s = self._context, time.perf_counter()
        file = await opened(context.executor, lambda: checkpoint.open_raw(one.entry))
        part_bytes = context.mirror.part_bytes
        stream = PartStream(
            file,
            one,
            slots=slots,
            pace=context.pace,
            part_bytes=part_bytes,
            executor=context.executor,
            on_part=self._on_part,
        )
        try:
            await context.store.put(
                one.key,
                stream,
                size_bytes=one.entry.size_bytes,
                part_bytes=part_bytes,
                parallel=context.mirror.parallel,
            )
            if one.entry.size_bytes > part_bytes:
                # Where the reply to its beginning was lost, the library has begun a second upload, and nobody knows
                # the first.
                await self._in_thread(context.store.discard_parts, one.key)
            self._told("upload", started_s, one.entry.path, 0, one.entry.size_bytes)
            return await stream.md5s()
        except AbortedElsewhere:
            # Nothing of it is left, and what there is now is the other process's.
            raise
        except Exception:
            with contextlib.suppress(MirrorError):
                # Best effort: the next try, or the next start, does it again.
                await self._in_thread(context.store.discard_parts, one.key)
            failure = stream.failure
            if failure is not None:
                if isinstance(failure, FileNotFoundError | ValueError) and not await self._in_thread(
                    checkpoint.is_current
                ):
                    raise CheckpointNotFoundError(
                        f"checkpoint {self._tag!r} was deleted while it was being mirrored"
                    ) from failure
                raise failure from None
            raise
        finally:
            await stream.close()
            file.close()

    def _look_at(self, one: ObjectPlan, md5s: list[bytes]) -> str:
        context, size_bytes = self._context, one.entry.size_bytes
        found = context.store.head(one.key)
        if found is None or found.size_bytes != size_bytes:
            there = "is not there" if found is None else f"has {found.size_bytes} bytes, {size_bytes} were sent"
            raise _ObjectDamaged(f"the store has accepted {one.key!r}, which {there}", url=context.store.url)
        is_single = size_bytes <= context.mirror.part_bytes
        expected, e_tag = md5s[0].hex() if is_single else combined_md5(md5s), found.e_tag.strip('"')
        # Some stores give an object of several parts a tag of another form: nothing can be said of that.
        is_told = context.abilities.md5_tags and re.fullmatch(
            "[0-9a-f]{32}" + ("" if is_single else f"-{len(md5s)}"), e_tag
        )
        if is_told and e_tag != expected:
            raise _ObjectDamaged(
                f"the store holds other bytes of {one.key!r} than were sent (checksum {e_tag})", url=context.store.url
            )
        return found.e_tag

    # The manifest.

    def _publish(self, checkpoint: CommittedCheckpoint, plan: UploadPlan) -> None:
        context = self._context
        if not checkpoint.is_current():
            raise CheckpointNotFoundError(
                f"checkpoint {self._tag!r} was deleted or replaced while it was being mirrored"
            )
        started_s = time.perf_counter()
        state = context.states.get(plan.tag)
        ours = state.ours if state is not None else ()
        publish(
            context.store,
            plan,
            conditional=context.abilities.conditional,
            may_replace=lambda found: may_replace(found, plan, ours, context.may_overwrite),
            on_replace=lambda found: self._doom(plan, found.keys),
            patience_s=context.mirror.retry_timeout_s,
        )
        self._told("upload manifest", started_s, MANIFEST_NAME, 0, len(plan.manifest))
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

    # Inside.

    def _abandon_own(self) -> None:
        state = self._context.states.get(self._tag)
        if state is not None and not state.mirrored:
            abandon(self._context, state)

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._context.executor, call, *args)

    def _on_part(self, started_s: float, offset: int, num_bytes: int) -> None:
        self._metrics.num_parts += 1
        self._metrics.sent_bytes += num_bytes

    def _told(self, kind: str, started_s: float, path: str, offset: int, num_bytes: int) -> None:
        self._context.on_span(
            Span(kind, started_s, time.perf_counter(), "async-ckpt-mirror", self._tag, path, offset, num_bytes)
        )


class _ObjectDamaged(MirrorError):
    """What the store holds is not what was sent."""
