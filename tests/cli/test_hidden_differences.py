"""`diff` and `export` of what has the same bytes and another value, or the same name and another place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ..reading.committed import commit
from ..support.comparing import torch_bytes

ANOTHER = torch.arange(4.0)


def compared(cli: Any, root: Path, old: object, new: object) -> dict[str, Any]:
    commit(root, "old", {"m.pt": torch_bytes(old)})
    commit(root, "new", {"m.pt": torch_bytes(new)})
    found: dict[str, Any] = json.loads(cli("diff", root / "old", root / "new", "--json").out)
    assert json.loads(cli("diff", root / "old", root / "old", "--json").out)["changes"] == []
    return found


def test_inspect_shows_all_leaves_of_one_dotted_name(cli: Any, tmp_path: Path) -> None:
    state = {"a.b": torch.zeros(4), "a": {"b": torch.ones(3)}, "c.d": slice(1, 2), "c": {"d": slice(3, 4)}}
    state |= {"e.0": torch.zeros(4), "e": [torch.ones(2)]}
    commit(tmp_path, "t", {"x.pt": torch_bytes(state)})
    shown = cli("inspect", tmp_path / "t").out
    for said in (
        "float32 [4]",
        "['a']['b']  float32 [3]",
        "['e'][0]  float32 [2]",
        "['c']['d']  <__builtin__.slice(3, 4)>",
        "c.d  <__builtin__.slice(1, 2)>",
    ):
        assert said in shown


@pytest.mark.wide
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"a.b": torch.zeros(4), "a": {"b": torch.ones(4)}}, {"a.b": ANOTHER, "a": {"b": torch.ones(4)}}),
        ({"a.b": torch.zeros(4), "a": {"b": torch.ones(4)}}, {"a.b": torch.zeros(4), "a": {"b": ANOTHER}}),
        ({1: torch.zeros(4), "1": torch.ones(4)}, {1: ANOTHER, "1": torch.ones(4)}),
        ({1: torch.zeros(4), "1": torch.ones(4)}, {1: torch.zeros(4), "1": ANOTHER}),
        ({b"k" * 20: torch.zeros(4), b"l" * 20: torch.ones(4)}, {b"k" * 20: ANOTHER, b"l" * 20: torch.ones(4)}),
        ({2**300: torch.zeros(4), 2**300 + 1: torch.ones(4)}, {2**300: ANOTHER, 2**300 + 1: torch.ones(4)}),
        ({"": torch.zeros(4), "''": torch.ones(4)}, {"": ANOTHER, "''": torch.ones(4)}),
    ],
)
def test_tensors_of_one_dotted_name_are_told_apart(cli: Any, tmp_path: Path, old: object, new: object) -> None:
    found = compared(cli, tmp_path, old, new)
    assert [change["change"] for change in found["changes"]] == ["changed"]
    assert found["num_equal"] == 1


def test_one_of_two_of_a_name_is_missing(cli: Any, tmp_path: Path) -> None:
    found = compared(cli, tmp_path, {"a.b": ANOTHER, "a": {"b": ANOTHER}}, {"a.b": ANOTHER})
    assert [(change["change"], change["tensor"]) for change in found["changes"]] == [("removed", "['a']['b']")]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (torch.tensor([1 + 2j, 3 - 1j]), torch.tensor([1 + 2j, 3 - 1j]).conj()),
        (torch.tensor([1 + 2j, 3 - 1j]).imag, torch.tensor([1 + 2j, 3 - 1j]).conj().imag),
    ],
)
def test_the_same_bytes_with_another_value_are_a_change(
    cli: Any, tmp_path: Path, old: torch.Tensor, new: torch.Tensor
) -> None:
    found = compared(cli, tmp_path, {"x": old}, {"x": new})
    assert [change["tensor"] for change in found["changes"]] == ["x"]


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_another_scale_of_the_same_bytes_is_a_change(cli: Any, tmp_path: Path) -> None:
    old, new = (torch.quantize_per_tensor(scale * ANOTHER, scale, 0, torch.qint8) for scale in (1.0, 2.0))
    assert [change["tensor"] for change in compared(cli, tmp_path, {"x": old}, {"x": new})["changes"]] == ["x"]


@pytest.mark.wide
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x" * 200 + "a", "x" * 200 + "b"),
        (b"x" * 200 + b"a", b"x" * 200 + b"b"),
        (10**100, 10**100 + 1),
        ((1, (2, (3, "a"))), (1, (2, (3, "b")))),
        (list(range(100_010)), [*range(100_009), 7]),
        (torch.Size([1, 2]), torch.Size([1, 3])),
        (torch.arange(4).untyped_storage(), torch.ones(4).untyped_storage()),
        ({1, 2}, {1, 3}),
    ],
    ids=str,
)
def test_other_values_are_compared_whole(cli: Any, tmp_path: Path, old: object, new: object) -> None:
    found = compared(cli, tmp_path, {"x": old, "same": 1}, {"x": new, "same": 1})
    assert found["changes"] == []
    assert found["other_values"]
    assert not any("same" in line for line in found["other_values"])


def test_nested_values_and_arrays_are_compared_whole(cli: Any, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    assert compared(cli, tmp_path, {"x": numpy.arange(1000)}, {"x": numpy.arange(1000) % 999})["other_values"] == [
        "m.pt: x"
    ]
    deep_old: object = "a"
    deep_new: object = "b"
    for _ in range(220):
        deep_old, deep_new = [deep_old], [deep_new]
    assert len(compared(cli, tmp_path, {"x": deep_old}, {"x": deep_new})["other_values"]) == 1


def test_export_keeps_conjugate_and_negative_bits(cli: Any, tmp_path: Path) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    base = torch.tensor([1 + 2j, 3 - 1j])
    state = {"conj": base.conj(), "neg": base.clone().conj().imag, "both": base.conj()[:1], "plain": base}
    commit(tmp_path, "a", {"m.pt": torch_bytes(state)})
    assert cli("export", tmp_path / "a/m.pt", tmp_path / "m.safetensors").code == 0
    exported = safetensors_torch.load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(exported[name], tensor.resolve_conj().resolve_neg()) for name, tensor in state.items())
