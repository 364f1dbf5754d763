"""What breaks on the way: replies, requests, servers, credentials. Each against a real server behind the tests' own
proxy."""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.errors import CheckpointNotFoundError, MirrorError, OutOfSpaceError
from async_ckpt.mirror.config import Mirror
from async_ckpt.mirror.context import Alone, Stopped
from async_ckpt.mirror.remote import open_store
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
    mirroring_through,
    remote_content,
    s3_mirror,
)
from .proxy import Fault, Proxy
from .servers import Server, free_ports, keys, unfinished_uploads
from .test_upload import root_of


def every_other(
    kind: Fault, what: Callable[[str, str], bool] = lambda method, path: True
) -> Callable[[int, str, str], Fault]:
    """Break each request once, the first time that its method and path are seen."""
    seen: set[tuple[str, str]] = set()
    lock = threading.Lock()

    def plan(number: int, method: str, path: str) -> Fault:
        # Sent again as a whole, an object has another upload.
        path = re.sub(r"probe-[0-9a-f]*", "probe", re.sub(r"uploadId=[^&]*", "uploadId", path))
        with lock:
            if (method, path) in seen or not what(method, path):
                return None
            seen.add((method, path))
            return kind

    return plan


def is_data(method: str, path: str) -> bool:
    return method in ("PUT", "POST") and "manifest.json" not in path and ".probe" not in path


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["503", "429", "reset", "lost", "cut request", "duplicate"])
def test_every_request_fails_once_and_the_upload_ends_well(kind: str, moto: Any, tmp_path: Path, prefix: str) -> None:
    with Proxy(moto.endpoint, every_other(kind)) as proxy:
        mirror = s3_mirror(moto, prefix, endpoint=proxy.endpoint)
        with mirroring(tmp_path, mirror) as made:
            commit_and_send(made, tmp_path, "step-1", big()).result(60)
        assert len(proxy.seen) > 15
    assert remote_content(s3_mirror(moto, prefix), "step-1") == big()
    assert garbage(moto, prefix) == [] and unfinished_uploads(moto, prefix) == []


@pytest.mark.wide
def test_requests_that_are_never_answered_are_sent_again(moto: Any, tmp_path: Path, prefix: str) -> None:
    with mirroring_through(every_other("stall", is_data), moto, tmp_path, prefix, request_timeout_s=1.0) as made:
        commit_and_send(made, tmp_path, "step-1", SMALL).result(60)
    assert remote_content(s3_mirror(moto, prefix), "step-1") == SMALL


@pytest.mark.wide
def test_a_conflict_is_tried_again(moto: Any, tmp_path: Path, prefix: str) -> None:
    """Also where no condition was sent: another writer of the same object, for a moment."""
    conflict = every_other("409", lambda method, path: method in ("PUT", "POST"))
    with mirroring_through(conflict, moto, tmp_path, prefix) as made:
        commit_and_send(made, tmp_path, "step-1", big()).result(60)
    assert remote_content(s3_mirror(moto, prefix), "step-1") == big()
    assert garbage(moto, prefix) == [] and unfinished_uploads(moto, prefix) == []


@pytest.mark.wide
@pytest.mark.parametrize("what", ["model.bin", "small.bin", "manifest.json"])
def test_a_body_that_arrives_damaged_is_sent_again(what: str, moto: Any, tmp_path: Path, prefix: str) -> None:
    # This server compares no checksums.
    damage = every_other("wrong request", lambda method, path: method == "PUT" and what in path)
    with mirroring_through(damage, moto, tmp_path, prefix) as made:
        commit_and_send(made, tmp_path, "step-1", big()).result(60)
    assert remote_content(s3_mirror(moto, prefix), "step-1") == big() and garbage(moto, prefix) == []


