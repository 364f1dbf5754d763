"""What did not change is shared with the last checkpoint of its path, and every checkpoint stays complete by itself.

Reflinks are emulated, where nothing else is said: `tests/faults/test_realdisks.py` has them on xfs and btrfs.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, Catalog, SpanRecorder
from async_ckpt.errors import (
    CheckpointError,
    CommitError,
    ConfigError,
    CorruptCheckpointError,
    OutOfSpaceError,
    TornSnapshotError,
)
from async_ckpt.metrics import CommitMetrics
from async_ckpt.storage.probe import Findings
from tests.support.comparing import torch_bytes
from tests.support.faulty_filesystem import FaultyFileSystem, Operation
from tests.support.insides import pipeline_of, thread_of

CHUNK = 4096
NUM_CHUNKS = 12


def tensors() -> dict[str, torch.Tensor]:
    """Ten tensors of about a chunk each."""
    return {f"w{k}": torch.arange(1024, dtype=torch.int32) + k for k in range(10)}


class Run:
    """An engine whose files share blocks (`clones`), or are linked; `ops` of the last commit."""

    def __init__(self, root: Path, *, clones: bool, kind: str = "xfs", **config: Any) -> None:
        self.root = root
        self.fs = FaultyFileSystem(keep_data=True)
        self.fs.emulate_clones = clones
        self.fs.fs_type = lambda path: kind if clones else "ext4"  # type: ignore[method-assign]
        given = {"reuse": "auto", "chunk_bytes": CHUNK, "staging_bytes": 32 * CHUNK, "filesystem": self.fs} | config
        self.engine = AsyncCheckpointEngine(root, **given)
        self.ops: list[Operation] = []

    def commit(self, tag: str, state: Any, path: str = "m.pt", **how: Any) -> CommitMetrics:
        start = len(self.fs.operations)
        self.engine.create(tag)
        self.engine.save(state, path, **how)
        pending = self.engine.commit(tag)
        pending.result(30)
        self.ops = [op for op in self.fs.operations[start:] if op.path.endswith(path)]
        return pending.metrics

    def names(self, *, failed: bool = False) -> list[str]:
        return [op.name for op in self.ops if op.name in ("clone", "link", "pwrite") and (op.outcome == "ok") != failed]

    def check(self, tag: str, state: Any, path: str = "m.pt") -> None:
        """It verifies, and is byte for byte what torch writes."""
        report = Catalog(self.root).verify(tag)
        assert report.ok, report.problems
        assert (self.root / tag / path).read_bytes() == torch_bytes(state)


@pytest.fixture
def run(fast_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(**config: Any) -> Run:
        runs.append(Run(fast_path / f"root{len(runs)}", **config))
        return runs[-1]

    yield make
    for one in runs:
        one.fs.heal()
        one.engine.close()


@pytest.mark.parametrize("io_mode", ["direct", "buffered"])
def test_chunks_that_did_not_change_are_cloned_and_the_rest_is_written(run: Any, io_mode: str) -> None:
    one, state = run(clones=True, io_mode=io_mode), tensors()
    assert one.commit("a", state).shared_bytes == 0
    state["w4"].add_(1)
    metrics = one.commit("b", state)
    one.check("b", state)
    written = sum(op.num_bytes or 0 for op in one.ops if op.name == "pwrite")
    # The two chunks that it lies in, and the end of the file, with all checksums.
    assert metrics.written_bytes <= written <= 5 * CHUNK
    assert metrics.shared_bytes == sum(op.num_bytes or 0 for op in one.ops if op.name == "clone") >= 7 * CHUNK
    assert metrics.written_bytes + metrics.shared_bytes == metrics.size_bytes
    entry = Catalog(one.root).manifest("b").files[0]
    assert entry.shared_bytes == metrics.saves[0].shared_bytes == metrics.shared_bytes
    shutil.rmtree(one.root / "a")
    one.check("b", state)


def test_once_a_file_has_shared_bytes_the_next_one_clones_them_before_it_writes(run: Any) -> None:
    one, state = run(clones=True), tensors()
    for tag in "abc":
        one.commit(tag, state)
        state["w4"].add_(1)
    metrics = one.commit("d", state)
    one.check("d", state)
    # One call for what lies before, one for what comes after; none waits for a write.
    assert one.names()[:2] == ["clone", "clone"] and set(one.names()[2:]) == {"pwrite"}
    assert metrics.written_bytes + metrics.shared_bytes == metrics.size_bytes
    for tensor in state.values():
        tensor.add_(1)
    assert one.commit("e", state).shared_bytes == 0
    state["w4"].add_(1)
    one.commit("f", state)
    # Where the last one has shared nothing, nothing is sure: each chunk is cloned when its checksum is known.
    assert one.names().count("clone") > 2


def test_of_an_unchanged_file_only_the_ragged_rest_of_a_page_is_written(run: Any) -> None:
    one, state = run(clones=True), tensors()
    one.commit("a", state)
    metrics = one.commit("b", state)
    one.check("b", state)
    assert metrics.written_bytes == metrics.size_bytes % 4096 and os.stat(one.root / "b" / "m.pt").st_nlink == 1


@pytest.mark.parametrize("path", ["m.pt", "deep/er/m.pt"])
def test_where_there_are_no_reflinks_an_unchanged_file_is_a_hard_link(run: Any, path: str) -> None:
    one, state = run(clones=False), tensors()
    one.commit("a", state, path)
    metrics = one.commit("b", state, path)
    assert one.names() == ["link"] and metrics.written_bytes == 0 and metrics.shared_bytes == metrics.size_bytes
    assert os.path.samefile(one.root / "a" / path, one.root / "b" / path)
    one.engine.delete("a")
    one.check("b", state, path)
    # The next one is a link to that.
    one.commit("c", state, path)
    assert one.names() == ["link"]


@pytest.mark.parametrize("which", range(10))
def test_a_file_that_is_equal_up_to_some_chunk_is_written(run: Any, which: int) -> None:
    one, state = run(clones=False), tensors()
    one.commit("a", state)
    # No counter moves: every chunk is held back until the one that differs.
    state[f"w{which}"].data[7] = 1 << 20
    assert one.commit("b", state).shared_bytes == 0
    assert "link" not in one.names()
    one.check("b", state)


@pytest.mark.parametrize("clones", [True, False])
def test_a_file_larger_than_the_staging_memory(run: Any, clones: bool) -> None:
    one, state = run(clones=clones, staging_bytes=4 * CHUNK), tensors()
    one.commit("a", state)
    metrics = one.commit("b", state)
    assert metrics.saves[0].mode == "streamed" and (metrics.shared_bytes > 8 * CHUNK) is clones
    one.check("b", state)


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "in place, to the same values": lambda state: state["w3"].add_(0),
    "past the counters": lambda state: state["w3"].data.add_(1),
    "another tensor with the same values": lambda state: state.update(w3=state["w3"].clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_have_changed_is_written(run: Any, change: str) -> None:
    one, state = run(clones=True), tensors()
    one.commit("a", state)
    one.commit("b", state)
    CHANGES[change](state)
    one.commit("c", state)
    start = 4096 * 3 + 2000
    # Where no counter has told of it, over what was shared before.
    last = [op.name for op in one.ops if op.name in ("clone", "pwrite") and 0 <= start - op.offset < op.num_bytes]
    assert last == ["clone", "pwrite"][change != "past the counters" :]
    one.check("c", state)


def test_a_counter_is_believed_before_a_checksum(run: Any) -> None:
    """Other bytes with the same CRC-32."""
    one = run(clones=False)
    state = {"w": torch.zeros(8192, dtype=torch.uint8)}
    one.commit("a", state)
    polynomial = 0x104C11DB7
    bits = [k for k in range(33) if polynomial >> (32 - k) & 1]
    for bit in bits:
        state["w"][4096 + bit // 8] ^= 1 << bit % 8
    one.commit("b", state)
    a, b = (Catalog(one.root).manifest(tag).files[0].extent_crc32 for tag in "ab")
    assert a == b and one.names() == ["pwrite"] * len(one.names())
    one.check("b", state)


def test_samples_are_believed_before_a_checksum(run: Any) -> None:
    """All bytes are others, with the same CRC-32, and no counter has moved: as a fused optimizer might leave them."""
    one = run(clones=True)
    state = {"w": torch.zeros(8192, dtype=torch.uint8)}
    one.commit("a", state)
    pattern = torch.frombuffer(bytearray((0xEDB88320 << 1 | 1).to_bytes(8, "little")), dtype=torch.uint8)
    version = state["w"]._version
    state["w"].data ^= pattern.repeat(1024)
    assert state["w"]._version == version
    one.commit("b", state)
    a, b = (Catalog(one.root).manifest(tag).files[0].extent_crc32 for tag in "ab")
    assert a[1:-1] == b[1:-1]
    one.check("b", state)


def test_freed_storages_are_not_taken_for_new_ones(run: Any) -> None:
    one = run(clones=True)
    for tag in "abcdef":
        metrics = one.commit(tag, tensors())
        assert metrics.shared_bytes == 0


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINVAL])
def test_what_cannot_be_cloned_is_written(run: Any, code: int) -> None:
    one, state = run(clones=True), tensors()
    one.commit("a", state)
    one.fs.fail_when(lambda op: op.name == "clone", code)
    assert one.commit("b", state).shared_bytes == 0
    one.check("b", state)
    num_asked = len([op for op in one.ops if op.name == "clone"])
    assert 1 <= num_asked <= 12
    one.fs.heal()
    metrics = one.commit("c", state)
    one.check("c", state)
    for_good = code in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL)
    assert ("clone" in one.names()) is not for_good and metrics.shared_bytes > 0


def test_what_cannot_be_linked_is_written(run: Any) -> None:
    one, state = run(clones=False), tensors()
    one.commit("a", state)
    for tag, code in (("b", errno.EMLINK), ("c", errno.EPERM), ("d", errno.EIO)):
        one.fs.fail_when(lambda op: op.name == "link", code)
        assert one.commit(tag, state).shared_bytes == 0
        one.check(tag, state)
        one.fs.heal()


@pytest.mark.parametrize("clones", [True, False])
@pytest.mark.parametrize("what", ["deleted", "replaced", "edited", "a link"])
def test_a_source_that_is_not_what_was_committed_is_not_used(run: Any, clones: bool, what: str) -> None:
    one, state = run(clones=clones), tensors()
    one.commit("a", state)
    source = one.root / "a" / "m.pt"
    if what == "deleted":
        shutil.rmtree(source.parent)
    elif what == "replaced":
        other = source.read_bytes()
        source.unlink()
        source.write_bytes(bytes(len(other)))
    elif what == "edited":
        with open(source, "r+b") as file:
            file.write(b"edited")
    else:
        source.rename(source.parent / "elsewhere")
        source.symlink_to("elsewhere")
    assert one.commit("b", state).shared_bytes == 0
    one.check("b", state)


@pytest.mark.parametrize("clones", [True, False])
def test_a_source_that_goes_while_it_is_used(run: Any, clones: bool) -> None:
    one, state = run(clones=clones), tensors()
    one.commit("a", state)
    gone: list[str] = []

    def before(op: Operation) -> None:
        if op.name in ("clone", "link") and not gone:
            gone.append("a")
            shutil.rmtree(one.root / "a")

    one.fs.before = before
    metrics = one.commit("b", state)
    assert gone and (metrics.shared_bytes > 0) is clones
    one.check("b", state)


def test_a_file_whose_task_is_cancelled_stays_open_while_bytes_are_cloned_into_it(run: Any) -> None:
    """Its number would be another file's, and that file would get the bytes."""
    one, state = run(clones=True), tensors()
    for tag in "abc":
        one.commit(tag, state)
        state["w4"].add_(1)
    cloning, closed, go_on = threading.Event(), threading.Event(), threading.Event()

    def before(op: Operation) -> None:
        if op.name == "clone":
            cloning.set()
            go_on.wait(20)
        elif op.name == "close" and cloning.is_set() and op.path.endswith("m.pt") and "staging" in op.path:
            closed.set()

    one.fs.before = before
    one.engine.create("d")
    one.engine.save(state, "m.pt")
    assert cloning.wait(20)
    loop = thread_of(pipeline_of(one.engine).pool)
    loop.call(lambda: [task.cancel() for task in asyncio.all_tasks(loop.loop)])
    is_early = closed.wait(0.2)
    go_on.set()
    with pytest.raises(CheckpointError):
        one.engine.commit("d").result(30)
    assert closed.is_set() and not is_early


