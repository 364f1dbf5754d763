"""Parts of the DCP integration that need one process only."""

from __future__ import annotations

import gc
import io
import os
import pickle
import resource
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from async_ckpt import (
    AsyncCheckpointEngine,
    BackpressureTimeout,
    Catalog,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    TagExistsError,
    TornSnapshotError,
    UnsafePathError,
    UnsupportedStateError,
)
from async_ckpt.format.names import DCP_METADATA_NAME
from async_ckpt.integrations.dcp import ArenaStager, DcpReader, DcpWriter, TrainingState, load_sharded, save_sharded
from async_ckpt.integrations.dcp.blobs import BlobPlanner, join_blobs, raw_plan
from async_ckpt.integrations.dcp.metadata import decode_metadata
from tests.format.test_hostile_pickles import pairs_of_one_hash
from tests.reading.committed import commit
from tests.support.render import unsealed

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated"),
    pytest.mark.wide,
]

COMPLEX = torch.randn(100, 10, dtype=torch.complex64)
TENSORS = {
    "plain": torch.randn(5, 3),
    "view": COMPLEX[3:7],
    "conj": COMPLEX[10:20].conj(),
    "conj, transposed": COMPLEX[:4].t().conj(),
    "transposed": COMPLEX.t(),
    "neg": COMPLEX[2].conj().imag,
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3),
    "sparse": torch.eye(4).to_sparse(),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "large": torch.randn(20_000).bfloat16(),
}


def image(state: Any, extent_bytes: int) -> bytes:
    """The file's bytes, made as snapshot and writer make them; asserts the CRC of each extent."""
    data = unsealed(state)
    sealer = state.plan.sealer()
    for offset in range(0, len(data), extent_bytes):
        extent = memoryview(data)[offset : offset + extent_bytes]
        assert sealer(offset, extent) == zlib.crc32(extent)
    return bytes(data)


@pytest.mark.parametrize("extent_bytes", [1000, 4096, 1 << 20])
def test_blobs_are_what_torch_save_writes(extent_bytes: int) -> None:
    planner = BlobPlanner()
    blobs = [planner.tensor(tensor) for tensor in TENSORS.values()]
    state, extents = join_blobs([*blobs, (raw_plan(b"bytes"), None), (raw_plan(b""), None)])
    data = image(state, extent_bytes)
    for tensor, extent in zip(TENSORS.values(), extents, strict=False):
        blob = data[extent.offset : extent.offset + extent.length]
        found = torch.load(io.BytesIO(blob))
        assert (found.dtype, found.is_conj(), found.is_neg()) == (tensor.dtype, tensor.is_conj(), tensor.is_neg())
        assert torch.equal(found.to_dense(), tensor.to_dense()) if tensor.is_sparse else torch.equal(found, tensor)
        if tensor.is_contiguous() and not tensor.is_sparse and not tensor.is_neg():
            stock = io.BytesIO()
            alone = tensor.detach().resolve_conj().clone()
            torch.save(alone.conj() if tensor.is_conj() else alone, stock)
            assert len(stock.getvalue()) == len(blob)
    assert data.endswith(b"bytes")


def test_a_part_of_a_large_storage_is_written_alone(tmp_path: Path) -> None:
    large = torch.randn(1 << 18)
    state, _ = join_blobs([BlobPlanner().tensor(large[100:200])])
    assert state.plan.file_bytes < 3000
    assert state.plan.payload_nbytes == [400]


def make_writer(**options: Any) -> DcpWriter:
    return DcpWriter(**{"staging_bytes": 1 << 20, "chunk_bytes": 8192, "num_writers": 2, **options})


def saved(root: Path, state: dict[str, Any], tag: str = "s1") -> str:
    writer = make_writer()
    dcp.save(state, checkpoint_id=root / tag, storage_writer=writer)
    writer.close()
    return str(root / tag)


def test_damage_is_found_before_it_reaches_a_tensor(tmp_path: Path) -> None:
    path = saved(tmp_path, {"x": torch.ones(5000), "y": torch.ones(10)})
    file = Path(path, "__0_0.distcp")
    data = bytearray(file.read_bytes())
    data[9000] ^= 1
    file.write_bytes(data)
    target = {"x": torch.zeros(5000), "y": torch.zeros(10)}
    with pytest.raises(CheckpointException) as caught:
        dcp.load(target, checkpoint_id=path, storage_reader=DcpReader())
    (wrapped,) = caught.value.failures.values()
    assert isinstance(wrapped[0], CorruptCheckpointError)
    assert target["x"].eq(0).all()
    assert not Catalog(tmp_path).verify("s1").ok


