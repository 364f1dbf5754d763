"""Mirrors of an engine: what is pending, what waits, what retention and loads do."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, Catalog, KeepLast, Mirror
from async_ckpt.errors import CheckpointNotFoundError, ConfigError, MirrorError
from async_ckpt.integrations.dcp import DcpReader, DcpWriter, load_sharded, save_sharded
from async_ckpt.metrics import MirrorMetrics, Observer, Span

from ..support.comparing import same
from ..support.stepping import until
from .making import check_store, s3_mirror
from .proxy import Fault, Proxy
from .servers import aws_environment, free_ports
from .test_reading import state


def saved(engine: AsyncCheckpointEngine, tag: str, seed: int = 0) -> Any:
    engine.create(tag)
    engine.save(state(seed), "model.pt")
    return engine.commit(tag, {"step": seed})


def engine_on(root: Path, *mirrors: Mirror, **fields: Any) -> AsyncCheckpointEngine:
    return AsyncCheckpointEngine(root, staging_bytes=16 << 20, chunk_bytes=1 << 16, mirrors=mirrors, **fields)


class Told(Observer):
    def __init__(self) -> None:
        self.mirrors: list[tuple[str, int, BaseException | None]] = []
        self.kinds: set[str] = set()

    def on_mirror(self, metrics: MirrorMetrics, error: BaseException | None) -> None:
        self.mirrors.append((metrics.tag, metrics.sent_bytes, error))

    def on_span(self, span: Span) -> None:
        self.kinds.add(span.kind)


@pytest.mark.wide
def test_a_commit_is_mirrored_and_told(moto: Any, tmp_path: Path, prefix: str) -> None:
    mirror, told = s3_mirror(moto, prefix), Told()
    with engine_on(tmp_path, mirror, observers=(told,)) as engine:
        pending = saved(engine, "step-1", 1)
        threads: list[str] = []
        pending.mirrored.add_done_callback(lambda mirrored: threads.append(threading.current_thread().name))
        assert pending.result(60) == "step-1" and pending.mirrored.result(60) == "step-1"
        assert pending.mirrored.metrics.sent_bytes == pending.metrics.size_bytes > 0
    assert threads == ["async-ckpt-callbacks-0"]
    assert check_store(mirror) == ["step-1"]
    assert (
        told.mirrors == [("step-1", pending.metrics.size_bytes, None)] and {"upload", "upload manifest"} <= told.kinds
    )


@pytest.mark.wide
def test_leaving_the_block_waits_for_mirrors(moto: Any, tmp_path: Path, prefix: str) -> None:
    mirror = s3_mirror(moto, prefix)
    with engine_on(tmp_path, mirror) as engine:
        for step in range(4):
            saved(engine, f"step-{step}", step)
    assert check_store(mirror) == [f"step-{step}" for step in range(4)]


@pytest.mark.wide
def test_leaving_the_block_says_what_is_left_and_the_next_engine_goes_on(
    moto: Any, tmp_path: Path, prefix: str
) -> None:
    is_open = threading.Event()

    def hold(number: int, method: str, path: str) -> Fault:
        if "step-1" in path and method == "PUT":
            is_open.wait(60)
        return None

    with Proxy(moto.endpoint, hold) as proxy:
        engine = engine_on(tmp_path, s3_mirror(moto, prefix, endpoint=proxy.endpoint), mirror_timeout_s=0.2)
        pending = saved(engine, "step-1")
        with pytest.warns(RuntimeWarning, match=r"1 checkpoint\(s\) are not mirrored yet.*'step-1'"):
            engine.close()
        assert isinstance(pending.mirrored.exception(0), MirrorError) and pending.exception(0) is None
        is_open.set()
        until(lambda: threads_of_mirrors() == [])
    with engine_on(tmp_path, s3_mirror(moto, prefix)) as engine:
        until(lambda: "step-1" in Catalog(s3_mirror(moto, prefix).url, remote(s3_mirror(moto, prefix))).tags())


def threads_of_mirrors() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("async-ckpt-mirror")]


def remote(mirror: Mirror) -> Any:
    from async_ckpt.mirror.remote import RemoteFileSystem

    return RemoteFileSystem(mirror)


@pytest.mark.wide
def test_local_retention_waits_for_mirrors(moto: Any, tmp_path: Path, prefix: str) -> None:
    is_open = threading.Event()

    def hold(number: int, method: str, path: str) -> Fault:
        if "step-0" in path:
            is_open.wait(60)
        return None

    with Proxy(moto.endpoint, hold) as proxy:
        mirror = s3_mirror(moto, prefix, endpoint=proxy.endpoint, request_timeout_s=60.0)
        with engine_on(tmp_path, mirror, retention=KeepLast(1)) as engine:
            pending = [saved(engine, f"step-{step}", step) for step in range(3)]
            for one in pending:
                one.result(60)
            assert engine.tags() == ["step-0", "step-1", "step-2"]
            is_open.set()
            pending[-1].mirrored.result(60)
            until(lambda: engine.tags() == ["step-2"])
    assert check_store(s3_mirror(moto, prefix)) == ["step-0", "step-1", "step-2"]


@pytest.mark.wide
def test_local_retention_does_not_wait_where_it_is_told_so(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    mirror = Mirror("s3://bucket/run", options={"endpoint": f"http://127.0.0.1:{port}"}, retry_timeout_s=0.1)
    with engine_on(tmp_path, mirror, retention=KeepLast(1), keep_local_until_mirrored=False) as engine:
        with pytest.warns(RuntimeWarning, match="are not mirrored"):
            engine.create("step-0")
        engine.commit("step-0").result(60)
        for step in range(1, 3):
            saved(engine, f"step-{step}", step).result(60)
        assert engine.tags() == ["step-2"]


@pytest.mark.wide
def test_a_new_machine_restores_from_the_mirror(moto: Any, tmp_path: Path, prefix: str) -> None:
    mirror = s3_mirror(moto, prefix, retention=KeepLast(1))
    with engine_on(tmp_path / "old", mirror) as engine:
        saved(engine, "step-1", 1).mirrored.result(60)
    with engine_on(tmp_path / "new", mirror) as engine:
        assert engine.latest() is None and engine.latest(tier="any") == "step-1"
        assert same(engine.load("step-1/model.pt"), state(1))
        target = state(0)
        engine.load_into(target, f"{tmp_path}/new/step-1/model.pt")
        assert same(target["model"], state(1)["model"])
        with pytest.raises(CheckpointNotFoundError):
            engine.load("step-9/model.pt")
        for step in (2, 3):
            saved(engine, f"step-{step}", step).mirrored.result(60)
        assert engine.latest(tier="any") == "step-3"
    # The one that the run resumed from stays.
    assert check_store(mirror) == ["step-1", "step-3"]


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_is_restored_from_the_mirror(
    moto: Any, tmp_path: Path, prefix: str, monkeypatch: Any
) -> None:
    import torch.distributed.checkpoint as dcp

    mirror = s3_mirror(moto, prefix)
    with engine_on(tmp_path / "old", mirror) as engine:
        save_sharded(engine, "step-1", {"x": torch.arange(9000.0), "step": 3}).mirrored.result(60)
    found: dict[str, Any] = {"x": torch.zeros(9000), "step": 0}
    with engine_on(tmp_path / "new", mirror) as engine:
        load_sharded(engine, "step-1", found)
        with pytest.raises(CheckpointNotFoundError):
            load_sharded(engine, "step-2", found)
    assert torch.equal(found["x"], torch.arange(9000.0)) and found["step"] == 3
    aws_environment(monkeypatch, moto)
    found["x"].zero_()
    dcp.load(found, checkpoint_id=f"{mirror.url}/step-1", storage_reader=DcpReader())
    assert torch.equal(found["x"], torch.arange(9000.0))
    with pytest.raises(ConfigError, match="is a store"):
        DcpWriter(f"{mirror.url}/step-1")


@pytest.mark.wide
def test_a_mirror_that_is_away_does_not_hide_the_other(moto: Any, tmp_path: Path, prefix: str) -> None:
    (port,) = free_ports(1)
    nobody = {"endpoint": f"http://127.0.0.1:{port}", "access_key_id": "a", "secret_access_key": "b"}
    away = Mirror("s3://bucket/away", options=nobody, retry_timeout_s=0.1)
    there = s3_mirror(moto, prefix)
    with engine_on(tmp_path / "old", there) as engine:
        saved(engine, "step-1", 1).mirrored.result(60)
    with engine_on(tmp_path / "new", away, there) as engine:
        assert same(engine.load("step-1/model.pt"), state(1))
        with pytest.raises(MirrorError, match="cannot be reached"):
            engine.load("step-2/model.pt")


@pytest.mark.wide
def test_what_is_damaged_on_disk_is_restored_from_the_mirror(moto: Any, tmp_path: Path, prefix: str) -> None:
    mirror = s3_mirror(moto, prefix)
    with engine_on(tmp_path, mirror, overwrite="replace") as engine:
        saved(engine, "step-1", 1).mirrored.result(60)
        saved(engine, "step-2", 2).mirrored.result(60)
        file = tmp_path / "step-2" / "model.pt"
        file.write_bytes(file.read_bytes()[:-9] + b"x" * 9)
        assert engine.latest() == "step-1" and engine.latest(tier="any") == "step-2"
        assert same(engine.load("step-2/model.pt"), state(2))
        saved(engine, "step-2", 3).result(60)
        assert same(engine.load("step-2/model.pt"), state(3))


@pytest.mark.wide
def test_what_cannot_be_used_is_an_error_of_the_first_create(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    options = {"endpoint": f"http://127.0.0.1:{port}", "access_key_id": "a", "secret_access_key": "b"}
    mirror = Mirror("s3://bucket/run", options=options, on_failure="raise", retry_timeout_s=0.2)
    with engine_on(tmp_path, mirror) as engine, pytest.raises(MirrorError, match="cannot be reached"):
        engine.create("step-1")


@pytest.mark.wide
@pytest.mark.parametrize("where", ["an endpoint without a store", "below a file"])
def test_whatever_is_at_the_url_training_goes_on(where: str, moto: Any, tmp_path: Path, prefix: str) -> None:
    (tmp_path / "file").write_text("no directory")
    with Proxy(moto.endpoint, lambda number, method, path: "404") as proxy:
        elsewhere = Mirror(f"file://{tmp_path}/file/run")
        mirror = elsewhere if where == "below a file" else s3_mirror(moto, prefix, endpoint=proxy.endpoint)
        with engine_on(tmp_path / "root", mirror) as engine:
            with pytest.warns(RuntimeWarning, match="are not mirrored: .* failed"):
                engine.create("step-1")
            pending = engine.commit("step-1")
            assert pending.result(60) == "step-1" and isinstance(pending.mirrored.exception(60), MirrorError)


@pytest.mark.wide
def test_what_failed_is_mirrored_once_the_store_is_back(moto: Any, tmp_path: Path, prefix: str) -> None:
    """Without another commit: the disk may be full of what waits for the mirror."""
    is_away = threading.Event()
    is_away.set()
    with Proxy(moto.endpoint, lambda number, method, path: "reset" if is_away.is_set() else None) as proxy:
        mirror = s3_mirror(moto, prefix, endpoint=proxy.endpoint, retry_timeout_s=0.2)
        with engine_on(tmp_path, mirror, retention=KeepLast(1)) as engine:
            with pytest.warns(RuntimeWarning, match="cannot be reached"):
                pending = [saved(engine, f"step-{step}", step) for step in range(3)]
            for one in pending:
                assert isinstance(one.mirrored.exception(60), MirrorError)
            assert engine.tags() == ["step-0", "step-1", "step-2"]
            is_away.clear()
            until(lambda: check_store(s3_mirror(moto, prefix)) == ["step-0", "step-1", "step-2"])
            until(lambda: engine.tags() == ["step-2"])


@pytest.mark.wide
def test_a_failed_upload_is_raised_by_close_where_that_is_asked_for(moto: Any, tmp_path: Path, prefix: str) -> None:
    def refuse(number: int, method: str, path: str) -> Fault:
        return "skew" if "step-1" in path else None

    with Proxy(moto.endpoint, refuse) as proxy:
        engine = engine_on(tmp_path, s3_mirror(moto, prefix, endpoint=proxy.endpoint, on_failure="raise"))
        saved(engine, "step-1").result(60)
        with pytest.raises(MirrorError, match="clock differs"):
            engine.close()
    assert Catalog(tmp_path).latest() == "step-1"


@pytest.mark.wide
def test_replaced_and_deleted_tags(moto: Any, tmp_path: Path, prefix: str) -> None:
    mirror = s3_mirror(moto, prefix)
    with engine_on(tmp_path, mirror, overwrite="replace") as engine:
        for seed in range(3):
            saved(engine, "latest", seed)
        engine.pending()
        saved(engine, "gone").result(60)
        engine.delete("gone")
        saved(engine, "last").mirrored.result(60)
    assert "latest" in check_store(mirror)
    shutil.rmtree(tmp_path)
    with engine_on(tmp_path, mirror) as engine:
        assert same(engine.load("latest/model.pt"), state(2))


@pytest.mark.wide
def test_a_preemption_bounds_the_wait_for_mirrors(moto: Any, tmp_path: Path, prefix: str) -> None:
    is_open = threading.Event()

    def hold(number: int, method: str, path: str) -> Fault:
        if "step-1" in path and method == "PUT":
            is_open.wait(60)
        return None

    with Proxy(moto.endpoint, hold) as proxy:
        engine = engine_on(tmp_path, s3_mirror(moto, prefix, endpoint=proxy.endpoint))
        engine.on_preemption((signal.SIGUSR1,), deadline_s=1.0)
        engine.create("step-1")
        engine.save(state(1), "model.pt")
        os.kill(os.getpid(), signal.SIGUSR1)
        engine.commit("step-1")
        began = time.monotonic()
        with pytest.warns(RuntimeWarning, match="are not mirrored yet"):
            engine.close()
        assert time.monotonic() - began < 20
        is_open.set()
        until(lambda: threads_of_mirrors() == [])
    assert Catalog(tmp_path).latest() == "step-1"


@pytest.mark.wide
def test_a_rate_is_kept(tmp_path: Path) -> None:
    mirror = Mirror(f"file://{tmp_path}/other", max_bytes_per_s=2e6)
    with engine_on(tmp_path / "root", mirror) as engine:
        saved(engine, "step-0").mirrored.result(60)
        pending = saved(engine, "step-1")
        pending.mirrored.result(60)
        # The first one goes at once; what comes after it waits for its share of the rate.
        assert pending.mirrored.metrics.upload_s > 0.5 * pending.metrics.size_bytes / 2e6


def test_observers_of_the_package_show_uploads(tmp_path: Path, caplog: Any) -> None:
    import prometheus_client

    from async_ckpt import LoggingObserver, PrometheusObserver, TensorBoardObserver, TraceObserver

    class Board:
        def __init__(self) -> None:
            self.points: dict[str, tuple[float, int]] = {}

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.points[tag] = scalar_value, global_step

    registry, board, url = prometheus_client.CollectorRegistry(), Board(), f"file://{tmp_path}/other"
    observers = (
        LoggingObserver(),
        PrometheusObserver(registry),
        TraceObserver(tmp_path / "trace.json"),
        TensorBoardObserver(board, step_of=lambda metrics: 7),
    )
    with (
        caplog.at_level(logging.INFO, "async_ckpt"),
        engine_on(tmp_path / "root", Mirror(url), observers=observers) as engine,
    ):
        saved(engine, "step-0").mirrored.result(60)
    for observer in observers:
        getattr(observer, "close", lambda: None)()
    assert f"'step-0' mirrored to {url}" in caplog.text
    assert registry.get_sample_value("async_ckpt_mirrored_total", {"mirror": url}) == 1.0
    assert '"upload"' in (tmp_path / "trace.json").read_text()
    name = f"checkpoint/mirror/{tmp_path}/other"
    assert board.points[f"{name}/failed"] == (0.0, 7) and board.points[f"{name}/sent_bytes"][0] > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"mirrors": "s3://bucket/run"},
        {"mirrors": (Mirror("s3://b/r"), Mirror("s3://b/r/"))},
        {"root": "s3://bucket/run"},
        {"mirrors": (), "mirror_timeout_s": 0},
        {"mirrors": (), "uploaders_per_node": 0},
    ],
)
def test_bad_fields(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mirror|uploaders"):
        AsyncCheckpointEngine(**{"root": tmp_path, **fields})


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("bucket/run", {}),
        ("s3:///run", {}),
        ("file://host/run", {}),
        ("http://host/run", {}),
        ("s3://bucket/../run", {}),
        ("s3://bucket/a\nb", {}),
        ("s3://bucket/run", {"part_bytes": 1 << 20}),
        ("s3://bucket/run", {"parallel": 0}),
        ("s3://bucket/run", {"on_failure": "ignore"}),
        ("s3://bucket/run", {"max_bytes_per_s": -1}),
        ("s3://bucket/run", {"retention": 3}),
    ],
)
def test_bad_mirrors(url: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Mirror(url, **fields)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("s3://bucket//run/a//", "s3://bucket/run/a"),
        ("s3://bucket/", "s3://bucket"),
        ("file:////mnt//run/", "file:///mnt/run"),
        ("s3://bucket/100%25 a", "s3://bucket/100%25 a"),
    ],
)
def test_one_place_has_one_name(given: str, url: str) -> None:
    assert Mirror(given).url == url == Mirror(url).url
