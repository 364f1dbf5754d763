"""Which committed file a new one may share its bytes with: the last one of the same path that this engine has
committed, where both have the same layout. And what is not even copied: tensors that the user has named as frozen.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import TornSnapshotError, report, some_of
from ..format.sealer import Sealed, Sealer
from ..plan.plan import FilePlan, PlannedState
from ..snapshot.changes import SeenState
from ..snapshot.owned_storages import storage_ids, storages_of
from ..writer.file import FileWrite
from ..writer.sharing import OlderFile

_NUM_PATHS = 256
"""At least so many are remembered: where each checkpoint has others, the oldest are forgotten."""
FULL_CHECK_EVERY = 16
"""Of so many saves of a path in a row, one copies frozen tensors too, and compares them with what is on the disk."""
_NUM_SAMPLES = 2048
"""Of a chunk, so many words of eight bytes at least, or all."""


@dataclass(frozen=True)
class CommittedFile:
    """What is known of the last committed file of a path."""

    seen: SeenState
    older: OlderFile
    sealed: Sealed | None
    """None where no part of it can be passed over."""
    samples: Sequence[bytes]
    """By extent."""


class NewFile:
    """How one file is sealed, and what it shares. `seal` and `pass_over`: an I/O thread, in file order."""

    def __init__(self, reuse: Reuse, path: str, plan: FilePlan, seen: SeenState, known: CommittedFile | None) -> None:
        self.sealer = plan.sealer()
        self.seen = seen
        self._reuse = reuse
        self._path = path
        self.known = known
        """What it may share bytes with."""
        self.samples: list[bytes] = []
        """By extent. Fused optimizers move no counters: for them a CRC-32 alone would be too little to believe."""
        self._num_untold = 0
        """Extents that have changed, and no counter had told of it."""
        self._older: OlderFile | None = None
        self._frozen: list[int] = []
        """The extents that hold nothing but frozen payloads, untouched, and literals that depend on the layout."""
        if known is not None and known.sealed is not None and reuse.named_frozen is not None:
            step = known.older.extent_bytes
            untouched = seen.untouched(known.seen, step, among=reuse.frozen_storages())
            first, last = plan.payload_offsets[0], plan.literals[-1][0] if len(plan.literals) > 1 else plan.file_bytes
            inner = range(-(-first // step), last // step if last < plan.file_bytes else len(untouched))
            self._frozen = [k for k in inner if untouched[k]]

    def older(self) -> OlderFile:
        """The file that this one may share bytes with, where one is `known`. Before anything is sealed."""
        assert self.known is not None
        older = self.known.older
        untouched = self.seen.untouched(self.known.seen, older.extent_bytes)
        self._older = replace(older, untouched=untouched)
        return self._older

    @property
    def is_counted(self) -> bool:
        """Whether version counters have told of most that has changed."""
        return self._older is None or self._num_untold <= sum(self._older.untouched)

    def elsewhere(self, write: FileWrite) -> frozenset[int]:
        """The chunks that need not be copied now. Opens the older file."""
        if not self._frozen or self._reuse.is_full_check(self._path) or write.open_older() is None:
            return frozenset()
        return frozenset(self._frozen)

    def seal(self, offset: int, view: memoryview) -> int:
        """As `Sealer`. Raises TornSnapshotError: a frozen tensor has changed."""
        crc = self.sealer(offset, view)
        num_words = view.nbytes // 8
        # An odd step, so that the rows of a matrix are not met in one column.
        words = view[: num_words * 8].cast("Q")[:: (num_words // (2 * _NUM_SAMPLES)) | 1]
        samples = hashlib.blake2b(words.tobytes(), digest_size=16).digest()
        extent, known, older = len(self.samples), self.known, self._older
        self.samples.append(samples)
        if known is not None and older is not None and samples != known.samples[extent]:
            self._num_untold += older.untouched[extent]
            older.untouched[extent] = False
        if known is not None and extent in self._frozen and crc != known.older.extent_crc32[extent]:
            self._reuse.refuse(self._path, self.seen.storages_in(offset, offset + view.nbytes))
        return crc

    def pass_over(self, offset: int, view: memoryview) -> int:
        """As `seal`, for a chunk that is not here: nothing is read or changed in `view`."""
        assert self.known is not None and self.known.sealed is not None
        self.sealer.pass_over(offset, offset + view.nbytes, self.known.sealed)
        extent = len(self.samples)
        self.samples.append(self.known.samples[extent])
        return self.known.older.extent_crc32[extent]


class Reuse:
    """What an engine knows of its committed files. Calls come from `save`, and from commits; never blocks."""

    def __init__(self, *, is_on: bool, frozen: Any = None) -> None:
        self.is_on = is_on
        self.named_frozen = frozen
        self._num_unchecked: dict[str, int] = {}
        """By path, saves since all was copied."""
        self._seen: dict[str, SeenState] = {}
        """By path, of the last save."""
        self._committed: dict[str, CommittedFile] = {}
        """By path."""

    def tell(self, root: str, *, clones: bool) -> None:
        """Say once how files are shared in `root`."""
        how = "chunks that did not change share their blocks with the last checkpoint's (reuse='auto')"
        if not clones:
            how = "files that did not change are hard links to the last checkpoint's (reuse='auto'; no reflinks here)"
        if self.is_on:
            report(logging.INFO, "root %r: %s", root, how)

    def begin(self, path: str, state: PlannedState) -> NewFile | None:
        """Look at a state that is saved as `path` now; None where its file shares nothing with any other."""
        if not state.plan.payload_nbytes:
            return None
        seen = SeenState(state, self._seen.get(path))
        _remember(self._seen, {path: seen})
        known = self._committed.get(path)
        fits = known is not None and known.seen.plan_hash == seen.plan_hash
        return NewFile(self, path, state.plan, seen, known if fits else None)

    def committed(self, root: str, tag: str, files: Mapping[str, tuple[FileWrite, NewFile | None]]) -> None:
        """Remember the files of a checkpoint that has been committed, by path."""
        found = {}
        for path, (write, new) in files.items():
            if new is not None and (stamp := write.stamp) is not None:
                parts, crcs = (tag, *path.split("/")), tuple(write.extent_crc32)
                has_shared = write.sharing is not None and write.sharing.shared_bytes > 0
                size, step = write.size_bytes, write.extent_bytes
                older = OlderFile(root, parts, stamp, size, step, crcs, [], new.is_counted, has_shared)
                # Integrations have sealers of their own.
                sealed = new.sealer.sealed if isinstance(new.sealer, Sealer) else None
                found[path] = CommittedFile(new.seen, older, sealed, new.samples)
        _remember(self._committed, found)

    # What is frozen.

    def _frozen(self) -> Iterator[tuple[str, Any]]:
        named = self.named_frozen
        if hasattr(named, "named_parameters"):
            yield from named.named_parameters()
        else:
            yield from ((f"parameter {k} of reuse_frozen", tensor) for k, tensor in enumerate(named))

    def frozen_storages(self) -> set[int]:
        """Of the tensors that are frozen now, each over all of its storage: what else lies in one may be trained."""
        return {
            storage._cdata
            for _, tensor in self._frozen()
            if not tensor.requires_grad
            for storage in storages_of(tensor)
            if getattr(tensor, "_local_tensor", tensor).nbytes >= storage.nbytes()
        }

    def is_full_check(self, path: str) -> bool:
        """Count a save of `path`: whether this is the one that copies everything."""
        num_unchecked = (self._num_unchecked.get(path, 0) + 1) % FULL_CHECK_EVERY
        _remember(self._num_unchecked, {path: num_unchecked})
        return num_unchecked == 0

    def refuse(self, path: str, storages: set[int]) -> None:
        """A full check has found that some of these have changed: the next save of `path` shares nothing. Raises
        TornSnapshotError: always."""
        self._committed.pop(path, None)
        names = tuple(name for name, tensor in self._frozen() if not storages.isdisjoint(storage_ids(tensor)))
        raise TornSnapshotError(
            f"frozen tensors (reuse_frozen) have changed, which no version counter shows: among {some_of(names)}. "
            f"{path!r} is not committed; checkpoints of up to {FULL_CHECK_EVERY} saves before hold them as they were. "
            "Do not name them as frozen, or change them in place under torch.no_grad(), and not by .data",
            names,
        )

    def forget(self, paths: Iterable[str]) -> None:
        """Let the next files of these paths share nothing: what they would share may be damaged."""
        for path in paths:
            self._committed.pop(path, None)


def _remember(known: dict[str, Any], more: dict[str, Any]) -> None:
    for path in more:
        known.pop(path, None)
    known.update(more)
    for path in list(known)[: -max(len(more), _NUM_PATHS)]:
        known.pop(path, None)
