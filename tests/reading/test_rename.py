"""`load_into(rename=...)`: names in the file are not those of the given state; and what of the file is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import async_ckpt
from async_ckpt import AsyncCheckpointEngine, ConfigError, StateMismatchError

from ..support.comparing import torch_bytes
from .committed import EXTENT_BYTES, commit


def saved(tmp_path: Path, state: Any) -> Path:
    commit(tmp_path, "a", {"m.pt": torch_bytes(state)})
    return tmp_path / "a/m.pt"


def ones(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((3,), float(number)) for number, name in enumerate(names, 1)}


def zeros(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(3) for name in names}


def values(state: Any) -> dict[str, float]:
    return {name: float(tensor[0]) for name, tensor in state.items()}


FITTING = {
    "a wrapper goes": ({"module.": ""}, ("module.w", "module.b"), ("w", "b")),
    "without its dot": ({"module": ""}, ("module.w", "module.b"), ("w", "b")),
    "a wrapper comes": ({"": "module."}, ("w", "b"), ("module.w", "module.b")),
    "a whole part only": ({"head": "classifier"}, ("head.w", "header.w"), ("classifier.w", "header.w")),
    "whole names": ({"w": "weight", "w.b": "bias"}, ("w", "w.b"), ("weight", "bias")),
    "exchanged": ({"a": "b", "b": "a"}, ("a.w", "b.w"), ("b.w", "a.w")),
    "the longest": ({"m.": "n.", "m.head.": "classifier."}, ("m.w", "m.head.w"), ("n.w", "classifier.w")),
    "not twice": ({"a.": "b.", "b.": "c."}, ("a.w", "b.w"), ("b.w", "c.w")),
    "some stay": ({"x": "y"}, ("x", "z"), ("y", "z")),
}


@pytest.mark.parametrize("case", FITTING)
def test_names_of_the_file_become_names_of_the_state(tmp_path: Path, case: str) -> None:
    rename, names, given = FITTING[case]
    target = zeros(*given)
    done = async_ckpt.load_into(target, saved(tmp_path, ones(*names)), rename=rename)
    assert list(values(target).values()) == [1.0, 2.0]
    # The structure is the file's, the tensors are the given ones.
    assert [done.state[name] is target[new] for name, new in zip(names, given, strict=True)] == [True, True]


SELECTED = {
    "in the part": ({"module.": ""}, {"w": 0, "b": 0}),
    "in the part, by whole names": ({"model.module.": ""}, {"w": 0, "b": 0}),
    "in the whole": ({"module.": ""}, {"model": {"w": 0, "b": 0}, "optim": {"x": 0}}),
    "in the whole, by whole names": ({"model.module.": "model."}, {"model": {"w": 0, "b": 0}, "optim": {"x": 0}}),
    "elsewhere in the whole": ({"model.module": "ema"}, {"ema": {"w": 0, "b": 0}, "optim": {"x": 0}, "emax": 0}),
}


def filled(state: Any) -> Any:
    return {key: filled(leaf) if isinstance(leaf, dict) else torch.zeros(3) for key, leaf in state.items()}


@pytest.mark.parametrize("format", ["torch", "safetensors"])
@pytest.mark.parametrize("case", SELECTED)
def test_with_a_part_selected(tmp_path: Path, case: str, format: str) -> None:
    rename, given = SELECTED[case]
    whole = ones("model.module.w", "model.module.b", "optim.x")
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, format=format) as engine:
        engine.create("a")
        engine.save(whole, "m")
        engine.commit("a").result()
        target = filled(given)
        done = engine.load_into(target, "a/m", select="model.", rename=rename)
    inner = target.get("model", target.get("ema", target))
    assert values(inner) == {"w": 1.0, "b": 2.0}
    assert float(target.get("optim", {"x": torch.zeros(1)})["x"][0]) == 0
    assert values(done.state) == {"model.module.w": 1.0, "model.module.b": 2.0}


WRONG = {
    "matches nothing": ({"nope.": ""}, r"no tensor named 'nope\.'; it has a, b, m"),
    "half a name": ({"aa": "c"}, r"no tensor named 'aa'"),
    "clash": ({"b": "a"}, r"\['a'\] and \['b'\] would both be 'a'"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named_and_nothing_is_changed(tmp_path: Path, case: str, strict: bool) -> None:
    rename, message = WRONG[case]
    path, target = saved(tmp_path, ones("a", "b", "m.aaa")), zeros("a", "b", "m.aaa")
    with pytest.raises(StateMismatchError, match=message):
        async_ckpt.load_into(target, path, rename=rename, strict=strict)
    with pytest.raises(StateMismatchError, match=r"'b' of those whose name begins with 'm\.'"):
        async_ckpt.load_into(target, path, select="m.", rename={"b": "c"}, strict=strict)
    for wrong in ("a", {"a": 1}, {1: "a"}, [("a", "b")]):
        with pytest.raises(ConfigError, match="rename must map names"):
            async_ckpt.load_into(target, path, rename=wrong, strict=strict)  # type: ignore[arg-type]
    assert set(values(target).values()) == {0.0}


def test_mismatches_after_renaming(tmp_path: Path) -> None:
    path, target = saved(tmp_path, ones("module.a", "module.b", "c")), zeros("a", "d")
    with pytest.raises(StateMismatchError) as caught:
        async_ckpt.load_into(target, path, rename={"module.": ""})
    assert caught.value.mismatches == (
        "missing: ['d'] is not in the file",
        "unexpected: module.b (renamed to b) is only in the file",
        "unexpected: c is only in the file",
    )
    done = async_ckpt.load_into(target, path, rename={"module.": ""}, strict=False)
    assert done.loaded == ("['a']",) and done.mismatches == caught.value.mismatches
    assert done.state["module.a"] is target["a"] and values(done.state) == {"module.a": 1, "module.b": 2, "c": 3}


def test_two_tensors_of_one_dotted_name_are_not_taken_for_each_other(tmp_path: Path) -> None:
    state = {"m": {"a.b": torch.ones(3), "a": {"b": torch.full((3,), 2.0)}}}
    path, target = saved(tmp_path, state), filled({"m": {"a.b": 0, "a": {"b": 0}}})
    with pytest.raises(StateMismatchError, match=r"would both be 'm\.a\.b'"):
        async_ckpt.load_into(target, path, select="m.")
    async_ckpt.load_into(target, path)
    assert float(target["m"]["a.b"][0]) == 1 and float(target["m"]["a"]["b"][0]) == 2


def test_what_is_read_is_shown(tmp_path: Path) -> None:
    state = {"optim": torch.ones(EXTENT_BYTES), "model.w": torch.ones(EXTENT_BYTES // 4)}
    path = saved(tmp_path, state)
    size = path.stat().st_size
    whole = async_ckpt.load_into({name: torch.zeros_like(tensor) for name, tensor in state.items()}, path)
    part = async_ckpt.load_into({"v": torch.zeros(EXTENT_BYTES // 4)}, path, select="model.", rename={"w": "v"})
    assert whole.read_bytes == size
    # The tensor lies in two extents; the pickle and the directory are in the first and the last.
    assert EXTENT_BYTES <= part.read_bytes <= 4 * EXTENT_BYTES < size
