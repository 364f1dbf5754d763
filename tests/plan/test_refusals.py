"""What cannot be saved is refused with its key path; a damaged container is refused without harm."""

from __future__ import annotations

import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.errors import CorruptCheckpointError, UnsupportedStateError
from async_ckpt.format.zip_directory import UnusualLayoutError, check_headers, read_directory
from async_ckpt.plan.planner import Planner
from tests.support.comparing import torch_bytes


class Broken:
    def __reduce__(self):
        raise ZeroDivisionError("no reduce today")


_WEIGHT = torch.arange(4.0)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("state", "path", "cause"),
    [
        ({"a": {"fn": lambda: 0}}, "state['a']['fn']", (pickle.PicklingError, AttributeError)),
        ({"a": [1, (2, Broken())]}, "state['a'][1][1]", ZeroDivisionError),
        ({"a": _WEIGHT, "b": [_WEIGHT.view(torch.int32)]}, "state['b'][0]", RuntimeError),
        ({"a": _WEIGHT, "raw": [1, _WEIGHT.untyped_storage()]}, "state['raw'][1]", RuntimeError),
        ({"outer": {"lock": __import__("threading").Lock()}}, "state['outer']['lock']", TypeError),
        (lambda: 0, "state (function)", (pickle.PicklingError, AttributeError)),
    ],
)
def test_the_key_path_is_named(state, path, cause):
    with pytest.raises(UnsupportedStateError) as caught:
        Planner().plan(state)
    assert path in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)


def test_fake_tensors_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(3)
    with pytest.raises(UnsupportedStateError, match=r"state\['a'\]\['fake'\]"):
        Planner().plan({"a": {"fake": fake}})


def test_meta_storage_is_refused():
    with pytest.raises(UnsupportedStateError, match="no readable data"):
        Planner().plan({"s": torch.empty(4, device="meta").untyped_storage()})


@pytest.mark.parametrize("compact_views", [False, True])
@pytest.mark.parametrize("nbytes_left", [0, 200])
@pytest.mark.parametrize("was_planned_before", [False, True])
def test_a_tensor_that_reaches_past_its_storage_is_refused(nbytes_left, was_planned_before, compact_views):
    planner = Planner(compact_views=compact_views)
    state = {"kept": torch.ones(3), "cut": torch.ones(100)[10:]}
    if was_planned_before:
        planner.plan(state)
    state["cut"].untyped_storage().resize_(nbytes_left)
    with pytest.raises(UnsupportedStateError, match=r"state\['cut'\] needs 400 bytes.* resized to"):
        planner.plan(state)


@pytest.mark.parametrize("was_planned_before", [False, True])
def test_a_storage_that_is_no_whole_number_of_elements_is_refused(was_planned_before):
    """torch writes it, and refuses to read it."""
    planner, buffer = Planner(), torch.zeros(12, dtype=torch.uint8)
    state = {"kept": torch.ones(3), "v": buffer[:8].view(torch.float32)}
    if was_planned_before:
        planner.plan(state)
    buffer.untyped_storage().resize_(10)
    with pytest.raises(UnsupportedStateError, match=r"state\['v'\] is torch.float32 in a storage of 10 bytes"):
        planner.plan(state)
    assert Planner(compact_views=True).plan(state).plan.payload_nbytes == [12, 8]


def test_too_deep_nesting_is_refused():
    state: list = []
    for _ in range(100_000):
        state = [state]
    with pytest.raises(UnsupportedStateError) as caught:
        Planner().plan({"deep": state})
    assert isinstance(caught.value.__cause__, RecursionError)


def test_extents_out_of_order_are_refused():
    plan = Planner().plan({"a": torch.ones(3)}).plan
    with pytest.raises(ValueError, match="does not follow"):
        plan.sealer()(4096, memoryview(bytearray(8)))


