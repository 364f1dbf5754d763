"""What people hear at the first save of a file: of types that `load` refuses by default, and of buffers that are not
streamed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from ..errors import some_of
from ..format.named import file_naming, listing, places_named
from ..format.pickles import MalformedPickleError
from .key_paths import path_of, walk
from .object_parts import is_numpy
from .torch_layout import LARGE_BYTES

_IS_LOADED_BY_FRAMEWORK = ContextVar("loaded by a framework", default=False)


@contextlib.contextmanager
def loaded_by_framework() -> Iterator[None]:
    """What this thread saves meanwhile, a framework loads again in its own way: nobody is told what `load` refuses of
    it, as there is nothing that a user could do about it.
    """
    token = _IS_LOADED_BY_FRAMEWORK.set(True)
    try:
        yield
    finally:
        _IS_LOADED_BY_FRAMEWORK.reset(token)


def told_of_buffers(state: Any, file_name: str) -> str | None:
    """A warning, with the key paths, of large arrays and bytes: they are encoded in memory, where tensors are streamed;
    None where there are none.
    """
    found = []
    for place, obj in walk(state):
        kind = type(obj)
        is_buffer = kind in (bytes, bytearray) or is_numpy(kind)
        num_bytes = (len(obj) if kind in (bytes, bytearray) else getattr(obj, "nbytes", 0)) if is_buffer else 0
        if num_bytes >= LARGE_BYTES:
            found.append(f"state{path_of(place)} ({kind.__name__} of {num_bytes >> 20} MiB)")
    if not found:
        return None
    return (
        f"{file_name or 'the state'}: {some_of(found)}: what is no tensor is encoded in memory, outside "
        "staging_bytes: an array at once to twice its size, bytes at up to six times theirs and with the GIL held. "
        "Save torch.from_numpy(array) or torch.frombuffer(data, dtype=torch.uint8) instead: tensors are streamed"
    )


def told_of_refused(pickled: bytes, names: Iterable[str], file_name: str) -> str | None:
    """A warning, with the key paths, of what the pickle of `file_name` names and `load` refuses by default; or None."""
    is_asked = not _IS_LOADED_BY_FRAMEWORK.get()
    refused = is_asked and set(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(file_naming(names))))
    if not refused:
        return None
    try:
        found = places_named(pickled, refused)
    except MalformedPickleError:
        return None
    return (
        f"{file_name or 'the state'} holds what load refuses by default (weights_only=True): {listing(found)}. Convert "
        "it to numbers, text, lists, dicts or tensors; or load the file with weights_only=False, which runs code, or "
        "after torch.serialization.add_safe_globals"
    )
