"""Where a restore's time goes: every way of reading one committed file, cold, alternating with fio on the same file.

    python -m benchmarks.restore_probe DIRECTORY [--size-mib 1024] [--tensors 300] [--repeats 5] [--out FOLDER]

One process, so that the ways differ in nothing else; the contenders in processes of their own are in
`scenarios/restore.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import async_ckpt
from async_ckpt.host.memory import region
from async_ckpt.reading import load as restore
from async_ckpt.reading import load_into as restore_into
from benchmarks.limits import MIB, evict, fio_read_s
from benchmarks.results import keep, parser_of, reduced, timed
from benchmarks.workloads import commit


def ways(catalog: async_ckpt.Catalog, path: Path, plain: Path, num_bytes: int) -> dict[str, Callable[[], Any]]:
    """Name and call of each way; existing tensors and lent memory are warm."""
    from safetensors.torch import load_file

    target = {name: torch.ones_like(tensor) for name, tensor in torch.load(path).items()}
    pool = [region(16 * MIB) for _ in range(num_bytes // (16 * MIB) + 2)]
    for memory in pool:
        memory[:] = bytes(16 * MIB)

    def lend(size: int) -> Any:
        if not pool or size > 16 * MIB:
            return None
        memory = pool.pop()
        return memory, lambda: pool.append(memory)

    def into(**options: Any) -> Callable[[], Any]:
        return lambda: restore.load_committed_into(catalog, "probe", "m.pt", target, **options)

    def twice() -> Any:
        measured = restore_into.available_memory_bytes  # type: ignore[attr-defined]
        restore_into.available_memory_bytes = lambda: 0  # type: ignore[attr-defined]
        try:
            return into()()
        finally:
            restore_into.available_memory_bytes = measured  # type: ignore[attr-defined]

    return {
        "torch.load": lambda: torch.load(path),
        "safetensors.load_file": lambda: load_file(plain),
        "load": lambda: restore.load_committed(catalog, "probe", "m.pt"),
        "load, not verified": lambda: restore.load_committed(catalog, "probe", "m.pt", verify="off"),
        "load_into": into(),
        "load_into, warm memory lent": into(lend=lend),
        "load_into, read twice": twice,
        "load_into, not atomic": into(atomic=False),
    }


def main() -> None:
    options = parser_of(__doc__, size_mib=1024, tensors=300, repeats=5).parse_args()
    from safetensors.torch import save_file

    state = {f"layer.{i}": torch.randn(options.size_mib * MIB // 4 // options.tensors) for i in range(options.tensors)}
    with async_ckpt.AsyncCheckpointEngine(options.directory, overwrite="replace") as engine:
        commit(engine, "probe", state)
    plain = options.directory / "probe.safetensors"
    save_file(state, plain)
    path = options.directory / "probe/m.pt"
    num_bytes = path.stat().st_size
    del state
    calls = ways(async_ckpt.Catalog(options.directory), path, plain, num_bytes)
    taken: dict[str, list[float]] = {"fio": [], **{name: [] for name in calls}}
    for _ in range(options.repeats):
        for name, call in calls.items():
            taken["fio"].append(fio_read_s(path, num_bytes, "direct_qd16"))
            evict(path)
            evict(plain)
            taken[name].append(timed(call))
    limit = statistics.median(taken["fio"])
    for name, samples in taken.items():
        figure = reduced(samples)
        rate, share = num_bytes / figure.median / 2**30, limit / figure.median
        print(f"{name:30} {rate:5.2f} GiB/s  {share:4.2f} of fio  ({figure.low:.2f} to {figure.high:.2f} s)")
    keep(options, "restore", {"num_bytes": num_bytes, "seconds": taken})


if __name__ == "__main__":
    main()
