"""A planned file is byte for byte torch.save's, for every kind of state and however its extents are cut."""

from __future__ import annotations

import io
import warnings
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config as serialization_config

from async_ckpt.format.checksum import crc32
from async_ckpt.format.zip import lay_out, with_pickle
from async_ckpt.plan.planner import Planner
from tests.support.comparing import torch_bytes
from tests.support.render import render
from tests.support.states import PLAIN, STATES
from tests.support.torch_container import HoleFile, scan, torch_container


@pytest.fixture(params=list(STATES))
def state_name(request):
    return request.param


def make(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return STATES[name]()


def plan(planner, state, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return planner.plan(state, **options)


@pytest.mark.wide
def test_bytes_are_those_of_torch_save(state_name):
    state = make(state_name)
    expected = torch_bytes(state)
    planner = Planner()
    planned = plan(planner, state)
    assert render(planned) == expected
    again = plan(planner, state)
    assert render(again, 64 << 10) == expected
    if state_name in PLAIN:
        assert (planned.plan.planner, planned.cached, again.cached) == ("fast", False, True)


@pytest.mark.parametrize("extent_nbytes", [1, 7, 100, 4096])
def test_extents_may_be_cut_inside_any_field(extent_nbytes):
    for name in ("tied", "zero_dim", "descriptor_quirk"):
        state = make(name)
        assert render(plan(Planner(), state), extent_nbytes) == torch_bytes(state)


@pytest.mark.parametrize("alignment", [1, 2, 3, 7, 63, 64, 100, 512, 4096, 4097, 16384, 65000])
def test_every_alignment(alignment):
    for name in ("tied", "zero_dim", "descriptor_quirk", "conj"):
        state = make(name)
        with serialization_config.patch({"save.storage_alignment": alignment}):  # type: ignore[attr-defined]
            expected = torch_bytes(state)
        planned = plan(Planner(alignment=alignment), state)
        assert render(planned, 1000) == expected
        assert all(offset % alignment == 0 for offset in planned.plan.payload_offsets)
        with zipfile.ZipFile(io.BytesIO(expected)) as archive:
            assert archive.testzip() is None


@pytest.mark.parametrize("alignment", [0, -1, 65537])
def test_alignment_out_of_range_is_refused(alignment):
    with pytest.raises(ValueError, match="alignment"):
        lay_out(b"pickle", [8], name_hash=b"0" * 20, alignment=alignment)


_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["cpu", "storage", "0", "1", "a"]),
)
_dtypes = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn]
)


@st.composite
def _states(draw):
    """Nests of containers over scalars, tensors, views of shared storages, and repeated objects."""
    bases = [torch.zeros(draw(st.integers(0, 40)), dtype=draw(_dtypes)) for _ in range(draw(st.integers(0, 3)))]
    seen: list = [*bases]

    def view(base):
        start = draw(st.integers(0, len(base)))
        cut = base[start::2] if draw(st.booleans()) else base[start:]
        return cut.view(1, -1) if draw(st.booleans()) and cut.is_contiguous() else cut

    def build(depth):
        choice = draw(st.integers(0, 9))
        if choice <= 3 or depth == 0:
            return draw(_leaves)
        if choice == 4 and seen:
            return draw(st.sampled_from(seen))
        if choice == 5 and bases:
            made = view(draw(st.sampled_from(bases)))
        else:
            items = [build(depth - 1) for _ in range(draw(st.integers(0, 4)))]
            keys = draw(
                st.lists(
                    st.one_of(st.text(max_size=3), st.integers(0, 300)),
                    min_size=len(items),
                    max_size=len(items),
                    unique=True,
                )
            )
            pairs = list(zip(keys, items, strict=True))
            kind = draw(st.sampled_from(["dict", "ordered", "list", "tuple"]))
            made = (
                {"dict": dict, "ordered": __import__("collections").OrderedDict}[kind](pairs)
                if kind in ("dict", "ordered")
                else None
            )
            made = made if made is not None else (items if kind == "list" else tuple(items))
        seen.append(made)
        return made

    return [build(4) for _ in range(draw(st.integers(1, 4)))]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(_states(), st.sampled_from([64, 1, 96, 4096]))
def test_random_nests(state, alignment):
    with serialization_config.patch({"save.storage_alignment": alignment}):  # type: ignore[attr-defined]
        expected = torch_bytes(state)
    planner = Planner(alignment=alignment)
    planned = plan(planner, state)
    assert planned.plan.planner == "fast"
    assert render(planned, 256) == expected
    again = plan(planner, state)
    assert again.cached
    assert render(again) == expected


