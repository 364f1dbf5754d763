"""The command line, `async-ckpt`: look after checkpoints without writing Python.

Guarantees: `list`, `inspect`, `verify`, `diff` and `watch` write nothing, lock nothing and sweep nothing in the root,
so they are safe beside a running training; they do not import torch. Errors are one line on standard error; `--debug`
adds the traceback.

Each command is a module of its own, imported only when it is asked for: `options(parser)` adds its arguments, and
`command(...)` takes them by name and returns the exit code; the first sentence of its docstring is the command's line
in the help.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any

from .common import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, exit_code, one_line

COMMANDS = (
    "list",
    "inspect",
    "verify",
    "diff",
    "prune",
    "delete",
    "mirror",
    "sweep",
    "watch",
    "export",
    "demo",
    "bench",
)
_ABOUT = (
    "Look after checkpoints: list, verify, compare, delete, mirror, watch and export them, and measure a disk.\n\n"
    "ROOT is the directory that an engine saves to, TAG one checkpoint in it (the directory ROOT/TAG), FILE a path "
    "inside that checkpoint. Begin with `async-ckpt list ROOT`; `async-ckpt demo` makes a root to try things on."
)
_EPILOG = (
    "Exit codes: 0 nothing is wrong; 1 damaged, different or failed; 2 wrong usage; "
    "3 no such root, checkpoint, file or metric; 130 interrupted."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code (SystemExit)."""
    for name in ("stdout", "stderr"):
        # Closed by the caller (`>&-`): there is nobody to read it.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    given = sys.argv[1:] if argv is None else argv
    # Accepted before and after the command.
    debug = "--debug" in given
    try:
        try:
            done = _run([argument for argument in given if argument != "--debug"])
        except SystemExit as left:
            # argparse's, after help or a usage error.
            done = EXIT_OK if left.code is None else int(left.code)
        sys.stdout.flush()
        raise SystemExit(done)
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say.
        _drop_output()
        raise SystemExit(EXIT_FAILED) from None
    except Exception as error:
        code = exit_code(error)
        if code is None:
            # A bug of ours, not a known failure: then the traceback is what helps.
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        with contextlib.suppress(OSError):
            if debug:
                traceback.print_exc()
            print(f"async-ckpt: {one_line(error)}", file=sys.stderr)
        raise SystemExit(code) from None


def _drop_output() -> None:
    """What could not be written is not tried again while the interpreter exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Help(argparse.HelpFormatter):
    """Keeps the paragraphs of a text."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        return "\n\n".join(textwrap.fill(paragraph, width, break_on_hyphens=False) for paragraph in paragraphs)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        module = _module(arguments[0])
        parser = _parser(f"async-ckpt {arguments[0]}", module.command.__doc__)
        module.options(parser)
        done: int = module.command(**vars(parser.parse_intermixed_args(arguments[1:])))
        return done
    parser = _parser("async-ckpt", _ABOUT)
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--debug", action="store_true", help="show tracebacks; accepted anywhere")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands (each has a --help of its own)")
    for name in COMMANDS:
        about = " ".join(_module(name).command.__doc__.split("\n\n")[0].split())
        commands.add_parser(name, help=about.partition(". ")[0].rstrip("."))
    if parser.parse_args(arguments).version:
        from importlib.metadata import version

        print(f"async-ckpt {version('async-ckpt')}")
        return EXIT_OK
    parser.print_help()
    return EXIT_USAGE


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name, description=about, epilog=_EPILOG, formatter_class=_Help, allow_abbrev=False
    )
