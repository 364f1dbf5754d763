"""Runs named scenarios on one rank of a real DeepSpeed job; writes one JSON file with each one's failure, or null.

Started by `job.run_job`: ``python -m tests.integrations.deepspeed.worker <directory> <scenario> ...``
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path

import torch


def main(directory: Path, names: list[str]) -> int:
    torch.set_num_threads(1)
    from tests.integrations.deepspeed import many_ranks, one_rank, readers, wider

    logging.disable(logging.WARNING)
    outcomes: dict[str, str | None] = {}
    for name in names:
        function, _, argument = name.partition(":")
        scenario = next(
            getattr(module, function) for module in (one_rank, readers, wider, many_ranks) if hasattr(module, function)
        )
        own = directory / name.replace(":", "-")
        own.mkdir(exist_ok=True)
        started = time.monotonic()
        try:
            scenario(own, *argument.split(",")) if argument else scenario(own)
            left = [
                p.name for p in own.rglob(".*") if p.name.startswith((".staging.", ".trash.", ".aside.", ".latest."))
            ]
            # Other ranks may be at work in there still.
            assert os.environ["WORLD_SIZE"] != "1" or not left, f"left behind: {left}"
            outcomes[name] = None
        except BaseException:  # noqa: BLE001 -- whatever it is, it is this scenario's outcome
            outcomes[name] = traceback.format_exc()
            if os.environ["WORLD_SIZE"] != "1":
                # The ranks are out of step now: nothing that follows would mean anything.
                break
        gc.collect()
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    (directory / f"outcomes-{os.environ['RANK']}.json").write_text(json.dumps(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
