"""The command line, `async-ckpt`: look after checkpoints without writing Python.

Exit codes:

- 0: done, nothing is wrong
- 1: something is damaged, differs, or failed
- 2: wrong usage: an unknown option, a bad value, a malformed tag or path
- 3: no such root, checkpoint, file or metric
- 130: interrupted

Guarantees: `list`, `inspect`, `verify`, `diff` and `watch` write nothing, lock nothing and sweep nothing in the root,
so they are safe beside a running training; they do not import torch. Errors are one line on standard error; `--debug`
adds the traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from .failing import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, exit_code, one_line


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code (SystemExit)."""
    for name in ("stdout", "stderr"):
        # Closed by the caller (`>&-`): there is nobody to read it.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        # Accepted before and after the command.
        arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        done = _run(arguments)
        sys.stdout.flush()
        raise SystemExit(done)
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say.
        _drop_output()
        raise SystemExit(EXIT_FAILED) from None
    except Exception as error:
        if debug:
            raise
        code = exit_code(error)
        if code is None:
            # A bug of ours, not a known failure: then the traceback is what helps.
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        with contextlib.suppress(OSError):
            print(f"async-ckpt: {one_line(error)}", file=sys.stderr)
        raise SystemExit(code) from None


def _drop_output() -> None:
    """What could not be written is not tried again while the interpreter exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    operands = [argument for argument in arguments[1:] if argument != "--json"]
    if arguments[:1] == ["list"] and len(operands) == 1 and not operands[0].startswith("-"):
        # The command that is typed most, and by scripts: it must not wait for a command-line library to be imported.
        from .listing import list_checkpoints

        return list_checkpoints(operands[0], as_json=len(arguments) > 2)
    from .app import build

    build(arguments)(arguments, prog_name="async-ckpt")
    return EXIT_OK


__all__ = ["main"]
