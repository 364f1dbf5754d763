"""The interface of the README, call by call, on real files."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import async_ckpt
from async_ckpt import AsyncCheckpointEngine, Catalog, PendingCommit

from ..support.comparing import torch_bytes


def state(value: float = 1.0) -> dict[str, object]:
    return {"w": torch.full((300, 70), value), "b": torch.arange(7), "step": int(value), "name": "x"}


def commit_one(engine: AsyncCheckpointEngine, tag: str, value: float) -> PendingCommit:
    engine.create(tag)
    engine.save(state(value), "model.pt")
    return engine.commit(tag, metadata={"step": int(value), "loss": value / 2})


def test_committed_file_is_what_torch_save_writes(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        assert commit_one(engine, "a", 3).result(60) == "a"
        assert (tmp_path / "a" / "model.pt").read_bytes() == torch_bytes(state(3))
        loaded = engine.load("a/model.pt")
        assert torch.equal(loaded["w"], state(3)["w"]) and loaded["step"] == 3
        assert torch.equal(torch.load(tmp_path / "a" / "model.pt")["w"], loaded["w"])


def test_nothing_is_visible_before_commit(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        engine.create("a")
        engine.save(state(), "model.pt")
        assert engine.tags() == [] and not (tmp_path / "a").exists()
        engine.commit("a").result(60)
        assert engine.tags() == ["a"] and engine.latest() == "a"


def test_several_checkpoints_in_flight(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=8 << 20, max_pending_commits=8) as engine:
        pending = [commit_one(engine, f"t{k}", k) for k in range(6)]
        assert [p.result(60) for p in pending] == [f"t{k}" for k in range(6)]
        assert engine.tags() == [f"t{k}" for k in range(6)]
        for k in range(6):
            assert engine.load(f"t{k}/model.pt")["step"] == k


def test_load_into_waits_for_snapshots_after_it_has_waited_for_commits(tmp_path: Path) -> None:
    calls = []

    class Telling(AsyncCheckpointEngine):
        def catalog_of(self, tag: str) -> Catalog:
            calls.append("commits")
            return super().catalog_of(tag)

        def wait_snapshot(self) -> None:
            calls.append("snapshots")
            super().wait_snapshot()

    with Telling(tmp_path, staging_bytes=1 << 20) as engine:
        commit_one(engine, "a", 3)
        # What another thread saves while the commit is waited for must not be overwritten while it is copied.
        engine.load_into(into := state(1), "a/model.pt")
        assert calls == ["commits", "snapshots"] and torch.equal(into["w"], state(3)["w"])


def test_leaving_the_block_waits(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        pending = commit_one(engine, "a", 1)
    assert pending.done() and Catalog(tmp_path).tags() == ["a"]


def test_absolute_path_and_subdirectories(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(str(tmp_path), staging_bytes=1 << 20) as engine:
        engine.create("a")
        engine.makedirs("sub/deeper")
        engine.makedirs("sub/deeper", exist_ok=True)
        engine.makedirs(tmp_path / "a" / "empty")
        engine.save(state(1), tmp_path / "a" / "model.pt")
        engine.save(state(2), "sub/deeper/optim.pt")
        engine.commit("a").result(60)
    assert (tmp_path / "a" / "empty").is_dir()
    assert torch.load(tmp_path / "a" / "model.pt")["step"] == 1
    assert async_ckpt.load(tmp_path / "a" / "sub" / "deeper" / "optim.pt")["step"] == 2


def test_two_open_tags_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20) as engine:
        engine.create("a")
        engine.create("b")
        engine.save(state(1), tmp_path / "a" / "model.pt")
        engine.save(state(2), "model.pt")
        engine.commit("b").result(60)
        engine.commit("a").result(60)
        assert [engine.load(f"{t}/model.pt")["step"] for t in "ab"] == [1, 2]
        assert engine.tags() == ["b", "a"]


def test_replace_keeps_the_old_one_until_the_new_one_is_durable(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, overwrite="replace") as engine:
        commit_one(engine, "a", 1).result(60)
        engine.create("a")
        engine.save(state(2), "model.pt")
        assert torch.load(tmp_path / "a" / "model.pt")["step"] == 1
        engine.commit("a").result(60)
        assert engine.load("a/model.pt")["step"] == 2


def test_replacing_a_tag_whose_commit_is_pending_keeps_the_order(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=8 << 20, overwrite="replace") as engine:
        pending = [commit_one(engine, "last", k) for k in range(4)]
        for p in pending:
            p.result(60)
        assert engine.load("last/model.pt")["step"] == 3


async def test_pending_commit_is_awaitable_and_survives_a_cancelled_wait(tmp_path: Path) -> None:
    async with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        pending = commit_one(engine, "a", 1)
        waiter = asyncio.ensure_future(_wait(pending))
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert await pending == "a"
        assert await pending == "a"
        assert pending.done() and pending.exception() is None


async def _wait(pending: PendingCommit) -> str:
    return await pending


def test_pending_commit_is_awaitable_from_two_loops(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        pending = commit_one(engine, "a", 1)
        results: list[str] = []
        threads = [threading.Thread(target=lambda: results.append(asyncio.run(_wait(pending)))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == ["a", "a"]


def test_done_callback_gets_the_commit(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        called = threading.Event()
        seen: list[PendingCommit] = []
        pending = commit_one(engine, "a", 1)
        pending.add_done_callback(lambda p: (seen.append(p), called.set()))
        assert called.wait(60)
        assert seen == [pending]


def test_metadata_is_readable_without_torch(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        commit_one(engine, "a", 4).result(60)
    code = (
        "import sys, async_ckpt; c = async_ckpt.Catalog(sys.argv[1]); m = c.manifest(c.latest()); "
        "assert m.metadata['step'] == 4 and m.metadata['loss'] == 2.0, m; assert c.tags() == ['a']; assert "
        "'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


def test_load_into_fills_existing_tensors(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30))
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        engine.create("a")
        engine.save(model.state_dict(), "model.pt")
        engine.commit("a").result(60)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        engine.load_into(model.state_dict(), "a/model.pt")
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


def test_load_waits_for_a_pending_commit_of_that_tag(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        commit_one(engine, "a", 5)
        assert engine.load("a/model.pt")["step"] == 5


def test_threads_take_turns_and_contents_never_mix(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    with AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20, max_pending_commits=3) as engine:

        def work(k: int) -> None:
            try:
                for n in range(10):
                    tag = f"w{k}-{n}"
                    engine.create(tag)
                    engine.save({"v": torch.full((5000,), float(k * 100 + n))}, tmp_path / tag / "x.pt")
                    engine.commit(tag)
            except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert failures == []
    assert len(Catalog(tmp_path).tags()) == 80
    for k in range(8):
        for n in range(10):
            assert torch.load(tmp_path / f"w{k}-{n}" / "x.pt")["v"].unique().tolist() == [k * 100 + n]


def test_metrics_say_what_a_save_cost(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        pending = commit_one(engine, "a", 1)
        pending.result(60)
        metrics = pending.metrics
        assert metrics.num_files == 1 and metrics.size_bytes == (tmp_path / "a" / "model.pt").stat().st_size
        assert 0 < metrics.stall_s < metrics.total_s + metrics.stall_s and metrics.bytes_per_s > 0
        assert metrics.saves[0].planner == "fast" and metrics.saves[0].num_tensors == 2


def test_a_broken_observer_harms_no_checkpoint(tmp_path: Path) -> None:
    class Broken:
        def on_span(self, span: object) -> None:
            raise ValueError("observer bug")

        on_save = on_span

        def on_commit(self, metrics: object, error: object) -> None:
            raise ValueError("observer bug")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, observers=(Broken(),)) as engine:
            assert commit_one(engine, "a", 1).result(60) == "a"
    assert len([w for w in caught if "observer bug" in str(w.message)]) == 1


def test_newest_is_the_last_commit_even_when_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        commit_one(engine, "z-first-run", 1).result(60)
    an_hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr("time.time_ns", lambda: an_hour_ago)
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        for k, tag in enumerate(("c", "b", "a")):
            commit_one(engine, tag, k)
    assert Catalog(tmp_path).tags() == ["z-first-run", "c", "b", "a"]


def test_safetensors_format(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int16), "t": torch.randn(4, 6).t()}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, format="safetensors") as engine:
        engine.create("x")
        engine.save(tensors, "model.safetensors")
        engine.commit("x").result(60)
        loaded = safetensors.load_file(tmp_path / "x" / "model.safetensors")
        ours = engine.load("x/model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and torch.equal(ours[name], tensor)


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, async_ckpt; async_ckpt.Catalog; async_ckpt.EngineConfig; assert 'torch' not in sys.modules; "
        "assert set(async_ckpt.__all__) <= set(dir(async_ckpt))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in async_ckpt.__all__:
        assert (getattr(async_ckpt, name).__doc__ or "").strip(), name
