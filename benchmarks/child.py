"""The process that runs one contender once: reads a request, writes one JSON file, and exits.

Guarantees: the file is written whatever the contender does short of killing the process; what was measured before a
failure is in it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.contenders.base import Unavailable
from benchmarks.environment import describe, raise_open_files_limit
from benchmarks.scenarios.common import Request


def perform(request: Request) -> dict[str, Any]:
    """Run the scenario; a failure becomes the row's status and reason."""
    result: dict[str, Any] = {"status": "ok", "reason": ""}
    scenario = importlib.import_module(f"benchmarks.scenarios.{request.scenario}")
    try:
        scenario.run(request, result)
    except Unavailable as error:
        result.update(status="missing", reason=str(error))
    except Exception as error:  # noqa: BLE001 - whatever a contender raises is its row
        result.update(
            status="failed", reason=f"{type(error).__name__}: {error}"[:600], traceback=traceback.format_exc()[-4000:]
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--request", required=True)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    request = Request(**json.loads(arguments.request))
    raise_open_files_limit()
    environment = describe(Path(request.directory))
    result = perform(request)
    result["environment"] = environment
    arguments.out.write_text(json.dumps(result, default=str))
    sys.stdout.flush()
    # Threads and processes that a contender left behind must not keep the run waiting; the parent ends the group.
    os._exit(0)


if __name__ == "__main__":
    main()
