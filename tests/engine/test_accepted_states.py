"""What torch.save takes, the engine takes: the file is torch.save's, the first time and from a cached plan, guarded or
not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.serialization import config as serialization_config

from async_ckpt import AsyncCheckpointEngine, UnsupportedStateError
from tests.support.comparing import torch_bytes
from tests.support.stepping import saved


class Sized:
    """An object with an attribute that arrays have too."""

    def __init__(self, nbytes: object) -> None:
        self.nbytes = nbytes


class Raising:
    """Asking for its size fails; pickling it does not."""

    @property
    def nbytes(self) -> int:
        raise ValueError("not yet known")

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        raise ValueError("nothing to see")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Raising, ())


class Key:
    """A key that cannot be shown."""

    def __repr__(self) -> str:
        raise ValueError("no")


def _converted_module() -> torch.nn.Module:
    with torch.inference_mode():
        module = torch.nn.Linear(2, 2)
    return module.double()


def _uninitialised() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.LazyLinear(3).state_dict()


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(2)


STATES: dict[str, Callable[[], Any]] = {
    "nbytes is None": lambda: Sized(None),
    "nbytes is text": lambda: Sized("many"),
    "nbytes is huge": lambda: Sized(1 << 80),
    "properties that raise": Raising,
    "a key that cannot be shown": lambda: {Key(): [torch.ones(2), Raising()]},
    "a module converted outside the inference mode it was made in": _converted_module,
    "its state": lambda: _converted_module().state_dict(),
    "uninitialised": _uninitialised,
    "uninitialised beside inference tensors": lambda: [_uninitialised(), _inference()],
}


@pytest.mark.wide
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "not guarded"])
@pytest.mark.parametrize("name", STATES)
def test_the_file_is_torchs_own(tmp_path: Path, name: str, guarded: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    state = {"weight": weight, "part": STATES[name](), "after": torch.ones(4)}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=1 << 16) as engine:
        if guarded:
            engine.guard(torch.optim.SGD([weight], lr=0.1))
        for tag in ("first", "again"):
            saved(engine, state, tag, path="state.pt").result()
            assert (tmp_path / tag / "state.pt").read_bytes() == torch_bytes(state)


@pytest.mark.wide
@pytest.mark.parametrize("alignment", [65535, 65536])
def test_an_alignment_of_nearly_64_kib_holds_for_tensors_of_any_size(tmp_path: Path, alignment: int) -> None:
    """Where torch's padding overflows its field, torch writes a file that nobody can read."""
    sizes = range(65462, 65480)
    config = {"storage_alignment": alignment, "staging_bytes": 16 << 20, "chunk_bytes": 1 << 20}
    num_torchs_own = 0
    with AsyncCheckpointEngine(tmp_path, **config) as engine:
        for size in sizes:
            more = torch.ones(2, dtype=torch.complex64)
            # A conjugated one is left to torch's own pickler.
            state = {
                "a": torch.full((size,), 1, dtype=torch.uint8),
                "b": torch.arange(4),
                "more": more.conj() if size % 2 else more,
            }
            saved(engine, state, f"s{size}", path="state.pt").result()
            path = tmp_path / f"s{size}" / "state.pt"
            for loaded in (engine.load(f"s{size}/state.pt"), torch.load(path)):
                assert (
                    torch.equal(loaded["a"], state["a"])
                    and torch.equal(loaded["b"], state["b"])
                    and torch.equal(loaded["more"], state["more"])
                )
            with serialization_config.patch({"save.storage_alignment": alignment}):  # type: ignore[attr-defined]
                num_torchs_own += path.read_bytes() == torch_bytes(state)
    assert len(sizes) - 8 <= num_torchs_own < len(sizes)


@pytest.mark.parametrize(
    "bad", [lambda: lambda: 0, lambda: torch._efficientzerotensor((2,)), lambda: torch.zeros(2).to_mkldnn()]
)
def test_what_torch_refuses_leaves_the_checkpoint_usable(tmp_path: Path, bad: Callable[[], Any]) -> None:
    state = {"weight": torch.ones(3)}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=1 << 16) as engine:
        engine.create("tag")
        engine.save(state, "state.pt")
        with pytest.raises(UnsupportedStateError, match=r"state\['part'\]"):
            engine.save({"part": bad()}, "other.pt")
        engine.save(state, "other.pt")
        engine.commit("tag").result()
        assert (tmp_path / "tag" / "other.pt").read_bytes() == torch_bytes(state)
