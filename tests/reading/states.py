"""States to be restored, and how to compare them bit by bit."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from async_ckpt.reading.state_tree import flatten

from ..support.comparing import torch_bytes


def trained() -> dict[str, Any]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 30)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "step": 7}


def plain() -> dict[str, Any]:
    torch.manual_seed(2)
    base = torch.randn(50, 60)
    cyclic: dict[str, Any] = {"x": torch.ones(2)}
    cyclic["self"] = cyclic
    return {
        "views": [base, base.t(), base[3:9, ::2], base[4].expand(3, 60)],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        "leaf": torch.randn(3, requires_grad=True),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "types": [
            torch.arange(9).to(dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64)
        ],
        "float8": torch.randn(7).to(torch.float8_e4m3fn),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "numbers": (1, -1, 300, 70000, 2**40, -(2**90), 1.5, True, None, "text \u00e4", ("nested", (2,))),
        "ordered": OrderedDict(b=1, a=[torch.zeros(1)]),
        "long": torch.randn(70_000),
        "cyclic": cyclic,
    }


def torch_only() -> dict[str, Any]:
    return {
        "sparse": torch.eye(4).to_sparse(),
        "conj": torch.tensor([1 + 2j]).conj(),
        "set": {1, 2},
        "bytes": b"ab",
        "storage": torch.arange(4.0).untyped_storage(),
        "plain": torch.randn(40_000),
    }


def zeroed(state: Any) -> Any:
    """A new state of the same structure as `torch.save` would restore it, all elements zero."""
    import io

    fresh = torch.load(io.BytesIO(torch_bytes(state)))
    for _, leaf in flatten(fresh):
        if isinstance(leaf, torch.Tensor):
            leaf.detach().untyped_storage().fill_(0)  # type: ignore[attr-defined]
    return fresh


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
