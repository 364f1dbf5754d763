"""The plain reader: what torch would make of it, or a refusal; never a call, a crash or a hang."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.errors import CorruptCheckpointError
from async_ckpt.format.zip_directory import Record, UnusualLayoutError, read_directory
from async_ckpt.reading.build import NotPlainError, load_plain
from tests.reading.states import plain, trained
from tests.support.comparing import torch_bytes


def read(pickled: bytes) -> Any:
    return load_plain(pickled, RECORDS)


leaves = st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False) | st.text()
nests = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=30,
)


@pytest.mark.wide
@given(nests)
@settings(max_examples=80, deadline=None)
def test_containers_and_leaves_come_back(value: Any) -> None:
    found = read(pickle.dumps(value, protocol=2))
    assert found == value
    assert repr(found) == repr(value)


def directory_of(data: bytes) -> dict[str, Record]:
    return read_directory(lambda offset, size: data[offset : offset + size], len(data))


FILE = torch_bytes({**plain(), "trained": trained()})
DATA = zipfile.ZipFile(io.BytesIO(FILE)).read("archive/data.pkl")
RECORDS = directory_of(FILE)


@given(at=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_damaged_pickle_is_refused_or_read_but_nothing_else(at: int, value: int, cut: bool) -> None:
    damaged = bytearray(DATA)
    damaged[at % len(damaged)] = value
    if cut:
        del damaged[at % len(damaged) :]
    with contextlib.suppress(NotPlainError, CorruptCheckpointError):
        read(bytes(damaged))


class Caller:
    def __init__(self, function: Any, *args: Any) -> None:
        self.what = function, args

    def __reduce__(self) -> Any:
        return self.what


@pytest.mark.parametrize(
    "pickled",
    [
        pickle.dumps(Caller(print, "ran"), 2),
        pickle.dumps(Caller(eval, "print('ran')"), 2),
        pickle.dumps(print, 2),
        pickle.dumps({1}, 2),
        pickle.dumps([1], 4),
        b"\x80\x02cbuiltins\nprint\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.",
        b"\x80\x02ctorch\nFloatStorage\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(X\x01\x00\x00\x00aK\x01ub.",
        b"\x80\x02ccollections\nOrderedDict\n)Rccollections\nOrderedDict\nb.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02ctorch.storage\n_load_from_bytesStorage\n)R.",
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"\x80\x02\x8a\xff\x01.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02h\x05.",
        b"\x80\x02\x85.",
        b"\x80\x02ub.",
        b"\x80\x02(K\x01.",
        b"\x80\x02" + b"(" * 100_000,
        b"",
        b"\x80",
        b"\x80\x03N.",
    ],
)
def test_what_is_not_plain_is_refused(pickled: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotPlainError):
        read(pickled)
    assert capsys.readouterr().out == ""


def test_a_huge_memo_index_takes_no_memory() -> None:
    # The C unpickler would allocate 64 GiB for this one.
    assert read(b"\x80\x02]r\xff\xff\xff\xff.") == []


def test_deep_nesting_does_not_recurse() -> None:
    found = read(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    for _ in range(99_999):
        (found,) = found
    assert found == []


def test_read_directory_agree_with_zipfile() -> None:
    data = torch_bytes({**trained(), "empty": torch.empty(0)})
    found = directory_of(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert list(found) == [info.filename.partition("/")[2] for info in archive.infolist()]
        for info in archive.infolist():
            record = found[info.filename.partition("/")[2]]
            assert data[record.offset : record.offset + record.num_bytes] == archive.read(info)
            assert record.crc32 == info.CRC


def test_a_zip_laid_out_otherwise_is_left_to_torch() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    data = buffer.getvalue()
    with pytest.raises((UnusualLayoutError, ValueError)):
        directory_of(data)
