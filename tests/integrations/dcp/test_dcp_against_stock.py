"""The same calls with DCP's own writer and reader and with ours: the same results, whichever of them reads what the
other wrote.
"""

from __future__ import annotations

import copy
import io
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from async_ckpt import Catalog
from async_ckpt.integrations.dcp import ArenaStager, DcpReader, DcpWriter
from tests.integrations.dcp import work
from tests.integrations.dcp.test_dcp_ranks import assert_same
from tests.support.processes import run_ranks

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated", "ignore::FutureWarning"
    ),
    pytest.mark.wide,
]

BASE = torch.arange(24.0).reshape(4, 6)
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.bool)
DTYPES = (*PLAIN_DTYPES, torch.complex64, torch.float8_e4m3fn)
STATES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "empty tensors": {"a": torch.empty(0), "b": torch.empty(3, 0, 2), "c": torch.ones(2)},
    "0-dim": {"a": torch.tensor(1.5), "b": torch.tensor(3), "c": torch.tensor(True), "d": torch.tensor(1 + 2j)},
    "python scalars": {"i": 3, "f": 0.5, "s": "text", "b": True, "n": None, "c": 1 + 2j, "big": 10**30},
    "containers": {
        "list": [1, torch.ones(2), {"x": torch.zeros(3)}],
        "tuple": (1, torch.ones(1)),
        "empty": {},
        "none": [],
        "deep": {"a": {"b": {"c": 1}}},
    },
    "views": {
        "row": BASE[1],
        "column": BASE[:, 2],
        "transposed": BASE.t(),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "flipped": BASE.flip(0),
    },
    "tied": {"a": BASE, "b": BASE, "c": BASE[1:]},
    "parameters": {"p": torch.nn.Parameter(torch.ones(3)), "q": torch.nn.Parameter(torch.ones(2), requires_grad=False)},
    "dtypes": {str(dtype).removeprefix("torch."): torch.arange(6).to(dtype).reshape(2, 3) for dtype in DTYPES},
    "bits": {
        "conj": torch.arange(6).to(torch.complex64).mul(1 + 2j).conj(),
        "neg": torch.arange(4).to(torch.complex64).mul(1j).conj().imag,
    },
    "odd keys": {"a.b": torch.ones(1), "a/b": torch.ones(2), "": torch.ones(3), "ü": 1},
    "large": {
        "x": torch.arange(3 << 18).reshape(-1, 16),
        "y": torch.arange(3 << 18).to(torch.uint8)[1:],
        "z": torch.ones(5),
    },
    "many": {f"t{n}": torch.full((n % 7, 3), float(n)) for n in range(300)},
}


def blank(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(blank, state))
    return (
        torch.zeros_like(state, requires_grad=False)
        if isinstance(state, torch.Tensor)
        else state
        if state is None
        else type(state)()
    )


