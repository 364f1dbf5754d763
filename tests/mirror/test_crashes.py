"""The process is killed at every request and at every step that changes its state; the next one goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.errors import MirrorError
from async_ckpt.host.process import Owner
from async_ckpt.mirror.config import Mirror
from async_ckpt.mirror.state import DIRECTORY, States
from async_ckpt.storage.filesystem import FileSystem

from ..support.stepping import until
from .making import (
    SMALL,
    big,
    check_store,
    commit,
    commit_and_send,
    content,
    garbage,
    mirroring,
    remote_content,
    s3_mirror,
)
from .proxy import Fault, Proxy
from .servers import BUCKET, unfinished_uploads
from .test_upload import root_of


@pytest.mark.wide
@pytest.mark.parametrize("at", [16, 21, 24])
def test_killed_at_a_request(at: int, moto: Any, tmp_path: Path, prefix: str) -> None:
    assert _killed(moto, tmp_path, prefix, request=at)


@pytest.mark.wide
@pytest.mark.parametrize("at", [1, 9, 16])
def test_killed_at_a_step_of_the_state(at: int, moto: Any, tmp_path: Path, prefix: str) -> None:
    assert _killed(moto, tmp_path, prefix, step=at)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["request", "step"])
def test_killed_at_every_request_and_every_step(killed: str, moto: Any, tmp_path: Path, prefix: str) -> None:
    at, is_killed = 0, True
    while is_killed:
        at += 1
        is_killed = _killed(moto, root_of(tmp_path / str(at)), f"{prefix}-{at}", **{killed: at})
    assert at > (30 if killed == "request" else 15)


def _begun(server: Any, root: Path, where: str) -> None:
    """One tag is mirrored and replaced on disk since, another one is new."""
    with mirroring(root, s3_mirror(server, where)) as made:
        commit_and_send(made, root, "latest", SMALL).result(60)
    commit(root, "latest", big(), created=2, overwrite="replace")
    commit(root, "step-3", SMALL, created=3)


def _victim(root: Path, where: str, endpoint: str, server: Any, kill_at: int) -> subprocess.Popen[bytes]:
    options = json.dumps({**server.options(), "endpoint": endpoint})
    command = [sys.executable, "-m", "tests.mirror.victim", str(root), f"s3://{BUCKET}/{where}", options, str(kill_at)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _killed(server: Any, root: Path, where: str, *, request: int = 0, step: int = 0) -> bool:
    """Whether it came so far."""
    _begun(server, root, where)

    def kill(number: int, method: str, path: str) -> Fault:
        if number == request:
            os.kill(victim.pid, signal.SIGKILL)
            return "lost" if request % 2 else "reset"
        return None

    with Proxy(server.endpoint, kill) as proxy:
        victim = _victim(root, where, proxy.endpoint, server, step)
        said, _ = victim.communicate(timeout=120)
        assert victim.returncode in (0, -signal.SIGKILL), said.decode()
    _goes_on(server, root, where)
    return victim.returncode != 0


def _goes_on(server: Any, root: Path, where: str) -> None:
    """Whatever is reported as mirrored is there; everything is, in the end; nothing is left over."""
    mirror = s3_mirror(server, where)
    check_store(mirror)
    states = States(FileSystem(), str(root), mirror.url, 0)
    for tag, created in (("latest", 2), ("step-3", 3)):
        if states.is_mirrored(tag, created):
            assert remote_content(mirror, tag) == content(root, tag)
    with mirroring(root, mirror) as made:
        until(lambda: made.is_mirrored("latest", 2) and made.is_mirrored("step-3", 3))
    assert remote_content(mirror, "latest") == big() == content(root, "latest")
    assert remote_content(mirror, "step-3") == SMALL
    assert garbage(server, where) == [] and unfinished_uploads(server, where) == []
    assert [path.name for path in (root / DIRECTORY).rglob(".tmp.*")] == []


@pytest.mark.wide
def test_deleted_on_disk_after_a_crash_ends_cleanly(moto: Any, tmp_path: Path, prefix: str) -> None:
    commit(tmp_path, "gone", big())

    def kill(number: int, method: str, path: str) -> Fault:
        if method == "PUT" and "partNumber=2" in path:
            os.kill(victim.pid, signal.SIGKILL)
        return None

    with Proxy(moto.endpoint, kill) as proxy:
        victim = _victim(tmp_path, prefix, proxy.endpoint, moto, 0)
        victim.communicate(timeout=60)
    assert victim.returncode == -signal.SIGKILL and unfinished_uploads(moto, prefix) != []
    shutil.rmtree(tmp_path / "gone")
    with mirroring(tmp_path, s3_mirror(moto, prefix)) as made:
        made.check()
    assert (
        unfinished_uploads(moto, prefix) == []
        and garbage(moto, prefix) == []
        and check_store(s3_mirror(moto, prefix)) == []
    )
    assert list((tmp_path / DIRECTORY).rglob("*.json")) == []


@pytest.mark.wide
def test_a_damaged_state_is_left_out_and_the_store_asked(moto: Any, tmp_path: Path, prefix: str) -> None:
    mirror = s3_mirror(moto, prefix)
    with mirroring(tmp_path, mirror) as made:
        commit_and_send(made, tmp_path, "step-1", SMALL).result(60)
    (state,) = (tmp_path / DIRECTORY).rglob("*.json")
    state.write_text(state.read_text()[:-10])
    with mirroring(tmp_path, mirror) as made:
        until(lambda: made.is_mirrored("step-1", 1))
    assert remote_content(mirror, "step-1") == SMALL and garbage(moto, prefix) == []


class FailsAtTheManifest(FileSystem):
    def rename(self, src: str, dst: str) -> None:
        if dst.endswith("step-1/manifest.json"):
            raise OSError("the process dies here")
        super().rename(src, dst)


@pytest.mark.parametrize("then", ["goes on", "is deleted"])
def test_a_manifest_that_was_half_written_to_a_directory_is_removed(then: str, tmp_path: Path) -> None:
    root, other = root_of(tmp_path / "root"), tmp_path / "other"
    mirror = Mirror(f"file://{other}", retry_timeout_s=0.1)
    with mirroring(root, mirror, fs=FailsAtTheManifest()) as made:
        assert isinstance(commit_and_send(made, root, "step-1").exception(60), MirrorError)
    me = FileSystem().owner()
    dead = Owner(me.host, "0123abcd", me.pid_namespace, 4_000_000, 1)
    (other / "step-1" / f".part-manifest.json-{dead}-0").write_bytes(b"half")
    if then == "is deleted":
        shutil.rmtree(root / "step-1")
    with mirroring(root, mirror) as made:
        made.check()
        if then == "goes on":
            until(lambda: made.is_mirrored("step-1", 1))
    left = {path.name for path in other.rglob("*") if path.is_file()}
    assert left == ({"manifest.json", "model.bin", "optim.bin"} if then == "goes on" else set())
