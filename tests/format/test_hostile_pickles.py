"""Crafted pickles end soon, in little memory, and as an error of this package: in `load`, in `inspect`, and before
torch sees them.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from async_ckpt import CheckpointError, load
from async_ckpt.format.inert import MalformedPickleError, OpaqueKey, describe
from async_ckpt.format.pickles import read_inert
from async_ckpt.format.tensors import OtherInfo, leaves
from tests.reading.committed import commit

from .pickle_fuzz import NAMES, check, fuzz

_NUM = 20_000
_SIZE, _TENSOR, _ODICT = b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"
_ONES = b"(" + b"K\x01" * 16384 + b"t"
_STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x06tQ"


def _again(head: bytes, each: bytes, num: int = _NUM) -> bytes:
    return b"\x80\x02" + head + b"](" + each * num + b"e."


def _number_of_hash_0(k: int) -> bytes:
    return b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N"


def _text(num: int) -> bytes:
    return b"X" + struct.pack("<I", num) + b"a" * num


def _long(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def pairs_of_one_hash(num: int) -> Iterator[tuple[int, int]]:
    """Pairs of numbers that are different keys with one hash: how tuples are hashed is no secret of the process."""
    first, second, start = 11400714785074694791, 14029467366897019727, 2870177450012600261
    inverse, number = pow(second, -1, 1 << 64), 0
    while num:
        lane = (start + number * second) % (1 << 64)
        rotated = (lane << 31 | lane >> 33) % (1 << 64)
        other = (1234567 - rotated * first) * inverse % (1 << 64)
        if other < (1 << 61) - 1:
            yield number, other
            num -= 1
        number += 1


_ODD = b"cfoo\nBar\n"
_ARRAY, _SPARSE = b"cnumpy.core.multiarray\n_reconstruct\n", b"ctorch._utils\n_rebuild_sparse_tensor\n"
_LIST = b"](" + b"N" * 50_000 + b"e"
_DOUBLING = b"]q\0" + b"".join(b"](h%ch%ceq%c" % (k, k, k + 1) for k in range(60))
"""Sixty lists, each of the one before, twice: the last, h<, has 2^60 elements for whoever writes it out."""
_TUPLES = b")q\0" + b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(60))
"""The same of tuples, for whoever hashes it."""


def _id(key: bytes) -> bytes:
    return b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + key + b"X\x03\0\0\0cpuK\x06tQ"


CRAFTED = {
    "one state many times": _again(
        _ODICT + b"q\0}(" + b"".join(b"X\4\0\0\0%04dN" % k for k in range(9999)) + b"uq\1", b"h\0)Rh\1b"
    ),
    "one text many times": _again(_text(200_000) + b"q\0", b"h\0"),
    "one huge number many times": _again(b"\x8b" + struct.pack("<i", 200_000) + b"\x7f" * 200_000 + b"q\0", b"h\0"),
    "one text as state": _again(_text(200_000) + b"q\0" + _ODD + b"q\1", b"h\1)Rh\0b"),
    "one list in many states": _again(_LIST + b"\x85\x85q\0" + _ODD + b"q\1", b"h\1)Rh\0b"),
    "one list in many arrays": _again(_LIST + b"\x85\x85q\0" + _ARRAY + b"q\1", b"h\1h\0R"),
    "one long name": _again(b"cos\n" + b"a" * 200_000 + b"\nq\0", b"h\0"),
    "one long name by parts": _again(_text(200_000) + b"q\0" + _text(1) + b"q\1", b"h\0h\1\x93"),
    "many names": b"\x80\x02](" + b"".join(b"cfoo%d\nbar\n" % k for k in range(_NUM)) + b"e.",
    "a name far down": b"\x80\x02" + b"]" * 100_000 + _ODD + b"a" * 100_000 + b".",
    "a storage with a doubling key": b"\x80\x02" + _DOUBLING + _id(b"h<") + b".",
    "a storage with a deep key": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"q\0" + _id(b"h\0") + b".",
    "a doubling kind": b"\x80\x02"
    + _DOUBLING
    + b"cnumpy.core.multiarray\n_reconstruct\n)R(K\1K\1"
    + _ODD
    + b"h<\x85Rtb.",
    "a doubling layout": b"\x80\x02"
    + _DOUBLING
    + b"ctorch._utils\n_rebuild_sparse_tensor\n"
    + _ODD
    + b"h<\x85R)\x86R.",
    "a length for another caller": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nbytearray\n"
    + b"ctorch\nTensor\n\x8a\x08"
    + b"\x7f" * 8
    + b"\x85}tR.",
    "a length for a caller's caller": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\0(h\0ctorch\nTensor\nq\1"
    + b"(ctorch\nFloatTensor\nh\1\x8a\x07"
    + b"\x7f" * 7
    + b"\x85}t}tR.",
    "callers of callers": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\0"
    + (b"(h\0h\0" * 5000 + b")" + b"Nt" * 5000 + b"R."),
    "a quantized tensor without memory": b"\x80\x02ctorch._utils\n_rebuild_qtensor\n("
    + _id(b"X\1\0\0\x000")
    + b"K\0\x8a\x07"
    + b"\x7f" * 7
    + b"\x85K\0\x85(ctorch\nper_tensor_affine\nG?\xf0\0\0\0\0\0\0K\0t\x89"
    + _ODICT
    + b")RtR.",
    "a doubling attribute": b"\x80\x02" + _DOUBLING + _ODD + b")R}h<Nsb.",
    "one size many times": _again(_SIZE + b"q\0" + _ONES + b"\x85q\x01", b"h\0h\x01R"),
    "one tuple in many sizes": _again(_SIZE + b"q\0" + _ONES + b"q\x01", b"h\0h\x01\x85R"),
    "tensors of many dimensions": _again(
        _TENSOR + b"q\0" + _ONES + b"q\x01" + _STORAGE + b"q\x02",
        b"h\0(h\x02K\0h\x01h\x01\x89" + _ODICT + b")RtR",
        3000,
    ),
    "one long tuple as key": b"\x80\x02" + _ONES + b"q\0](" + b"}h\0Ns" * _NUM + b"e.",
    "one huge number as key": b"\x80\x02\x8b"
    + struct.pack("<i", 100_000)
    + b"\x7f" * 100_000
    + b"q\0]("
    + b"}h\0Ns" * _NUM
    + b"e.",
    "a set of one list": _again(b"cbuiltins\nset\nq\0](" + b"N" * 16384 + b"e\x85q\x01", b"h\0h\x01R"),
    "a list of one list": _again(b"c__builtin__\nlist\nq\0](" + b"N" * 16384 + b"e\x85q\x01", b"h\0h\x01R"),
    "bytes of one text": _again(
        b"c_codecs\nencode\nq\0X\0\x80\0\0" + b"a" * 32768 + b"X\x06\0\0\0latin1\x86q\x01", b"h\0h\x01R"
    ),
    "a deep key": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "a deep key in a set": b"\x80\x02cbuiltins\nset\n](" + b")" + b"\x85" * 100_000 + b"e\x85R.",
    "a key of keys": b"\x80\x02}N\x85q\0" + b"h\0h\0\x86q\0" * 60 + b"Ns.",
    "numbers of one hash": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(20_000))
    + b"u.",
    "deep lists": b"\x80\x02" + b"](" * 900 + b"e" * 899 + b"e.",
    "a length": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "a module by name": b"\x80\x02ctorch\nonnx\n.",
    "arguments that are no tuple": b"\x80\x02" + _ODICT + b"]R.",
    "a cut double": b"\x80\x02G\0\0",
    "a name that a terminal obeys": b"\x80\x02cos\n\x1b[31msystem\n)R.",
    "nothing": b"",
    "no size": b"\x80\x02" + _SIZE + b"X\x01\0\0\0a\x85R.",
    "a size of text": b"\x80\x02" + _SIZE + b"(X\x01\0\0\0at\x85R.",
    "no dimensions": b"\x80\x02" + _TENSOR + b"(" + _STORAGE + b"K\0K\0K\0\x89" + _ODICT + b")RtR.",
    "an unknown storage": b"\x80\x02X\x01\0\0\0aQ.",
    "one huge number in many dimensions": b"\x80\x02\x8b"
    + struct.pack("<i", 200_000)
    + b"\x7f" * 200_000
    + b"q\0("
    + b"h\0" * 5000
    + b"tq\1"
    + _TENSOR
    + b"("
    + _STORAGE
    + b"K\0h\1h\1\x89"
    + _ODICT
    + b")RtR.",
    "a call of a doubling list": b"\x80\x02" + _DOUBLING + b"h<)R.",
    "a new object of a doubling list": b"\x80\x02" + _DOUBLING + b"h<)\x81.",
    "a call of many long texts": b"\x80\x02" + _text(500_000) + b"q\0](" + b"h\0" * 100_000 + b"e)R.",
    "a call of a doubling counter": b"\x80\x02ccollections\nCounter\n)Rq\0"
    + b"".join(b"ccollections\nCounter\n)Rq%c(K\0h%cK\1h%cu" % (k + 1, k, k) for k in range(60))
    + b")R.",
    "a layout of a doubling tuple": b"\x80\x02" + _TUPLES + b"ctorch.serialization\n_get_layout\nh<\x85R.",
    "a doubling quantizer": b"\x80\x02"
    + _DOUBLING
    + b"ctorch._utils\n_rebuild_qtensor\n("
    + _STORAGE
    + b"K\0K\2\x85K\1\x85h<\x85\x89"
    + _ODICT
    + b")RtR.",
    "text in a slow encoding": b"\x80\x02c_codecs\nencode\n"
    + b"X\x60\xea\0\0"
    + "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))).encode()
    + b"X\x08\0\0\0punycode\x86R.",
    "one size as key": b"\x80\x02" + _SIZE + _ONES + b"\x85Rq\0](" + b"}h\0Ns" * _NUM + b"e.",
    "complex numbers of one hash": b"\x80\x02}("
    + b"".join(
        b"cbuiltins\ncomplex\nG" + struct.pack(">d", (1 << 40) - 1000003 * k) + b"G" + struct.pack(">d", k) + b"\x86RN"
        for k in range(_NUM)
    )
    + b"u.",
    "nested tuples of one hash": b"\x80\x02}("
    + b"".join(_long(a) + _long(b) + b"\x86\x85N" for a, b in pairs_of_one_hash(_NUM))
    + b"u.",
    "kinds of kinds": b"\x80\x02N"
    + b"".join(b"\x85q\0" + _ARRAY + b")R(K\1K\1\x85" + _ODD + b"h\0Rtb" for _ in range(4000))
    + b".",
    "many leaves, far down": b"\x80\x02" + b"](" * 100 + b"N" * 1_000_000 + b"e" * 100 + b".",
    "many leaves below one long key": b"\x80\x02}" + _text(200_000) + b"](" + b"N" * 100_000 + b"es.",
}


def test_pairs_of_one_hash_are_that() -> None:
    pairs = list(pairs_of_one_hash(100))
    assert len(set(pairs)) == 100 and len(set(map(hash, pairs))) == 1


@pytest.mark.wide
@pytest.mark.parametrize("name", CRAFTED)
def test_it_is_read_or_refused_within_its_bounds(name: str) -> None:
    check(CRAFTED[name])


def _file_with(pickled: bytes) -> bytes:
    buffer, made = io.BytesIO(), io.BytesIO()
    torch.save([torch.ones(6)], buffer)
    writer = torch._C.PyTorchFileWriter(made, True, 64)
    with zipfile.ZipFile(buffer) as archive:
        for record in archive.infolist():
            record_name = record.filename.partition("/")[2]
            data = pickled if record_name == "data.pkl" else archive.read(record)
            if record_name not in ("version", ".data/serialization_id"):
                writer.write_record(record_name, data, len(data))
    writer.write_end_of_file()
    return made.getvalue()


@pytest.mark.wide
def test_load_gives_an_error_of_this_package_or_a_value(tmp_path: Path) -> None:
    """In one process of its own: a crash, or 512 MiB more than torch itself takes, ends it."""
    files = {f"{number}.pt": _file_with(pickled) for number, pickled in enumerate(CRAFTED.values()) if pickled}
    commit(tmp_path, "tag", files)
    script = f"""
