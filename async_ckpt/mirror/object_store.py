"""S3, GCS and Azure through obstore, which is imported when the first store is made.

Requests are tried again by the library, within the mirror's `retry_timeout_s`. S3 is asked to check the SHA-256 of
every part, which the library computes anyway to sign it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from html import unescape
from importlib import import_module
from typing import Any
from urllib.parse import quote

from ..errors import CheckpointError, ConfigError, MirrorError
from .config import Mirror, split_url
from .signed_s3 import SignedS3
from .store import ANY_VERSION, PROBE_TIMEOUT_S, AbortedElsewhere, ConditionFailed, ObjectInfo, PassingFailure

_MAX_RETRIES = 100
_HINTS = {
    "RequestTimeTooSkewed": "this machine's clock differs from the store's: set it (NTP)",
    "InvalidAccessKeyId": "the access key is unknown to the store: check the credentials",
    "SignatureDoesNotMatch": "the secret key is wrong, or this machine's clock: check the credentials",
    "ExpiredToken": "the credentials have expired: renew them",
    "AccessDenied": "the credentials do not allow this: check their permissions",
    "NoSuchBucket": "there is no such bucket: make it, or correct the URL",
    "404": "there is no such bucket, or no store at the endpoint: check both",
    "400": "the store takes no such request: check the region, the credentials and this machine's clock",
    "401": "the store knows nobody of these credentials",
    "403": "the credentials do not allow this: check them, and this machine's clock",
}


_DAMAGED_ON_THE_WAY = (
    "BadDigest",
    "InvalidDigest",
    "IncompleteBody",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
)


class ObjectStore:
    """See `store.Store`. Raises ConfigError: obstore is not installed, or does not take the options."""

    def __init__(self, mirror: Mirror, *, quick: bool = False) -> None:
        self.url = mirror.url
        try:
            self._obstore: Any = import_module("obstore")
            from_url = import_module("obstore.store").from_url
        except ImportError as error:
            raise ConfigError(
                f"a mirror at {mirror.url} needs obstore: install the extra async-ckpt[remote] ({error})"
            ) from error
        exceptions = self._obstore.exceptions
        self._unmet = exceptions.AlreadyExistsError, exceptions.PreconditionError
        scheme, bucket, prefix = split_url(mirror.url)
        options = dict(mirror.options)
        limit_s = PROBE_TIMEOUT_S if quick else float("inf")
        patience_s = min(mirror.retry_timeout_s, limit_s)
        client: dict[str, Any] = {"timeout": timedelta(seconds=min(mirror.request_timeout_s, limit_s))}
        client["connect_timeout"] = timedelta(seconds=PROBE_TIMEOUT_S / 2)
        if (_endpoint(scheme, options) or "").startswith("http://"):
            client["allow_http"] = True
        options["client_options"] = {**client, **options.get("client_options", {})}
        backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=15), "base": 2}
        retry = {"max_retries": 2 if quick else _MAX_RETRIES, "retry_timeout": timedelta(seconds=patience_s)}
        options["retry_config"] = {**retry, "backoff": backoff, **options.get("retry_config", {})}
        if scheme in ("s3", "s3a"):
            options.setdefault("checksum_algorithm", "SHA256")
            # Deleting in bulk is a POST, which is not sent again when the connection breaks.
            options.setdefault("disable_bulk_delete", True)
        try:
            # The library takes "%20" for a space.
            self._store = from_url(f"{scheme}://{bucket}/{quote(prefix)}", **options)
        except Exception as error:
            raise ConfigError(f"the options of the mirror {mirror.url} are refused: {_first_line(error)}") from error
        speaks_s3 = scheme in ("s3", "s3a", "gs")
        self._s3 = SignedS3(self.url, mirror.options, _endpoint(scheme, options), patience_s) if speaks_s3 else None

    def put(self, key: str, parts: Iterator[memoryview], *, size_bytes: int, part_bytes: int, parallel: int) -> None:
        is_large = size_bytes > part_bytes
        how = {"chunk_size": part_bytes, "max_concurrency": parallel} if is_large else {"use_multipart": False}
        try:
            with self._telling(f"writing {key!r}", may_lack=is_large):
                self._obstore.put(self._store, key, parts if is_large else next(parts), **how)
        except FileNotFoundError as error:
            raise AbortedElsewhere(f"the upload of {key!r} was aborted by another process", url=self.url) from error

    def put_if(self, key: str, data: bytes, replaced: ObjectInfo | None) -> None:
        mode: object = "create" if replaced is None else "overwrite"
        if replaced is not None and replaced is not ANY_VERSION:
            # GCS wants the version, S3 and Azure the tag; the library takes no None.
            mode = {"e_tag": replaced.e_tag} | ({"version": replaced.version} if replaced.version is not None else {})
        with self._telling(f"writing {key!r}"):
            try:
                self._obstore.put(self._store, key, data, mode=mode, use_multipart=False)
            except self._unmet as error:
                raise ConditionFailed(f"writing {key!r}: the condition does not hold", url=self.url) from error

    def read(self, key: str, max_bytes: int) -> tuple[ObjectInfo, bytes] | None:
        with contextlib.suppress(FileNotFoundError), self._telling(f"reading {key!r}", may_lack=True):
            found = self._obstore.get(self._store, key)
            info = _info(found.meta)
            return info, bytes(found.bytes()) if info.size_bytes <= max_bytes else b""
        return None

    def get_range(self, key: str, offset: int, num_bytes: int) -> memoryview:
        if not num_bytes:
            return memoryview(b"")
        with self._telling(f"reading {key!r}", may_lack=True):
            try:
                return memoryview(self._obstore.get_range(self._store, key, start=offset, length=num_bytes))
            except Exception as error:
                # It ends before the first byte asked for.
                if "status code: 416" in str(error):
                    return memoryview(b"")
                # Some servers (rclone) say 200 where they mean 206, which the library refuses to trust.
                if "non-partial response" not in str(error):
                    raise
            data, at = bytearray(), 0
            for chunk in self._obstore.get(self._store, key).stream(min_chunk_size=1 << 20):
                data += memoryview(chunk)[max(0, offset - at) : max(0, offset + num_bytes - at)]
                at += len(chunk)
                if at >= offset + num_bytes:
                    break
            return memoryview(data)

    def head(self, key: str) -> ObjectInfo | None:
        with contextlib.suppress(FileNotFoundError), self._telling(f"looking at {key!r}", may_lack=True):
            return _info(self._obstore.head(self._store, key))
        return None

    def list(self, folder: str) -> tuple[Sequence[str], Sequence[str]]:
        with self._telling(f"listing {folder!r}"):
            found = self._obstore.list_with_delimiter(self._store, folder or None)
        # Some servers show the folder itself as an object in it.
        paths = [str(meta["path"]).rstrip("/") for meta in found["objects"]]
        objects = [path.rpartition("/")[2] for path in paths if path != folder]
        return [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]], objects

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                self._delete(key)
            except PassingFailure:
                # The library does not send it again where the connection breaks.
                self._delete(key)

    def _delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._telling(f"deleting {key!r}", may_lack=True):
            self._obstore.delete(self._store, key)

    def discard_parts(self, key: str) -> None:
        if self._s3 is not None:
            self._s3.discard_parts(key)

    def refuses_damage(self, key: str) -> bool:
        return self._s3 is not None and self._s3.refuses_damage(key)

    @contextlib.contextmanager
    def _telling(self, what: str, *, may_lack: bool = False) -> Iterator[None]:
        """Raise what the library raises as the mirror's errors; with `may_lack` FileNotFoundError, where it is the
        object that is not there, and not its bucket."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            if may_lack and isinstance(error, FileNotFoundError) and "<Code>NoSuchBucket</Code>" not in str(error):
                raise FileNotFoundError(f"{what} failed, {self.url} has no such object") from error
            raise self._translated(error, what) from error

    def _translated(self, error: Exception, what: str) -> MirrorError:
        text = str(error)
        code = re.search(r"<Code>(\w+)</Code>", text)
        status = re.search(r"status code: (\d+)", text)
        hint = next((_HINTS[found[1]] for found in (code, status) if found and found[1] in _HINTS), "")
        said = re.search(r"<Message>([^<]*)</Message>", text)
        if said and "request time" in said[1].casefold():
            # Some call this by a code of its own, some a lack of permission.
            hint = _HINTS["RequestTimeTooSkewed"]
        if not hint and not status:
            hint = "the store cannot be reached: check the endpoint and the network"
        reason = f"{code[1]}: {unescape(said[1])}" if code and said else _first_line(error)
        may_pass = status is None or int(status[1]) >= 500 or status[1] in ("408", "409", "429")
        may_pass |= code is not None and code[1] in _DAMAGED_ON_THE_WAY
        kind = PassingFailure if may_pass else MirrorError
        return kind(f"{what} failed, {hint + '; ' if hint else ''}the store said: {reason[:300]}", url=self.url)


def _endpoint(scheme: str, options: dict[str, Any]) -> str | None:
    """As the options name it, or for S3 the environment. A token of Google's goes to no endpoint of S3's."""
    if scheme == "gs":
        return options.get("base_url")
    names = ("endpoint", "aws_endpoint_url_s3", "endpoint_url", "aws_endpoint")
    from_env = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT") if scheme in ("s3", "s3a") else ()
    known = (*map(options.get, names), *map(os.environ.get, from_env))
    return next((found for found in known if found), None)


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(int(meta["size"]), str(meta["e_tag"] or ""), meta["version"])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
