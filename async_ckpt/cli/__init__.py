"""The command line, `async-ckpt`: look after checkpoints without writing Python.

Guarantees: `list`, `inspect`, `verify`, `diff` and `watch` write nothing, lock nothing and sweep nothing in the root,
so they are safe beside a running training; they do not import torch. Errors are one line on standard error; `--debug`
adds the traceback.
"""

from __future__ import annotations

from .app import main

__all__ = ["main"]