def test_another_file_in_the_place_of_the_source_is_not_linked(run: Any) -> None:
    one, state = run(clones=False), tensors()
    one.commit("a", state)
    source = one.root / "a" / "m.pt"

    def before(op: Operation) -> None:
        if op.name == "link":
            source.unlink()
            source.write_bytes(b"another")

    one.fs.before = before
    assert one.commit("b", state).shared_bytes == 0
    one.check("b", state)


def rot(path: Path, offset: int) -> None:
    """Two bytes change, as on a disk that rots: it tells no time."""
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff\xfe")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("clones", [True, False])
def test_damage_on_the_disk_is_found_in_both(run: Any, clones: bool) -> None:
    one, state = run(clones=clones), tensors()
    one.commit("a", state)
    rot(one.root / "a" / "m.pt", 3 * CHUNK + 5)
    assert one.commit("b", state).shared_bytes > 0
    catalog = Catalog(one.root)
    assert [catalog.verify(tag).ok for tag in "ab"] == [False, False]
    # What `load` refuses, is not handed on for ever.
    assert catalog.latest() is None


def test_reuse_is_off_for_files_of_another_layout_and_for_other_engines(run: Any) -> None:
    one, state = run(clones=True), tensors()
    one.commit("a", state)
    assert one.commit("b", {**state, "x": torch.ones(1)}).shared_bytes == 0
    assert one.commit("c", state).shared_bytes == 0
    assert one.commit("d", state, "other.pt").shared_bytes == 0
    pytest.importorskip("safetensors")
    assert one.commit("e", state, format="safetensors").shared_bytes == 0
    assert one.commit("f", state, format="safetensors").shared_bytes > 0
    with AsyncCheckpointEngine(
        one.root, reuse="auto", chunk_bytes=CHUNK, staging_bytes=32 * CHUNK, filesystem=one.fs
    ) as other:
        other.create("g")
        other.save(state, "m.pt", format="safetensors")
        pending = other.commit("g")
        assert pending.result(30) and pending.metrics.shared_bytes == 0


