"""One rank reads and verifies a file, the others receive it: see `wire`.

Guarantees:
- Each byte is read, and its checksum compared, once, by one rank of a group (all ranks, or those of a node). All ranks
  fill their tensors from the same checkpoint, or all raise.
- Memory: sixteen pieces of 2 MiB per host; and of the file's directory and pickle the extents they lie in on the rank
  that reads, on the others twice the parts of 256 KiB they lie in. Tensors on a GPU are filled from the pieces by the
  device's own copies.
- What ends in the middle (a read, a rank) ends it on all: whoever does not answer is named, within twice `timeout_s`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist

from ..errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    RankFailedError,
    StateMismatchError,
    UnsupportedStateError,
    report,
)
from ..format.checksum import crc32
from ..format.manifest import FileEntry
from ..format.names import Root, StrPath
from ..host.device import without_default_device
from ..host.facts import node_from_env
from ..reading.build import NotPlainError, read_structure
from ..reading.catalog import Catalog
from ..reading.errors import OVERWRITTEN, ReadError, telling_overwritten
from ..reading.load_into import Mover, Restored, match
from ..reading.records import naming
from ..reading.verified_file import Buffers, VerifiedFile
from ..threads.outcome import name_pending
from .exchange import Exchange
from .latest_on_all import committed, newest_first
from .rank_requests import RankInfo
from .wire import PIECE_BYTES, LostError, Wire, host_key

_ALIKE = CheckpointNotFoundError, CorruptCheckpointError, StateMismatchError, UnsupportedStateError
"""Which errors of another rank are raised as such; others as RankFailedError."""
_HEAD_BYTES = 256 << 10
"""The directory and the pickle are sent in parts of so many bytes, and no others."""
Parts = Callable[[int, int], Sequence[tuple[int, bytes | memoryview]]]
"""Offsets and bytes of parts of a file, among them what there is of the bytes from an offset on."""


def load_once(
    info: RankInfo,
    catalog: Catalog,
    exchange: Exchange,
    path: StrPath,
    target: Any,
    per_node: bool | None,
    how: dict[str, Any],
) -> Restored:
    """See `RankCoordinator.load_once`."""
    if not dist.is_initialized():
        raise ConfigError("load_once sends over torch.distributed: call torch.distributed.init_process_group before it")
    there = dist.get_rank(), dist.get_world_size()
    if there != (info.rank, info.world_size):
        raise ConfigError(f"rank {info.rank} of {info.world_size} is {there[0]} of {there[1]} in torch.distributed")
    tag, name = Root(catalog.root).split_committed(path)
    ranks = info.group
    if per_node and info.num_nodes == 1:
        ranks = node_from_env(info.rank, info.world_size).ranks
    name_pending(catalog.root)
    older: list[str] | None = None
    exchange.begin()
    name_of_all, *keys = exchange.round(host_key(), lambda keys: [uuid.uuid4().hex, *keys])
    hosts: dict[Any, list[int]] = {}
    for rank in ranks:
        hosts.setdefault(keys[rank] or rank, []).append(rank)
    for number in itertools.count():
        try:
            with contextlib.ExitStack() as opened, without_default_device():
                wire = Wire(f"{name_of_all}/{number}/{ranks[0]}", list(hosts.values()), info.rank, info.timeout_s)
                opened.callback(wire.close)
                return _Load(exchange, ranks, info, opened, wire).run(catalog, tag, name, target, how)
        except _UnreadableError as failed:
            if older is None:
                found = _agree(exchange, lambda: committed([catalog]) if info.rank == ranks[0] else None)
                older = _older_than(tag, [one for one in found if one is not None])
            if not older:
                raise failed.error from failed.error.__cause__
            report(logging.WARNING, "load_once: checkpoint %r is passed over for %r: %s", tag, older[0], failed.error)
            tag = older.pop(0)
    raise AssertionError


class _UnreadableError(Exception):
    """A checkpoint is missing or damaged, as all ranks know; `error` is what each raises if there is no older one."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _older_than(tag: str, on_nodes: list[Any]) -> list[str]:
    """Those that all who read have, newest first: all, where the age of `tag` is not known."""
    limit = min((created for one in on_nodes for found, created in one if found == tag), default=None)
    ordered = newest_first(on_nodes)
    return [found for found, created in ordered if found != tag and (limit is None or created <= limit)]


def _agree(exchange: Exchange, work: Callable[[], Any]) -> list[Any]:
    """What `work` has given on the ranks, each value once. Blocks; raises on all ranks if it fails on one."""
    own: Exception | None = None
    try:
        word = {"found": work()}
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait for this rank
        own = error
        is_unreadable = isinstance(error, (CheckpointNotFoundError, CorruptCheckpointError, ReadError))
        kind = next((n for n, kind in enumerate(_ALIKE) if isinstance(error, kind)), -1)
        text, is_lost = str(error)[:2000], isinstance(error, LostError)
        word = {"error": text, "kind": kind, "unreadable": is_unreadable, "lost": is_lost}
    said = exchange.round(word, _combined)
    if "error" not in said:
        return list(said["found"])
    rank, text, kind = said["rank"], said["error"], said["kind"]
    if own is not None and not isinstance(own, LostError):
        failure = own
    elif kind >= 0:
        failure = _ALIKE[kind](f"rank {rank}: {text}")
    else:
        failure = RankFailedError(f"rank {rank}: {text}", rank=rank, step="load_once")
    if said["unreadable"]:
        raise _UnreadableError(failure)
    raise failure