def test_a_crafted_metadata_file_runs_nothing() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch /tmp/async-ckpt-was-here",)

    for raw in (pickle.dumps(Evil()), pickle.dumps({"a": 1}), b"\x80", b""):
        with pytest.raises(CorruptCheckpointError):
            decode_metadata(raw, source="x")
    assert not os.path.exists("/tmp/async-ckpt-was-here")


def fitting(**changes: Any) -> Metadata:
    sizes = torch.Size([2, 3])
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), sizes)
    known: dict[str, Any] = {
        "x": TensorStorageMetadata(TensorProperties(torch.bfloat16), sizes, [chunk]),
        "y": BytesStorageMetadata(),
    }
    stored = {
        MetadataIndex("x", torch.Size([0, 0]), 0): _StorageInfo("__0_0.distcp", 0, 9),
        MetadataIndex("y"): _StorageInfo("f", 9, 1),
    }
    meta = StorageMeta(Path("/somewhere/s1"), "save id", None)
    fields = {
        "state_dict_metadata": known,
        "planner_data": {"x": ("a", 1)},
        "storage_data": stored,
        "storage_meta": meta,
    }
    if hasattr(Metadata, "version"):
        fields["version"] = "1.0.0"
    return Metadata(**{**fields, **changes})


def test_metadata_is_read_as_pickle_reads_it() -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert decode_metadata(pickle.dumps(fitting(), protocol), source="x") == fitting()
    assert decode_metadata(pickle.dumps(fitting(storage_meta=None)), source="x").storage_meta is None


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def sizes_of_one_tuple(num: int) -> bytes:
    return b"\x80\x02](" + b"(" + b"K\x01" * num + b"tq\x00" + b"0" + b"ctorch\nSize\nh\x00\x85R" * num + b"e."


HOSTILE = {
    "a memo index of four bytes": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "deeply nested lists": nested(1_500_000),
    "deeply nested tuples": b"\x80\x02)" + b"\x85" * 3_000_000 + b".",
    "a deep tuple as a key": b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.",
    "many sizes of one long tuple": sizes_of_one_tuple(6000),
    "a size of a huge number": b"\x80\x02ctorch\nSize\n\x8a\x0a" + b"\xff" * 9 + b"\x7f\x85\x85R.",
    "metadata in metadata": pickle.dumps(fitting(planner_data=fitting())),
    "a negative offset": pickle.dumps(fitting(storage_data={MetadataIndex("x"): _StorageInfo("f", -1, 9)})),
    "an offset of another type": pickle.dumps(fitting(storage_data={MetadataIndex("x"): _StorageInfo("f", "0", 9)})),  # type: ignore[arg-type]
    "a path of another type": pickle.dumps(fitting(storage_data={MetadataIndex("x"): _StorageInfo(7, 0, 9)})),  # type: ignore[arg-type]
    "keys of another type": pickle.dumps(fitting(storage_data={"x": _StorageInfo("f", 0, 9)})),
    "a device of nothing": b"\x80\x02ctorch\ndevice\n)R.",
    "no description": pickle.dumps(fitting(state_dict_metadata=[])),
    "chunks of other dimensions": pickle.dumps(
        fitting(
            state_dict_metadata={
                "x": TensorStorageMetadata(
                    TensorProperties(), torch.Size([2]), [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))]
                )
            }
        )
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_crafted_metadata_is_an_error_in_little_memory(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCheckpointError):
        decode_metadata(HOSTILE[name], source="x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 << 10, "in KiB"


def test_keys_of_one_hash_are_refused() -> None:
    """Each would be compared with all before: a few million bytes would take hours."""
    keys = {MetadataIndex("x", torch.Size(pair)): _StorageInfo("f", 0, 9) for pair in pairs_of_one_hash(200)}
    with pytest.raises(CorruptCheckpointError, match="one hash"):
        decode_metadata(pickle.dumps(fitting(storage_data=keys)), source="x")


def test_what_the_metadata_does_not_place_is_damage(tmp_path: Path) -> None:
    commit(tmp_path, "s1", {DCP_METADATA_NAME: pickle.dumps(fitting(storage_data={}))}, format="opaque")
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"x": torch.zeros(2, 3)}, storage_reader=DcpReader(tmp_path / "s1"))
    assert isinstance(caught.value.failures[0][0], CorruptCheckpointError)


