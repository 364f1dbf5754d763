"""What one warm save and commit runs: classes, functions, modules, threads, and hand-overs between threads per chunk.

    python -m benchmarks.hot_path [--directory DIR] [--names]

Every thread is traced (`sys.setprofile`) over one warm save and commit of 16 chunks, each tensor of which has changed
since the save before, as training does it: a call of a function of the
package counts it, its class (where the function is a method) and its module. A hand-over is a job given to another
thread (`DaemonExecutor.submit`) or a wake-up of the loop (`call_soon_threadsafe`); how many a chunk costs is what 48
chunks cost more than 16, divided by 32.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import async_ckpt
from async_ckpt import AsyncCheckpointEngine
from async_ckpt.threads.executor import DaemonExecutor

PACKAGE = str(Path(async_ckpt.__file__).parent)
CHUNK_BYTES = 256 << 10
NUM_CHUNKS, NUM_MORE_CHUNKS = 16, 48
_HAND_OVERS = {DaemonExecutor.submit.__code__, asyncio.BaseEventLoop.call_soon_threadsafe.__code__}


class Calls:
    """The package's functions that were called while `on`, on every thread that was started after this was made."""

    def __init__(self) -> None:
        self.on = False
        self.functions: set[tuple[str, str]] = set()
        self.hand_overs: Counter[str] = Counter()
        self._classes: dict[Any, str | None] = {}
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def stop(self) -> None:
        """Trace no more, on this thread and on those that are yet to start."""
        self.on = False
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if not self.on or event != "call":
            return
        code = frame.f_code
        if code in _HAND_OVERS:
            caller = frame.f_back
            self.hand_overs[caller.f_code.co_name if caller is not None else "?"] += 1
        if code.co_filename.startswith(PACKAGE):
            self.functions.add((code.co_filename[len(PACKAGE) + 1 :], _qualified_name(frame)))

    @property
    def classes(self) -> set[tuple[str, str]]:
        """Classes of the package whose methods were called."""
        return {(file, name.split(".")[0]) for file, name in self.functions if "." in name and not name.startswith("<")}

    @property
    def modules(self) -> set[str]:
        """Modules of the package that had a function called."""
        return {file for file, _ in self.functions}


def _qualified_name(frame: FrameType) -> str:
    """`Class.method` or `function`; what is defined inside a function counts as that function."""
    code = frame.f_code
    name = getattr(code, "co_qualname", None)
    if name is None:
        # Python 3.10: the class that defines it, by the first argument.
        owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
        kind = owner if isinstance(owner, type) else type(owner)
        found = next((base for base in kind.__mro__ if code.co_name in vars(base)), None)
        name = code.co_name if found is None or owner is None else f"{found.__name__}.{code.co_name}"
    return str(name).split(".<locals>")[0]


def measure(directory: Path, num_chunks: int) -> tuple[Calls, int]:
    """One warm save and commit of so many chunks, traced; and how many threads the engine has."""
    calls = Calls()
    state = {"model": {f"w{k}": torch.zeros(CHUNK_BYTES // 4) for k in range(num_chunks - 1)}}
    before = threading.active_count()
    try:
        with AsyncCheckpointEngine(
            directory, staging_bytes=2 * num_chunks * CHUNK_BYTES, chunk_bytes=CHUNK_BYTES
        ) as engine:
            engine.prewarm(states={"model.pt": state})
            num_threads = threading.active_count() - before
            for tag in ("cold", "warm", "traced"):
                for tensor in state["model"].values():
                    tensor.add_(1)
                calls.on = tag == "traced"
                engine.create(tag)
                engine.save(state, "model.pt")
                engine.commit(tag).result()
                calls.on = False
    finally:
        calls.stop()
    return calls, num_threads


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, default=None, help="where checkpoints go; default: a temporary directory"
    )
    parser.add_argument("--names", action="store_true", help="name every class and function too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        calls, num_threads = measure(Path(folder) / "a", NUM_CHUNKS)
        more, _ = measure(Path(folder) / "b", NUM_MORE_CHUNKS)
    num_more = more.hand_overs.total() - calls.hand_overs.total()
    result: dict[str, Any] = {
        "classes": len(calls.classes),
        "functions": len(calls.functions),
        "modules": len(calls.modules),
        "threads": num_threads,
        "hand_overs": calls.hand_overs.total(),
        "hand_overs_per_chunk": round(num_more / (NUM_MORE_CHUNKS - NUM_CHUNKS), 2),
    }
    if arguments.names:
        result["class_names"] = sorted(f"{file}: {name}" for file, name in calls.classes)
        result["function_names"] = sorted(f"{file}: {name}" for file, name in calls.functions)
        result["hand_overs_by"] = dict(more.hand_overs)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