def _combined(said: list[Any]) -> Any:
    bad = [{**word, "rank": rank} for rank, word in enumerate(said) if "error" in word]
    if bad:
        return min(bad, key=lambda word: (word["lost"], word["unreadable"], word["rank"]))
    found: list[Any] = []
    for word in said:
        if word["found"] not in found:
            found.append(word["found"])
    return {"found": found}


class _Load:
    """One checkpoint, tried by all ranks in step."""

    def __init__(
        self, exchange: Exchange, ranks: tuple[int, ...], info: RankInfo, opened: contextlib.ExitStack, wire: Wire
    ) -> None:
        self._exchange = exchange
        self._ranks = ranks
        self._reads = info.rank == ranks[0]
        self._opened = opened
        self._wire = wire
        self._file: VerifiedFile
        self._head: VerifiedFile
        self._structure: Any = None
        self._mover: Mover
        self._restored: Restored

    def run(self, catalog: Catalog, tag: str, name: str, target: Any, how: dict[str, Any]) -> Restored:
        found = [word for word in _agree(self._exchange, partial(self._open, catalog, tag, name)) if word is not None]
        if len({word["created"] for word in found}) > 1:
            raise _UnreadableError(CheckpointNotFoundError(f"the nodes have different checkpoints {tag!r}"))
        mine = next(word for word in found if word["reader"] == self._ranks[0])
        if len(_agree(self._exchange, partial(self._match, mine, target, how))) > 1:
            raise StateMismatchError("load_once: the ranks were given states that do not match the file alike")
        try:
            _agree(self._exchange, self._move)
        except RankFailedError as error:
            raise RankFailedError(f"{error.message}; {OVERWRITTEN}", rank=error.rank, step="load_once") from error
        return replace(self._restored, read_bytes=self._file.read_bytes if self._reads else 0, tag=tag)

    def _open(self, catalog: Catalog, tag: str, name: str) -> Any:
        if not self._reads:
            return None
        created = catalog.manifest(tag).created_unix_ns
        self._file = file = self._opened.enter_context(catalog.open_file(tag, name))
        entry = [file.entry.path, file.size_bytes, _HEAD_BYTES, (), file.entry.format, "", None]
        with naming(file):
            self._read_head(file.name, entry, lambda *part: [(part[0], file.view(*part))])
        file.show_to(*self._head.looks)
        return {"reader": self._ranks[0], "created": created, "name": file.name, "entry": entry}

    def _read_head(self, name: str, entry: list[Any], parts: Parts) -> None:
        head = _Head(name, entry[1], parts)
        self._head = VerifiedFile(head, FileEntry(*entry), check=False, num_threads=1)
        try:
            self._structure = read_structure(self._head)
        except NotPlainError as error:
            what = f"{name} holds more than plain tensors ({error}): only load and load_into read it, on each rank"
            raise UnsupportedStateError(what) from error

    def _match(self, found: dict[str, Any], target: Any, how: dict[str, Any]) -> int:
        """Send what the structure was read from, for the others to do the same; a number that is equal on all."""
        wire = self._wire
        with self._ending_on_all():
            wire.connect()
            if self._reads:
                pieces = Buffers(num_bytes=PIECE_BYTES)
                for block in self._head.blocks(sorted(self._head.kept()), pieces, with_kept=True):
                    assert block.memory is not None
                    wire.send(block.offset, block.memory)
                wire.end()
            else:
                sent = [(offset, bytes(view)) for offset, view in wire.receive()]
                self._read_head(found["name"], found["entry"], lambda *part: sent)
                self._file = self._head
        try:
            self._mover, self._restored = match(self._file, self._structure, target, **how)
        except _NotSentError as error:
            raise UnsupportedStateError(
                f"{self._file.name}: given tensors share memory, and the file holds them apart: "
                "load_into compares their values"
            ) from error
        return crc32(repr((self._restored.loaded, self._restored.mismatches)).encode())

    def _move(self) -> None:
        mover, wire = self._mover, self._wire
        with self._ending_on_all(), mover.changing():
            if self._reads:
                places = Buffers(wire.place, PIECE_BYTES, are_reused=False)
                with naming(self._file), telling_overwritten():
                    self._file.stream(
                        lambda offset, view: wire.send(offset, view, mover.scatter), mover.extents, places
                    )
                wire.end()
            else:
                for piece in wire.receive():
                    mover.scatter(*piece)
            mover.copy()

    @contextlib.contextmanager
    def _ending_on_all(self) -> Iterator[None]:
        """Around what sends and receives: the others need not wait for a rank that fails there."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(LostError):
                if self._reads and not isinstance(error, LostError):
                    self._wire.end(failed=True)
            self._wire.close()
            raise


class _NotSentError(Exception):
    """What was to be read is not among what the other rank has sent."""


class _Head:
    """Some parts of a file, as a `ReadableFile`."""

    map_path = ""

    def __init__(self, path: str, size_bytes: int, parts: Parts) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._parts = parts

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        end, found = offset + buffer.nbytes, 0
        for start, part in self._parts(offset, buffer.nbytes):
            low, high = max(offset, start), min(end, start + len(part))
            if low < high:
                buffer[low - offset : high - offset] = part[low - start : high - start]
                found += high - low
        if found < buffer.nbytes:
            raise _NotSentError(f"{self.path}: not all of the bytes {offset} to {end} were sent to this rank")

    def close(self) -> None:
        return None
