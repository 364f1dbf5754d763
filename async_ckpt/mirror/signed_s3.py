"""The requests to S3 that the library has no call for, signed here (Signature Version 4): unfinished multipart uploads
are listed and aborted, and a body is sent with a wrong checksum. Google's store takes the first two as well, with a
bearer token.

Without keys that can be read here (credentials of the instance, say), what a killed process left is up to the bucket's
lifecycle rule, and that is logged once.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import http.client
import logging
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from html import unescape
from typing import Any

from ..errors import MirrorError, report
from .config import split_url
from .store import PassingFailure

_TIMEOUT_S = 20.0
_PAUSE_S, _MAX_PAUSE_S = 0.1, 5.0


class SignedS3:
    """A prefix of a bucket, by its URL. Any thread; blocks."""

    def __init__(self, url: str, options: Mapping[str, Any], endpoint: str | None, patience_s: float) -> None:
        scheme, self._bucket, self._prefix = split_url(url)
        self._is_google = scheme == "gs"
        self._patience_s = patience_s
        self._options = options
        self._endpoint = (endpoint or ("https://storage.googleapis.com" if self._is_google else "")).rstrip("/")
        self._url = url
        self._is_told = False

    def discard_parts(self, key: str) -> None:
        """Abort every unfinished upload of exactly this key. Raises MirrorError: the store refused, or cannot be
        reached."""
        credentials = self._credentials()
        if credentials is None:
            if not self._is_told:
                self._is_told = True
                report(
                    logging.WARNING,
                    "the credentials of %s cannot be read here: parts of interrupted uploads stay until the bucket's "
                    "lifecycle rule (AbortIncompleteMultipartUpload) removes them",
                    self._url,
                )
            return
        full = self._full(key)
        listed = self._request(credentials, "GET", "", {"uploads": "", "prefix": full})
        for upload in re.findall(r"<Upload>(.*?)</Upload>", listed, re.S):
            found = {name: unescape(value) for name, value in re.findall(r"<(Key|UploadId)>([^<]*)</", upload)}
            if found.get("Key") == full and "UploadId" in found:
                self._request(credentials, "DELETE", full, {"uploadId": found["UploadId"]})

    def refuses_damage(self, key: str) -> bool:
        """Whether a body with the SHA-256 of another one is refused; what cannot be tried counts as no."""
        credentials = self._credentials()
        if credentials is None or self._is_google:
            return False
        headers = {"x-amz-checksum-sha256": base64.b64encode(hashlib.sha256(b"sent").digest()).decode()}
        try:
            self._request(credentials, "PUT", self._full(key), {}, b"damaged", headers)
        except MirrorError as error:
            return isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code == 400
        return False

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _credentials(self) -> tuple[str, str, str | None] | None:
        """Key, secret and token; with a bearer token, that alone."""
        provider = self._options.get("credential_provider")
        given = provider() if provider is not None else {"token": self._options.get("bearer_token")}
        if self._is_google:
            return ("", "", str(given["token"])) if isinstance(given, Mapping) and given["token"] else None
        if provider is not None:
            if not isinstance(given, Mapping):
                return None
            return str(given["access_key_id"]), str(given["secret_access_key"]), given.get("token")
        key, secret = self._option("access_key_id"), self._option("secret_access_key")
        return (str(key), str(secret), self._option("session_token")) if key and secret else None

    def _option(self, name: str) -> str | None:
        for known in (name, f"aws_{name}"):
            if self._options.get(known):
                return str(self._options[known])
        return os.environ.get(f"AWS_{name.upper()}")

    def _address(self, region: str, key: str) -> str:
        quoted = urllib.parse.quote(key, safe="/-_.~")
        if self._endpoint and str(self._options.get("virtual_hosted_style_request", "")).lower() == "true":
            return f"{self._endpoint}/{quoted}"
        if self._endpoint:
            return f"{self._endpoint}/{self._bucket}/{quoted}".rstrip("/")
        return f"https://s3.{region}.amazonaws.com/{self._bucket}/{quoted}".rstrip("/")

    def _request(
        self,
        credentials: tuple[str, str, str | None],
        method: str,
        key: str,
        query: Mapping[str, str],
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> str:
        region = self._option("region") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        address = self._address(region, key)
        give_up_s, pause_s = time.monotonic() + self._patience_s, _PAUSE_S
        while True:
            request = _signed(credentials, region, method, address, query, body, headers or {})
            failure: Exception
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
                    return str(reply.read().decode("utf-8", "replace"))
            except urllib.error.HTTPError as error:
                with error:
                    if error.code == 404 and method == "DELETE":
                        # Aborted by somebody else, or finished: nothing is left to discard.
                        return ""
                    if error.code < 500 and error.code != 429:
                        told = f"{method} of {key or 'unfinished uploads'!r} was refused: {error}"
                        raise MirrorError(told, url=self._url) from error
                failure = error
            except (OSError, http.client.HTTPException) as error:
                failure = error
            if time.monotonic() > give_up_s:
                told = f"{method} of {key or 'unfinished uploads'!r} failed: {failure}"
                raise PassingFailure(told, url=self._url) from failure
            time.sleep(pause_s)
            pause_s = min(_MAX_PAUSE_S, 2 * pause_s)


def _signed(
    credentials: tuple[str, str, str | None],
    region: str,
    method: str,
    address: str,
    query: Mapping[str, str],
    body: bytes,
    more_headers: Mapping[str, str],
) -> urllib.request.Request:
    access_key, secret, token = credentials
    canonical_query = "&".join(f"{_quoted(name)}={_quoted(value)}" for name, value in sorted(query.items()))
    url = f"{address}?{canonical_query}" if query else address
    if not access_key:
        return urllib.request.Request(url, method=method, headers={"authorization": f"Bearer {token}"})
    now = datetime.datetime.now(datetime.timezone.utc)
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    parsed = urllib.parse.urlsplit(address)
    digest = hashlib.sha256(body).hexdigest()
    headers = {"host": parsed.netloc, "x-amz-content-sha256": digest, "x-amz-date": stamp, **more_headers}
    if token:
        headers["x-amz-security-token"] = token
    names = ";".join(sorted(headers))
    lines = [
        method,
        parsed.path or "/",
        canonical_query,
        *(f"{name}:{headers[name]}" for name in sorted(headers)),
        "",
        names,
        digest,
    ]
    scope = f"{day}/{region}/s3/aws4_request"
    to_sign = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256("\n".join(lines).encode()).hexdigest()))
    secret_key = f"AWS4{secret}".encode()
    for part in (day, region, "s3", "aws4_request"):
        secret_key = hmac.new(secret_key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(secret_key, to_sign.encode(), hashlib.sha256).hexdigest()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    del headers["host"]
    return urllib.request.Request(url, data=body or None, method=method, headers=headers)


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="-_.~")
