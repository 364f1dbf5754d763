"""Threads that run through frames of all sizes, beside one that looks at them while collections with slow finalizers are due. Run as a
process: what goes wrong is a crash."""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType
from typing import Any

from async_ckpt.host.frames import calling_frame, innermost_frames

NUM_ROUNDS = 1000
NUM_GARBAGE = 30


class Slow:
    """Garbage in a cycle of its own; one in many gives up the GIL when it is collected."""

    num_collected = 0

    def __init__(self) -> None:
        self.myself = self

    def __del__(self) -> None:
        Slow.num_collected += 1
        if Slow.num_collected % NUM_GARBAGE == 0 and threading.current_thread() is threading.main_thread():
            time.sleep(0.0005)


def function_with(num_locals: int) -> Callable[..., int]:
    names = "".join(f"v{k} = " for k in range(num_locals))
    body = f"{names}f\n    return depth and others[int(dice() * len(others))](depth - 1, others, dice)"
    scope: dict[str, Any] = {}
    exec(f"def f(depth, others, dice):\n    {body}\n", scope)
    made: Callable[..., int] = scope["f"]
    return made


def run_for_ever(seed: int) -> None:
    functions = [function_with(k) for k in range(1, 14)]
    dice = random.Random(seed).random
    while True:
        functions[0](int(dice() * 9), functions, dice)


def look() -> None:
    gc.disable()
    for _ in range(NUM_GARBAGE):
        Slow()
    gc.enable()
    for frame in innermost_frames().values():
        around: Any = frame
        while around is not None:
            assert type(around.f_code) is CodeType
            around = calling_frame(around)
    assert gc.isenabled()


if __name__ == "__main__":
    gc.set_threshold(20)
    sys.setswitchinterval(1e-4)
    for seed in range(4):
        threading.Thread(target=run_for_ever, args=(seed,), daemon=True).start()
    for _ in range(NUM_ROUNDS):
        look()
    print("seen", flush=True)
    os._exit(0)