def directory(raw: bytes):
    calls = []

    def pread(offset, nbytes):
        assert offset >= 0
        assert nbytes >= 0
        assert offset + nbytes <= len(raw)
        calls.append(nbytes)
        return raw[offset : offset + nbytes]

    try:
        records = read_directory(pread, len(raw))
    except UnusualLayoutError as error:
        raise CorruptCheckpointError(str(error)) from error
    check_headers(pread, records)
    return records


def test_directory_gives_names_extents_and_crcs():
    raw = torch_bytes({"a": torch.arange(5.0), "e": torch.empty(0), "b": torch.arange(3)})
    records = directory(raw)
    assert list(records)[:2] == ["data.pkl", ".format_version"]
    data = records["data/0"]
    assert raw[data.offset : data.offset + data.num_bytes] == torch.arange(5.0).numpy().tobytes()
    assert data.crc32 == __import__("zlib").crc32(raw[data.offset : data.offset + data.num_bytes])
    assert records["data/1"].num_bytes == 0


_RAW = torch_bytes({"a": torch.arange(5.0), "b": torch.arange(3)})
_TAIL = _RAW.index(b"PK\1\2")


@settings(max_examples=300, deadline=None)
@given(st.integers(_TAIL, len(_RAW) - 1), st.binary(min_size=1, max_size=8))
def test_damaged_directories_are_corrupt_or_harmless(position, junk):
    raw = _RAW[:position] + junk + _RAW[position + len(junk) :]
    raw = raw[: len(_RAW)]
    try:
        records = directory(raw)
    except CorruptCheckpointError:
        return
    ends = 0
    for record in records.values():
        assert ends <= record.offset <= record.offset + record.num_bytes <= len(raw)
        ends = record.offset + record.num_bytes


@pytest.mark.parametrize("cut", [0, 1, 97, 98, 500])
def test_cut_files_are_corrupt(cut):
    with pytest.raises(CorruptCheckpointError):
        directory(_RAW[: len(_RAW) - cut - 1])


def _patched(offset: int, data: bytes) -> bytes:
    return _RAW[:offset] + data + _RAW[offset + len(data) :]


def _entry(name: bytes) -> int:
    return _RAW.rindex(name) - 46


@pytest.mark.parametrize(
    "raw",
    [
        _patched(_entry(b"archive/data/1") + 10, struct.pack("<H", 8)),
        _patched(_entry(b"archive/data/1") + 42, struct.pack("<I", 0)),
        _patched(_entry(b"archive/data/1") + 20, struct.pack("<II", 1 << 31, 1 << 31)),
        _patched(_entry(b"archive/data/1") + 46, b"archive/data/0"),
        _patched(len(_RAW) - 98 + 24, struct.pack("<QQ", 1 << 60, 1 << 60)),
        _patched(len(_RAW) - 98 + 40, struct.pack("<Q", 1 << 62)),
        b"PK\5\6" + bytes(18),
        b"",
    ],
    ids=["compressed", "overlap", "huge", "duplicate", "count", "size", "no_zip64", "empty"],
)
def test_crafted_directories_are_corrupt(raw):
    with pytest.raises(CorruptCheckpointError):
        directory(raw)


def test_zip64_directory_is_read():
    state = {"huge": torch.empty((4 << 30) + 8, dtype=torch.uint8), "after": torch.ones(2)}
    plan = Planner().plan(state).plan

    def pread(offset, nbytes):
        start, data = max(
            (literal for literal in plan.literals if literal[0] <= offset), key=lambda literal: literal[0]
        )
        return data[offset - start : offset - start + nbytes]

    records = read_directory(pread, plan.file_bytes)
    assert records["data/0"].num_bytes == (4 << 30) + 8
    assert [records[f"data/{key}"].offset for key in range(2)] == list(plan.payload_offsets)


def test_refused_states_leave_the_planner_usable():
    planner = Planner()
    with pytest.raises(UnsupportedStateError):
        planner.plan({"fn": lambda: 0})
    assert planner.plan({"a": 1}).plan.file_bytes == len(torch_bytes({"a": 1}))