class Custom:
    """No plain data."""


def test_objects_that_are_no_plain_data_are_loaded_only_on_request(tmp_path: Path) -> None:
    path = saved(tmp_path, {"x": torch.ones(3), "object": Custom()})
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"x": torch.zeros(3), "object": None}, checkpoint_id=path, storage_reader=DcpReader())
    assert isinstance(caught.value.failures[0][0], UnsupportedStateError)
    state: dict[str, Any] = {"x": torch.zeros(3), "object": None}
    dcp.load(state, checkpoint_id=path, storage_reader=DcpReader(weights_only=False))
    assert isinstance(state["object"], Custom)


def test_an_existing_checkpoint_is_refused_or_replaced(tmp_path: Path) -> None:
    saved(tmp_path, {"x": torch.ones(3)})
    with pytest.raises(CheckpointException) as caught:
        saved(tmp_path, {"x": torch.zeros(3)})
    assert isinstance(caught.value.failures[0][0], TagExistsError)
    writer = make_writer(overwrite="replace", path=tmp_path / "s1", metadata={"loss": 1.5})
    dcp.save({"x": torch.full((3,), 7.0)}, storage_writer=writer)
    writer.close()
    state = {"x": torch.zeros(3)}
    dcp.load(state, storage_reader=DcpReader(tmp_path / "s1", verify="size"))
    assert state["x"].eq(7).all()
    assert Catalog(tmp_path).manifest("s1").metadata == {"loss": 1.5}


def test_what_an_abandoned_save_has_staged_goes_with_its_writer(tmp_path: Path) -> None:
    writer = make_writer()
    writer.reset(tmp_path / "a")
    writer.prepare_global_plan([])
    assert len(os.listdir(tmp_path)) == 1
    writer.reset(tmp_path / "b")
    assert os.listdir(tmp_path) == []
    writer.prepare_global_plan([])
    writer._core.close()  # type: ignore[union-attr]
    del writer
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_bad_paths_and_options_are_refused(tmp_path: Path) -> None:
    assert not DcpWriter.validate_checkpoint_id("/root/.hidden")
    assert not DcpWriter.validate_checkpoint_id("s3://bucket/tag")
    assert DcpReader.validate_checkpoint_id("s3://bucket/tag")
    assert DcpWriter.validate_checkpoint_id(tmp_path / "tag")
    with pytest.raises(UnsafePathError):
        DcpWriter("/root/..")
    with pytest.raises(ConfigError, match="overwrite"):
        DcpWriter(overwrite="yes")
    with pytest.raises(ConfigError, match="chunk_bytes"):
        DcpWriter(chunk_bytes=5)
    with pytest.raises(ConfigError, match="verify"):
        DcpReader(verify="no")
    with pytest.raises(ConfigError, match="use_collectives"):
        DcpWriter().set_up_storage_writer(True, rank=0, use_collectives=False)
    with pytest.raises(ConfigError, match="checkpoint_id"):
        DcpWriter().reset()
    reader = DcpReader(tmp_path / "none")
    with pytest.raises(CheckpointNotFoundError):
        reader.read_metadata()


def assert_staged_like(staged: Any, tensor: torch.Tensor, values: torch.Tensor) -> None:
    assert type(staged) is type(tensor)
    assert (staged.dtype, staged.shape, staged.requires_grad) == (tensor.dtype, tensor.shape, tensor.requires_grad)
    assert (staged.is_conj(), staged.is_neg()) == (tensor.is_conj(), tensor.is_neg())
    if tensor.is_sparse:
        assert torch.equal(staged.to_dense(), values.to_dense())
    else:
        assert staged.stride() == tensor.stride()
        assert torch.equal(staged, values)


