"""Uploads that succeed: what is in the store then, and what the rest of the package sees of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, MirrorError
from async_ckpt.mirror.config import Mirror
from async_ckpt.mirror.context import MirrorHooks
from async_ckpt.mirror.remote import remote_catalog
from async_ckpt.mirror.store import ConditionFailed
from async_ckpt.retention import KeepLast, carry_out

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
from .servers import BUCKET, client, keys, unfinished_uploads


@pytest.mark.wide
@pytest.mark.parametrize("server", ["moto", "seaweedfs"])
def test_a_committed_checkpoint_is_mirrored_and_read_back(
    server: str, tmp_path: Path, prefix: str, request: Any
) -> None:
    running = request.getfixturevalue(server)
    mirror = s3_mirror(running, prefix)
    files = {**big(), "empty.bin": b"", "deep/er/x.bin": b"x"}
    with mirroring(tmp_path, mirror) as made:
        made.check()
        pending = commit_and_send(made, tmp_path, "step-1", files)
        assert pending.result(60) == "step-1"
        assert pending.metrics.sent_bytes == pending.metrics.size_bytes == sum(map(len, files.values()))
        assert made.is_mirrored("step-1", 1)
    assert remote_content(mirror, "step-1") == files == content(tmp_path, "step-1")
    assert (
        check_store(mirror) == ["step-1"]
        and garbage(running, prefix) == []
        and unfinished_uploads(running, prefix) == []
    )


def test_what_any_client_copies_out_is_the_file(moto: Any, tmp_path: Path, prefix: str) -> None:
    with mirroring(tmp_path, s3_mirror(moto, prefix)) as made:
        commit_and_send(made, tmp_path, "step-1", SMALL).result(60)
    (key,) = [key for key in keys(moto, prefix) if key.endswith("model.bin")]
    assert client(moto).get_object(Bucket=BUCKET, Key=key)["Body"].read() == SMALL["model.bin"]
    assert key.split("/")[1] == "step-1" and len(key.split("/")[2]) == 16


@pytest.mark.wide
def test_a_prefix_is_taken_as_it_stands(moto: Any, tmp_path: Path, prefix: str) -> None:
    where = f"{prefix}/100%25 ä+b"
    mirror = s3_mirror(moto, where + "/")
    with mirroring(tmp_path, mirror) as made:
        commit_and_send(made, tmp_path, "step-1", big()).result(60)
    assert all(key.startswith(f"{where}/step-1/") for key in keys(moto, prefix + "/"))
    assert remote_content(mirror, "step-1") == big() and garbage(moto, where) == []


def test_a_directory_is_a_mirror_too(tmp_path: Path) -> None:
    root, mirror = tmp_path / "root", Mirror(f"file://{tmp_path}/other/run", part_bytes=5 << 20)
    with mirroring(root_of(root), mirror) as made:
        commit_and_send(made, root, "step-1", big()).result(60)
        commit_and_send(made, root, "step-1", big(3), created=2, overwrite="replace").result(60)
    assert remote_content(mirror, "step-1") == big(3)
    assert sum(1 for path in (tmp_path / "other").rglob("*") if path.is_file()) == 3


@pytest.mark.wide
def test_replaced_locally_is_replaced_in_the_store(moto: Any, tmp_path: Path, prefix: str) -> None:
    mirror = s3_mirror(moto, prefix)
    with mirroring(tmp_path, mirror) as made:
        commit_and_send(made, tmp_path, "latest", SMALL).result(60)
        commit_and_send(made, tmp_path, "latest", big(), created=2, overwrite="replace").result(60)
    assert remote_content(mirror, "latest") == big()
    assert garbage(moto, prefix) == []


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["lost", "skew"])
def test_what_was_replaced_and_cannot_be_deleted_fails_no_mirroring(
    kind: str, moto: Any, tmp_path: Path, prefix: str
) -> None:
    """A connection that breaks once is nothing; what is refused is deleted by the next start."""
    broken: set[str] = set()

    def fail(number: int, method: str, path: str) -> Fault:
        is_new = method == "DELETE" and "/latest/" in path and path not in broken
        broken.update({path} if is_new and kind == "lost" else ())
        return kind if is_new else None

    with mirroring_through(fail, moto, tmp_path, prefix) as made:
        commit_and_send(made, tmp_path, "latest", SMALL).result(60)
        commit_and_send(made, tmp_path, "latest", big(), created=2, overwrite="replace").result(60)
    assert remote_content(s3_mirror(moto, prefix), "latest") == big()
    assert len(garbage(moto, prefix)) == (0 if kind == "lost" else len(SMALL))
    with mirroring(tmp_path, s3_mirror(moto, prefix)) as made:
        made.check()
    assert garbage(moto, prefix) == []


@pytest.mark.wide
def test_of_two_runs_on_one_prefix_the_second_is_refused(moto: Any, tmp_path: Path, prefix: str) -> None:
    mirror = s3_mirror(moto, prefix)
    first, second = root_of(tmp_path / "a"), root_of(tmp_path / "b")
    with mirroring(first, mirror) as one, mirroring(second, mirror) as other:
        commit_and_send(one, first, "step-1", SMALL).result(60)
        with pytest.raises(ConditionFailed, match=r"another run.*overwrite='replace'"):
            commit_and_send(other, second, "step-1", big(), created=2).result(60)
    assert remote_content(mirror, "step-1") == SMALL and garbage(moto, prefix) == []
    with mirroring(second, mirror, may_overwrite=True) as other:
        commit_and_send(other, second, "step-1", big(7), created=3, overwrite="replace").result(60)
    assert remote_content(mirror, "step-1") == big(7) and garbage(moto, prefix) == []


@pytest.mark.wide
def test_a_restart_goes_on_with_what_is_not_mirrored(moto: Any, tmp_path: Path, prefix: str) -> None:
    mirror = s3_mirror(moto, prefix)
    for step in range(3):
        commit(tmp_path, f"step-{step}", SMALL, created=step + 1)
    with mirroring(tmp_path, mirror) as made:
        commit_and_send(made, tmp_path, "step-3", SMALL, created=9).result(60)
        until(lambda: made.is_mirrored("step-2", 3))
    assert check_store(mirror) == ["step-0", "step-1", "step-2", "step-3"]


def test_deleted_locally_before_it_was_mirrored(moto: Any, tmp_path: Path, prefix: str) -> None:
    import shutil

    with mirroring(tmp_path, s3_mirror(moto, prefix)) as made:
        made.check()
        pending = made.expect("gone")
        commit(tmp_path, "gone", SMALL)
        shutil.rmtree(tmp_path / "gone")
        made.committed(pending, None)
        with pytest.raises(CheckpointNotFoundError):
            pending.result(60)
    assert keys(moto, prefix) == []


@pytest.mark.wide
def test_damaged_on_disk_is_not_mirrored(moto: Any, tmp_path: Path, prefix: str) -> None:
    mirror = s3_mirror(moto, prefix)
    with mirroring(tmp_path, mirror) as made:
        made.check()
        pending = made.expect("bad")
        commit(tmp_path, "bad", SMALL)
        (tmp_path / "bad" / "model.bin").write_bytes(b"M" + SMALL["model.bin"][1:])
        made.committed(pending, None)
        with pytest.raises(CorruptCheckpointError, match=r"model\.bin.*differ from what was committed"):
            pending.result(60)
    assert check_store(mirror) == []


@pytest.mark.wide
def test_retention_in_the_store_deletes_manifest_and_objects(moto: Any, tmp_path: Path, prefix: str) -> None:
    def retain(mirror: Mirror, catalog: Any, remove: Any) -> None:
        carry_out(catalog, KeepLast(2), remove, hold=lambda manifest: "held" if manifest.tag == "step-1" else None)

    mirror = s3_mirror(moto, prefix, retention=KeepLast(2))
    with mirroring(tmp_path, mirror, hooks=MirrorHooks(retain=retain)) as made:
        for step in range(5):
            commit_and_send(made, tmp_path, f"step-{step}", SMALL, created=step + 1).result(60)
        commit_and_send(made, tmp_path, "last", SMALL, created=9).result(60)
    assert check_store(mirror) == ["step-1", "step-4", "last"] and garbage(moto, prefix) == []
    assert len(content_tags(tmp_path)) == 6


@pytest.mark.wide
def test_a_deletion_in_the_store_that_was_cut_short_is_ended_by_the_next_start(
    moto: Any, tmp_path: Path, prefix: str
) -> None:
    """The manifest goes first: no reader finds a checkpoint that lacks an object."""

    def cut(number: int, method: str, path: str) -> Fault:
        return "skew" if method == "DELETE" and "/step-0/" in path and "manifest.json" not in path else None

    def retain(mirror: Mirror, catalog: Any, remove: Any) -> None:
        carry_out(catalog, KeepLast(1), remove, hold=lambda manifest: None)

    with Proxy(moto.endpoint, cut) as proxy:
        mirror = s3_mirror(moto, prefix, endpoint=proxy.endpoint, retention=KeepLast(1))
        with mirroring(tmp_path, mirror, hooks=MirrorHooks(retain=retain)) as made:
            for step in range(2):
                commit_and_send(made, tmp_path, f"step-{step}", SMALL, created=step + 1).result(60)
    assert check_store(s3_mirror(moto, prefix)) == ["step-1"] and len(garbage(moto, prefix)) == len(SMALL)
    with mirroring(tmp_path, s3_mirror(moto, prefix)) as made:
        made.check()
    assert check_store(s3_mirror(moto, prefix)) == ["step-1"] and garbage(moto, prefix) == []


def test_a_file_of_too_many_parts_is_refused_before_anything_is_sent(moto: Any, tmp_path: Path, prefix: str) -> None:
    from async_ckpt.format.manifest import FileEntry, Manifest
    from async_ckpt.mirror.objects import plan_upload

    entry = FileEntry("model.bin", 60 << 30, 1 << 30, (0,) * 60, "opaque", "test", None)
    manifest = Manifest("huge", 1, (entry,))
    with pytest.raises(MirrorError, match=r"more than 10000 parts.*part_bytes to 6442451 or more"):
        plan_upload(manifest, b"x" * 30, Mirror("s3://b/r", part_bytes=5 << 20), None)
    assert plan_upload(manifest, b"x" * 30, Mirror("s3://b/r", part_bytes=8 << 20), None).objects


def test_await_and_callbacks(moto: Any, tmp_path: Path, prefix: str) -> None:
    told = []

    async def main() -> None:
        with mirroring(tmp_path, s3_mirror(moto, prefix)) as made:
            pending = commit_and_send(made, tmp_path, "a", SMALL)
            pending.add_done_callback(lambda one: told.append(one.tag))
            assert await asyncio.wait_for(pending, 60) == "a" and pending.done()

    asyncio.run(main())
    assert told == ["a"]


@pytest.mark.wide
def test_the_catalog_of_a_store(moto: Any, tmp_path: Path, prefix: str) -> None:
    mirror = s3_mirror(moto, prefix)
    with mirroring(tmp_path, mirror) as made:
        for step in range(3):
            commit_and_send(made, tmp_path, f"step-{step}", SMALL, created=step + 1).result(60)
    catalog = remote_catalog(mirror)
    assert catalog.tags() == ["step-0", "step-1", "step-2"] and catalog.latest() == "step-2"
    assert catalog.manifest("step-1").metadata == {"step": 2}
    with pytest.raises(CheckpointNotFoundError, match="step-0"):
        catalog.manifest("step-9")
    s3 = client(moto)
    (key,) = [key for key in keys(moto, f"{prefix}/step-2") if key.endswith("model.bin")]
    s3.put_object(Bucket=BUCKET, Key=key, Body=b"x" * len(SMALL["model.bin"]))
    assert "model.bin" in str(catalog.verify("step-2").problems[0]) and catalog.latest() == "step-1"
    s3.put_object(Bucket=BUCKET, Key=key, Body=b"short")
    assert "has 5 bytes" in str(catalog.verify("step-2", level="size").problems[0])
    s3.delete_object(Bucket=BUCKET, Key=key)
    assert "missing" in str(catalog.verify("step-2", level="size").problems[0])
    s3.copy_object(
        Bucket=BUCKET, Key=f"{prefix}/step-1/manifest.json", CopySource=f"{BUCKET}/{prefix}/step-0/manifest.json"
    )
    assert "model.bin: is missing" in str(catalog.verify("step-1").problems[0]) and catalog.latest() == "step-0"


def root_of(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def content_tags(root: Path) -> list[str]:
    from async_ckpt.reading.catalog import Catalog

    return Catalog(root).tags()