@pytest.mark.wide
def test_bodies_that_always_arrive_damaged_are_an_error_and_no_manifest(moto: Any, tmp_path: Path, prefix: str) -> None:
    def damage(number: int, method: str, path: str) -> Fault:
        return "wrong request" if is_data(method, path) else None

    with mirroring_through(damage, moto, tmp_path, prefix) as made:
        pending = commit_and_send(made, tmp_path, "step-1", {"model.bin": b"m" * 999})
        with pytest.raises(MirrorError, match=r"holds other bytes of 'step-1/.*model\.bin' than were sent"):
            pending.result(60)
    assert check_store(s3_mirror(moto, prefix)) == []


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["wrong body", "cut"])
def test_replies_that_are_damaged_never_reach_a_reader(kind: str, moto: Any, tmp_path: Path, prefix: str) -> None:
    from async_ckpt.mirror.remote import remote_catalog

    with mirroring(tmp_path, s3_mirror(moto, prefix)) as made:
        commit_and_send(made, tmp_path, "step-1", SMALL).result(60)

    def damage(number: int, method: str, path: str) -> Fault:
        return kind if method == "GET" and "model.bin" in path else None

    with Proxy(moto.endpoint, damage) as proxy:
        catalog = remote_catalog(s3_mirror(moto, prefix, endpoint=proxy.endpoint, retry_timeout_s=0.2))
        if kind == "cut":
            with pytest.raises(MirrorError, match="reading"):
                catalog.verify("step-1")
        else:
            assert not catalog.verify("step-1").ok


@pytest.mark.parametrize("said", ["skew", "skew without a code"])
def test_a_clock_that_is_wrong_is_named(said: str, moto: Any, tmp_path: Path, prefix: str) -> None:
    with Proxy(moto.endpoint, lambda number, method, path: said) as proxy:
        mirror = s3_mirror(moto, prefix, endpoint=proxy.endpoint, on_failure="raise")
        with mirroring(tmp_path, mirror) as made, pytest.raises(MirrorError, match="clock differs"):
            made.check()


@pytest.mark.wide
def test_wrong_credentials_are_told_at_once(seaweedfs: Any, tmp_path: Path, prefix: str) -> None:
    mirror = s3_mirror(seaweedfs, prefix, options={"secret_access_key": "wrong"}, on_failure="raise")
    with mirroring(tmp_path, mirror) as made:
        with pytest.raises(MirrorError, match=r"secret key is wrong.*SignatureDoesNotMatch"):
            made.check()
        made.check()


def test_a_missing_bucket_is_told_at_once(moto: Any, tmp_path: Path) -> None:
    mirror = Mirror("s3://no-such-bucket/run", options=moto.options(), on_failure="raise")
    with mirroring(tmp_path, mirror) as made, pytest.raises(MirrorError, match="no such bucket"):
        made.check()


