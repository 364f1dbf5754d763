"""Files that all ranks hold alike, written once by all of them: each copies, seals and writes its share of one file.

What makes it one file comes with the vote. Each rank tells a digest of its plan, the CRCs of what it has written, and
those of one chunk of another rank's share, which it has copied too. The rank that renames compares these, and fills in
what depends on all shares: the CRCs of tensors that lie in two of them, and the directory at the file's end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ..format.manifest import FileEntry
from ..format.shares import ShareSealer, Told, amended, check_agreement, cut, head_blocks
from ..format.zip_directory import DESCRIPTOR_MAGIC
from ..plan.plan import PlannedState
from ..reading.committed import read_back
from ..storage.filesystem import FileSystem


class Replica:
    """One file that all ranks hold, and this rank's share of it. `reads_back`: the whole file, once it is finished."""

    def __init__(
        self, path: str, state: PlannedState, chunk_bytes: int, rank: int, num_writers: int, *, reads_back: bool
    ) -> None:
        plan = state.plan
        self.share = cut(plan.file_bytes, chunk_bytes, plan.payload_offsets, rank, num_writers)
        self.seal = ShareSealer(plan, self.share)
        self._reads_back = reads_back
        self._path, self._plan, self._chunk_bytes = path, plan, chunk_bytes
        self._cut = f"{num_writers} writers of chunks of {chunk_bytes} bytes"
        self._devices = [device for device in state.devices if device.index is not None]

    @cached_property
    def _head(self) -> bytes:
        """All before the first payload, without the numbers of this rank's devices, which are rank 0's in the file, and
        the CRC of the record that says them.
        """
        first = self._plan.payload_offsets[0] if self._plan.payload_offsets else self._plan.file_bytes
        head = b"".join(data for offset, data in self._plan.literals if offset < first)
        if self._plan.seal_map is not None:
            crc = self._plan.seal_map.crcs_before[0].to_bytes(4, "little")
            head = head.replace(DESCRIPTOR_MAGIC + crc, DESCRIPTOR_MAGIC + b"????")
        for device in self._devices:
            head = head.replace(str(device).encode(), device.type.encode() + b":" + b"?" * len(str(device.index)))
        return head

    def tell(self) -> dict[str, Any]:
        """See `SharedFile`."""
        share, seal, plan = self.share, self.seal, self._plan
        told = Told(
            cut=self._cut,
            plan=hashlib.blake2b(self._head + plan.plan_hash.encode(), digest_size=16).hexdigest(),
            blocks=head_blocks(self._head),
            start=share.start,
            end=share.end,
            extents=seal.extents,
            parts=seal.mine.parts or (),
            first=seal.first,
            compared=seal.compared,
            slips=seal.mine.sealed.slips,
        )
        return told.encode()

    def finish(self, filesystem: FileSystem, staging: str, told: Mapping[int, dict[str, Any]]) -> FileEntry:
        """See `SharedFile`."""
        plan, chunk_bytes = self._plan, self._chunk_bytes
        by_rank = {rank: Told.decode(raw) for rank, raw in told.items()}
        shares = check_agreement(self._path, by_rank, self._head, plan, chunk_bytes)
        changes = plan.sealer().joined([(share.start, share.end, share.parts, share.slips) for share in shares])
        before = filesystem.amend(os.path.join(staging, *self._path.split("/")), plan.file_bytes, changes)
        crcs = amended(
            [crc for share in shares for crc in share.extents], chunk_bytes, plan.file_bytes, changes, before
        )
        entry = FileEntry(
            self._path, plan.file_bytes, chunk_bytes, crcs, plan.format, plan.planner, plan.plan_hash, rank=None
        )
        if self._reads_back:
            read_back(filesystem, staging, [entry])
        return entry
