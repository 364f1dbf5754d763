"""States of every kind that torch.save takes, as factories: name -> state."""

from __future__ import annotations

import argparse
import collections
import random
from collections import OrderedDict
from functools import partial

import numpy as np
import torch
from torch import nn

from .comparing import unwarned


class Tagged(torch.Tensor):
    """A subclass; pickled by name."""


class Config:
    """A plain object with a tensor inside."""

    def __init__(self) -> None:
        self.weight = torch.arange(4.0)
        self.name = "config"


def _tied():
    weight = torch.randn(4, 5)
    return {
        "a": weight,
        "b": weight,
        "c": weight.t(),
        "d": weight[1:3],
        "e": weight[:, ::2],
        "f": weight.expand(2, 4, 5),
        "g": weight.detach(),
    }


def _cyclic():
    state = {"list": [1, 2]}
    state["self"] = state
    state["list"].append(state["list"])
    return state


def _shared_deep():
    inner, word = {"x": torch.ones(2), "n": 1}, ("w", 1)
    return {"deep": [[[inner], word]], "shallow": inner, "word": word}


def _recursive_tuple():
    pair = ([],)
    pair[0].append(pair)
    triple = ([], 1, 2, 3)
    triple[0].append(triple)
    return {"pair": pair, "triple": triple, "both": [pair, pair]}


def _optimizer(kind, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = kind(model.parameters(), **options)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(5, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return {"model": model.state_dict(), "optim": optimizer.state_dict()}


def _attributed():
    tensor = torch.ones(2)
    tensor.note = "mine"  # type: ignore[attr-defined]
    return {"t": tensor}


@unwarned()
def _quantised():
    per_tensor = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
    scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([0, 0])
    return [per_tensor, torch.quantize_per_channel(torch.randn(2, 3), scales, zeros, 0, torch.quint8)]


@unwarned()
def _nested(layout):
    return {"n": torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)}


@unwarned()
def _sparse():
    dense = torch.tensor([[0, 1.0], [2, 0]])
    rows, columns, blocks = dense.to_sparse_csr(), dense.to_sparse_csc(), dense.to_sparse_bsr((1, 1))
    return {"coo": dense.to_sparse(), "csr": rows, "csc": columns, "bsr": blocks}


def _identities():
    word, half = "".join(["sha", "red"]), (0.9, 0.999)
    return {
        word: [word, "".join(["sha", "red"]), "cpu", "storage", "0", "7", "10", "", "é", "\ud800"],
        "groups": [{"betas": half}, {"betas": half}, {"betas": (0.9, 0.999)}],
        "t": [torch.ones(1) for _ in range(12)],
    }


def _containers():
    lengths = (0, 1, 2, 3, 4, 999, 1000, 1001, 2000, 2001)
    ordered = OrderedDict((str(n), OrderedDict.fromkeys(range(n))) for n in lengths)
    ordered._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    return [
        ordered,
        *({"d": dict.fromkeys(map(str, range(n))), "l": list(range(n)), "t": tuple(range(n))} for n in lengths),
    ]


def _scalars():
    small = [0, 255, 256, 65535, 65536, -1, -128]
    words = [-(2**31), 2**31, 2**31 - 1, -(2**31) - 1, 2**63, -(2**63), 2**64]
    return {
        "ints": [*small, *words, 2**2039, -(2**2039), 1 << 5000],
        "floats": [0.0, -0.0, 1e300, float("inf"), float("nan")],
        "atoms": [True, False, None],
        3: 4,
        None: 5,
        2.5: 1,
        True: 0,
    }


def _random_states():
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "generator": torch.Generator().get_state(),
    }


def _meta():
    with torch.device("meta"):
        return {"m": nn.Linear(2, 3).state_dict(), "t": torch.empty(5)}


def _quirk():
    # Payloads that look like a data descriptor: torch's writer mixes them into the serialization id.
    return [torch.frombuffer(bytearray(b"PK\7\x08" + bytes(range(n))), dtype=torch.uint8) for n in (0, 3, 4, 5, 100)]


_DTYPES = [
    *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
    *("complex32", "complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
]


def _dtypes():
    state = {}
    for name in filter(partial(hasattr, torch), _DTYPES):
        base = torch.empty(6, dtype=getattr(torch, name))
        state[name] = {"a": base, "b": base[1:], "c": torch.empty(0, dtype=base.dtype)}
    return state


PLAIN = {
    "tied": _tied,
    "cyclic": _cyclic,
    "shared_deep": _shared_deep,
    "adamw": lambda: _optimizer(torch.optim.AdamW, lr=1e-3),
    "sgd": lambda: _optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
    "identities": _identities,
    "containers": _containers,
    "scalars": _scalars,
    "root_tensor": lambda: torch.randn(3),
    "root_none": lambda: None,
    "root_text": lambda: "text",
    "empty_dict": dict,
    "zero_dim": lambda: [torch.tensor(3.0), torch.tensor(7), torch.empty(0), torch.empty(0, 4), torch.empty(3, 0)],
    "requires_grad": lambda: [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True) * 2],
    "rank_five": lambda: torch.randn(1, 2, 1, 2, 3).permute(4, 0, 2, 1, 3),
    "channels_last": lambda: torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last),
    "long_key": lambda: {"k" * 5000: torch.ones(1)},
    "namespace": lambda: argparse.Namespace(lr=0.1, weight=torch.ones(2)),
    "object": lambda: {"o": Config()},
    "counter": lambda: {"c": collections.Counter("abca"), "d": collections.defaultdict(list, {"x": [1]})},
    "bytes_set": lambda: {
        "b": b"bytes",
        "s": {1},
        "f": frozenset((2,)),
        "size": torch.Size((2, 3)),
        "dtype": torch.float32,
        "dev": torch.device("cpu"),
    },
    "rng": _random_states,
    "descriptor_quirk": _quirk,
    "large": lambda: [
        torch.arange(300_000, dtype=torch.float32),
        torch.ones(3),
        torch.arange(50_001, dtype=torch.uint8),
    ],
    "many": lambda: {f"layer.{n}": torch.full((n % 5,), n) for n in range(1500)},
    "dtypes": _dtypes,
}
"""Those that the fast planner must take itself."""

STATES = PLAIN | {
    "recursive_tuple": _recursive_tuple,
    "lbfgs": lambda: _optimizer(torch.optim.LBFGS, max_iter=3),
    "parameter": lambda: {
        "p": nn.Parameter(torch.randn(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "b": nn.Buffer(torch.ones(1)),
    },
    "conj": lambda: {
        "c": torch.randn(2, dtype=torch.cfloat).conj(),
        "n": torch.randn(2, dtype=torch.cfloat).conj().imag,
    },
    "sparse": _sparse,
    "quantised": _quantised,
    "nested_strided": lambda: _nested(torch.strided),
    "nested_jagged": lambda: _nested(torch.jagged),
    "meta": _meta,
    "subclass": lambda: {"t": torch.arange(3.0).as_subclass(Tagged)},
    "attributed": _attributed,
    "untyped_storage": lambda: {"s": torch.arange(3.0).untyped_storage(), "t": torch.arange(3)},
}