@pytest.mark.wide
def test_no_network_is_a_warning_where_training_is_to_go_on(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    mirror = Mirror(
        "s3://bucket/run",
        options={"endpoint": f"http://127.0.0.1:{port}", "access_key_id": "a", "secret_access_key": "b"},
        retry_timeout_s=0.1,
    )
    with mirroring(tmp_path, mirror) as made:
        with pytest.warns(RuntimeWarning, match="cannot be reached"):
            made.check()
        pending = commit_and_send(made, tmp_path, "step-1", SMALL)
        assert isinstance(pending.exception(60), MirrorError)
        made.raise_unacknowledged()
    assert content(tmp_path, "step-1") == SMALL


@pytest.mark.wide
def test_closing_waits_for_no_store_that_nobody_waits_for(moto: Any, tmp_path: Path, prefix: str) -> None:
    commit(tmp_path, "step-1", SMALL)
    is_hanging = threading.Event()

    def hang(number: int, method: str, path: str) -> Fault:
        is_hanging.set()
        return "stall"

    with Proxy(moto.endpoint, hang) as proxy:
        with mirroring(tmp_path, s3_mirror(moto, prefix, endpoint=proxy.endpoint), close_s=60.0):
            assert is_hanging.wait(60)
            began = time.monotonic()
        assert time.monotonic() - began < 20


@pytest.mark.wide
def test_what_failed_is_tried_again_with_the_next_commit(moto: Any, tmp_path: Path, prefix: str) -> None:
    is_down = True

    def fail(number: int, method: str, path: str) -> Fault:
        return "reset" if is_down else None

    with mirroring_through(fail, moto, tmp_path, prefix, retry_timeout_s=0.5, on_failure="raise") as made:
        with pytest.raises(MirrorError):
            made.check()
        first = commit_and_send(made, tmp_path, "step-1", SMALL)
        assert first.exception(60) is not None
        is_down = False
        commit_and_send(made, tmp_path, "step-2", SMALL, created=2).result(60)
        until(lambda: made.is_mirrored("step-1", 1))
        made.raise_unacknowledged()
    assert check_store(s3_mirror(moto, prefix)) == ["step-1", "step-2"]


@pytest.mark.wide
def test_a_store_that_ignores_conditions_is_found_and_said(
    rclone: Any, tmp_path: Path, prefix: str, caplog: Any
) -> None:
    mirror = s3_mirror(rclone, prefix)
    with caplog.at_level(logging.WARNING, "async_ckpt"), mirroring(tmp_path, mirror) as made:
        made.check()
        commit_and_send(made, tmp_path, "step-1", big()).result(60)
    assert "ignores conditions" in caplog.text
    assert remote_content(mirror, "step-1") == big() and garbage(rclone, prefix) == []


def test_a_store_that_ignores_conditions_is_refused_to_several_ranks(rclone: Any, tmp_path: Path, prefix: str) -> None:
    class OneOfTwo(Alone):
        rank = 0

    mirror, refused = s3_mirror(rclone, prefix, on_failure="raise"), r"ignores conditions.*several ranks"
    with mirroring(tmp_path, mirror, agreement=OneOfTwo()) as made, pytest.raises(MirrorError, match=refused):
        made.check()
    assert [key for key in keys(rclone, prefix) if "step" in key] == []


def test_a_directory_raises_what_the_source_of_its_parts_raises(tmp_path: Path) -> None:
    """An object that is no longer wanted, because another one has failed, must not hide why."""

    def parts() -> Iterator[memoryview]:
        yield memoryview(b"half")
        raise Stopped("another object has failed", url=store.url)

    store = open_store(Mirror(f"file://{tmp_path}"), FileSystem())
    with pytest.raises(Stopped):
        store.put("step-1/model.bin", parts(), size_bytes=8, part_bytes=4, parallel=1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class FullForStates(FileSystem):
    """A disk that is full when the mirror's state is written."""

    def create_file(self, path: str, data: bytes) -> None:
        if ".mirrors" in path:
            raise OutOfSpaceError("no space", path=path)
        super().create_file(path, data)


def test_a_disk_that_is_full_for_the_state_fails_the_mirroring_and_nothing_else(
    moto: Any, tmp_path: Path, prefix: str
) -> None:
    with mirroring(tmp_path, s3_mirror(moto, prefix), fs=FullForStates()) as made:
        pending = commit_and_send(made, tmp_path, "step-1", SMALL)
        assert isinstance(pending.exception(60), OutOfSpaceError) and "cannot be noted" in str(pending.exception())
        assert not made.is_mirrored("step-1", 1)
    assert content(tmp_path, "step-1") == SMALL and keys(moto, prefix) == []
    with mirroring(tmp_path, s3_mirror(moto, prefix)) as made:
        commit_and_send(made, tmp_path, "step-2", SMALL, created=2).result(60)


@pytest.mark.wide
def test_replaced_on_disk_in_the_middle_of_its_upload(moto: Any, tmp_path: Path, prefix: str) -> None:
    """At some requests of the upload; both versions are whole, and the newer one is what stays."""
    for at in (12, 20):
        root = root_of(tmp_path / f"root-{at}")
        where = f"{prefix}-{at}"
        replaced = threading.Event()

        def replace(
            number: int, method: str, path: str, at: int = at, root: Path = root, replaced: threading.Event = replaced
        ) -> Fault:
            if number == at and (root / "latest").exists() and not replaced.is_set():
                replaced.set()
                commit(root, "latest", big(5), created=2, overwrite="replace")
            return None

        with mirroring_through(replace, moto, root, where) as made:
            made.check()
            first = commit_and_send(made, root, "latest", big())
            assert isinstance(first.exception(60), CheckpointNotFoundError | None)
            if replaced.is_set():
                second = made.expect("latest")
                made.committed(second, None)
                second.result(60)
        assert remote_content(s3_mirror(moto, where), "latest") == content(root, "latest")
        assert garbage(moto, where) == [] and unfinished_uploads(moto, where) == []


@pytest.mark.wide
def test_what_was_given_up_leaves_the_older_one_replaceable(moto: Any, tmp_path: Path, prefix: str) -> None:
    """Deleted on disk in the middle of its upload, and committed once more."""
    is_deleted = threading.Event()

    def delete(number: int, method: str, path: str) -> Fault:
        if "partNumber=2" in path and not is_deleted.is_set():
            is_deleted.set()
            shutil.rmtree(tmp_path / "latest")
        return None

    mirror = s3_mirror(moto, prefix)
    with mirroring_through(delete, moto, tmp_path, prefix) as made:
        commit_and_send(made, tmp_path, "latest", SMALL).result(60)
        second = commit_and_send(made, tmp_path, "latest", big(), created=2, overwrite="replace")
        assert isinstance(second.exception(60), CheckpointNotFoundError) and is_deleted.is_set()
        commit_and_send(made, tmp_path, "latest", big(3), created=3).result(60)
    assert remote_content(mirror, "latest") == big(3) and garbage(moto, prefix) == []


@pytest.mark.wide
def test_racing_runs_on_one_prefix_leave_one_whole_checkpoint_per_tag(
    seaweedfs: Any, tmp_path: Path, prefix: str
) -> None:
    mirror = s3_mirror(seaweedfs, prefix)
    roots = [root_of(tmp_path / str(k)) for k in range(3)]
    with mirroring(roots[0], mirror) as a, mirroring(roots[1], mirror) as b, mirroring(roots[2], mirror) as c:
        pending = [
            commit_and_send(made, root, f"step-{step}", {"model.bin": f"{root} {step}".encode() * 99}, created=step + 1)
            for step in range(3)
            for made, root in zip((a, b, c), roots, strict=True)
        ]
        outcomes = [one.exception(60) is None for one in pending]
    assert [sum(outcomes[3 * step : 3 * step + 3]) for step in range(3)] == [1, 1, 1]
    assert len(check_store(mirror)) == 3 and garbage(seaweedfs, prefix) == []


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["store", "directory"])
def test_two_processes_mirror_the_same_root(kind: str, seaweedfs: Any, tmp_path: Path, prefix: str) -> None:
    """As `async-ckpt mirror` beside a training does; whoever ends first removes what the other has half sent."""
    elsewhere = Mirror(f"file://{tmp_path}/elsewhere", part_bytes=5 << 20, retry_timeout_s=10)
    mirror = s3_mirror(seaweedfs, prefix) if kind == "store" else elsewhere
    with mirroring(tmp_path, mirror) as one, mirroring(tmp_path, mirror) as other:
        one.check()
        other.check()
        for step in range(3):
            commit(tmp_path, f"step-{step}", big(step), created=step + 1)
            pending = [(made, made.expect(f"step-{step}")) for made in (one, other)]
            for made, waits in pending:
                made.committed(waits, None)
            for _, waits in pending:
                waits.result(60)
    assert check_store(mirror) == ["step-0", "step-1", "step-2"]
    assert garbage(seaweedfs, prefix) == [] and unfinished_uploads(seaweedfs, prefix) == []


@pytest.mark.wide
def test_the_server_is_killed_in_the_middle_of_an_upload(seaweedfs: Server, tmp_path: Path, prefix: str) -> None:
    assert _upload_with_a_crash_of(seaweedfs, 13, root_of(tmp_path / "root"), prefix)


@pytest.mark.slow
def test_the_server_is_killed_at_every_request(seaweedfs: Server, tmp_path: Path, prefix: str) -> None:
    for at in itertools.count(1):
        if not _upload_with_a_crash_of(seaweedfs, at, root_of(tmp_path / str(at)), f"{prefix}-{at}"):
            break
    assert at > 20


def _upload_with_a_crash_of(server: Server, at: int, root: Path, where: str) -> bool:
    """The server is killed when request `at` comes, and started again at once; False where so many never came."""

    restarts = []

    def crash(number: int, method: str, path: str) -> Fault:
        if number == at:
            server.kill()
            restarts.append(threading.Thread(target=server.start))
            restarts[0].start()
            return "reset"
        return None

    with Proxy(server.endpoint, crash) as proxy:
        mirror = s3_mirror(server, where, endpoint=proxy.endpoint, retry_timeout_s=60.0)
        try:
            with mirroring(root, mirror) as made:
                commit_and_send(made, root, "step-1", big()).result(90)
        finally:
            for restart in restarts:
                restart.join()
    assert (
        remote_content(s3_mirror(server, where, retry_timeout_s=30.0), "step-1") == big()
        and garbage(server, where) == []
    )
    return bool(restarts)
