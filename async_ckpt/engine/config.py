"""The engine's configuration: one frozen dataclass, every field with its unit and the reason for its default.

Bad fields, units and combinations are refused when the configuration is made, with the fix named.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ConfigError, check_int, check_positive
from ..format.names import StrPath, is_url
from ..host.facts import available_memory_bytes, local_world_size
from ..host.memory import PAGE_BYTES
from ..metrics import Observer
from ..mirror.config import Mirror
from ..ranks.coordinator import Coordinator
from ..retention import RetentionPolicy
from ..storage.filesystem import FileSystem
from .pending import Tolerate

MAX_CHUNK_BYTES = 1 << 30
DEFAULT_CHUNK_BYTES = 16 << 20
MAX_AUTO_STAGING_BYTES = 16 << 30


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an `AsyncCheckpointEngine` works; immutable and checked as a whole.

    Raises:
        ConfigError: a field has a wrong type, unit or range; the message names the field and the fix.
    """

    root: StrPath
    """Directory that holds the checkpoints, one sub-directory per tag. Made if it is missing."""

    staging_bytes: int | Literal["auto"] = "auto"
    """Upper bound of host memory for snapshots, in bytes. "auto" is a quarter of the memory available now (of the
    cgroup's limit, where that is lower), divided by LOCAL_WORLD_SIZE, at most 16 GiB. Give at least the size of one
    checkpoint to make saves lazy; a larger checkpoint streams through."""

    chunk_bytes: int | Literal["auto"] = "auto"
    """Size of one staging chunk and of one write, in bytes, a multiple of 4096. "auto" is 16 MiB, or an eighth of
    `staging_bytes` where that is less: large enough for a disk's full rate, small enough to overlap copy, CRC and
    write."""

    num_writers: int | Literal["auto"] = "auto"
    """Chunks that are written at once, over all files. "auto" is up to 16, fewer where many threads copy."""

    io_mode: Literal["auto", "direct", "buffered"] = "auto"
    """O_DIRECT or the page cache; "auto" is O_DIRECT from 1 MiB on. "direct" falls back per file where it is
    refused.
    """

    overwrite: Literal["refuse", "replace"] = "refuse"
    """What `create` of a committed tag does: raise, or exchange the old for the new one atomically at commit."""

    max_pending_commits: int = 4
    """Commits in flight before `commit` waits; bounds the work that is lost when the process dies."""

    backpressure_timeout_s: float = 1800.0
    """How long `save`, `commit` and the guard wait for the disk before `BackpressureTimeout`, in seconds."""

    close_timeout_s: float = 1800.0
    """How long leaving the block, `close` and interpreter exit wait for pending commits, in seconds."""

    format: Literal["torch", "safetensors"] = "torch"
    """File format of `save`; safetensors takes flat dicts of tensors only."""

    storage_alignment: int = 64
    """Alignment of every tensor's bytes in the file; 64 is torch's own and keeps files byte-identical to
    `torch.save`."""

    compact_views: bool = False
    """Write only the bytes that views cover, not their whole storages (torch writes whole storages)."""

    on_commit_failure: Literal["raise"] | Tolerate = "raise"
    """What a failed commit is: an error of the next `create` and of `close`, unless somebody has asked for it before;
    or, with ``Tolerate(consecutive=2, within_s=3600)``, a warning until so many have failed in a row. Older checkpoints
    stay either way."""

    rewrite: bool = False
    """Write a file once more, from staging memory to a new file, where its disk failed with EIO, ESTALE or ETIMEDOUT;
    or was full, and earlier commits and `retention` have made room since. Staging memory is kept until a file is
    synced, unless a save wants it: what does not fit there whole is not written again."""

    read_back: bool = False
    """Read every file back from the disk and compare its CRCs before the rename; costs a second pass of I/O."""

    pin_memory: bool | Literal["auto"] = "auto"
    """Page-locked staging memory, from which a device copies at full rate. "auto": where there is an accelerator that
    can."""

    reuse: Literal["auto", "off"] = "auto"
    """"auto": what did not change since the last checkpoint is shared with it and not written, where tensors of one
    path are the same objects, unchanged by their version counters and checksums: chunk by chunk where the file system
    has reflinks (xfs, btrfs), else a whole file by a hard link. Every checkpoint is complete, whatever becomes of the
    others; but a hard link is one file under two names: whoever edits or damages one of them has changed both."""

    reuse_frozen: Any = None
    """A module, or tensors, that never change again: while they have `requires_grad` False and the version counters of
    the last commit, they are not even copied, chunk by chunk of a file that can share them (see `reuse`); but those
    that are views of a larger storage are. Every 16th save of a path copies and compares all the same, and fails with
    `TornSnapshotError` where one was changed past its counter (``.data``, fused optimizers): the up to 15 checkpoints
    before hold it as it was, and verify."""

    sweep_on_start: bool = True
    """Remove what crashed processes left staged in `root`; never a live process's staging."""

    preflight: bool = True
    """Write, sync and rename one small file in `root` when the engine starts, on each node: a disk that cannot be
    written is an error then, and not after hours. A few milliseconds; nothing of it stays."""

    retention: RetentionPolicy | None = None
    """Which older checkpoints to delete after each commit; None keeps all."""

    mirrors: Sequence[Mirror] = ()
    """Where committed checkpoints are copied to, behind training: object stores, other disks. See `Mirror`."""

    keep_local_until_mirrored: bool = True
    """Where there are mirrors, `retention` deletes nothing that not all of them have had."""

    mirror_timeout_s: float = 600.0
    """How long leaving the block, `close` and interpreter exit wait for uploads, in seconds; what is left goes on at
    the next start.
    """

    uploaders_per_node: int | None = None
    """How many processes of one node upload at once, over all engines on this root; None: all of them."""

    coordinator: Coordinator | None = None
    """Commits as one among many ranks; None is a single process."""

    observers: tuple[Observer, ...] = ()
    """Told about every chunk, save and commit."""

    filesystem: FileSystem | None = None
    """The seam to the disk; None is the local file system. Tests inject faults here."""

    def __post_init__(self) -> None:
        if not isinstance(self.root, (str, os.PathLike)) or not os.fspath(self.root):
            raise ConfigError(f"root must be a non-empty path, not {self.root!r}")
        if "\0" in str(os.fspath(self.root)):
            raise ConfigError(f"root {self.root!r} holds a NUL character")
        if is_url(self.root):
            raise ConfigError(
                f"root must be a local directory, not {self.root!r}: give a store as mirrors=(Mirror(url),)"
            )
        self._check_sizes()
        # A field that takes one of a few values says by its type which.
        for name, kind in get_type_hints(EngineConfig).items():
            if kind is bool or get_origin(kind) is Literal:
                self._check_choice(name, *get_args(kind) or (True, False))
        self._check_frozen()
        if not isinstance(self.on_commit_failure, Tolerate):
            self._check_choice("on_commit_failure", "raise")
        if self.num_writers != "auto":
            check_int("num_writers", self.num_writers, 1, 256)
        check_int("max_pending_commits", self.max_pending_commits, 1, 1024)
        check_int("storage_alignment", self.storage_alignment, 1, 65536)
        if self.uploaders_per_node is not None:
            check_int("uploaders_per_node", self.uploaders_per_node, 1, 1024)
        for name in ("backpressure_timeout_s", "close_timeout_s", "mirror_timeout_s"):
            check_positive(name, getattr(self, name))
        self._check_mirrors()
        if self.pin_memory not in (True, False, "auto"):
            raise ConfigError(f"pin_memory must be True, False or 'auto', not {self.pin_memory!r}")

    def _check_sizes(self) -> None:
        if self.chunk_bytes != "auto":
            check_int("chunk_bytes", self.chunk_bytes, PAGE_BYTES, MAX_CHUNK_BYTES, " (bytes, e.g. 16 << 20)")
            if self.chunk_bytes % PAGE_BYTES:
                raise ConfigError(
                    f"chunk_bytes must be a multiple of {PAGE_BYTES} (direct I/O), not {self.chunk_bytes}"
                )
        if self.staging_bytes != "auto":
            check_int("staging_bytes", self.staging_bytes, 1, 1 << 50, " (bytes, e.g. 4 << 30 for 4 GiB)")
            smallest = PAGE_BYTES if self.chunk_bytes == "auto" else self.chunk_bytes
            if self.staging_bytes < smallest:
                raise ConfigError(
                    f"staging_bytes={self.staging_bytes} is smaller than one chunk ({smallest} bytes); "
                    "it is given in bytes (4 << 30 is 4 GiB): raise it or lower chunk_bytes"
                )

    def _check_frozen(self) -> None:
        frozen = self.reuse_frozen
        if frozen is not None and self.reuse == "off":
            raise ConfigError("reuse_frozen needs reuse='auto': what is not copied is shared with the last checkpoint")
        if frozen is None or (hasattr(frozen, "named_parameters") and not isinstance(frozen, type)):
            return
        tensors = (frozen,) if hasattr(frozen, "untyped_storage") or not isinstance(frozen, Iterable) else tuple(frozen)
        if isinstance(frozen, type) or not all(hasattr(tensor, "untyped_storage") for tensor in tensors):
            raise ConfigError(f"reuse_frozen must be a module or its parameters, not {frozen!r}")
        object.__setattr__(self, "reuse_frozen", tensors)

    def _check_mirrors(self) -> None:
        if not isinstance(self.mirrors, Sequence) or not all(isinstance(mirror, Mirror) for mirror in self.mirrors):
            raise ConfigError(f"mirrors must be a sequence of Mirror objects, not {self.mirrors!r}")
        urls = [mirror.url for mirror in self.mirrors]
        if len(set(urls)) < len(urls):
            raise ConfigError(f"mirrors: {max(urls, key=urls.count)!r} is there twice")
        for mirror in self.mirrors:
            if mirror.retention is not None and not isinstance(mirror.retention, RetentionPolicy):
                raise ConfigError(f"mirrors: retention must be a policy such as KeepLast(3), not {mirror.retention!r}")

    def _check_choice(self, name: str, *allowed: object) -> None:
        value = getattr(self, name)
        # 1 is equal to True, and not the same.
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")

    @classmethod
    def from_params(cls, params: ConfigParams, **overrides: Any) -> EngineConfig:
        """Build a configuration from a root, a mapping or a configuration; keyword arguments override.

        Raises:
            ConfigError: an unknown field (the nearest known name is suggested) or a bad value.
        """
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = dict(overrides)
        if isinstance(params, Mapping):
            given = {**params, **overrides}
        elif isinstance(params, (str, os.PathLike)):
            given = {"root": params, **overrides}
        elif params is not None and not isinstance(params, EngineConfig):
            raise ConfigError(f"expected a root path, a mapping or an EngineConfig, not {type(params).__name__}")
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                raise ConfigError(
                    f"unknown configuration field {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                )
        if isinstance(params, EngineConfig):
            return replace(params, **given)
        if "root" not in given:
            raise ConfigError("root is missing: give the directory that holds the checkpoints")
        return cls(**given)

    def resolved_staging_bytes(self) -> int:
        """`staging_bytes` as a number; "auto" is measured now (see the field)."""
        if self.staging_bytes != "auto":
            return self.staging_bytes
        share = available_memory_bytes() // 4 // local_world_size()
        floor = 2 * (DEFAULT_CHUNK_BYTES if self.chunk_bytes == "auto" else self.chunk_bytes)
        return max(floor, min(share, MAX_AUTO_STAGING_BYTES))

    def resolved_chunk_bytes(self) -> int:
        """`chunk_bytes` as a number; "auto" keeps at least eight chunks in staging."""
        if self.chunk_bytes != "auto":
            return self.chunk_bytes
        chunk, staging_bytes = DEFAULT_CHUNK_BYTES, self.resolved_staging_bytes()
        while chunk > PAGE_BYTES and chunk * 8 > staging_bytes:
            chunk //= 2
        return chunk


ConfigParams = EngineConfig | Mapping[str, Any] | StrPath | None
"""What an engine is made from: its configuration, some fields of that, or its root."""