import resource, sys, time
import torch
from async_ckpt import CheckpointError, load
torch.ones(1).sum()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20),) * 2)
for name in {sorted(files)!r}:
    started = time.thread_time()
    try:
        load(sys.argv[1] + "/tag/" + name, num_threads=1)
    except CheckpointError as error:
        assert str(error).isprintable() and len(str(error)) < 5000, str(error)
    assert time.thread_time() - started < 5, name
    print(name)
assert "torch.onnx" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-300:] + ended.stderr[-2000:]


def test_references_that_torch_itself_writes_cost_nothing() -> None:
    """Many objects with one shared tuple, many equal sizes, keys of every kind."""
    pair = (3, 4)
    shared = [torch.Size(pair) for _ in range(5000)]
    state = {
        "sizes": shared,
        "keys": [{pair: n, 1 << 70: n, "text": n, None: n} for n in range(3000)],
        "bytes": [b"ab" * 50] * 2000,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    found = read_inert(zipfile.ZipFile(buffer).read("archive/data.pkl"))
    assert len(found["sizes"]) == 5000 and list(found["keys"][7]) == [pair, 1 << 70, "text", None]


@pytest.mark.wide
@pytest.mark.parametrize(
    "leaf",
    ["x" * 200_000, b"\xff" * 200_000, numpy.arange(25_000.0), 1 << 100_000],
    ids=["str", "bytes", "array", "int"],
)
def test_a_large_leaf_may_be_shared_often(leaf: object) -> None:
    buffer = io.BytesIO()
    torch.save({"layers": [{"cfg": leaf, "i": i} for i in range(3000)]}, buffer)
    found = list(leaves(zipfile.ZipFile(buffer).read("archive/data.pkl"), {}))
    exact = {info.exact for info in found if isinstance(info, OtherInfo) and info.path[-1] == "cfg"}
    assert len(found) >= 6000 and len(exact) == 1


def test_keys_that_are_not_hashed_are_equal_to_nothing() -> None:
    found = read_inert(b"\x80\x02}(N\x85\x85q\0K\x01h\0K\x02]K\x03u.")
    assert [type(key) for key in found] == [OpaqueKey] * 3
    assert describe(found) == "<dict of 3>"


def test_what_cannot_be_printed_is_not() -> None:
    called = read_inert(b"\x80\x02cos\n\x1b[31msystem\nX\x05\0\0\0\x1b[31m\x85R.")
    assert describe(called) == r"<os.\x1b[31msystem('\x1b[31m')>"


def test_the_opcodes_of_other_protocols_are_not_plain(tmp_path: Path) -> None:
    with pytest.raises(MalformedPickleError, match="opcode"):
        read_inert(b"\x80\x02\xff.")
    commit(tmp_path, "tag", {"a.pt": _file_with(b"\x80\x02\xff.")})
    with pytest.raises(CheckpointError):
        load(tmp_path / "tag" / "a.pt")


@pytest.mark.wide
def test_what_pickles_seldom_say_is_read() -> None:
    read = read_inert(b"\x80\x02(\x82\x01\x83\x02\x01\x84\x03\0\0\0S'\xe9\\x41'\n(c__main__\nA\noI01\nl.")
    assert [describe(item) for item in read[:3]] == ["<extension.1>", "<extension.258>", "<extension.3>"]
    assert [read[3], read[5]] == ["éA", True]
    assert describe(read[4]) == "<__main__.A>"


def test_a_sample_of_the_fuzzer() -> None:
    assert len(NAMES) > 10
    fuzz(4000, seed=7)


@pytest.mark.slow
def test_the_fuzzer() -> None:
    fuzz(60_000, seed=1)
