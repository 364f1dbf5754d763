"""The first save of a file, and `prewarm`, name what `load` will refuse and what is not streamed; `load` names all of
it at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import pathlib
import threading
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, UnsupportedStateError
from async_ckpt.plan import planner as planner_module
from async_ckpt.plan import torch_layout
from async_ckpt.plan.planner import Planner


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    width: int
    where: pathlib.PurePosixPath


def state() -> dict[str, Any]:
    return {
        "best": np.float64(0.5),
        "log": [{"loss": 1.0}, {"loss": np.float32(2.0)}],
        "where": pathlib.PurePosixPath("/a"),
        "when": datetime.datetime(2026, 1, 1),
        "colour": Colour.RED,
        "config": Config(3, pathlib.PurePosixPath("/b")),
        "args": argparse.Namespace(lr=0.1, inner={"when": datetime.date(2026, 1, 1)}),
        "weight": torch.ones(2),
        "fine": [1, "text", None, {"x": 0.5}, torch.Size((2,)), torch.float16],
    }


PLACES = [
    "numpy._core.multiarray.scalar at state['best'], state['log'][1]['loss']",
    "pathlib.PurePosixPath at state['where'], state['config'].where",
    "datetime.datetime at state['when']",
    "datetime.date at state['args'].inner['when']",
    f"{__name__}.Colour at state['colour']",
    f"{__name__}.Config at state['config']",
    "argparse.Namespace at state['args']",
]


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "load refuses" in str(warning.message)]


@pytest.mark.wide
def test_the_first_save_and_prewarm_name_all_types_and_places_once(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=1 << 16) as engine:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.prewarm(states={"warm.pt": {**state(), "other": 1}})
            engine.create("tag")
            engine.save({**state(), "other": 2}, "warm.pt")
            engine.save(state(), "first.pt")
            engine.save({"weight": torch.ones(2), "n": [1]}, "fine.pt")
            engine.commit("tag").result()
        messages = told(caught)
        assert [message.split(" ")[0] for message in messages] == ["warm.pt", "first.pt"]
        for message in messages:
            assert [place for place in PLACES if place not in message] == []
            assert "'fine'" not in message and "'weight'" not in message
        with pytest.raises(UnsupportedStateError) as refused:
            engine.load("tag/first.pt")
        assert [place for place in PLACES if place not in str(refused.value)] == []
        assert engine.load("tag/first.pt", weights_only=False)["colour"] is Colour.RED


def show(told: str) -> None:
    warnings.warn(told, RuntimeWarning, stacklevel=2)


def test_no_lock_is_held_while_a_warning_is_shown(tmp_path: Path) -> None:
    """Warnings are shown by the user's code: here it asks another thread that calls the engine."""
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=1 << 16) as engine:
        threads = []

        def showwarning(*_: object) -> None:
            threads.append(threading.Thread(target=lambda: engine.create(f"other-{len(threads)}")))
            threads[-1].start()
            threads[-1].join(30)
            assert not threads[-1].is_alive()

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = showwarning
            engine.prewarm(states={"a.pt": state()})
            engine.create("tag")
            engine.save({**state(), "more": 1}, "b.pt")
        assert len(threads) == 2
        for tag in ("tag", "other-1", "other-2"):
            engine.abort(tag)


def test_what_the_user_allows_is_not_refused(tmp_path: Path) -> None:
    allowed = [pathlib.PurePosixPath]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("error")
        Planner(tell=show).plan({"where": pathlib.PurePosixPath("/a")})


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (range(3), ["builtins.range"]),
        (frozenset({1}), ["builtins.frozenset"]),
        (defaultdict(list, a=[1]), ["builtins.list", "collections.defaultdict"]),
    ],
)
def test_containers_that_load_refuses_are_named_as_torch_names_them(value: object, names: list[str]) -> None:
    told: list[str] = []
    Planner(tell=told.append).plan({"x": value}, name="a.pt")
    assert "; ".join(f"{name} at state['x']" for name in names) + ". Convert" in told[0]


def test_a_warning_that_is_an_error_costs_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=1 << 16) as engine:
        engine.create("tag")
        engine.save(state(), "a.pt")
        engine.commit("tag").result()
    assert "load refuses by default" in caplog.text


@pytest.mark.parametrize(
    "data", [np.zeros(4096), b"x" * 32768, bytearray(32768), np.array([0.5] * 4096).reshape(64, 64)]
)
def test_large_buffers_are_named(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    for module in (planner_module, torch_layout):
        monkeypatch.setattr(module, "LARGE_BYTES", 30_000)
    planner = Planner(tell=show)
    with pytest.warns(
        RuntimeWarning, match=r"a.pt: state\['data'\]\['x'\] \(\w+ of 0 MiB\): what is no tensor is encoded in memory"
    ):
        planner.plan({"data": {"x": data}, "w": torch.ones(2)}, name="a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planner.plan({"data": {"x": data}, "w": torch.ones(2)}, name="a.pt")
        Planner(tell=show).plan({"w": torch.ones(100_000)}, name="a.pt")


def test_places_are_few_and_printable() -> None:
    paths = {f"k{number}\x1b": pathlib.PurePosixPath("/a") for number in range(20)}
    with pytest.warns(RuntimeWarning, match=r"state\['k0\\x1b'\], .* and 16 more") as caught:
        Planner(tell=show).plan({**paths, pathlib.PurePosixPath("/key"): 1})
    assert str(caught[0].message).isprintable()
