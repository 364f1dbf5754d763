"""What `save_sharded` accepts, `load_sharded` gives back: every kind of value; and blobs that are crafted."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import io
import os
import pathlib
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from async_ckpt import AsyncCheckpointEngine, CorruptCheckpointError, UnsupportedStateError
from async_ckpt.errors import StateMismatchError
from async_ckpt.integrations.dcp import TrainingState, load_sharded, save_sharded
from async_ckpt.integrations.dcp.objects import load_blob, padded, unpadded
from async_ckpt.reading.build import NotPlainError
from tests.support.comparing import torch_bytes

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated", "ignore:Sparse"
    ),
    pytest.mark.wide,
]


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    rate: float = 0.1


Point = collections.namedtuple("Point", "x y")


class Labelled(torch.Tensor):
    """A tensor subclass without a state of its own."""


def quiet(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Kinds that torch calls a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def quantized(scale: float) -> torch.Tensor:
    return quiet(lambda: torch.quantize_per_tensor(torch.arange(12.0).reshape(3, 4), scale, 0, torch.qint8))


PLAIN: dict[str, Any] = {
    "numpy": np.arange(6.0).reshape(2, 3),
    "numpy of nothing": np.empty((0, 3)),
    "numpy of text": np.array(["a", "bc"]),
    "numpy of objects": np.array([1, "a"], dtype=object),
    "numpy of dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
    "numpy records": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
    "numpy scalar": np.float32(3),
    "numpy rng": np.random.RandomState(3).get_state(),
    "numpy generator": np.random.default_rng(0).bit_generator.state,
    "python rng": random.Random(3).getstate(),
    "torch rng": torch.get_rng_state(),
    "a list of arrays": [np.arange(3), {"x": np.ones(1)}],
    "counter": collections.Counter("aab"),
    "sets": {1, 2},
    "frozen sets": frozenset([1]),
    "path": pathlib.Path("/a/b"),
    "date": datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
    "bytes": b"abc",
    "no bytes": b"",
    "bytearray": bytearray(b"x"),
    "size": torch.Size([1, 2]),
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "storage": torch.arange(3.0).untyped_storage(),
    "sparse": torch.eye(4).to_sparse(),
    "csr": quiet(lambda: torch.eye(4).to_sparse_csr()),
    "csc": quiet(lambda: torch.eye(4).to_sparse_csc()),
    "quantized": quantized(0.5),
    "quantized by channel": quiet(
        lambda: torch.quantize_per_channel(
            torch.ones(3, 4), torch.ones(3), torch.zeros(3, dtype=torch.int64), 0, torch.qint8
        )
    ),
    "fp8": torch.arange(3.0).to(torch.float8_e4m3fn),
    # torch 2.7 does not have all of them.
    **{
        name: torch.arange(4, dtype=torch.uint8).view(getattr(torch, name))
        for name in ("float4_e2m1fn_x2", "float8_e8m0fnu")
        if hasattr(torch, name)
    },
    "uint16": torch.arange(3).to(torch.uint16),
    "conj": torch.ones(2, dtype=torch.complex128).mul(1j).conj(),
    "tensors in lists": [torch.ones(2), torch.eye(3).to_sparse()],
}
TRUSTED: dict[str, Any] = {
    "enum": Color.RED,
    "dataclass": Settings(0.5),
    "namespace": argparse.Namespace(a=1),
    "named tuple": Point(1, 2),
    "deque": collections.deque([1, 2], maxlen=4),
    "range": range(3),
    "an int of 256 bytes": 1 << 2040,
    "tensor subclass": torch.arange(3.0).as_subclass(Labelled),
}
REFUSED: dict[str, Any] = {
    "jagged": quiet(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
    "nested": quiet(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "meta": torch.empty(3, device="meta"),
    "two keys of one dotted name": {1: torch.ones(1), "1": torch.zeros(1)},
}


def blank(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.is_quantized:
            return value.clone()
        dense = torch.zeros_like(value) if value.layout is torch.strided else torch.ones(value.shape)
        return dense if value.layout is torch.strided else quiet(lambda: dense.to_sparse(layout=value.layout))
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    return [blank(item) for item in value] if isinstance(value, list) else None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (torch.Tensor, torch.UntypedStorage, torch.TypedStorage)):
        if not isinstance(a, torch.Tensor):
            return list(a) == list(b)
        if a.layout is not torch.strided:
            return a.layout is b.layout and torch.equal(a.to_dense(), b.to_dense())
        if a.is_quantized:
            return torch.equal(a.int_repr(), b.int_repr()) and torch.equal(a.dequantize(), b.dequantize())
        return a.dtype == b.dtype and a.resolve_conj().contiguous().view(torch.uint8).equal(
            b.resolve_conj().contiguous().view(torch.uint8)
        )
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def back(root: Path, value: Any, target: Any, **options: Any) -> Any:
    """`value`, saved and loaded into `target`."""
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20) as engine:
        save_sharded(engine, "a", {"before": torch.ones(3), "x": value}).result()
        state = {"before": torch.zeros(3), "x": target}
        load_sharded(engine, "a", state, **options)
        assert torch.equal(state["before"], torch.ones(3))
        return state["x"]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_comes_back(tmp_path: Path, name: str) -> None:
    found = back(tmp_path, PLAIN[name], blank(PLAIN[name]))
    if name in ("storage", "counter", "numpy generator"):
        # DCP itself makes plain dicts and typed storages of these.
        found = type(PLAIN[name])(found) if name != "storage" else found.untyped()
    assert same(PLAIN[name], found)


@pytest.mark.parametrize("name", TRUSTED)
def test_objects_of_other_classes_come_back_on_request(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    value = TRUSTED[name]
    with pytest.raises(UnsupportedStateError, match=r"'x'.*weights_only=False"):
        back(tmp_path / "default", value, blank(value))
    found = back(tmp_path / "asked", value, blank(value), weights_only=False)
    assert same(value, found)


def test_the_save_says_what_a_load_will_not_take_and_the_load_names_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"mode": {"color": Color.RED}, "settings": Settings(), "step": 3}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        save_sharded(engine, "a", state).result()
        save_sharded(engine, "b", state).result()
        told = [record.message for record in caplog.records if "weights_only=False" in record.message]
        assert len(told) == 1 and "'mode.color'" in told[0] and "Settings" in told[0] and "'step'" not in told[0]
        with pytest.raises(UnsupportedStateError, match=r"'mode.color' holds .*Color; 'settings' holds .*Settings"):
            load_sharded(engine, "a", {"mode": {"color": None}, "settings": None, "step": 0})


@pytest.mark.parametrize("name", REFUSED)
def test_what_dcp_cannot_give_back_is_refused_at_the_save(tmp_path: Path, name: str) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        with pytest.raises(UnsupportedStateError):
            save_sharded(engine, "a", {"x": REFUSED[name]})
        save_sharded(engine, "a", {"x": torch.ones(1)}).result()
        assert engine.tags() == ["a"]


def test_a_target_that_a_quantized_tensor_does_not_fit(tmp_path: Path) -> None:
    for n, target in enumerate((quantized(2.0), torch.ones(3, 4))):
        with pytest.raises(StateMismatchError, match=r"'x'.*quantization"):
            back(tmp_path / str(n), quantized(0.5), target)


def test_an_object_may_shrink_as_far_as_it_likes(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        # The second and the later ones lie where the first one had room.
        for num_bytes in (300_000, 200_000, 3, 0, 5000):
            state, tag = {"x": bytes(num_bytes), "w": torch.ones(1)}, f"t{num_bytes}"
            save_sharded(engine, tag, state).result()
            for load in (load_sharded, lambda engine, tag, target: dcp.load(target, checkpoint_id=tmp_path / tag)):
                target = {"x": None, "w": torch.zeros(1)}
                load(engine, tag, target)
                assert target["x"] == state["x"]


@pytest.mark.parametrize("num_zeros", [0, 1, 70_000, 131_050, 131_072, 400_000])
def test_the_zeros_in_a_container_or_behind_it_are_none_of_it(num_zeros: int) -> None:
    buffer = io.BytesIO()
    torch.save({"x": b"PK\5\6"}, buffer)
    blob = buffer.getvalue()
    for given in (blob + bytes(num_zeros), padded(blob, len(blob) + num_zeros)):
        assert len(given) == len(blob) + num_zeros
        assert bytes(unpadded(memoryview(given))) == blob
    assert torch.load(io.BytesIO(padded(blob, len(blob) + num_zeros)))["x"] == b"PK\5\6"
    assert unpadded(memoryview(bytes(num_zeros))) == bytes(num_zeros)


def halves() -> dict[str, torch.Tensor]:
    base = torch.zeros(6)
    return {"a": base[:4], "b": base[2:]}


def tied(make: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    tensor = make()
    return {"a": tensor, "b": tensor.view_as(tensor)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: tied(lambda: torch.zeros(4)),
        lambda: tied(lambda: torch.zeros(4).as_subclass(Labelled)),
        lambda: tied(lambda: torch.quantize_per_tensor(torch.zeros(4), 0.5, 0, torch.qint8)),
        halves,
    ],
    ids=["tied", "subclasses", "quantized", "halves"],
)
def test_targets_that_share_memory_and_are_apart_in_the_checkpoint(
    tmp_path: Path, make: Callable[[], dict[str, torch.Tensor]]
) -> None:
    state, target = make(), make()
    state["a"].copy_(torch.arange(4.0))
    other = state["b"].clone()
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        save_sharded(engine, "same", state).result()
        load_sharded(engine, "same", target, weights_only=False)
        assert all(torch.equal(target[name].dequantize(), state[name].dequantize()) for name in state)
        save_sharded(engine, "apart", {"a": state["a"], "b": other.copy_(torch.arange(4.0) + 4)}).result()
        with pytest.raises(StateMismatchError, match="'a', 'b' share memory"):
            load_sharded(engine, "apart", target, weights_only=False)


def training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 2)
    model.register_parameter("lone", torch.nn.Parameter(torch.ones(1)))
    return model, torch.optim.AdamW(model.parameters())


def test_a_parameter_without_a_gradient_names_the_way_to_load_the_rest(tmp_path: Path) -> None:
    model, optimizer = training()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        save_sharded(engine, "a", {"train": TrainingState(model, optimizer)}).result()
        fresh, other = training()
        state = {"train": TrainingState(fresh, other)}
        with pytest.raises(StateMismatchError, match=r"lone.*allow_partial_load=True"):
            load_sharded(engine, "a", state)
        load_sharded(engine, "a", state, planner=DefaultLoadPlanner(allow_partial_load=True))
        assert torch.equal(fresh.weight, model.weight) and torch.equal(
            other.state[fresh.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"]
        )


def container(pickled: bytes) -> memoryview:
    raw = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(raw)
    writer.write_record("data.pkl", pickled, len(pickled))
    writer.write_end_of_file()
    return memoryview(raw.getvalue())


def compressed(pickled: bytes) -> memoryview:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", pickled)
    return memoryview(raw.getvalue())


HUGE = (1 << 30).to_bytes(4, "little")
CRAFTED = {
    "compressed": compressed(b"\x80\x02X" + HUGE + bytes(1 << 27) + b"."),
    "empty": memoryview(b""),
    "cut": memoryview(b"PK"),
    "a pickle alone": memoryview(b"\x80\x02N."),
    "no pickle": container(b"\xff"),
    "a bytearray by its length": container(b"\x80\x02c__builtin__\nbytearray\nJ" + HUGE + b"\x85R."),
    "a tensor by its length": container(b"\x80\x02ctorch\nFloatTensor\nJ" + HUGE + b"\x85R."),
    "an array by its shape": container(
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ" + HUGE + b"\x85U\x01b\x87R."
    ),
    "an array by its class": container(b"\x80\x02cnumpy\nndarray\nJ" + HUGE + b"\x85\x85\x81."),
    "a scalar without its bytes": container(
        b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x0a\0\0\0V900000000\x89\x88\x87R\x85R."
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_blob_that_would_become_large_is_refused_before_it_is_read(name: str) -> None:
    with pytest.raises(CorruptCheckpointError):
        load_blob(CRAFTED[name], "x")


def test_nothing_of_a_refused_blob_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    with pytest.raises(NotPlainError, match="mkdir"):
        load_blob(memoryview(torch_bytes({"x": Evil()})), "x")
    assert not (tmp_path / "ran").exists()
