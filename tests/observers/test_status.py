"""What engines publish about themselves for `async-ckpt watch`: where, when, and that it never matters to a checkpoint."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import time

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, StatusObserver
from async_ckpt.host.process import OwnerState, current_owner
from async_ckpt.observers.published import read_statuses, remove_stale, remove_stale_runtime
from async_ckpt.observers.status_document import RATE_WINDOW_S, encode
from async_ckpt.observers.status_places import RuntimePlace, SharedPlace, root_key
from async_ckpt.observers.status_writer import StatusWriter
from tests.cli.test_reading import dead_owner


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    """A runtime directory of one's own."""
    path = tmp_path / "runtime"
    path.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    return path


def files(runtime) -> list[str]:
    return sorted(str(path.relative_to(runtime)) for path in runtime.rglob("*") if path.is_file())


def open_engine(root, **fields) -> AsyncCheckpointEngine:
    return AsyncCheckpointEngine(root, staging_bytes=1 << 20, chunk_bytes=64 << 10, **fields)


def save(engine: AsyncCheckpointEngine, tag: str) -> None:
    engine.create(tag)
    engine.save({"x": torch.zeros(20_000)}, "x.pt")


def seen(engine: AsyncCheckpointEngine, root):
    assert engine._inflight.publisher.flush()
    (status,) = read_statuses(str(root))
    return status


def test_every_engine_publishes_from_create_to_close(tmp_path, runtime):
    root = tmp_path / "root"
    with open_engine(root) as engine:
        status = seen(engine, root)
        assert (status.owner, status.owner_state, status.in_flight, status.last) == (current_owner(), OwnerState.ALIVE, (), None)
        save(engine, "a")
        (flying,) = seen(engine, root).in_flight
        assert (flying["tag"], flying["state"], flying["num_files"]) == ("a", "open", 1)
        assert flying["size_bytes"] == flying["copied_bytes"] > 80_000
        assert flying["stall_s"] > 0
        engine.commit("a").result()
        save(engine, "b")
        engine.abort("b")
        status = seen(engine, root)
        assert status.in_flight == ()
        assert (status.num_committed, status.num_failed, status.num_aborted) == (1, 0, 1)
        assert status.last["tag"] == "a"
        assert status.last["error"] is None
        assert status.last["stall_s"] > 0
        assert status.written_bytes >= (root / "a" / "x.pt").stat().st_size
        assert status.queue_bytes == status.queue_chunks == 0
        assert [name for name in os.listdir(root) if name.startswith(".")] == []
    assert files(runtime) == []
    assert read_statuses(str(root)) == []


def test_the_queue_and_the_state_of_a_commit_are_seen_from_outside(tmp_path, held_copies):
    root = tmp_path / "root"
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with open_engine(root) as engine:
        engine.guard(optimizer)
        held = held_copies(engine)
        engine.create("t")
        engine.save(model.state_dict(), "m.pt")
        pending = engine.commit("t")
        status = seen(engine, root)
        held.let_go()
        pending.result()
        (flying,) = status.in_flight
        assert (flying["state"], flying["copied_bytes"], flying["written_bytes"]) == ("committing", 0, 0)
        assert flying["size_bytes"] > 16_000
        assert (status.queue_bytes, status.queue_chunks) == (0, 0)
        assert seen(engine, root).in_flight == ()


def test_what_is_copied_and_not_written_is_the_queue(tmp_path):
    import threading

    gate = threading.Event()
    with open_engine(tmp_path / "root") as engine:
        # All threads that compute checksums are busy: nothing can be written.
        for _ in range(8):
            engine._inflight.pool._sealers.submit(gate.wait)
        save(engine, "t")
        status = seen(engine, tmp_path / "root")
        gate.set()
        engine.commit("t")
    assert status.queue_bytes == status.in_flight[0]["size_bytes"]
    assert status.queue_chunks == 2


def test_a_failed_commit_is_counted_and_shown(tmp_path):
    from async_ckpt.errors import CheckpointError
    from tests.support.faulty_filesystem import FaultyFileSystem

    fs = FaultyFileSystem()
    with open_engine(tmp_path / "root", filesystem=fs) as engine:
        fs.fail_when(lambda op: op.name == "rename" and ".staging.a." in op.path, 5)
        save(engine, "a")
        with pytest.raises(CheckpointError):
            engine.commit("a").result()
        status = seen(engine, tmp_path / "root")
        assert (status.num_failed, status.in_flight) == (1, ())
        assert status.last["error"]
        fs.heal()


def test_two_engines_of_one_process_on_one_root_are_two(tmp_path):
    with open_engine(tmp_path / "root") as first, open_engine(tmp_path / "root") as second:
        first._inflight.publisher.flush()
        second._inflight.publisher.flush()
        assert len(read_statuses(str(tmp_path / "root"))) == 2


