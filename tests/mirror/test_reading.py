"""Checkpoints read out of a store by the package's usual calls, with the credentials of the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import async_ckpt
from async_ckpt.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, StateMismatchError
from async_ckpt.format.manifest import Manifest, encode
from async_ckpt.mirror.objects import with_attempt
from async_ckpt.mirror.remote import RemoteFileSystem
from async_ckpt.reading.load import load_committed_into

from ..support.comparing import same
from ..support.stepping import until
from .making import SMALL, check_store, commit, garbage, mirroring, s3_mirror
from .proxy import Proxy
from .servers import BUCKET, aws_environment, client, keys


@pytest.fixture
def environment(moto: Any, monkeypatch: Any) -> None:
    aws_environment(monkeypatch, moto)


def state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "model": {"w": torch.randn(300, 500), "b": torch.randn(500)},
        "optim": {"m": torch.randn(1000, 400)},
        "step": seed,
    }


def made_in(root: Path, *tags: str) -> None:
    with async_ckpt.AsyncCheckpointEngine(root, staging_bytes=16 << 20, chunk_bytes=1 << 16) as engine:
        for seed, tag in enumerate(tags):
            engine.create(tag)
            engine.save(state(seed), "model.pt")
            engine.commit(tag).result(60)


def mirrored(root: Path, mirror: Any, num_tags: int, **more: Any) -> None:
    with mirroring(root, mirror, **more) as made:
        catalog = async_ckpt.Catalog(root)
        manifests = [catalog.manifest(tag) for tag in catalog.tags()]
        assert len(manifests) == num_tags
        until(lambda: all(made.is_mirrored(manifest.tag, manifest.created_unix_ns) for manifest in manifests))


@pytest.mark.wide
def test_load_and_load_into_from_a_url(environment: None, moto: Any, tmp_path: Path, prefix: str) -> None:
    made_in(tmp_path, "step-0", "step-1")
    mirrored(tmp_path, s3_mirror(moto, prefix), 2)
    url = f"s3://{BUCKET}/{prefix}"
    assert async_ckpt.Catalog(url).tags() == ["step-0", "step-1"] and async_ckpt.Catalog(url + "/").latest() == "step-1"
    assert same(async_ckpt.load(f"{url}/step-1/model.pt"), state(1))
    target = state(0)
    async_ckpt.load_into(target, f"{url}/step-1/model.pt")
    assert same({key: target[key] for key in ("model", "optim")}, {key: state(1)[key] for key in ("model", "optim")})
    with pytest.raises(CheckpointNotFoundError, match=r"has no file 'other\.pt'"):
        async_ckpt.load(f"{url}/step-1/other.pt")
    with pytest.raises(CheckpointNotFoundError, match="not in a committed checkpoint"):
        async_ckpt.load(f"{url}/step-9/model.pt")
    with pytest.raises(ConfigError, match="cannot be mapped"):
        async_ckpt.load(f"{url}/step-1/model.pt", mmap=True)


@pytest.mark.wide
def test_only_what_is_selected_is_fetched(moto: Any, tmp_path: Path, prefix: str) -> None:
    made_in(tmp_path, "step-0")
    mirrored(tmp_path, s3_mirror(moto, prefix), 1)
    with Proxy(moto.endpoint) as proxy:
        filesystem = RemoteFileSystem(s3_mirror(moto, prefix, endpoint=proxy.endpoint))
        catalog = async_ckpt.Catalog(f"s3://{BUCKET}/{prefix}", filesystem)
        whole, part, before = state(5), state(6)["model"], state(5)
        done = load_committed_into(catalog, "step-0", "model.pt", whole, select="model.")
        assert same(whole["model"], state(0)["model"]) and same(whole["optim"], before["optim"])
        assert sorted(done.state) == ["model.b", "model.w"]
        load_committed_into(catalog, "step-0", "model.pt", part, select="model.", atomic=True)
        assert same(part, state(0)["model"])
        num_bytes = proxy.num_reply_bytes
        with pytest.raises(
            StateMismatchError, match=r"no tensor whose name begins with 'other\.'; it has model, optim"
        ):
            load_committed_into(catalog, "step-0", "model.pt", part, select="other.")
    size = (tmp_path / "step-0" / "model.pt").stat().st_size
    # Twice less than half of the file; the directory and the pickle at its ends are a few extents.
    assert num_bytes < size


def test_a_directory_url(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    made_in(root, "step-0")
    mirrored(root, async_ckpt.Mirror(f"file://{other}/run"), 1)
    assert async_ckpt.Catalog(f"file://{other}/run").latest() == "step-0"
    assert same(async_ckpt.load(f"file://{other}/run/step-0/model.pt"), state(0))


def test_what_was_copied_out_of_a_mirror_is_a_checkpoint(moto: Any, tmp_path: Path, prefix: str) -> None:
    """With all of its folder: by any S3 client, or where the mirror is a directory. It can be mirrored again."""
    root, copy = tmp_path / "root", tmp_path / "copy"
    made_in(root, "step-0")
    mirrored(root, s3_mirror(moto, prefix), 1)
    for key in keys(moto, prefix + "/"):
        path = copy / key.removeprefix(prefix + "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client(moto).get_object(Bucket=BUCKET, Key=key)["Body"].read())
    (report,) = map(async_ckpt.Catalog(copy).verify, ["step-0"])
    assert report.ok and not report.extra
    assert same(async_ckpt.load(copy / "step-0" / "model.pt"), state(0))
    again = s3_mirror(moto, f"{prefix}/again")
    mirrored(copy, again, 1)
    assert check_store(again) == ["step-0"] and garbage(moto, f"{prefix}/again") == []


def test_what_another_tool_has_synced_is_read_too(moto: Any, tmp_path: Path, prefix: str) -> None:
    made_in(tmp_path, "step-0")
    for path in (tmp_path / "step-0").iterdir():
        client(moto).put_object(Bucket=BUCKET, Key=f"{prefix}/step-0/{path.name}", Body=path.read_bytes())
    mirror = s3_mirror(moto, prefix)
    assert check_store(mirror) == ["step-0"]
    # It is an older one of another run: replaced only where that is asked for.
    made_in(tmp_path / "other", "step-0")
    mirrored(tmp_path / "other", mirror, 1, may_overwrite=True)
    assert check_store(mirror) == ["step-0"] and garbage(moto, prefix) == []


@pytest.mark.wide
def test_damage_in_the_store_reaches_no_tensor_and_is_named(
    environment: None, moto: Any, tmp_path: Path, prefix: str
) -> None:
    made_in(tmp_path, "older", "old", "step-0")
    mirrored(tmp_path, s3_mirror(moto, prefix), 3)
    (key,) = [key for key in keys(moto, prefix) if "/step-0/" in key and key.endswith("model.pt")]
    s3 = client(moto)
    data = bytearray(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    data[len(data) // 2] ^= 1
    s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    path = f"s3://{BUCKET}/{prefix}/step-0/model.pt"
    with pytest.raises(CorruptCheckpointError, match=r"s3://.*/step-0/.*model\.pt.*older ones in s3://.*: old, older"):
        async_ckpt.load(path)
    target, before = state(5), state(5)
    with pytest.raises(CorruptCheckpointError):
        async_ckpt.load_into(target, path)
    assert same(target, before)
    assert async_ckpt.Catalog(f"s3://{BUCKET}/{prefix}").latest() == "old"
    s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(data[:-1]))
    with pytest.raises(CorruptCheckpointError, match=r"'model\.pt' .* has \d+ bytes, \d+ were committed.*older ones"):
        async_ckpt.load(path)
    s3.delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(CorruptCheckpointError, match=r"'model\.pt' in .* is missing.*older ones"):
        async_ckpt.load(path)
    foreign = {"Bucket": BUCKET, "Key": f"{prefix}/older/manifest.json"}
    s3.copy_object(Bucket=BUCKET, Key=f"{prefix}/step-0/manifest.json", CopySource=foreign)
    with pytest.raises(CorruptCheckpointError, match=r"its manifest is that of 'older'; older ones.*: old, older"):
        async_ckpt.load(path)
    assert async_ckpt.Catalog(f"s3://{BUCKET}/{prefix}").latest() == "old"


def test_nothing_of_the_library_is_imported_without_a_mirror(tmp_path: Path) -> None:
    commit(tmp_path, "a", SMALL)
    program = (
        f"import sys, async_ckpt; async_ckpt.Catalog({str(tmp_path)!r}).latest(); print([m for m in "
        "sys.modules if 'obstore' in m])"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )


@pytest.mark.wide
def test_many_tags_are_listed_in_pages(seaweedfs: Any, prefix: str) -> None:
    """More than one page of a listing; `-m slow` has 10,000."""
    _many_tags(seaweedfs, prefix, 1_010)


@pytest.mark.slow
def test_ten_thousand_tags(seaweedfs: Any, prefix: str) -> None:
    _many_tags(seaweedfs, prefix, 10_000)


def _many_tags(server: Any, prefix: str, num_tags: int) -> None:
    mirror = s3_mirror(server, prefix)
    filesystem = RemoteFileSystem(mirror)

    def put(number: int) -> None:
        manifest = Manifest(f"step-{number}", number + 1, (), metadata={"step": number})
        raw = with_attempt(encode(manifest), "0" * 16)
        filesystem.store.put_if(f"step-{number}/manifest.json", raw, None)

    filesystem.each(put, range(num_tags))
    catalog = async_ckpt.Catalog(mirror.url, filesystem)
    entries = catalog.entries()
    assert [entry.tag for entry in entries] == [f"step-{number}" for number in range(num_tags)]
    assert all(entry.manifest.metadata == {"step": entry.manifest.created_unix_ns - 1} for entry in entries)
    assert catalog.latest() == f"step-{num_tags - 1}"
