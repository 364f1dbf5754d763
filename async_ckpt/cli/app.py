"""The commands, put together; each lives in a module of its own, which is imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

_MODULES = {
    "list": "list_command",
    "inspect": "inspect",
    "verify": "verify",
    "diff": "diff",
    "prune": "prune",
    "delete": "delete",
    "mirror": "mirror",
    "sweep": "sweep",
    "watch": "watch",
    "export": "export",
    "demo": "demo_command",
    "bench": "bench",
}

_EPILOG = (
    "Exit codes: 0 nothing is wrong; 1 damaged, different or failed; 2 wrong usage; "
    "3 no such root, checkpoint, file or metric; 130 interrupted."
)


def build(arguments: list[str]) -> Callable[..., Any]:
    """The command line for these arguments: with all commands, or only the one that is asked for."""
    app = typer.Typer(
        name="async-ckpt",
        help="Look after checkpoints: list, inspect, verify, compare, prune, delete, watch, export, measure.",
        epilog=_EPILOG,
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    asked = arguments[0] if arguments and arguments[0] in _MODULES else None
    for name, module in _MODULES.items():
        if asked in (None, name):
            app.command(name, epilog=_EPILOG)(importlib.import_module(f".{module}", __package__).command)
    return app


def _version(value: bool) -> None:
    if value:
        print(f"async-ckpt {version('async-ckpt')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; accepted anywhere.")] = False,
) -> None:
    pass