def values(state: Any) -> Any:
    """What can be compared: resolved, detached values."""
    if isinstance(state, dict):
        return {key: values(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return dict(enumerate(map(values, state)))
    return state.detach().resolve_conj().resolve_neg().clone() if isinstance(state, torch.Tensor) else state


def save(state: dict[str, Any], path: Path, *, ours: bool, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not ours:
            path.mkdir(parents=True, exist_ok=True)
            dcp.save(state, checkpoint_id=path, **options)
            return
        writer = DcpWriter(staging_bytes=1 << 20, chunk_bytes=65536)
        try:
            dcp.save(state, checkpoint_id=path, storage_writer=writer, **options)
        finally:
            writer.close()


def load(state: dict[str, Any], path: Path, *, ours: bool, **options: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, storage_reader=DcpReader() if ours else None, **options)
    return state


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("no_dist", [False, True])
def test_any_state(tmp_path: Path, name: str, no_dist: bool) -> None:
    state, options = STATES[name], {"no_dist": True} if no_dist else {}
    save(state, tmp_path / "stock", ours=False, **options)
    expected = values(load(blank(state), tmp_path / "stock", ours=False))
    save(state, tmp_path / "ours", ours=True, **options)
    assert_same(values(load(blank(state), tmp_path / "ours", ours=True, **options)), expected)
    assert_same(values(load(blank(state), tmp_path / "ours", ours=False)), expected)
    assert Catalog(tmp_path).verify("ours").ok
    for which in ("stock", "ours"):
        dcp_to_torch_save(tmp_path / which, tmp_path / f"{which}.pt")
    whole = [torch.load(tmp_path / f"{which}.pt", weights_only=False) for which in ("stock", "ours")]
    assert_same(values(whole[1]), values(whole[0]))


@pytest.mark.parametrize(
    "name", ["views", "tied", "parameters", "dtypes", "bits", "containers", "0-dim", "empty tensors"]
)
def test_any_state_through_the_stager(tmp_path: Path, name: str) -> None:
    state = STATES[name]
    expected, stager = values(state), ArenaStager()
    staged = stager.stage(state)
    save(staged, tmp_path / "s", ours=True)
    assert_same(values(load(blank(state), tmp_path / "s", ours=True)), expected)
    del staged
    stager.close()


def outcome_of(call: Any) -> str:
    """What a caller sees: the kind of failure, with the first cause."""
    try:
        call()
    except CheckpointException as error:
        return f"CheckpointException({type(error.failures[0][0]).__name__})"
    except Exception as error:  # noqa: BLE001 - an outcome like any other
        return type(error).__name__
    return "ok"


MISMATCHES: dict[str, dict[str, Any]] = {
    "missing key": {"a": torch.zeros(4, 6), "new": torch.zeros(2)},
    "missing object": {"a": torch.zeros(4, 6), "object": 0},
    "fewer keys": {"a": torch.zeros(4, 6)},
    "another size": {"a": torch.zeros(4, 5)},
    "more dimensions": {"a": torch.zeros(4, 6, 1)},
    "another dtype": {"a": torch.zeros(4, 6, dtype=torch.bfloat16), "b": torch.zeros(3, dtype=torch.float64)},
    "strided target": {"a": torch.zeros(6, 4).t()},
    "part of a larger target": {"a": torch.zeros(8, 12)[::2, ::2]},
    "tensor for an object": {"step": torch.zeros(1)},
    "object for a tensor": {"b": 0},
}


@pytest.mark.parametrize("name", MISMATCHES)
@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_target_that_differs(tmp_path: Path, name: str, allow_partial: bool) -> None:
    saved = {"a": BASE, "b": torch.arange(3), "step": 7}
    save(saved, tmp_path / "ours", ours=True)
    found = []
    for ours in (False, True):
        target = copy.deepcopy(MISMATCHES[name])
        planner = DefaultLoadPlanner(allow_partial_load=allow_partial)
        found.append((outcome_of(partial(load, target, tmp_path / "ours", ours=ours, planner=planner)), values(target)))
    assert found[1][0] == found[0][0]
    if found[0][0] == "ok":
        assert_same(found[1][1], found[0][1])


class Doubling(DefaultSavePlanner):
    """Changes what is written, as planners may."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        return object * 2 if isinstance(object, torch.Tensor) else super().transform_object(write_item, object)


PLANNERS = {
    "dedup to the lowest rank": lambda: DefaultSavePlanner(dedup_save_to_lowest_rank=True),
    "not flattened": lambda: DefaultSavePlanner(flatten_state_dict=False),
    "transforming": Doubling,
}


@pytest.mark.parametrize("name", PLANNERS)
def test_planners(tmp_path: Path, name: str) -> None:
    state = {"a": {"x": BASE, "n": 3}, "b": torch.ones(2)}
    found = []
    for ours in (False, True):
        path = tmp_path / ("ours" if ours else "stock")
        save(state, path, ours=ours, planner=PLANNERS[name]())
        flat = DefaultLoadPlanner(flatten_state_dict=name != "not flattened")
        target = blank(state) if name != "not flattened" else {"b": torch.zeros(2)}
        found.append(values(load(target, path, ours=ours, planner=flat)))
    assert_same(found[1], found[0])


def test_a_stream_of_bytes_in_the_state(tmp_path: Path) -> None:
    state = {"x": torch.ones(2), "raw": io.BytesIO(b"bytes")}
    kinds = []
    for ours in (False, True):
        path = tmp_path / ("ours" if ours else "stock")
        kinds.append(outcome_of(partial(save, state, path, ours=ours)))
        if kinds[-1] == "ok":
            target: dict[str, Any] = {"x": torch.zeros(2), "raw": None}
            reader = DcpReader(weights_only=False) if ours else None
            kinds.append(outcome_of(partial(dcp.load, target, checkpoint_id=path, storage_reader=reader)))
            kinds.append(target["raw"].getvalue() if isinstance(target["raw"], io.BytesIO) else str(target["raw"]))
    assert kinds[: len(kinds) // 2] == kinds[len(kinds) // 2 :]


def test_only_the_rows_that_are_wanted_are_read(tmp_path: Path) -> None:
    tensor = torch.arange(1 << 20).reshape(1 << 10, 1 << 10)
    writer = DcpWriter(staging_bytes=2 << 20, chunk_bytes=65536)
    dcp.save({"x": tensor}, checkpoint_id=tmp_path / "s", storage_writer=writer)
    writer.close()
    # Damage far behind the rows that are loaded: unseen, because it is not read.
    file = tmp_path / "s" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[-200_000] ^= 1
    file.write_bytes(data)
    found = run_ranks(tmp_path / "p", 2, work.load_own_rows, str(tmp_path / "s"))
    assert found[0].equal(tensor[:512])
    assert found[1] is True


def test_shards_that_are_empty_uneven_or_replicated(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    expected = run_ranks(tmp_path / "p", 4, work.save_odd_shards, root)[0]
    assert Catalog(root).verify("ours").ok
    readings = [(f"{root}/ours", True), (f"{root}/ours", False), (f"{root}/stock", False)]
    for world_size in (3, 1):
        for states in run_ranks(tmp_path / "p", world_size, work.load_odd_shards, readings):
            for reading, found in zip(readings, states, strict=True):
                assert_same(found, expected, f"{reading} on {world_size}")
