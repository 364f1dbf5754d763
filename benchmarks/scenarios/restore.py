"""Reading a checkpoint back from a cold cache, into fresh memory and into existing tensors.

The file is written and synced first, then evicted (`posix_fadvise`).
`resident_fraction` says how much of it was still cached when the clock started.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders.base import Unavailable, sync_tree
from benchmarks.limits import FIO, evict, fio_read_s, run_fio
from benchmarks.scenarios.common import Request, Result, build_workload
from benchmarks.workloads import State, Workload, commit, flatten

_FIO = "limit_fio_read_"
NAMES = (
    *(_FIO + way for way in FIO),
    *("torch_load", "torch_load_mmap", "torch_load_into", "safetensors_load_file", "safetensors_load_into"),
    *("async_ckpt_load", "async_ckpt_load_into"),
)
Prepared = tuple[Path, Callable[[], Any], str]


def _copy_into(loaded: State, target: State) -> None:
    """What `load_state_dict` does at its core: every loaded tensor into the one that exists."""
    sources, _ = flatten(loaded)
    targets, _ = flatten(target)
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(sources[name])


def prepare(name: str, directory: Path, workload: Workload) -> Prepared:
    """Write the file this reader wants; returns it, the read itself, and the configuration in words."""
    state = workload.state()
    if name.startswith(_FIO):
        path, way = directory / "fio.dat", name.removeprefix(_FIO)
        run_fio(path, workload.num_bytes, ["--rw=write", "--end_fsync=1"])
        return path, lambda: fio_read_s(path, workload.num_bytes, way), "fio read, " + " ".join(FIO[way])
    if name.startswith("torch_load"):
        return _prepare_torch(name, directory / "state.pt", state)
    if name.startswith("safetensors"):
        return _prepare_safetensors(name, directory / "state.safetensors", state)
    return _prepare_async_ckpt(name, directory / "root", state)


def _prepare_torch(name: str, path: Path, state: State) -> Prepared:
    torch.save(state, path)
    is_mapped = name == "torch_load_mmap"
    words = "torch.load(path, mmap=True)" if is_mapped else "torch.load(path)"

    def read() -> State:
        return torch.load(path, weights_only=True, mmap=is_mapped)

    if name == "torch_load":
        return path, read, words
    return path, lambda: _copy_into(read(), state), f"{words}, copied into existing tensors"


def _prepare_safetensors(name: str, path: Path, state: State) -> Prepared:
    try:
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        raise Unavailable(f"not installed: {error.name}") from error
    flat, _ = flatten(state)
    save_file(flat, path)
    words = "safetensors.torch.load_file(path)"
    if name == "safetensors_load_into":
        return path, lambda: _copy_into(load_file(path), flat), f"{words}, copied into existing tensors"
    # load_file may map the file: read every page, as whoever uses the tensors will.
    return path, lambda: [t.clone() for t in load_file(path).values()], f"{words}, then every tensor read"


def _prepare_async_ckpt(name: str, root: Path, state: State) -> Prepared:
    import async_ckpt

    engine = async_ckpt.AsyncCheckpointEngine(root)
    commit(engine, "step-0", state, "state.pt").result()
    path = root / "step-0" / "state.pt"
    if name == "async_ckpt_load":
        engine.close()
        return path, lambda: async_ckpt.load(path), "async_ckpt.load(path), verified"
    return path, lambda: engine.load_into(state, "step-0/state.pt"), "engine.load_into(existing tensors), verified"


def run(request: Request, result: Result) -> None:
    """`num_saves` cold reads after `num_warmups` discarded ones."""
    if request.contender not in NAMES:
        raise Unavailable(f"{request.contender!r} does not read; known here: {', '.join(NAMES)}")
    workload = build_workload(request, result)
    directory = Path(request.directory)
    path, read, result["config"] = prepare(request.contender, directory, workload)
    sync_tree(path)
    samples = result.setdefault("samples", [])
    for index in range(request.num_warmups + request.num_saves):
        workload.advance()
        # Pages that a leftover mapping still holds cannot be evicted.
        gc.collect()
        resident = evict(path)
        start = time.perf_counter()
        loaded = read()
        took = time.perf_counter() - start
        if request.contender.startswith(_FIO):
            took = loaded
        del loaded
        if index >= request.num_warmups:
            samples.append({"restore_s": took, "num_bytes": workload.num_bytes, "resident_fraction": resident})
