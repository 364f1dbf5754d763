"""Reading a checkpoint back from a cold cache, into fresh memory and into existing tensors.

The file is written and synced first, then evicted (`posix_fadvise`; `drop_caches` too if asked and allowed).
`resident_fraction` says how much of it was still cached when the clock started.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders.base import Unavailable, flatten, sync_tree
from benchmarks.limits import evict, run_fio
from benchmarks.request import Request
from benchmarks.scenarios.common import Result, build_workload
from benchmarks.workloads import State, Workload

NAMES = (
    "limit_fio_read_direct_qd4",
    "limit_fio_read_direct_qd16",
    "limit_fio_read_buffered",
    "torch_load",
    "torch_load_mmap",
    "torch_load_into",
    "safetensors_load_file",
    "safetensors_load_into",
    "async_ckpt_load",
    "async_ckpt_load_into",
)
FIO_READS = {
    "limit_fio_read_direct_qd4": ["--direct=1", "--ioengine=libaio", "--iodepth=4"],
    "limit_fio_read_direct_qd16": ["--direct=1", "--ioengine=libaio", "--iodepth=16"],
    "limit_fio_read_buffered": ["--direct=0", "--ioengine=psync"],
}


def _copy_into(loaded: State, target: State) -> None:
    """What `load_state_dict` does at its core: every loaded tensor into the one that exists."""
    sources, _ = flatten(loaded)
    targets, _ = flatten(target)
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(sources[name])


def prepare(name: str, directory: Path, workload: Workload) -> tuple[Path, Callable[[], Any], str]:
    """Write the file this reader wants; returns it, the read itself, and the configuration in words."""
    state = workload.state()
    if name in FIO_READS:
        path = directory / "fio.dat"
        run_fio(path, workload.num_bytes, ["--rw=write", "--end_fsync=1"])
        return (
            path,
            lambda: run_fio(path, workload.num_bytes, ["--rw=read", *FIO_READS[name]]),
            "fio read, " + " ".join(FIO_READS[name]),
        )
    if name.startswith("torch_load"):
        return _prepare_torch(name, directory / "state.pt", state)
    if name.startswith("safetensors"):
        return _prepare_safetensors(name, directory / "state.safetensors", state)
    return _prepare_async_ckpt(name, directory / "root", state)


def _prepare_torch(name: str, path: Path, state: State) -> tuple[Path, Callable[[], Any], str]:
    torch.save(state, path)
    if name == "torch_load":
        return path, lambda: torch.load(path, weights_only=True), "torch.load(path)"
    if name == "torch_load_into":
        return (
            path,
            lambda: _copy_into(torch.load(path, weights_only=True), state),
            "torch.load(path), copied into existing tensors",
        )
    return (
        path,
        lambda: _copy_into(torch.load(path, weights_only=True, mmap=True), state),
        "torch.load(path, mmap=True), copied into existing tensors",
    )


def _prepare_safetensors(name: str, path: Path, state: State) -> tuple[Path, Callable[[], Any], str]:
    try:
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        raise Unavailable(f"not installed: {error.name}") from error
    flat, _ = flatten(state)
    save_file(flat, path)
    if name == "safetensors_load_file":
        # load_file may map the file: read every page, as whoever uses the tensors will.
        return (
            path,
            lambda: [t.clone() for t in load_file(path).values()],
            "safetensors.torch.load_file(path), then every tensor read",
        )
    return (
        path,
        lambda: _copy_into(load_file(path), flat),
        "safetensors.torch.load_file(path), copied into existing tensors",
    )


def _prepare_async_ckpt(name: str, root: Path, state: State) -> tuple[Path, Callable[[], Any], str]:
    import async_ckpt

    engine = async_ckpt.AsyncCheckpointEngine(root)
    engine.create("step-0")
    engine.save(state, "state.pt")
    engine.commit("step-0").result()
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
        resident = evict(path, request.drop_caches)
        start = time.perf_counter()
        loaded = read()
        took = time.perf_counter() - start
        if request.contender in FIO_READS:
            took = loaded["read"]["runtime"] / 1e3 * workload.num_bytes / loaded["read"]["io_bytes"]
        del loaded
        if index >= request.num_warmups:
            samples.append({"restore_s": took, "num_bytes": workload.num_bytes, "resident_fraction": resident})