def test_the_root_is_found_by_every_name_it_has(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to("root")
    with open_engine(tmp_path / "link") as engine:
        engine._inflight.publisher.flush()
        assert len(read_statuses(str(tmp_path / "root"))) == 1


def test_publishing_can_be_switched_off(tmp_path, runtime):
    with open_engine(tmp_path / "root", publish_status=False) as engine:
        assert engine._inflight.publisher is None
        save(engine, "a")
        engine.commit("a")
    assert files(runtime) == []


def test_an_observer_publishes_into_a_shared_directory_too(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with open_engine(root, observers=(StatusObserver(root),)) as engine:
        assert len(seen(engine, root).in_flight) == 0
        (name,) = [name for name in os.listdir(root) if name.startswith(".status.")]
        assert str(current_owner()) in name
    assert os.listdir(root) == []
    with open_engine(root, observers=(StatusObserver(root),), publish_status=False) as engine:
        assert seen(engine, root).root == str(root)


def test_directories_are_private_and_others_are_not_used(tmp_path, runtime):
    home = runtime / f"async-ckpt-{os.geteuid()}"
    place = RuntimePlace(str(tmp_path), current_owner(), 0)
    place.write(b"{}")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    place.remove()
    assert list(home.iterdir()) == []
    home.chmod(0o777)
    elsewhere = RuntimePlace(str(tmp_path), current_owner(), 0)
    elsewhere.write(b"{}")
    assert list(home.iterdir()) == []
    elsewhere.remove()
    home.rmdir()
    home.symlink_to(tmp_path)
    again = RuntimePlace(str(tmp_path), current_owner(), 0)
    again.write(b"{}")
    assert not (tmp_path / root_key(str(tmp_path))).exists()
    again.remove()


def test_a_runtime_directory_that_vanishes_is_made_again(tmp_path, runtime):
    import shutil

    place = RuntimePlace(str(tmp_path), current_owner(), 0)
    place.write(b"{}")
    shutil.rmtree(runtime / f"async-ckpt-{os.geteuid()}")
    place.write(b"{}")
    assert len(files(runtime)) == 1
    place.remove()


class Refusing:
    """A place on a disk that is full."""

    def write(self, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    def remove(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_place_that_refuses_is_reported_once_and_harms_nothing(tmp_path, caplog):
    good = SharedPlace(str(tmp_path), current_owner(), 7)
    with caplog.at_level(logging.WARNING, logger="async_ckpt"):
        writer = StatusWriter(lambda: (b"{}", False), [Refusing(), good])
        for _ in range(3):
            writer.changed()
            assert writer.flush()
        assert len(caplog.records) == 1
        assert "checkpoints are not affected" in caplog.records[0].getMessage()
        assert os.path.exists(good.path)
        writer.close()
    assert not os.path.exists(good.path)


def test_an_unforeseen_failure_of_the_publisher_is_said_and_commits_go_on(tmp_path, caplog):
    with open_engine(tmp_path / "root") as engine:
        engine._inflight.publisher._about["root"] = object()
        save(engine, "a")
        engine.commit("a").result()
        engine._inflight.publisher.flush()
    assert any("publishing the status" in record.getMessage() for record in caplog.records)
    assert engine._catalog.tags() == ["a"]


def test_a_planted_link_is_not_followed(tmp_path):
    place = SharedPlace(str(tmp_path), current_owner(), 0)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.symlink(victim, place.path + ".new")
    with pytest.raises(OSError, match="symbolic links"):
        place.write(b"{}")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "nul", '{"format": "async-ckpt-status", "format_version": 2}', "[" * 100_000, "x" * (2 << 20)]
)
def test_a_crafted_status_is_left_out(tmp_path, text):
    (tmp_path / f".status.{current_owner()}.0.json").write_text(text)
    (tmp_path / ".status.nobody.0.json").write_text(text)
    assert read_statuses(str(tmp_path)) == []


def fields(**changes):
    empty = {"in_flight": [], "queue_bytes": 0, "queue_chunks": 0, "written_bytes": 9, "bytes_per_s": 5.0, "last": None}
    return {"root": "/r", "rank": 0, "world_size": 1, "num_committed": 0, "num_failed": 0, "num_aborted": 0, **empty, **changes}


@pytest.mark.parametrize("changes", [{"bytes_per_s": float("nan")}, {"queue_bytes": "many"}, {"last": [1]}, {"in_flight": [{"tag": "x"}]}])
def test_a_status_is_checked_field_by_field(tmp_path, changes):
    path = tmp_path / f".status.{current_owner()}.0.json"
    path.write_bytes(encode(current_owner(), fields()))
    assert len(read_statuses(str(tmp_path))) == 1
    path.write_bytes(encode(current_owner(), fields(**changes)))
    assert read_statuses(str(tmp_path)) == []


def test_an_old_rate_says_nothing_about_now(tmp_path):
    (tmp_path / f".status.{current_owner()}.0.json").write_bytes(encode(current_owner(), fields()))
    (status,) = read_statuses(str(tmp_path))
    assert status.rate_bytes_per_s(status.updated_unix_s + 1) == 5.0
    assert status.rate_bytes_per_s(status.updated_unix_s + RATE_WINDOW_S + 1) == 0.0


KILLED = """
import os, sys, torch
from async_ckpt import AsyncCheckpointEngine, StatusObserver
engine = AsyncCheckpointEngine(sys.argv[1], staging_bytes=1 << 20, observers=(StatusObserver(sys.argv[1]),))
engine.create("t")
engine._inflight.publisher.flush()
os.kill(os.getpid(), 9)
"""


@pytest.mark.leaves_staging
def test_what_a_killed_process_published_is_removed_by_whoever_looks(tmp_path, runtime):
    root = tmp_path / "root"
    root.mkdir()
    for expected in (1, 1):
        subprocess.run([sys.executable, "-c", KILLED, str(root)], check=False)
        # The next engine on any root of this user has removed what the one before had left.
        assert len(files(runtime)) == expected
    left = read_statuses(str(root))
    assert {status.owner_state for status in left} == {OwnerState.DEAD}
    assert files(runtime) == []
    assert len(remove_stale(str(root))) == 2
    assert [name for name in os.listdir(root) if name.startswith(".status")] == []


def test_files_of_owners_that_cannot_be_looked_up_are_forgotten_after_a_week(tmp_path, runtime):
    me = current_owner()
    folder = runtime / f"async-ckpt-{os.geteuid()}" / "0123"
    folder.mkdir(parents=True)
    folder.parent.chmod(0o700)
    foreign, dead = folder / f"{'0' * 8}-{'1' * 8}-1-2-3.0.json", folder / f"{dead_owner()}.0.json"
    alive = folder / f"{me}.99.json"
    for path in (foreign, dead, alive):
        path.write_text("{}")
    remove_stale_runtime()
    assert set(folder.iterdir()) == {foreign, alive}
    os.utime(foreign, (time.time() - 8 * 86400,) * 2)
    os.utime(alive, (time.time() - 8 * 86400,) * 2)
    remove_stale_runtime()
    assert set(folder.iterdir()) == {alive}


def test_a_forked_child_publishes_and_removes_nothing(tmp_path, runtime):
    with open_engine(tmp_path / "root") as engine:
        engine._inflight.publisher.flush()
        child = os.fork()
        if child == 0:
            engine._inflight.publisher._writer.changed()
            engine._inflight.publisher.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert len(files(runtime)) == 1


def test_a_dropped_engine_takes_its_status_away(tmp_path, runtime):
    script = """
import sys
from async_ckpt import AsyncCheckpointEngine
engine = AsyncCheckpointEngine(sys.argv[1], staging_bytes=1 << 20)
engine._inflight.publisher.flush()
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "root")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran
    assert files(runtime) == []


def test_watch_shows_a_training_that_does_nothing_for_it(cli_watch, tmp_path):
    root = tmp_path / "root"
    with open_engine(root) as engine:
        save(engine, "step-1")
        engine.commit("step-1").result()
        save(engine, "step-2")
        engine._inflight.publisher.flush()
        found = json.loads(cli_watch(root, "--json"))
        shown = cli_watch(root, "--once")
        engine.commit("step-2")
    assert set(found) == {"root", "num_checkpoints", "newest", "engines", "staging"}
    (told,) = found["engines"]
    assert [flying["tag"] for flying in told["in_flight"]] == ["step-2"]
    assert (found["newest"], told["num_committed"], told["last"]["tag"]) == ("step-1", 1, "step-1")
    assert found["staging"] == []
    for word in ("step-2 (open)", "queue", "stall", "newest committed: step-1", f"process {os.getpid()}"):
        assert word in shown
    assert "nothing is staged" in cli_watch(root, "--once")


@pytest.mark.leaves_staging
def test_watch_shows_from_outside_what_nobody_publishes(cli_watch, tmp_path):
    root = tmp_path / "root"
    with open_engine(root, publish_status=False) as engine:
        save(engine, "quiet")
        (root / f".staging.lost.{dead_owner()}.0").mkdir()
        found = json.loads(cli_watch(root, "--json"))
        shown = cli_watch(root, "--once")
        engine.commit("quiet")
    assert {(staged["tag"], staged["owner_state"]) for staged in found["staging"]} == {("quiet", "alive"), ("lost", "dead")}
    assert "live owner, which publishes nothing here" in shown
    assert "async-ckpt sweep" in shown


@pytest.fixture
def cli_watch(capsys):
    from async_ckpt.cli import main

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as left:
            main(["watch", *map(str, arguments)])
        assert left.value.code == 0
        return capsys.readouterr().out

    return run
