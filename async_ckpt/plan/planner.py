"""From a state to a plan; and what people hear at the first save of a file: of types that `load` refuses by default,
and of buffers that are not streamed.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from ..errors import ConfigError, UnsupportedStateError, some_of
from ..format.named import refused_in
from ..host.device import accelerators, is_copyable
from ..host.memory import collector_paused
from .cached_plan import CachedPlan, Draft
from .key_paths import UNKNOWN, path_of, paths_of, walk
from .object_parts import is_numpy
from .plan import FileFormat, PlannedState, container_plan, planned_state
from .safetensors import SafetensorsPlan, plan_safetensors
from .strided import view_span
from .structure import TENSOR_TYPES, LooseStateError, NotPlainError
from .torch_layout import LARGE_BYTES, Part, Recorded, RecordingError, record_compact

_MAX_CACHED = 16
_MAX_TOLD_OF = 64
"""Files whose first save is looked at; a name that changes with each save is no news any more."""


class Planner:
    """Plans the exact bytes of `torch.save(obj, file_object)` without reading a payload byte. One thread at a time."""

    def __init__(
        self,
        *,
        alignment: int = 64,
        compact_views: bool = False,
        format: FileFormat = "torch",
        tell: Callable[[str], object] | None = None,
    ) -> None:
        """`alignment` of payloads in bytes, 1..65536. `compact_views` writes only bytes that views cover.

        `tell` gets a warning, at the first plan of a name, of what `load` refuses by default, and of large buffers.
        """
        self._alignment = alignment
        self._compact_views = compact_views
        self._format = format
        self._cache: dict[str, CachedPlan] = {}
        self._safetensors: dict[str, SafetensorsPlan] = {}
        self._tell = tell
        self._told_of: set[str] = set()
        self._loose: dict[str, bool] = {}
        """Files whose states hold so many more small objects than tensors that torch writes them faster than they are
        compared.
        """

    def plan(
        self, obj: Any, *, name: str = "", format: FileFormat | None = None, is_frameworks: bool = False
    ) -> PlannedState:
        """The plan of `obj`. `name` (the file's path) says whose plan to reuse; `format` overrides the planner's own;
        with `is_frameworks`, nobody is told what `load` refuses of it.

        Does not block and copies no payload. Raises UnsupportedStateError, naming the key path, for what cannot be
        saved, and TransactionStateError while the caller captures a graph.
        """
        # Torch's own switches that would make a file without its data or its checksums.
        if not torch.serialization.get_crc32_options():
            raise ConfigError(
                "torch.utils.serialization.config.save.compute_crc32=False: a checkpoint has checksums; save with it "
                "True"
            )
        if getattr(torch.serialization._serialization_tls, "skip_data", False):
            raise ConfigError("torch.serialization.skip_data writes files without tensors' data: save outside of it")
        if (format or self._format) == "safetensors":
            plan, planned = plan_safetensors(obj, self._safetensors.get(name))
            self._safetensors = _remembered(self._safetensors, name, plan)
        else:
            with collector_paused():
                planned = self._plan_from_cache(obj, name) or self._plan_anew(obj, name, is_frameworks)
        accelerators(planned.devices)
        return planned

    def _plan_from_cache(self, obj: Any, name: str) -> PlannedState | None:
        latest_first = list(self._cache.items())[::-1]
        for key, entry in sorted(latest_first, key=lambda item: item[0] != name):
            matched = entry.match(obj)
            if matched is not None:
                self._cache = _remembered(self._cache, key, entry)
                return matched
        return None

    def _plan_anew(self, obj: Any, name: str, is_frameworks: bool) -> PlannedState:
        """Let torch write it, and remember the plan where its structure is known."""
        try:
            draft = None if name in self._loose else Draft(obj)
        except LooseStateError:
            draft, self._loose = None, _remembered(self._loose, name, True)
        except (NotPlainError, RecursionError):
            draft = None
        try:
            recorded = record_compact(obj) if self._compact_views else Recorded(obj)
            recorded.lay_out(self._alignment, is_apart=draft is None)
        except RecordingError as error:
            raise refusal(obj, error) from error.__cause__
        refuse_unloadable(obj, recorded)
        planned = names = None
        if draft is not None:
            with contextlib.suppress(NotPlainError):
                entry = CachedPlan(draft, recorded)
                planned, names = entry.first(obj, draft), entry.names
                self._cache = _remembered(self._cache, name, entry)
        if planned is None:
            planned = _as_recorded(obj, recorded)
        if self._tell is not None and name not in self._told_of and len(self._told_of) < _MAX_TOLD_OF:
            self._told_of.add(name)
            told = None
            if recorded.pickled_bytes >= LARGE_BYTES:
                told = told_of_buffers(obj, name) if recorded.has_buffers else None
            elif not is_frameworks:
                told = told_of_refused(recorded.pickled, names, name)
            if told:
                self._tell(told)
        return planned


def _as_recorded(obj: Any, recorded: Recorded) -> PlannedState:
    storages = [storage for storage in recorded.storages if storage.nbytes()]
    nbytes = [storage.nbytes() for storage in storages]
    if nbytes != recorded.container.payload_nbytes:
        raise UnsupportedStateError("the state changed while it was being planned; nothing was written")
    for storage in storages:
        # Of meta and fake tensors.
        if not is_copyable(storage.device) or storage.data_ptr() == 0:
            raise _refused(obj, storage, f"has no readable data (device {storage.device})")
    parts: list[Part] = [recorded.part_of(storage) for storage in storages]
    strided = {payload: layout for payload, (_, _, layout) in enumerate(parts) if layout is not None}
    plan = container_plan(recorded.container, "torch", strided)
    sources, starts, tensors = [part[0] for part in parts], [part[1] for part in parts], recorded.tensors
    return planned_state(plan, sources, starts, tensors, recorded.versions, lambda: paths_of(obj, tensors))


Entry = TypeVar("Entry")


def _remembered(cache: dict[str, Entry], name: str, entry: Entry) -> dict[str, Entry]:
    """`cache` with `entry` as the latest, without the oldest ones.

    A new dict: a signal handler may save while it is made, or while the old one is gone through.
    """
    kept = {**{key: value for key, value in cache.items() if key != name}, name: entry}
    return dict(list(kept.items())[-_MAX_CACHED:])


def refuse_unloadable(obj: Any, recorded: Recorded) -> None:
    """Raise for what torch writes and nothing can load: tensors whose storage was freed or shrunk, storages that are no
    whole number of elements.
    """
    for tensor in recorded.tensors:
        if type(tensor) not in TENSOR_TYPES or tensor.layout != torch.strided or tensor.is_nested or not tensor.numel():
            continue
        _, reach = view_span(tensor.size(), tensor.stride(), 0)
        needed = (tensor.storage_offset() + reach) * tensor.element_size()
        storage = tensor.untyped_storage()
        if needed > storage.nbytes():
            why = f"needs {needed} bytes, and its storage was resized to {storage.nbytes()}"
            raise _refused(obj, storage, why)
    for storage, (_, kind, *_) in zip(recorded.storages, recorded.persistent_ids, strict=True):
        dtype = getattr(kind, "_dtype", torch.uint8)
        if storage.nbytes() % dtype.itemsize:
            why = (
                f"is {dtype} in a storage of {storage.nbytes()} bytes, no whole number of elements, which torch.load "
                "refuses: clone it, or save with compact_views=True"
            )
            raise _refused(obj, storage, why)


def _refused(obj: Any, storage: torch.UntypedStorage, why: str) -> UnsupportedStateError:
    """Names the first tensor that views `storage`."""
    path = " (somewhere inside)"
    for place, item in walk(obj):
        with contextlib.suppress(RuntimeError, NotImplementedError):
            if isinstance(item, torch.Tensor) and item.untyped_storage()._cdata == storage._cdata:
                path = path_of(place)
                break
    return UnsupportedStateError(f"state{path} {why}; nothing was written")


def refusal(obj: Any, error: RecordingError) -> UnsupportedStateError:
    """What torch.save's refusal means for the caller, with the key path."""
    reason, suspects = error.__cause__, error.suspects
    if isinstance(reason, RecursionError) or not suspects:
        # Breadth first, so that the last place is the deepest.
        suspects = [obj for _, obj in deque(walk(obj), maxlen=1)]
    found = zip(paths_of(obj, suspects), suspects, strict=True)
    path, item = next(((path, item) for path, item in found if path != UNKNOWN), (f" {UNKNOWN}", suspects[0]))
    return UnsupportedStateError(
        f"state{path} ({type(item).__name__}) cannot be saved: {type(reason).__name__}: {reason}; nothing was written"
    )


def told_of_buffers(state: Any, file_name: str) -> str | None:
    """A warning, with the key paths, of large arrays and bytes: they are encoded in memory, where tensors are streamed;
    None where there are none.
    """
    found = []
    for place, obj in walk(state):
        kind = type(obj)
        # Not of any class: an `nbytes` of its own may be anything.
        of_array = getattr(obj, "nbytes", 0) if is_numpy(kind) else 0
        num_bytes = len(obj) if kind in (bytes, bytearray) else of_array
        if num_bytes >= LARGE_BYTES:
            found.append(f"state{path_of(place)} ({kind.__name__} of {num_bytes >> 20} MiB)")
    if not found:
        return None
    return (
        f"{file_name or 'the state'}: {some_of(found)}: what is no tensor is encoded in memory, outside "
        "staging_bytes: an array at once to twice its size, bytes at up to six times theirs and with the GIL held. "
        "Save torch.from_numpy(array) or torch.frombuffer(data, dtype=torch.uint8) instead: tensors are streamed"
    )


def told_of_refused(pickled: bytes, names: Iterable[str] | None, file_name: str) -> str | None:
    """A warning, with the key paths, of what the pickle of `file_name` names and `load` refuses by default; or None."""
    found = refused_in(pickled, torch.serialization.get_unsafe_globals_in_checkpoint, names)
    return found and (
        f"{file_name or 'the state'} holds what load refuses by default (weights_only=True): {found}. Convert "
        "it to numbers, text, lists, dicts or tensors; or load the file with weights_only=False, which runs code, or "
        "after torch.serialization.add_safe_globals"
    )
