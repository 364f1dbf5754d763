"""Objects of any class in a file: seen, never made; hostile pickles end in bounded time and memory."""

from __future__ import annotations

import argparse
import collections
import enum
import json
import pickle
import subprocess

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt import AsyncCheckpointEngine
from async_ckpt.errors import CheckpointError
from async_ckpt.format.inert import Inert, MalformedPickleError, Name, describe, key_value
from async_ckpt.format.pickles import read_inert
from async_ckpt.format.tensors import leaves

from ..cli.conftest import PYTHON

# torch calls sparse CSR tensors a beta feature.
pytestmark = pytest.mark.filterwarnings("ignore")


class Colour(enum.Enum):
    RED = 1


class OwnDict(collections.OrderedDict):
    pass


class OwnTensor(torch.Tensor):
    pass


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)
        torch.nn.init.ones_(self.layer.weight)
        torch.nn.init.ones_(self.layer.bias)


def odd_state() -> dict:
    own = OwnDict()
    own["w"] = torch.arange(5)
    tensor = torch.ones(2, 3).as_subclass(OwnTensor)
    tensor.extra = torch.zeros(7)  # type: ignore[attr-defined]
    return {
        "array": numpy.arange(12.0).reshape(3, 4),
        "args": argparse.Namespace(lr=0.1, weight=torch.ones(2), inner={"x": torch.ones(3)}),
        "own": own,
        "size": torch.Size([3, 4]),
        "colour": Colour.RED,
        "coo": torch.eye(4).to_sparse(),
        "csr": torch.eye(4).to_sparse_csr(),
        "tensor": tensor,
        "net": Net(),
        "device": torch.device("cpu"),
        "default": collections.defaultdict(list, {"a": [torch.ones(2)]}),
        "keys": {(1, "a"): torch.ones(1), 5: torch.ones(2)},
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "big": 2**300,
        "step": 7,
    }


EXPECTED = {
    "args.weight": ("float32", [2]),
    "args.inner.x": ("float32", [3]),
    "own.w": ("int64", [5]),
    "coo.indices": ("int64", [2, 4]),
    "coo.values": ("float32", [4]),
    "csr.crow_indices": ("int64", [5]),
    "csr.col_indices": ("int64", [4]),
    "csr.values": ("float32", [4]),
    "tensor": ("float32", [2, 3]),
    "tensor.extra": ("float32", [7]),
    "net._modules.layer._parameters.weight": ("float32", [4, 3]),
    "net._modules.layer._parameters.bias": ("float32", [4]),
    "default.a.0": ("float32", [2]),
    "keys.(1, 'a')": ("float32", [1]),
    "keys.5": ("float32", [2]),
    "fp8": ("float8_e4m3fn", [4]),
    "conj": ("complex64", [2]),
}


@pytest.fixture
def odd(tmp_path):
    with AsyncCheckpointEngine(tmp_path / "root", staging_bytes=4 << 20) as engine:
        for tag, step in (("odd", 7), ("later", 8)):
            engine.create(tag)
            engine.save({**odd_state(), "step": step}, "all.pt")
            engine.save(
                {"q": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "array": numpy.ones(3)}, "q.pt"
            )
            engine.commit(tag)
    return tmp_path / "root"


@pytest.mark.wide
def test_every_tensor_is_found_and_everything_else_is_named(cli, odd):
    found = json.loads(cli("inspect", odd / "odd" / "all.pt", "--json").out)[0]
    assert {tensor["path"]: (tensor["dtype"], tensor["shape"]) for tensor in found["tensors"]} == EXPECTED
    raw = (odd / "odd" / "all.pt").read_bytes()
    (own,) = [tensor for tensor in found["tensors"] if tensor["path"] == "own.w"]
    assert raw[own["offset"] : own["offset"] + own["num_bytes"]] == torch.arange(5).numpy().tobytes()
    texts = {other["path"]: other["text"] for other in found["others"]}
    assert texts["array"] == "<numpy.ndarray f8 [3, 4]>"
    assert texts["args"] == "<argparse.Namespace>"
    assert texts["args.lr"] == "0.1"
    assert texts["colour"].endswith("Colour(1)>")
    assert texts["size"] == "<torch.Size (3, 4)>"
    assert texts["big"] == "<int of 301 bits>"
    assert [tensor["kind"] for tensor in found["tensors"] if tensor["path"] == "tensor"] == [f"{__name__}.OwnTensor"]
    shown = cli("inspect", odd / "odd").out
    for word in ("<numpy.ndarray f8 [3, 4]>", "sparse_coo", "indices", "OwnTensor", "quantized"):
        assert word in shown


def test_a_file_that_is_one_tensor_or_one_object_shows_it(cli, tmp_path):
    with AsyncCheckpointEngine(tmp_path / "root", staging_bytes=1 << 20) as engine:
        engine.create("t")
        engine.save(torch.ones(3), "tensor.pt")
        engine.save(argparse.Namespace(x=1), "object.pt")
        engine.commit("t")
    shown = cli("inspect", tmp_path / "root" / "t").out
    assert "(the whole file)  float32 [3]" in shown
    assert "(the whole file)  <argparse.Namespace>" in shown


