"""The pickle by torch itself: `torch.save` runs until it has pickled the object, and what it was given tells which
storage has which key.

Right for every object by construction, at the price of torch's own pickling (about 40 us per tensor). No payload byte
is read, no device is synchronised, and location tags are those of the original devices.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import torch

from ..format.zip import Container, lay_out
from .plan import version_counters

_STORAGES = (torch.storage.TypedStorage, torch.UntypedStorage)

Substitute = Callable[[torch.Tensor], Any]
"""Returns a reduce value to pickle instead of the tensor's own, or NotImplemented."""


@dataclass(slots=True)
class Recorded:
    """What one run of torch.save told."""

    container: Container
    pickled: bytes
    """data.pkl."""
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
    """torch.save refused; `__cause__` says why. `suspects`: the storage it refused and the tensor met last, if it was a
    storage.
    """

    def __init__(self, suspects: list[Any]) -> None:
        super().__init__("torch.save refused the object")
        self.suspects = suspects


class _Pickled(Exception):
    """Ends torch.save when it has pickled the object: the container around it is arithmetic."""


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
                    # Asked of every object; torch's own has an answer for storages alone.
                    if not isinstance(obj, _STORAGES):
                        return None
                    try:
                        result = inner(self, obj)
                    except Exception:
                        recorder.refused = [obj, *recorder.tensors[-1:]]
                        raise
                    recorder.note_storage(obj, result)
                    return result

                cls.persistent_id = persistent_id  # type: ignore[method-assign]

            def __init__(self, file: BytesIO, *arguments: Any, **options: Any) -> None:
                super().__init__(file, *arguments, **options)
                self._file = file

            def dump(self, obj: Any) -> None:
                super().dump(obj)
                recorder.pickled = self._file.getvalue()
                raise _Pickled

            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, torch.Tensor):
                    recorder.tensors.append(obj)
                    # At once: a substitute may hold a copy.
                    recorder.versions += version_counters([obj])
                    if recorder.substitute is not None:
                        return recorder.substitute(obj)
                return NotImplemented

        return RecordingPickler


def record(obj: Any, *, alignment: int = 64, substitute: Substitute | None = None) -> Recorded:
    """Run torch.save on `obj` and keep its layout. Raises RecordingError where torch.save raises an Exception."""
    recorder = _Recorder(substitute)
    module = SimpleNamespace(__name__="pickle", Pickler=recorder.pickler_class(), Unpickler=pickle.Unpickler)
    try:
        # No file object in Python: torch loses what a signal handler raises in one.
        torch.save(obj, BytesIO(), pickle_module=module)
    except _Pickled:
        pass
    except Exception as error:
        raise RecordingError(recorder.refused) from error
    storages = list(recorder.storages.values())
    nbytes = [storage.nbytes() for storage in storages]
    return Recorded(
        container=lay_out(recorder.pickled, nbytes, name_hash=name_hash(len(storages)), alignment=alignment),
        pickled=recorder.pickled,
        storages=storages,
        persistent_ids=list(recorder.persistent_ids.values()),
        uses=[recorder.uses[key] for key in recorder.storages],
        tensors=recorder.tensors,
        versions=recorder.versions,
    )


@lru_cache(maxsize=64)
def name_hash(num_storages: int) -> bytes:
    """The 20 digits with which torch starts the serialization id of a file with so many storages: a hash of the record
    names.

    The hash is the C++ library's own, so torch has to be asked; about 1 us per storage, once per count and process.
    """
    assert torch._C.PyTorchFileWriter is not None
    writer = torch._C.PyTorchFileWriter(BytesIO(), True, 64)
    for name in ("data.pkl", ".format_version", ".storage_alignment", "byteorder"):
        writer.write_record(name, b"x", 1)
    for key in range(num_storages):
        writer.write_record(f"data/{key}", b"", 0)
    writer.write_end_of_file()
    return writer.serialization_id().encode()[:20]
