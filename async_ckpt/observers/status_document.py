"""The published status of one engine: a small JSON document, written by `status_writer` and read back as untrusted text."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import Any

from ..host.process import Owner, OwnerState

MAX_STATUS_BYTES = 1 << 20
MAX_FLYING = 64
RATE_WINDOW_S = 5.0
_FORMAT, _VERSION = "async-ckpt-status", 2

_FLYING = {"tag": str, "state": str, "since_unix_s": float, "size_bytes": int, "copied_bytes": int, "written_bytes": int}
_FLYING |= {"num_files": int, "stall_s": float}
_LAST = {"tag": str, "error": str, "ended_unix_s": float, "size_bytes": int, "stall_s": float, "total_s": float}
_LAST |= {"bytes_per_s": float, "backpressure_s": float}


@dataclass(frozen=True, slots=True)
class Status:
    """What one engine published, checked field by field; times are seconds since 1970, sizes bytes."""

    owner: Owner
    owner_state: OwnerState
    root: str
    rank: int
    world_size: int
    updated_unix_s: float
    in_flight: tuple[dict[str, Any], ...]
    """Each with tag, state ("open" or "committing"), since_unix_s, size_bytes (of the files saved so far), copied_bytes,
    written_bytes, num_files and stall_s."""
    queue_bytes: int
    """Held in staging memory for files that are not written yet."""
    queue_chunks: int
    written_bytes: int
    """All that this engine has written."""
    bytes_per_s: float
    """Written over the last seconds before `updated_unix_s`."""
    num_committed: int
    num_failed: int
    num_aborted: int
    last: dict[str, Any] | None
    """The commit that ended last: tag, error (None: it succeeded), ended_unix_s, size_bytes, stall_s, total_s, bytes_per_s,
    backpressure_s."""

    def rate_bytes_per_s(self, now_unix_s: float) -> float:
        """The rate, or 0 when what was published is too old to say anything about now."""
        return self.bytes_per_s if now_unix_s - self.updated_unix_s < RATE_WINDOW_S else 0.0


def encode(owner: Owner, fields: dict[str, Any]) -> bytes:
    """The file's content: `fields` are those of `Status` from `root` on, without `updated_unix_s`."""
    flying = fields["in_flight"][-MAX_FLYING:]
    head = {"format": _FORMAT, "format_version": _VERSION, "owner": str(owner), "updated_unix_s": time.time()}
    return json.dumps({**head, **fields, "in_flight": flying}).encode()


def decode(raw: bytes, owner: Owner, state: OwnerState) -> Status:
    """A `Status` out of a file's content.

    Raises:
        ValueError, KeyError, TypeError, OverflowError, RecursionError: it is none.
    """
    document = json.loads(raw)
    if document["format"] != _FORMAT or document["format_version"] != _VERSION or document["owner"] != str(owner):
        raise ValueError("not a status file of this version and owner")
    last = document["last"]
    return Status(
        owner=owner,
        owner_state=state,
        root=str(document["root"])[:4096],
        rank=int(document["rank"]),
        world_size=int(document["world_size"]),
        updated_unix_s=_number(document["updated_unix_s"]),
        in_flight=tuple(_fields(item, _FLYING) for item in document["in_flight"][:MAX_FLYING]),
        queue_bytes=int(document["queue_bytes"]),
        queue_chunks=int(document["queue_chunks"]),
        written_bytes=int(document["written_bytes"]),
        bytes_per_s=_number(document["bytes_per_s"]),
        num_committed=int(document["num_committed"]),
        num_failed=int(document["num_failed"]),
        num_aborted=int(document["num_aborted"]),
        last=None if last is None else _fields(last, _LAST),
    )


def _fields(item: Any, kinds: dict[str, type]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name, kind in kinds.items():
        value = item[name]
        if kind is str:
            checked[name] = None if value is None else str(value)[:1000]
        else:
            checked[name] = int(value) if kind is int else _number(value)
    return checked


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is no number")
    return number