def test_moved_views_of_one_storage_are_written(run: Any) -> None:
    one, ring = run(clones=False, compact_views=True), torch.arange(4096)
    one.commit("a", {"x": ring[:1024]})
    one.commit("b", {"x": ring[:1024]})
    assert one.names() == ["link"]
    one.commit("c", {"x": ring[1024:2048]})
    assert "link" not in one.names()
    assert torch.equal(one.engine.load("c/m.pt")["x"], ring[1024:2048])


def test_off(run: Any) -> None:
    one, state = run(clones=True, reuse="off"), tensors()
    one.commit("a", state)
    assert one.commit("b", state).shared_bytes == 0
    assert not any(op.name in ("clone", "open") for op in one.ops)


def test_space_is_reserved_for_what_will_be_written(run: Any) -> None:
    one, state = run(clones=True, io_mode="direct"), tensors()
    one.commit("a", state)
    state["w4"].add_(1)
    one.commit("b", state)
    reserved = [op.num_bytes for op in one.ops if op.name == "allocate"]
    assert reserved and sum(reserved) <= 3 * CHUNK
    state["w4"].add_(1)
    one.fs.fail_when(lambda op: op.name == "allocate", errno.ENOSPC)
    with pytest.raises(OutOfSpaceError) as caught:
        one.commit("c", state)
    assert caught.value.needed_bytes is not None and caught.value.needed_bytes <= 3 * CHUNK