def test_a_stager_keeps_everything_and_sees_no_later_change() -> None:
    stager = ArenaStager()
    weight = torch.nn.Parameter(torch.randn(5, 5))
    base = COMPLEX.clone()
    state = {
        **TENSORS,
        "conj": base[3:5].conj(),
        "base": base,
        "weight": weight,
        "tied": weight,
        "row": weight.detach()[1:],
    }
    state |= {"leaf": torch.ones(2, requires_grad=True), "nested": OrderedDict(a=[1, (torch.arange(3), "x")])}
    values = {
        k: v.detach().resolve_conj().resolve_neg().clone() for k, v in state.items() if isinstance(v, torch.Tensor)
    }
    staged = stager.stage(state)
    with torch.no_grad():
        base.zero_()
        weight.zero_()
    for name, expected in values.items():
        assert_staged_like(staged[name], state[name], expected)
    assert staged["tied"] is staged["weight"]
    assert staged["row"].data_ptr() == staged["weight"][1:].data_ptr()
    assert staged["conj"].data_ptr() == staged["base"][3:5].data_ptr()
    assert type(staged["nested"]) is OrderedDict
    assert staged["nested"]["a"][1][0].equal(torch.arange(3))
    del staged
    gc.collect()
    stager.close()


def test_a_forked_child_reads_what_was_staged_and_stages_by_itself() -> None:
    stager = ArenaStager(num_slots=1)
    staged = stager.stage({"w": torch.arange(1000.0)})
    child = os.fork()
    if child == 0:
        # A child that is ended by a signal has not got there.
        same = torch.equal(staged["w"], torch.arange(1000.0))
        os._exit(0 if same and stager.stage({"w": torch.ones(1000)})["w"].sum() == 1000 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(staged["w"], torch.arange(1000.0))
    stager.close()


def test_a_slot_is_reused_only_when_the_last_tensor_of_its_snapshot_is_gone() -> None:
    stager = ArenaStager(num_slots=1, timeout_s=0.05)
    state = {"a": torch.ones(100), "b": torch.ones(100)}
    first: dict[str, Any] = stager.stage(state)
    view = first["b"][5:7]
    del first
    gc.collect()
    with pytest.raises(BackpressureTimeout):
        stager.stage({"a": torch.zeros(200)})
    assert view.eq(1).all()
    del view
    gc.collect()
    second = stager.stage({"a": torch.zeros(200)})
    # A larger state gets new memory; the snapshot alive keeps its own.
    third = stager.stage({"a": torch.full((1 << 20,), 3.0)})
    assert second["a"].eq(0).all()
    assert third["a"].eq(3).all()
    del second, third
    gc.collect()
    stager.close()


def test_one_process_saves_and_loads_sharded(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        save_sharded(engine, "s1", {"app": TrainingState(model, optimizer), "step": 3})
        with torch.no_grad():
            model.weight.zero_()
        state: dict[str, Any] = {"app": TrainingState(model, optimizer), "step": 0}
        load_sharded(engine, "s1", state)
        assert state["step"] == 3
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        with pytest.raises(TagExistsError):
            save_sharded(engine, "s1", {"x": torch.ones(1)})
        with pytest.raises(CheckpointNotFoundError):
            load_sharded(engine, "none", {"x": torch.ones(1)})


def test_a_copy_of_a_tensor_with_gaps_is_made_after_its_counter_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.ones(100, 100)
    plan = BlobPlanner.tensor

    def planned_and_changed(self: BlobPlanner, tensor: torch.Tensor) -> Any:
        planned = plan(self, tensor)
        weight.add_(1)
        return planned

    monkeypatch.setattr(BlobPlanner, "tensor", planned_and_changed)
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        with pytest.raises(TornSnapshotError, match="w"):
            save_sharded(engine, "t", {"w": weight.t()}).result(60)
        assert engine.latest() is None


def test_a_manifest_above_its_limit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """The sum over all ranks counts: each of these would fit alone."""

    def plan(num_elements: int) -> SavePlan:
        chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([num_elements]))
        data = TensorWriteData(chunk, TensorProperties(dtype=torch.float32), torch.Size([num_elements]))
        return SavePlan([WriteItem(MetadataIndex("w"), WriteItemType.SHARD, tensor_data=data)])

    writer = DcpWriter(tmp_path / "root/t", staging_bytes=64 << 20, chunk_bytes=16 << 20)
    with pytest.raises(UnsupportedStateError, match="does not fit"):
        writer.prepare_global_plan([plan(2**43), plan(2**43)])
    assert not list(tmp_path.iterdir())
    writer.prepare_global_plan([plan(2**43), plan(2**10)])
    writer.close()
    assert not list((tmp_path / "root").iterdir())
