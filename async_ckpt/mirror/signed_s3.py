"""The requests to S3 that the library has no call for, signed here (Signature Version 4): unfinished multipart uploads
are listed and aborted, and a body is sent with a wrong checksum. Google's store takes the first two as well, with a
bearer token.

Without keys that can be read here (credentials of the instance, say), what a killed process left is up to the bucket's
lifecycle rule, and that is logged once.
"""

from __future__ import annotations

import base64
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

_Credentials = tuple[str, str, "str | None"]
"""Key, secret and token; with a bearer token, that alone."""
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

    def _credentials(self) -> _Credentials | None:
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
        is_hosted = str(self._options.get("virtual_hosted_style_request", "")).lower() == "true"
        bucket = "" if self._endpoint and is_hosted else f"/{self._bucket}"
        end = f"/{key}" if key or not bucket else ""
        return (self._endpoint or f"https://s3.{region}.amazonaws.com") + urllib.parse.quote(bucket + end, safe="/-_.~")

    def _request(
        self,
        credentials: _Credentials,
        method: str,
        key: str,
        query: Mapping[str, str],
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> str:
        what = f"{method} of {key or 'unfinished uploads'!r}"
        give_up_s, pause_s = time.monotonic() + self._patience_s, _PAUSE_S
        while True:
            request = self._signed(credentials, method, key, query, body, headers or {})
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
                        raise MirrorError(f"{what} was refused: {error}", url=self._url) from error
                failure = error
            except (OSError, http.client.HTTPException) as error:
                failure = error
            if time.monotonic() > give_up_s:
                raise PassingFailure(f"{what} failed: {failure}", url=self._url) from failure
            time.sleep(pause_s)
            pause_s = min(_MAX_PAUSE_S, 2 * pause_s)

    def _signed(
        self,
        credentials: _Credentials,
        method: str,
        key: str,
        query: Mapping[str, str],
        body: bytes,
        more_headers: Mapping[str, str],
    ) -> urllib.request.Request:
        access_key, secret, token = credentials
        region = self._option("region") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        address = self._address(region, key)
        parsed = urllib.parse.urlsplit(address)
        asked = "&".join(f"{_quoted(name)}={_quoted(value)}" for name, value in sorted(query.items()))
        url = f"{address}?{asked}" if asked else address
        if not access_key:
            return urllib.request.Request(url, method=method, headers={"authorization": f"Bearer {token}"})
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        digest = hashlib.sha256(body).hexdigest()
        headers = {"host": parsed.netloc, "x-amz-content-sha256": digest, "x-amz-date": stamp, **more_headers}
        if token:
            headers["x-amz-security-token"] = token
        names, told = ";".join(sorted(headers)), "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        canonical = "\n".join((method, parsed.path or "/", asked, told, names, digest))
        scope = (stamp[:8], region, "s3", "aws4_request")
        lines = ("AWS4-HMAC-SHA256", stamp, "/".join(scope), hashlib.sha256(canonical.encode()).hexdigest())
        signature = f"AWS4{secret}".encode()
        for part in (*scope, "\n".join(lines)):
            signature = hmac.digest(signature, part.encode(), "sha256")
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={access_key}/{'/'.join(scope)}, SignedHeaders={names}, "
            f"Signature={signature.hex()}"
        )
        del headers["host"]
        return urllib.request.Request(url, data=body or None, method=method, headers=headers)


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="-_.~")
