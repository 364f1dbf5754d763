"""The command line, `async-ckpt`: look after checkpoints without writing Python.

Exit codes:

- 0: done, nothing is wrong
- 1: something is damaged, differs, or failed
- 2: wrong usage: an unknown option, a bad value, a malformed tag or path
- 3: no such root, checkpoint, file or metric
- 130: interrupted

Guarantees: `list`, `inspect`, `verify`, `diff` and `watch` write nothing, lock nothing and sweep nothing, so they are safe
beside a running training; they do not import torch. Errors are one line on standard error; `--debug` adds the traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code (SystemExit)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        # Accepted before and after the command.
        arguments = [argument for argument in arguments if argument != "--debug"]
    from .app import build

    try:
        build(arguments)(arguments, prog_name="async-ckpt")
    except Exception as error:
        from .failing import exit_code, one_line

        if debug:
            raise
        code = exit_code(error)
        if code is None:
            # A bug of ours, not a known failure: then the traceback is what helps.
            raise
        print(f"async-ckpt: {one_line(error)}", file=sys.stderr)
        raise SystemExit(code) from None


__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_NOT_FOUND", "EXIT_OK", "EXIT_USAGE", "main"]
