"""`load_into` of targets that share memory: one value for each byte, or a mismatch that names both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import StateMismatchError
from async_ckpt.reading import load as restore
from async_ckpt.reading.shared_memory import parts_of

from ..support.comparing import torch_bytes
from .committed import commit

State = dict[str, torch.Tensor]


class Labelled(torch.Tensor):
    """A tensor subclass without a state of its own."""


class Wrapper(torch.Tensor):
    """A tensor around another one, as DTensor is."""

    def __new__(cls, held: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Wrapper, (self.held,)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = [arg.held if isinstance(arg, Wrapper) else arg for arg in args]
        made = func(*held, **(kwargs or {}))
        return args[0] if func is torch.ops.aten.copy_.default else Wrapper(made)


def tied() -> State:
    weight = torch.zeros(20)
    return {"a": weight, "b": weight}


def halves() -> State:
    base = torch.zeros(20)
    return {"whole": base, "half": base[10:]}


def rows_and_columns() -> State:
    base = torch.zeros(4, 5)
    return {"row": base[1], "column": base[:, 2]}


def transposed() -> State:
    base = torch.zeros(4, 4)
    return {"straight": base, "across": base.t()}


def conjugated() -> State:
    base = torch.zeros(4, dtype=torch.complex64)
    return {"plain": base, "conj": base.conj()}


def real_part() -> State:
    base = torch.zeros(4, dtype=torch.complex64)
    return {"complex": base, "real": base.real}


def subclasses() -> State:
    base = torch.zeros(20)
    return {"object": base.as_subclass(Labelled), "plain": base}


def quantized() -> State:
    base = torch.quantize_per_tensor(torch.zeros(20), 0.1, 0, torch.qint8)
    return {"one": base, "other": base.view(4, 5)}


def compressed() -> State:
    values = torch.zeros(2)
    return {"matrix": torch.sparse_csr_tensor(torch.arange(3), torch.arange(2), values, (2, 2)), "values": values}


def wrapped() -> State:
    base = torch.zeros(20)
    return {"wrapper": Wrapper(base), "held": base}


OBJECTS = [subclasses, quantized, compressed, wrapped]
CASES = [tied, halves, rows_and_columns, transposed, conjugated, real_part]


def filled(target: State) -> State:
    """Separate tensors, all elements different, none of it shared."""
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape, dtype=tensor.dtype) for name, tensor in target.items()}


@pytest.mark.wide
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_shared_targets_that_are_apart_in_the_file_are_a_mismatch(tmp_path: Path, make: Callable[[], State]) -> None:
    target = make()
    first, second = target
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(filled(target))}, extent_bytes=4096)
    with pytest.raises(StateMismatchError, match="shares memory") as caught:
        restore.load_committed_into(catalog, "a", "m.pt", target)
    assert len(caught.value.mismatches) == 2
    assert all(repr(first) in line and repr(second) in line for line in caught.value.mismatches)
    assert all(tensor.eq(0).all() for tensor in target.values())
    done = restore.load_committed_into(catalog, "a", "m.pt", target, strict=False)
    assert done.loaded == ()
    assert all(tensor.eq(0).all() for tensor in target.values())
    assert {name: value.tolist() for name, value in done.state.items()} == {
        n: v.tolist() for n, v in filled(target).items()
    }


@pytest.mark.parametrize("format", ["torch", "safetensors"])
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_what_was_shared_when_it_was_saved_is_loaded(tmp_path: Path, make: Callable[[], State], format: str) -> None:
    state, target = make(), make()
    next(iter(state.values())).copy_(filled(state)[next(iter(state))])
    if format == "torch":
        if make is real_part:
            pytest.skip("torch.save refuses one storage under two dtypes")
        data = torch_bytes(state)
    else:
        # The format knows no sharing: each is written by itself.
        data = pytest.importorskip("safetensors.torch").save(
            {name: t.resolve_conj().clone().contiguous() for name, t in state.items()}
        )
    catalog = commit(tmp_path, "a", {"m": data}, extent_bytes=4096, format=format)
    restore.load_committed_into(catalog, "a", "m", target)
    assert all(torch.equal(target[name], state[name]) for name in state)


def test_equal_bytes_at_two_places_are_no_mismatch_and_minus_zero_is(tmp_path: Path) -> None:
    target = tied()
    catalog = commit(
        tmp_path, "a", {"m": torch_bytes({"a": torch.full((20,), float("nan")), "b": torch.full((20,), float("nan"))})}
    )
    restore.load_committed_into(catalog, "a", "m", target)
    assert target["a"].isnan().all()
    commit(tmp_path, "b", {"m": torch_bytes({"a": torch.zeros(20), "b": -torch.zeros(20)})})
    with pytest.raises(StateMismatchError, match="shares memory"):
        restore.load_committed_into(catalog, "b", "m", target)


def test_targets_that_interleave_and_never_meet_are_loaded(tmp_path: Path) -> None:
    base = torch.zeros(6, 9)
    target = {"q": base[:, :3], "k": base[:, 3:6], "v": base[:, 6:]}
    state = filled(target)
    catalog = commit(tmp_path, "a", {"m": torch_bytes(state)})
    restore.load_committed_into(catalog, "a", "m", target)
    assert all(torch.equal(target[name], state[name]) for name in state)


def test_objects_that_torch_reads_itself(tmp_path: Path) -> None:
    sparse = torch.zeros(3, 3).to_sparse()
    state = {"a": torch.eye(3).to_sparse(), "b": (2 * torch.eye(3)).to_sparse()}
    catalog = commit(tmp_path, "a", {"m": torch_bytes(state)})
    with pytest.raises(StateMismatchError, match="shares memory"):
        restore.load_committed_into(catalog, "a", "m", {"a": sparse, "b": sparse})
    dense = torch.zeros(2)
    commit(tmp_path, "b", {"m": torch_bytes({"a": torch.ones(2), "b": 2 * torch.ones(2), "set": {1}})})
    with pytest.raises(StateMismatchError, match="shares memory"):
        restore.load_committed_into(catalog, "b", "m", {"a": dense, "b": dense})


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:TypedStorage is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("make", OBJECTS, ids=lambda make: make.__name__)
def test_objects_whose_parts_share_memory(tmp_path: Path, make: Callable[[], State]) -> None:
    def moved(target: State) -> list[torch.Tensor]:
        return [part.clone() for tensor in target.values() for part in parts_of(tensor)]

    # Each out of a state of its own.
    apart = {name: make()[name] for name in make()}
    parts_of(next(iter(apart.values())))[0].add_(1)
    catalog = commit(tmp_path, "apart", {"m.pt": torch_bytes(apart)})
    target, untouched = make(), moved(make())
    with pytest.raises(StateMismatchError, match="shares memory"):
        restore.load_committed_into(catalog, "apart", "m.pt", target, weights_only=False)
    assert all(map(torch.equal, moved(target), untouched))
    # The bytes for the first one, if the file has them for both.
    same = make()
    parts_of(next(iter(same.values())))[0].add_(1)
    commit(tmp_path, "same", {"m.pt": torch_bytes(same)})
    restore.load_committed_into(catalog, "same", "m.pt", target, weights_only=False)
    assert all(map(torch.equal, moved(target), moved(same)))


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:TypedStorage is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("saved", "given", "words"),
    [
        (lambda: Wrapper(torch.ones(3)), lambda: torch.zeros(3), "is a Wrapper, the given one is plain"),
        (lambda: torch.eye(3).to_sparse_csr(), lambda: torch.ones(3, 3).to_sparse_csr(), r"values of shape \(3,\)"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            lambda: torch.quantize_per_channel(torch.ones(3), torch.ones(3), torch.zeros(3).long(), 0, torch.qint8),
            "torch.per_tensor_affine in the file, torch.per_channel_affine given",
        ),
    ],
    ids=["wrapper", "csr", "quantized"],
)
def test_objects_that_do_not_fit_each_other(
    tmp_path: Path, saved: Callable[[], torch.Tensor], given: Callable[[], torch.Tensor], words: str
) -> None:
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes({"first": torch.ones(2), "x": saved()})})
    target = {"first": torch.zeros(2), "x": given()}
    with pytest.raises(StateMismatchError, match=words):
        restore.load_committed_into(catalog, "a", "m.pt", target, weights_only=False, atomic=False)
    assert target["first"].eq(0).all()


@pytest.mark.parametrize(
    ("size", "stride", "is_shared"),
    [
        ((3,), (0,), True),
        ((4, 3), (1, 1), True),
        ((2, 3), (3, 2), False),
        ((3, 3), (4, 2), True),
        ((4, 0), (0, 1), False),
    ],
)
def test_elements_that_share_memory_within_one_target(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], is_shared: bool
) -> None:
    state = {"w": torch.arange(float(torch.Size(size).numel())).reshape(size)}
    target = torch.zeros(30).as_strided(size, stride)
    catalog = commit(tmp_path, "a", {"m": torch_bytes(state)})
    if is_shared:
        with pytest.raises(StateMismatchError, match="elements of the given tensor share memory"):
            restore.load_committed_into(catalog, "a", "m", {"w": target})
        assert target.eq(0).all()
    else:
        restore.load_committed_into(catalog, "a", "m", {"w": target})
        assert torch.equal(target, state["w"])


def test_what_stands_behind_an_empty_tensor_is_read(tmp_path: Path) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    data = safetensors_torch.save({"empty": torch.empty(0), "behind": torch.arange(50_000.0)})
    catalog = commit(tmp_path, "a", {"m": data}, format="safetensors")
    done = restore.load_committed_into(catalog, "a", "m", {}, strict=False)
    assert torch.equal(done.state["behind"], torch.arange(50_000.0))
    assert done.state["empty"].shape == (0,)
