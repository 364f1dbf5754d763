"""Checkpoints on disk, mirrors of them, and the oracle that every test asks at its end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from async_ckpt.mirror.config import Mirror
from async_ckpt.mirror.mirrors import Mirrors
from async_ckpt.mirror.pending import PendingMirror
from async_ckpt.mirror.remote import remote_catalog
from async_ckpt.storage.filesystem import FileSystem

from ..support.making import commit as commit
from ..support.making import content as content
from .proxy import Fault, Proxy
from .servers import BUCKET, client, keys

PART_BYTES = 5 << 20
SMALL = {"model.bin": b"m" * 9000, "sub/optim.bin": b"o" * 5000}


def big(seed: int = 0) -> dict[str, bytes]:
    """A checkpoint whose first file needs three parts."""
    block = bytes((seed + k) % 251 for k in range(4096))
    return {"model.bin": block * (12 << 20 >> 12) + b"tail", "small.bin": b"s" * 100}


def s3_mirror(server: Any, prefix: str, **fields: Any) -> Mirror:
    """A mirror with little patience and short pauses, so that a test of a failure is short."""
    short = {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(seconds=1), "base": 2}
    options = dict(server.options(), retry_config={"backoff": short}, **fields.pop("options", {}))
    if "endpoint" in fields:
        options["endpoint"] = fields.pop("endpoint")
    given = {"part_bytes": PART_BYTES, "retry_timeout_s": 10.0, "request_timeout_s": 5.0, **fields}
    return Mirror(f"s3://{BUCKET}/{prefix}", options=options, **given)


@contextlib.contextmanager
def mirroring(
    root: Path, *mirrors: Mirror, fs: FileSystem | None = None, close_s: float = 20.0, **more: Any
) -> Iterator[Mirrors]:
    made = Mirrors(mirrors, filesystem=fs or FileSystem(), root=os.fspath(root), **more)
    try:
        yield made
    finally:
        made.close(close_s)


@contextlib.contextmanager
def mirroring_through(
    plan: Callable[[int, str, str], Fault], server: Any, root: Path, prefix: str, **fields: Any
) -> Iterator[Mirrors]:
    """To a server with a proxy in front that breaks what `plan` says."""
    with (
        Proxy(server.endpoint, plan) as proxy,
        mirroring(root, s3_mirror(server, prefix, endpoint=proxy.endpoint, **fields)) as made,
    ):
        yield made


def commit_and_send(
    made: Mirrors, root: Path, tag: str, files: dict[str, bytes] = SMALL, *, created: int = 1, **more: Any
) -> PendingMirror:
    pending = made.expect(tag)
    commit(root, tag, files, created=created, **more)
    made.committed(pending, None)
    return pending


def remote_content(mirror: Mirror, tag: str) -> dict[str, bytes] | None:
    """The files of a mirrored tag, after full verification; None if it is not there."""
    catalog = remote_catalog(mirror)
    if tag not in catalog.tags():
        return None
    catalog.verify(tag).raise_if_bad()

    def read(checkpoint: Any) -> dict[str, bytes]:
        found = {}
        for entry in checkpoint.manifest.files:
            file = checkpoint.open_raw(entry)
            data = bytearray(entry.size_bytes)
            file.pread_into(memoryview(data), 0)
            file.close()
            found[entry.path] = bytes(data)
        return found

    return catalog.read(tag, read)


def check_store(mirror: Mirror) -> list[str]:
    """Every manifest that can be read names only whole, right objects; returns the tags."""
    catalog = remote_catalog(mirror)
    tags = catalog.tags()
    for tag in tags:
        catalog.verify(tag).raise_if_bad()
    return tags


def garbage(server: Any, prefix: str) -> list[str]:
    """Objects below the prefix that no manifest names."""
    s3 = client(server)
    named = set()
    there = keys(server, prefix + "/")
    for key in there:
        if key.endswith("/manifest.json"):
            from async_ckpt.format.manifest import decode

            raw = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            manifest = decode(raw, source=key)
            named |= {key, *(f"{prefix}/{manifest.tag}/{manifest.attempt}/{entry.path}" for entry in manifest.files)}
    # A crash leaves the few bytes that it tried the store with.
    return [key for key in there if key not in named and "/.probe-" not in key]


def priorities(pid: int) -> dict[str, tuple[int, int]]:
    """Niceness and class of disk priority (3: idle) of each thread of a process; names are of this process alone."""
    found = {}
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    for thread in os.listdir(f"/proc/{pid}/task"):
        name = names.get(int(thread)) or Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip()
        io_class = ctypes.CDLL(None).syscall(252, 1, int(thread)) >> 13
        found[f"{name}/{thread}"] = os.getpriority(os.PRIO_PROCESS, int(thread)), io_class
    return found


def upload_processes(pid: int | str = "self") -> list[int]:
    """The processes that upload for a process."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):
            for child in children.read_text().split():
                if b"mirror.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found
