"""What a mirror is: where it lies, how much it may use, what its failure means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError, check_int, check_positive

MIN_PART_BYTES = 5 << 20
MAX_PART_BYTES = 1 << 30
MAX_PARTS = 10_000
"""Stores take at most so many parts of one object, and none but the last below `MIN_PART_BYTES`."""
SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "file")

_URL = re.compile(r"([a-z0-9]+)://([^/?#\s]*)(/[^?#\0]*)?")


@dataclass(frozen=True)
class Mirror:
    """A place to which committed checkpoints are copied, behind training. Needs the extra ``async-ckpt[remote]``,
    except ``file://``.

    Raises:
        ConfigError: a field has a wrong type, unit or range; the message names the field and the fix.
    """

    url: str
    """``s3://bucket/run``, ``gs://bucket/run``, ``az://container/run`` or ``file:///mount/run``: where the tags lie."""

    parallel: int = 4
    """Parts on their way at once, over all files. Memory is at most `parallel * part_bytes`, beside the 20 MB of the
    process that uploads."""

    part_bytes: int = 16 << 20
    """Size of one part of an upload, in bytes; an object has at most 10,000 parts."""

    max_bytes_per_s: float | None = None
    """Bound of the upload rate, in bytes per second; None for none."""

    on_failure: Literal["warn", "raise"] = "warn"
    """Whether a checkpoint that could not be mirrored is a warning, or an error of the next `create` and of `close`.
    `pending.mirrored` raises it either way. It is tried again with the next commit, and each `retry_timeout_s`."""

    retention: Any = None
    """Which older checkpoints to delete in the store after each upload, such as `KeepLast(3)`; None keeps all."""

    retry_timeout_s: float = 180.0
    """How long one request is tried again after errors that may pass, in seconds."""

    request_timeout_s: float = 60.0
    """How long one request may take, in seconds: at least what one part needs at the slowest rate you accept."""

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Credentials, endpoint, region and the like, as ``obstore.store.from_url`` takes them. Without them: the
    environment."""

    def __post_init__(self) -> None:
        scheme, bucket, prefix = split_url(self.url)
        # One name for one place, however it was typed: what is known of a mirror is kept by its URL.
        object.__setattr__(self, "url", "/".join(filter(None, (f"{scheme}://{bucket}", prefix.lstrip("/")))))
        for name, low, high in (("parallel", 1, 256), ("part_bytes", MIN_PART_BYTES, MAX_PART_BYTES)):
            check_int(f"Mirror: {name}", getattr(self, name), low, high)
        for name in ("max_bytes_per_s", "retry_timeout_s", "request_timeout_s"):
            value = getattr(self, name)
            if value is not None or name != "max_bytes_per_s":
                check_positive(f"Mirror: {name}", value, "number")
        if self.on_failure not in ("warn", "raise"):
            raise ConfigError(f"Mirror: on_failure must be 'warn' or 'raise', not {self.on_failure!r}")
        if self.retention is not None and not callable(getattr(self.retention, "kept", None)):
            raise ConfigError(f"Mirror: retention must be a policy such as KeepLast(3), not {self.retention!r}")
        if not isinstance(self.options, Mapping):
            raise ConfigError(
                f"Mirror: options must be a mapping of names to values, not {type(self.options).__name__}"
            )


def split_url(url: str) -> tuple[str, str, str]:
    """Scheme, bucket (empty for a file) and prefix of a mirror's URL, which is taken as it stands ("%20" is no space).
    The prefix has no slash at its end, at its beginning only that of a file, and no empty components. Raises
    ConfigError: no such scheme, no bucket, or a query in it."""
    match = _URL.fullmatch(url) if isinstance(url, str) else None
    if match is None or match[1] not in SCHEMES:
        raise ConfigError(
            f"a mirror's URL is like s3://bucket/run, gs://, az:// or file:///path, not {str(url)[:200]!r}"
        )
    scheme, bucket, path = match[1], match[2], match[3] or ""
    if (scheme == "file") == bool(bucket):
        raise ConfigError(
            f"{url!r} " + ("has a host: write file:///path" if bucket else "names no bucket or container")
        )
    parts = [part for part in path.split("/") if part]
    if any(part in (".", "..") or not part.isprintable() for part in parts):
        raise ConfigError(f"{url!r} has '.', '..' or a control character in its path; give the plain path")
    return scheme, bucket, ("/" if scheme == "file" and parts else "") + "/".join(parts)
