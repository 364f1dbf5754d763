"""What uploads leave to others: processors and disk to training, the network of a node to its other processes, the root
to sweeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from async_ckpt import AsyncCheckpointEngine, KeepLast
from async_ckpt.errors import CheckpointNotFoundError
from async_ckpt.host.process import Owner
from async_ckpt.storage.filesystem import FileLock, FileSystem

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
from .servers import unfinished_uploads
from .test_engine import engine_on, saved

pytestmark = pytest.mark.wide


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="reads Linux's priorities")
def test_uploads_are_niced_and_idle_on_the_disk(moto: Any, tmp_path: Path, prefix: str) -> None:
    """Of the process that uploads every thread, of the training's only that of the mirror and those of the library."""
    options = json.dumps(dict(moto.options()))
    program = (
        "import json, sys; from pathlib import Path; from async_ckpt import Mirror\n"
        "import os; from tests.mirror.making import commit_and_send, mirroring, priorities, upload_processes\n"
        "mirror, root = Mirror(sys.argv[2], options=json.loads(sys.argv[3])), Path(sys.argv[1])\n"
        "with mirroring(root, mirror) as made:\n"
        "    commit_and_send(made, root, 'a').result(60); (child,) = upload_processes()\n"
        "    print(json.dumps([priorities(os.getpid()), priorities(child)]))\n"
    )
    where = [str(tmp_path), s3_mirror(moto, prefix).url, options]
    done = subprocess.run([sys.executable, "-c", program, *where], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, of_child = json.loads(done.stdout.splitlines()[-1])
    mirrors = {name: told for name, told in found.items() if name.startswith(("async-ckpt-mirror", "tokio"))}
    assert sum(name.startswith("async-ckpt") for name in mirrors) == 1 and len(mirrors) > 1
    assert {tuple(told) for told in mirrors.values()} == {(10, 3)}
    assert next(told for name, told in found.items() if name.startswith("MainThread"))[0] == 0
    assert len(of_child) > 6 and {tuple(told) for told in of_child.values()} == {(19, 3)}


class Turns(FileSystem):
    """Says when a turn was refused."""

    def __init__(self) -> None:
        super().__init__()
        self.was_refused = threading.Event()

    def lock(self, path: str) -> FileLock | None:
        lock = super().lock(path)
        if lock is None and "uploader." in path:
            self.was_refused.set()
        return lock


@pytest.mark.parametrize("num", [1, 2])
def test_so_many_processes_of_a_node_upload_at_once(num: int, moto: Any, tmp_path: Path, prefix: str) -> None:
    """One more than may; the last waits for its turn while all others send."""
    is_open, sending = threading.Event(), threading.Semaphore(0)
    senders: set[str] = set()

    def hold(number: int, method: str, path: str) -> Fault:
        sender = path.split("/")[2]
        if method == "PUT" and "step-" in path and not is_open.is_set():
            senders.add(sender)
            sending.release()
            is_open.wait(60)
        return None

    with Proxy(moto.endpoint, hold) as proxy:
        fields = {"endpoint": proxy.endpoint, "request_timeout_s": 60.0, "parallel": 1}
        turns = [Turns() for _ in range(num + 1)]
        mirrors = [s3_mirror(moto, f"{prefix}-{k}", **fields) for k in range(num + 1)]
        commit(tmp_path, "step-1", SMALL)
        with mirroring(tmp_path, mirrors[0], fs=turns[0], uploaders_per_node=num) as first:
            assert sending.acquire(timeout=60)
            with mirroring(tmp_path, mirrors[1], fs=turns[1], uploaders_per_node=num) as second:
                if num == 1:
                    assert turns[1].was_refused.wait(60) and senders == {f"{prefix}-0"}
                    is_open.set()
                    _all_mirrored(first, second)
                    return
                assert sending.acquire(timeout=60)
                with mirroring(tmp_path, mirrors[2], fs=turns[2], uploaders_per_node=num) as third:
                    assert turns[2].was_refused.wait(60) and senders == {f"{prefix}-0", f"{prefix}-1"}
                    is_open.set()
                    _all_mirrored(first, second, third)


def _all_mirrored(*made: Any) -> None:
    until(lambda: all(one.is_mirrored("step-1", 1) for one in made))


def test_a_sweep_beside_an_upload(moto: Any, tmp_path: Path, prefix: str) -> None:
    """Another engine starts on the root, sweeps what a crash has left there, commits and leaves, in the middle of an
    upload."""
    is_open, is_sending = threading.Event(), threading.Event()

    def hold(number: int, method: str, path: str) -> Fault:
        if "partNumber=2" in path and not is_open.is_set():
            is_sending.set()
            is_open.wait(60)
        return None

    me = FileSystem().owner()
    dead = Owner(me.host, "0123abcd", me.pid_namespace, 4_000_000, 1)
    left = tmp_path / f".staging.lost.{dead}.0"
    left.mkdir(mode=0o700)
    with Proxy(moto.endpoint, hold) as proxy:
        mirror = s3_mirror(moto, prefix, endpoint=proxy.endpoint, request_timeout_s=60.0)
        with mirroring(tmp_path, mirror) as made:
            pending = commit_and_send(made, tmp_path, "step-1", big())
            assert is_sending.wait(60)
            states = sorted(path.name for path in (tmp_path / ".mirrors").rglob("*"))
            with AsyncCheckpointEngine(tmp_path, staging_bytes=16 << 20) as engine:
                engine.create("other")
                engine.commit("other").result(60)
            assert not left.exists() and sorted(path.name for path in (tmp_path / ".mirrors").rglob("*")) == states
            is_open.set()
            pending.result(60)
    assert remote_content(s3_mirror(moto, prefix), "step-1") == big() == content(tmp_path, "step-1")
    assert "step-1" in check_store(s3_mirror(moto, prefix))


def test_local_retention_deletes_what_is_being_sent(moto: Any, tmp_path: Path, prefix: str) -> None:
    """Where it was told not to wait for mirrors: nothing of that checkpoint stays in the store."""
    is_open, is_sending = threading.Event(), threading.Event()

    def hold(number: int, method: str, path: str) -> Fault:
        if method == "PUT" and "step-0" in path and not is_open.is_set():
            is_sending.set()
            is_open.wait(60)
        return None

    with Proxy(moto.endpoint, hold) as proxy:
        mirror = s3_mirror(moto, prefix, endpoint=proxy.endpoint, request_timeout_s=60.0)
        fields: dict[str, Any] = {"retention": KeepLast(1), "keep_local_until_mirrored": False}
        with engine_on(tmp_path, mirror, **fields) as engine:
            first = saved(engine, "step-0")
            first.result(60)
            assert is_sending.wait(60)
            saved(engine, "step-1", 1).result(60)
            until(lambda: engine.tags() == ["step-1"])
            is_open.set()
            assert isinstance(first.mirrored.exception(60), CheckpointNotFoundError)
    assert check_store(s3_mirror(moto, prefix)) == ["step-1"]
    assert garbage(moto, prefix) == [] and unfinished_uploads(moto, prefix) == []
