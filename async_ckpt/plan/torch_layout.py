"""The plan by torch itself: `torch.save` runs into an object that keeps the bytes it writes and the holes it leaves for storages.

Right for every object by construction, at the price of torch's own pickling (about 60 us per tensor). No payload byte is read, no device
is synchronised, and location tags are those of the original devices.
"""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import serialization as torch_serialization

from ..format.zip import MAX_PADDED_ALIGNMENT, Container, lay_out, scan
from .plan import version_counters

Substitute = Callable[[torch.Tensor], Any]
"""Returns a reduce value to pickle instead of the tensor's own, or NotImplemented."""


@dataclass(slots=True)
class Recorded:
    """What one run of torch.save told."""

    container: Container
    storages: list[torch.UntypedStorage]
    """Per storage key, empty ones too."""
    persistent_ids: list[tuple[Any, ...]]
    """Per storage key, what torch gave it first: ("storage", type, key, location, size)."""
    uses: list[int]
    """Per storage key, how often it was met."""
    tensors: list[torch.Tensor]
    """Every tensor object, in pickling order."""
    versions: list[int | None]
    """The version counter of each when it was met, before anything of it was copied."""


class RecordingError(Exception):
    """torch.save refused; `__cause__` says why. `suspects`: the storage it refused and the tensor met last, if it was a storage."""

    def __init__(self, suspects: list[Any]) -> None:
        super().__init__("torch.save refused the object")
        self.suspects = suspects


class _HoleFile:
    """The file object torch.save writes to: keeps literals, skips holes."""

    def __init__(self) -> None:
        self.position = 0
        self.runs: list[tuple[int, list[bytes]]] = [(0, [])]

    def write(self, data: memoryview) -> int:
        # The view is valid during this call only.
        self.runs[-1][1].append(bytes(data))
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_CUR or offset < 0:
            raise OSError(f"unexpected seek({offset}, {whence}) while recording a layout")
        self.position += offset
        self.runs.append((self.position, []))
        return self.position

    def flush(self) -> None:
        """Nothing to do: torch calls it at the end."""

    def literals(self) -> tuple[tuple[int, bytes], ...]:
        return tuple((offset, b"".join(parts)) for offset, parts in self.runs)


class _Recorder:
    """Collects, during one torch.save, which storage owns which key."""

    def __init__(self, substitute: Substitute | None) -> None:
        self.storages: dict[str, torch.UntypedStorage] = {}
        self.uses: Counter[str] = Counter()
        self.persistent_ids: dict[str, tuple[Any, ...]] = {}
        self.tensors: list[torch.Tensor] = []
        self.versions: list[int | None] = []
        self.refused: list[Any] = []
        self.pickled = b""
        self.skipping = torch.serialization.skip_data()
        self.substitute = substitute

    def note_storage(self, obj: Any, persistent_id: tuple[Any, ...]) -> None:
        storage = obj if isinstance(obj, torch.UntypedStorage) else obj._untyped_storage
        self.storages[persistent_id[2]] = storage
        self.uses[persistent_id[2]] += 1
        self.persistent_ids.setdefault(persistent_id[2], persistent_id)

    def pickler_class(self) -> type[pickle.Pickler]:
        recorder = self

        class RecordingPickler(pickle.Pickler):
            """torch.save derives its own pickler from this class and defines `persistent_id` there."""

            def __init_subclass__(cls, **kwargs: Any) -> None:
                super().__init_subclass__(**kwargs)
                inner = cls.__dict__["persistent_id"]

                def persistent_id(self: Any, obj: Any) -> Any:
                    try:
                        result = inner(self, obj)
                    except Exception:
                        if isinstance(obj, (torch.storage.TypedStorage, torch.UntypedStorage)):
                            recorder.refused = [obj, *recorder.tensors[-1:]]
                        raise
                    if result is not None:
                        recorder.note_storage(obj, result)
                    return result

                cls.persistent_id = persistent_id  # type: ignore[method-assign]

            def __init__(self, file: BytesIO, *arguments: Any, **options: Any) -> None:
                super().__init__(file, *arguments, **options)
                self._file = file

            def dump(self, obj: Any) -> None:
                # Reducers must not see skip_data: under it quantised and nested tensors refuse to be pickled, meta tensors warn.
                recorder.skipping.__exit__(None, None, None)
                try:
                    super().dump(obj)
                finally:
                    recorder.skipping.__enter__()
                recorder.pickled = self._file.getvalue()

            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, torch.Tensor):
                    recorder.tensors.append(obj)
                    # At once: a substitute may hold a copy.
                    recorder.versions += version_counters([obj])
                    if recorder.substitute is not None:
                        return recorder.substitute(obj)
                return NotImplemented

        return RecordingPickler


def _save_options(alignment: int) -> AbstractContextManager[None]:
    # `patch` is put into the module at run time; it holds for this thread only.
    config: Any = torch_serialization.config
    options: AbstractContextManager[None] = config.patch({"save.storage_alignment": alignment, "save.compute_crc32": True})
    return options


def record(obj: Any, *, alignment: int = 64, substitute: Substitute | None = None) -> Recorded:
    """Run torch.save on `obj` and keep its layout. Raises RecordingError where torch.save raises an Exception."""
    recorder = _Recorder(substitute)
    module = SimpleNamespace(__name__="pickle", Pickler=recorder.pickler_class(), Unpickler=pickle.Unpickler)
    file = _HoleFile()
    try:
        with _save_options(alignment), recorder.skipping:
            torch.save(obj, file, pickle_module=module)  # type: ignore[arg-type]
    except Exception as error:
        raise RecordingError(recorder.refused) from error
    storages = list(recorder.storages.values())
    if alignment <= MAX_PADDED_ALIGNMENT:
        container = scan(file.literals(), file.position, alignment)
    else:
        nbytes = [storage.nbytes() for storage in storages]
        container = lay_out(recorder.pickled, nbytes, name_hash=name_hash(len(storages)), alignment=alignment)
    return Recorded(
        container=container,
        storages=storages,
        persistent_ids=list(recorder.persistent_ids.values()),
        uses=[recorder.uses[key] for key in recorder.storages],
        tensors=recorder.tensors,
        versions=recorder.versions,
    )


@lru_cache(maxsize=64)
def name_hash(num_storages: int) -> bytes:
    """The 20 digits with which torch starts the serialization id of a file with so many storages: a hash of the record names.

    The hash is the C++ library's own, so torch has to be asked; about 5 us per storage, once per count and process.
    """
    writer_class = getattr(torch._C, "PyTorchFileWriter", None)
    if writer_class is None or not hasattr(writer_class, "write_record_metadata"):
        return record([torch.empty(0).untyped_storage() for _ in range(num_storages)]).container.seal_map.name_hash
    file = _HoleFile()
    writer = writer_class(file, True, 64)
    for name in ("data.pkl", ".format_version", ".storage_alignment", "byteorder"):
        writer.write_record(name, b"x", 1)
    for key in range(num_storages):
        writer.write_record_metadata(f"data/{key}", 0)
    writer.write_end_of_file()
    return scan(file.literals(), file.position, 64).seal_map.name_hash
