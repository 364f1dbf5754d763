"""Large arrays and bytes: torch.save's bytes, from pieces that nobody has joined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from async_ckpt.format.zip import APART_BYTES
from async_ckpt.plan.planner import Planner
from tests.support.comparing import torch_bytes
from tests.support.render import render

RANDOM = np.random.default_rng(0).integers(0, 256, 5 << 20, dtype=np.uint8)
ARRAY = RANDOM[: 1210 * 1000].view(np.float32).reshape(550, 550)
BYTES = RANDOM[: 3 << 20].tobytes()

STATES: dict[str, Any] = {
    "an array": {"a": ARRAY, "t": torch.ones(5)},
    "alone": ARRAY,
    "met again": {"a": ARRAY, "b": [ARRAY, ARRAY], "t": torch.ones(5)},
    "other orders": [np.asfortranarray(ARRAY), ARRAY.reshape(2, 275, 550).transpose(2, 1, 0), ARRAY[:, ::2], ARRAY.T],
    "kinds": [
        RANDOM[:3_000_000].view(np.complex128),
        np.arange(1 << 18).astype("datetime64[s]"),
        np.zeros(1 << 18, dtype=[("x", "f4"), ("y", "i8")]),
        RANDOM[: 2 << 20] > 127,
        np.full(1 << 20, b"abc"),
        np.full(1 << 19, "é1"),
        RANDOM[: 2 << 20].view(">f4"),
        np.array([1, "x", None] * 1000, dtype=object),
    ],
    "bytes": {"b": BYTES, "again": BYTES, "ba": bytearray(BYTES), "a": ARRAY, "text": "é" * (1 << 20)},
    "at the limit": [np.zeros(APART_BYTES - 1, np.uint8), np.zeros(APART_BYTES + 1, np.uint8), RANDOM[:APART_BYTES]],
    "nested": {"x": [{"y": ARRAY.copy(), "s": np.arange(10)}], "t": torch.randn(70_000)},
}


@pytest.mark.parametrize("compact_views", [False, True])
@pytest.mark.parametrize("name", STATES)
def test_bytes_are_those_of_torch_save(name: str, compact_views: bool) -> None:
    planned = Planner(compact_views=compact_views).plan(STATES[name])
    assert render(planned, 1 << 20) == torch_bytes(STATES[name])
    # No piece is larger than the pickler's own: a bytes object in UTF-8.
    assert max(len(data) for _, data in planned.plan.literals) <= 2 * len(BYTES)


@pytest.mark.parametrize("part", [RANDOM.reshape(-1, 2)[:, 0], RANDOM.view("<u8").reshape(-1, 8)[:, 1::2]])
def test_an_array_with_gaps_is_encoded_block_by_block(part: Any) -> None:
    """Whole, it would be there four times, and the interpreter lock held all the while."""
    planned = Planner().plan({"a": part})
    assert render(planned, 1 << 20) == torch_bytes({"a": part})
    assert max(len(data) for _, data in planned.plan.literals) <= 2 * APART_BYTES < part.nbytes


def test_a_text_of_4_gib_is_refused_as_torch_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from async_ckpt import UnsupportedStateError
    from async_ckpt.plan import torch_layout

    monkeypatch.setattr(torch_layout, "_MAX_TEXT_BYTES", len(BYTES))
    with pytest.raises(UnsupportedStateError, match=r"state\['a'\].*larger than 4GiB"):
        Planner().plan({"a": RANDOM})