_GIB = 1 << 30


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.one_of(st.integers(0, 300), st.sampled_from([2**32 - 2, 2**32 - 1, 2**32, 5 * _GIB]), st.integers(0, 2**40)),
        max_size=7,
    ),
    alignment=st.one_of(st.sampled_from([64, 4096]), st.integers(1, 60000)),
)
def test_layout_arithmetic_is_torchs_own_up_to_terabytes(sizes, alignment):
    writer = torch._C.PyTorchFileWriter
    assert writer is not None
    ours = lay_out(b"pickle", sizes, name_hash=b"0" * 20, alignment=alignment)
    theirs = _torch_layout(b"pickle", sizes, alignment)
    assert ours.literals == tuple((o, d) for o, d in theirs.literals)
    assert (ours.file_bytes, ours.payload_offsets) == (theirs.file_bytes, theirs.payload_offsets)
    assert ours.seal_map.entry_crc_offsets == theirs.seal_map.entry_crc_offsets
    for other in (b"pickl3", b"pickle" * 3, b"p" * 70):
        assert with_pickle(ours, other, sizes) == lay_out(other, sizes, name_hash=b"0" * 20, alignment=alignment)


def _torch_layout(pickle_bytes, sizes, alignment):
    file = HoleFile()
    writer = torch._C.PyTorchFileWriter(file, True, alignment)
    for name, data in (
        ("data.pkl", pickle_bytes),
        (".format_version", b"1"),
        (".storage_alignment", b"%d" % alignment),
        ("byteorder", b"little"),
    ):
        writer.write_record(name, data, len(data))
    for key, nbytes in enumerate(sizes):
        writer.write_record_metadata(f"data/{key}", nbytes)
    writer.write_end_of_file()
    return scan(file.literals(), file.position, alignment)


def test_zip64_plan_without_touching_the_memory():
    # Reserved, never written: the pages do not exist.
    state = {"small": torch.ones(3), "huge": torch.empty(4 * _GIB + 8, dtype=torch.uint8), "after": torch.ones(2)}
    planned = plan(Planner(), state)
    recorded = torch_container(state)
    assert planned.plan.planner == "fast"
    assert planned.plan.literals == recorded.literals
    assert planned.plan.file_bytes == recorded.file_bytes > 4 * _GIB
    assert list(planned.plan.payload_offsets) == recorded.payload_offsets


def test_device_tensor_locations_are_kept():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    state = {"a": torch.ones(3, device="cuda"), "b": torch.ones(2, device="cuda"), "c": torch.ones(1)}
    planned = plan(Planner(), state)
    assert planned.plan.planner == "fast"
    assert planned.plan.literals == torch_container(state).literals


def test_dtensor_and_sharded_optimizer(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = torch.nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)]))
        optimizer = torch.optim.AdamW([weight])
        weight.sum().backward()
        optimizer.step()
        state = {"weight": weight, "detached": weight.detach(), "optim": optimizer.state_dict(), "plain": torch.ones(2)}
        planned = plan(Planner(), state)
        assert planned.plan.planner == "torch"
        assert render(planned) == torch_bytes(state)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_four_gib_for_real(tmp_path):
    """Compares extent by extent with the file torch wrote; needs 4 GiB of memory and of disk."""
    state = {"huge": torch.zeros((4 << 30) + 8, dtype=torch.uint8), "after": torch.arange(5.0)}
    state["huge"][12345::1_000_003] = 7
    planned = Planner().plan(state)
    pieces = [(offset, memoryview(data)) for offset, data in planned.plan.literals]
    for offset, storage in zip(planned.plan.payload_offsets, planned.storages, strict=True):
        pieces.append((offset, memoryview(torch.tensor([], dtype=torch.uint8).set_(storage).numpy())))
    sealer = planned.plan.sealer()
    path = tmp_path / "reference"
    with open(path, "wb") as file:
        torch.save(state, file)
    with open(path, "rb") as file:
        for start in range(0, planned.plan.file_bytes, 64 << 20):
            expected = file.read(64 << 20)
            extent = memoryview(bytearray(len(expected)))
            for offset, data in pieces:
                low, high = max(offset, start), min(offset + len(data), start + len(extent))
                if low < high:
                    extent[low - start : high - start] = data[low - offset : high - offset]
            crc = sealer(start, extent)
            assert extent == expected
            assert crc == crc32(expected)
        assert file.read(1) == b""
    path.unlink()