def test_diff_sees_into_them_too(cli, odd):
    ran = cli("diff", odd / "odd", odd / "later")
    assert ran.code == 0
    assert "values that are no tensors differ: all.pt: step" in ran.out
    assert json.loads(cli("diff", odd / "odd", odd / "later", "--json").out)["other_values"] == ["all.pt: step"]


def test_export_of_what_a_format_cannot_hold_names_it(cli, odd, tmp_path):
    from safetensors.torch import load_file

    target = tmp_path / "out.safetensors"
    refused = cli("export", odd / "odd" / "all.pt", target)
    assert refused.code == 1
    assert "array <numpy.ndarray" in refused.err
    quantized = cli("export", odd / "odd" / "q.pt", target, "--tensors-only")
    assert quantized.code == 1
    assert "'q' is qint8" in quantized.err
    assert not target.exists()
    assert cli("export", odd / "odd" / "all.pt", target, "--tensors-only").code == 0
    assert set(load_file(target)) == set(EXPECTED)
    assert torch.equal(load_file(target)["own.w"], torch.arange(5))


PROTOCOLS = [
    {"a": [1, 2.5, "x", None, True, b"yz", (1, 2), (1, 2, 3, 4)], "n": -(2**70), 3: {"s": {1}, "f": frozenset((2,))}},
    ["é\n" * 300],
    -1,
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(protocol):
    def plain(value):
        if isinstance(value, dict):
            return {str(key_value(key)): plain(child) for key, child in value.items()}
        return [plain(child) for child in value] if isinstance(value, (list, tuple, set, frozenset)) else value

    def expected(value):
        if isinstance(value, dict):
            return {str(key): expected(child) for key, child in value.items()}
        return [expected(child) for child in value] if isinstance(value, (list, tuple, set, frozenset)) else value

    for value in PROTOCOLS:
        assert plain(read_inert(pickle.dumps(value, protocol))) == expected(value)
    noted = read_inert(pickle.dumps(argparse.Namespace(x=1), protocol))
    assert isinstance(noted, Inert)
    assert "argparse.Namespace" in noted.name or "argparse.Namespace" in describe(noted.args[0])


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(raw):
    for pickled in (raw, b"\x80\x02" + raw + b"."):
        try:
            list(leaves(pickled, {}))
        except (MalformedPickleError, CheckpointError):
            continue


@given(st.data())
def test_no_damage_of_a_real_pickle_does_harm(data):
    raw = bytearray(
        pickle.dumps({"a": [argparse.Namespace(x=numpy.ones(2)), Colour.RED, {1: (2, 3)}], "b": OwnDict(c=4)}, 2)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        list(leaves(bytes(raw), {}))
    except (MalformedPickleError, CheckpointError):
        return


_PRIME = 2**61 - 1
HOSTILE = {
    "nested tuples": b"\x80\x02" + b")" + b"\x85" * 1_000_000 + b".",
    "nested key": b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s.",
    "nested calls": b"\x80\x02cos\nsystem\n" + b")R" * 500_000 + b".",
    "laughs": b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (k, k, k + 1) for k in range(90)) + b".",
    "itself": b"\x80\x02]q\x00h\x00a.",
    "long key": b"\x80\x02}X" + (2_000_000).to_bytes(4, "little") + b"a." * 1_000_000 + b"K\x01s.",
    "colliding keys": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (k * _PRIME).to_bytes(10, "little") + b"N" for k in range(100_000))
    + b"u.",
    "huge size": b"\x80\x02X\xff\xff\xff\xff.",
    "huge number": b"\x80\x02\x8b" + (1_000_000).to_bytes(4, "little") + b"\x7f" * 1_000_000 + b".",
    "no end": b"\x80\x02" + b"N0" * 100_000,
}


@pytest.mark.wide
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_soon(name):
    """In a process of its own, for some would crash it; with a limit on its memory and CPU time."""
    script = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from async_ckpt.errors import CheckpointError
from async_ckpt.format.inert import MalformedPickleError
from async_ckpt.format.pickles import read_inert
from async_ckpt.format.tensors import leaves
try:
    print("leaves", sum(1 for _ in leaves(sys.stdin.buffer.read(), {})))
except (CheckpointError, MalformedPickleError) as error:
    print("refused", error)
"""
    ran = subprocess.run([PYTHON, "-c", script], input=HOSTILE[name], capture_output=True, check=False)
    assert ran.returncode == 0, ran
    assert ran.stdout.startswith((b"leaves", b"refused"))


def test_the_number_of_opcodes_is_bounded(monkeypatch):
    monkeypatch.setattr("async_ckpt.format.pickles.MAX_OPCODES", 1000)
    with pytest.raises(MalformedPickleError, match="more than 1000 opcodes"):
        read_inert(b"\x80\x02" + b"N0" * 1000 + b"N.")


def test_a_name_is_only_a_name():
    assert read_inert(b"\x80\x02cos\nsystem\n.") == Name("os.system")
    called = read_inert(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    assert describe(called) == "<os.system('ls')>"
