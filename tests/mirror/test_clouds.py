"""Azure and Google, by their own clients: Azure's emulator where it is installed (``npm install -g azurite``), and
Google's dialect of the S3 protocol in front of a real server."""

from __future__ import annotations

import hashlib
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from async_ckpt import AsyncCheckpointEngine, Catalog, KeepLast, Mirror, MirrorError
from async_ckpt.mirror.remote import RemoteFileSystem
from async_ckpt.mirror.store import ConditionFailed

from ..support.comparing import same
from .making import SMALL, big, check_store, commit_and_send, mirroring, remote_content
from .proxy import Fault, Proxy
from .servers import BUCKET, Azurite, client, unfinished_uploads
from .test_reading import state
from .test_upload import root_of

pytestmark = pytest.mark.wide


_UNCHECKED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class GoogleDialect(Proxy):
    """Generations instead of entity tags in conditions, and a bearer token: the rest of Google's XML interface is
    S3's."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.tags: dict[str, str] = {}

    def ask(self, request: Any, body: bytes, *, half: bool = False) -> tuple[int, list[tuple[str, str]], bytes]:
        wanted = request.headers["x-goog-if-generation-match"]
        assert request.headers["Authorization"] == "Bearer token"
        request.headers.replace_header("Authorization", _UNCHECKED)
        if wanted == "0":
            request.headers["If-None-Match"] = "*"
        elif wanted is not None:
            request.headers["If-Match"] = self.tags.get(wanted, '"stranger"')
        status, headers, reply = super().ask(request, body, half=half)
        for name, value in [*headers]:
            if name.lower() == "etag":
                generation = str(int(hashlib.sha256((request.path + value).encode()).hexdigest()[:12], 16))
                self.tags[generation] = value
                headers.append(("x-goog-generation", generation))
        return status, headers, reply


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: Any) -> Iterator[Azurite]:
    if shutil.which("azurite-blob") is None:
        pytest.skip("needs azurite-blob: npm install -g azurite")
    server = Azurite(tmp_path_factory.mktemp("azurite"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["az", "gs"])
def mirror(request: Any, prefix: str) -> Iterator[Mirror]:
    patience: dict[str, Any] = {"part_bytes": 5 << 20, "retry_timeout_s": 20.0, "request_timeout_s": 20.0}
    if request.param == "az":
        options = request.getfixturevalue("azurite").options()
        yield Mirror(f"az://{BUCKET}/{prefix}", options=options, on_failure="raise", **patience)
        return
    with GoogleDialect(request.getfixturevalue("moto").endpoint) as front:
        options = {"base_url": front.endpoint, "bearer_token": "token"}
        yield Mirror(f"gs://{BUCKET}/{prefix}", options=options, on_failure="raise", **patience)


def objects(mirror: Mirror) -> list[str]:
    store = RemoteFileSystem(mirror).store

    def below(folder: str) -> list[str]:
        folders, names = store.list(folder)
        return [*names, *(name for inner in folders for name in below(f"{folder}/{inner}".strip("/")))]

    return below("")


def test_mirrored_replaced_and_read_back(mirror: Mirror, tmp_path: Path) -> None:
    with mirroring(tmp_path, mirror) as made:
        made.check()
        assert made.unconditional == []
        commit_and_send(made, tmp_path, "step-1", {**big(), "empty.bin": b""}).result(60)
        assert remote_content(mirror, "step-1") == {**big(), "empty.bin": b""}
        commit_and_send(made, tmp_path, "step-1", SMALL, created=2, overwrite="replace").result(60)
    assert remote_content(mirror, "step-1") == SMALL and len(objects(mirror)) == len(SMALL) + 1


def test_what_a_killed_process_left_half_sent_is_aborted_by_google_too(moto: Any, tmp_path: Path, prefix: str) -> None:
    with GoogleDialect(moto.endpoint) as front:
        options = {"base_url": front.endpoint, "bearer_token": "token"}
        store = RemoteFileSystem(Mirror(f"gs://{BUCKET}/{prefix}", options=options)).store
        unknown = client(moto).create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/a/b.pt")
        assert unknown["UploadId"] and unfinished_uploads(moto, prefix) == [f"{prefix}/a/b.pt"]
        store.discard_parts("a/b.pt")
    assert unfinished_uploads(moto, prefix) == []


def test_googles_token_goes_to_no_endpoint_of_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        do_GET = do_CONNECT

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            here = f"http://127.0.0.1:{server.server_port}"
            monkeypatch.setenv("AWS_ENDPOINT_URL", here)
            monkeypatch.setenv("https_proxy", here)
            # The opener that earlier tests have left knows of no proxy.
            urllib.request.install_opener(None)
            mirror = Mirror(f"gs://{BUCKET}/a", options={"bearer_token": "token"}, retry_timeout_s=0.01)
            with pytest.raises(MirrorError):
                RemoteFileSystem(mirror).store.discard_parts("b.pt")
        finally:
            urllib.request.install_opener(None)
            server.shutdown()
            thread.join()
    assert set(asked) == {"storage.googleapis.com:443"}


def test_another_run_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    first, second = root_of(tmp_path / "a"), root_of(tmp_path / "b")
    with mirroring(first, mirror) as one, mirroring(second, mirror) as other:
        commit_and_send(one, first, "step-1", SMALL).result(60)
        with pytest.raises(ConditionFailed, match="another run"):
            commit_and_send(other, second, "step-1", big(), created=2).result(60)
        other.raise_unacknowledged()
    assert remote_content(mirror, "step-1") == SMALL and len(objects(mirror)) == len(SMALL) + 1


def test_an_engine_mirrors_retains_and_restores(mirror: Mirror, tmp_path: Path) -> None:
    from dataclasses import replace

    kept = replace(mirror, retention=KeepLast(2))
    with AsyncCheckpointEngine(tmp_path / "old", staging_bytes=16 << 20, mirrors=(kept,)) as engine:
        for step in range(4):
            engine.create(f"step-{step}")
            engine.save(state(step), "model.pt")
            engine.commit(f"step-{step}").mirrored.result(60)
    assert check_store(mirror) == ["step-2", "step-3"] and len(objects(mirror)) == 4
    assert Catalog(mirror.url, RemoteFileSystem(mirror)).latest() == "step-3"
    with AsyncCheckpointEngine(tmp_path / "new", staging_bytes=16 << 20, mirrors=(mirror,)) as engine:
        assert engine.latest(tier="any") == "step-3"
        assert same(engine.load("step-3/model.pt"), state(3))


def test_a_server_that_fails_once_at_each_request(mirror: Mirror, tmp_path: Path) -> None:
    from dataclasses import replace

    seen: set[tuple[str, str]] = set()

    def once(number: int, method: str, path: str) -> Fault:
        is_new = (method, path) not in seen and ".probe" not in path
        seen.add((method, path))
        return "503" if is_new else None

    name = "endpoint" if "endpoint" in mirror.options else "base_url"
    upstream = mirror.options[name]
    with Proxy(upstream, once) as proxy:
        path = upstream.partition("//")[2].partition("/")[2]
        options = {**mirror.options, name: "/".join((proxy.endpoint, path)).rstrip("/")}
        with mirroring(tmp_path, replace(mirror, options=options)) as made:
            commit_and_send(made, tmp_path, "step-1", big()).result(90)
    assert remote_content(mirror, "step-1") == big()