def test_whether_files_share_blocks_is_asked_once_and_said_once(fast_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO", "async_ckpt")
    one = Run(fast_path / "root", clones=True)
    assert one.fs.findings == Findings(clones=True)
    one.engine.close()
    assert [record.getMessage() for record in caplog.records if "reuse=" in record.getMessage()] == [
        f"root {str(one.root)!r}: chunks that did not change share their blocks with the last checkpoint's "
        "(reuse='auto')"
    ]
    assert sorted(os.listdir(one.root)) == []


# What is named as frozen.


class Model(torch.nn.Module):
    """Ten parameters of about a chunk each, of which the last is trained."""

    def __init__(self) -> None:
        super().__init__()
        for k in range(10):
            self.register_parameter(f"w{k}", torch.nn.Parameter(torch.randn(1500), requires_grad=k == 9))


def copied(one: Run, spans: list[Any], tag: str) -> int:
    return sum(span.num_bytes for span in spans if span.kind == "copy" and span.tag == tag)


@pytest.mark.parametrize("format", ["torch", "safetensors"])
@pytest.mark.parametrize("named", ["module", "parameters"])
def test_what_is_frozen_is_not_even_copied(run: Any, named: str, format: str) -> None:
    model, spans = Model(), SpanRecorder()
    frozen = model if named == "module" else model.parameters()
    one = run(clones=True, reuse_frozen=frozen, observers=(spans,), format=format)
    for k, tag in enumerate("abcd"):
        with torch.no_grad():
            model.w9.add_(1)
            if tag == "c":
                # Thawed, so to say: its counter moves.
                model.w4.mul_(2)
        metrics = one.commit(tag, model.state_dict())
        loaded = one.engine.load(f"{tag}/m.pt")
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
        if format == "torch":
            one.check(tag, model.state_dict())
        assert (copied(one, spans.spans, tag) < metrics.size_bytes // 2) is (k > 0)
        assert (metrics.shared_bytes > metrics.size_bytes // 2) is (k > 0)


def test_a_frozen_tensor_that_has_changed_past_its_counter_fails_the_next_full_check(run: Any) -> None:
    model = Model()
    one = run(clones=True, reuse_frozen=model)
    one.commit("0", model.state_dict())
    model.w5.data.add_(1)
    failed = None
    for k in range(1, 20):
        try:
            one.commit(str(k), model.state_dict())
        except TornSnapshotError as error:
            failed = error
            break
    assert failed is not None and "w5" in failed.tensors and "'m.pt'" in str(failed)
    # From here on everything is right again.
    one.commit("right", model.state_dict())
    one.check("right", model.state_dict())


def test_where_all_is_copied_all_is_checked(run: Any) -> None:
    model = Model()
    one = run(clones=False, reuse_frozen=model)
    one.commit("a", model.state_dict())
    model.w5.data.add_(1)
    with torch.no_grad():
        model.w9.add_(1)
    with pytest.raises(TornSnapshotError, match="w5"):
        one.commit("b", model.state_dict())


@pytest.mark.parametrize("code", [errno.EIO, errno.EOPNOTSUPP, errno.ENOSPC])
def test_frozen_chunks_that_cannot_be_cloned_are_read_from_the_older_file(run: Any, code: int) -> None:
    model = Model()
    one = run(clones=True, reuse_frozen=model)
    one.commit("a", model.state_dict())
    one.fs.fail_when(lambda op: op.name == "clone", code)
    assert one.commit("b", model.state_dict()).shared_bytes == 0
    one.check("b", model.state_dict())


def test_a_frozen_file_without_reflinks_is_linked_without_a_copy(run: Any) -> None:
    model, spans = Model(), SpanRecorder()
    model.requires_grad_(False)
    one = run(clones=False, reuse_frozen=model, observers=(spans,))
    one.commit("a", model.state_dict())
    metrics = one.commit("b", model.state_dict())
    assert one.names() == ["link"] and copied(one, spans.spans, "b") < metrics.size_bytes // 2
    one.fs.fail_when(lambda op: op.name == "link", errno.EMLINK)
    one.commit("c", model.state_dict())
    one.check("c", model.state_dict())


def test_a_frozen_tensors_source_that_has_gone_is_copied(run: Any) -> None:
    model = Model()
    one = run(clones=True, reuse_frozen=model)
    one.commit("a", model.state_dict())
    shutil.rmtree(one.root / "a")
    assert one.commit("b", model.state_dict()).shared_bytes == 0
    one.check("b", model.state_dict())


def test_damage_in_the_source_of_frozen_chunks_fails_the_save_that_must_read_it(run: Any) -> None:
    model = Model()
    one = run(clones=True, reuse_frozen=model)
    one.commit("a", model.state_dict())
    rot(one.root / "a" / "m.pt", 5 * CHUNK + 5)
    one.fs.fail_when(lambda op: op.name == "clone", errno.EIO)
    with pytest.raises(CorruptCheckpointError, match="reuse_frozen"):
        one.commit("b", model.state_dict())


@pytest.mark.parametrize("magic_at", range(4, 10))
def test_payloads_that_begin_like_a_descriptor_keep_torchs_own_id(run: Any, magic_at: int) -> None:
    """Whatever of their heads lies in chunks that are not here."""
    state = {f"w{k}": torch.zeros(4096 * k + 4000 - 8 * magic_at, dtype=torch.uint8) for k in range(3)}
    for tensor in state.values():
        tensor[:8] = torch.tensor([*b"PK\x07\x08abcd"], dtype=torch.uint8)
    one = run(clones=True, reuse_frozen=list(state.values()))
    for tag in "ab":
        one.commit(tag, state)
        one.check(tag, state)


@pytest.mark.parametrize("bad", [1, "model", [1], torch.nn.Identity])
def test_what_cannot_be_frozen_is_refused(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ConfigError, match="reuse_frozen"):
        AsyncCheckpointEngine(tmp_path, reuse_frozen=bad)
    with pytest.raises(ConfigError, match="reuse_frozen"):
        AsyncCheckpointEngine(tmp_path, reuse="off", reuse_frozen=torch.nn.Identity())


@pytest.mark.parametrize("clones", [True, False])
def test_after_a_commit_that_failed_everything_is_written(run: Any, clones: bool) -> None:
    one, state = run(clones=clones, read_back=True), tensors()
    one.commit("a", state)
    file = one.root / "a" / "m.pt"
    before, content = os.stat(file), bytearray(file.read_bytes())
    content[CHUNK * 3] ^= 1
    file.write_bytes(content)
    # As a disk does it that has lost a bit.
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CommitError, match="read back"):
        one.commit("b", state)
    assert one.commit("c", state).shared_bytes == 0
    one.check("c", state)


def test_what_is_trained_beside_a_frozen_tensor_in_one_storage_is_copied(run: Any) -> None:
    flat = torch.zeros(8 * 1024)
    frozen, trained = torch.nn.Parameter(flat[:4096], requires_grad=False), torch.nn.Parameter(flat[4096:])
    one, state = run(clones=True, reuse_frozen=frozen), {"frozen": frozen, "trained": trained}
    one.commit("a", state)
    # As fused optimizers do it: no counter moves.
    trained.data.fill_(1)
    one.commit("b", state)
    one.check("b", state)
