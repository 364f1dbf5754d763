"""The pickle by torch itself: `torch.save` runs until it has pickled the object, and what it was given tells which
storage has which key.

Right for every object by construction, at the price of torch's own pickling (about 40 us per tensor). No payload byte
is read, no device is synchronised, and location tags are those of the original devices.
"""

from __future__ import annotations

import pickle
import secrets
import struct
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from io import BytesIO
from math import prod
from types import SimpleNamespace
from typing import Any

import torch

from ..format.zip import APART_BYTES, Container, lay_out
from .object_parts import is_numpy
from .plan import version_counters
from .strided import Strided, view_span

_STORAGES = (torch.storage.TypedStorage, torch.UntypedStorage)

LARGE_BYTES = 64 << 20
"""From so many on, a data.pkl is not looked through, and a buffer that is no tensor is named."""

_TOKEN_BYTES = 32
_MAX_TEXT_BYTES = 0xFFFFFFFF

Substitute = Callable[[torch.Tensor], Any]
"""Returns a reduce value to pickle instead of the tensor's own, or NotImplemented."""


Part = tuple[torch.UntypedStorage, int, Strided | None]
"""A storage, the byte of it that what is written begins at, and how that lies there if not as it is written."""


class RecordingError(Exception):
    """torch.save refused; `__cause__` says why. `suspects`: what it had met last, the latest first."""

    def __init__(self, suspects: list[Any]) -> None:
        super().__init__("torch.save refused the object")
        self.suspects = suspects


class _Pickled(Exception):
    """Ends torch.save when it has pickled the object: the container around it is arithmetic."""


class Recorded:
    """What one run of torch.save told."""

    container: Container
    pickled: bytes
    """data.pkl, with tokens in place of the bytes of large arrays; empty where it has `LARGE_BYTES`, and lies apart."""
    pickled_bytes: int
    """The size of the whole data.pkl."""
    has_buffers: bool
    """Whether that has `LARGE_BYTES` of one array or of bytes."""

    def __init__(self, obj: Any, substitute: Substitute | None = None) -> None:
        """Run torch.save on `obj` until it is pickled. Raises RecordingError where torch.save raises an Exception."""
        self.persistent_ids: list[tuple[Any, ...]] = []
        """What torch gave each storage key first: ("storage", type, key, location, size)."""
        self.storages: list[torch.UntypedStorage] = []
        """The storages by key, empty ones too."""
        self.uses: Counter[int] = Counter()
        """How often each storage was met, by its `_cdata`."""
        self.tensors: list[torch.Tensor] = []
        """Every tensor object, in pickling order."""
        self.versions: list[int | None] = []
        """The version counter of each when it was met."""
        self.parts: Mapping[int, Part] = {}
        """By `_cdata`, of the storages that stand for parts of the user's."""
        self._met: deque[Any] = deque(maxlen=8)
        """The last objects that are no plain containers, numbers or texts."""
        self._pieces: list[bytes] = []
        """The pieces of the pickle: a text of 64 KiB or more is one, which nobody has copied."""
        self._arrays: dict[bytes, Any] = {}
        """Large arrays, each by the bytes that were pickled in place of its own."""
        self._substitute = substitute
        module = SimpleNamespace(__name__="pickle", Pickler=self._pickler_class(), Unpickler=pickle.Unpickler)
        try:
            # No file object in Python: torch loses what a signal handler raises in one.
            torch.save(obj, BytesIO(), pickle_module=module)
        except _Pickled:
            pass
        except Exception as error:
            raise RecordingError(list(self._met)[::-1]) from error

    def lay_out(self, alignment: int, *, is_apart: bool) -> None:
        """Work out the container. `is_apart`: pieces of `APART_BYTES` or more become literals as they are; nobody is to
        look for scalars in them.
        """
        self.has_buffers = any(len(piece) >= LARGE_BYTES for piece in self._pieces)
        self.has_buffers |= any(array.nbytes >= LARGE_BYTES for array in self._arrays.values())
        pieces = list(_with_arrays(self._pieces, self._arrays))
        self.pickled_bytes = sum(map(len, pieces))
        self.pickled = b"".join(self._pieces) if self.pickled_bytes < LARGE_BYTES or not is_apart else b""
        self.container = lay_out(
            pieces if is_apart or self._arrays else self.pickled,
            [storage.nbytes() for storage in self.storages],
            name_hash=name_hash(len(self.storages)),
            alignment=alignment,
        )
        self._pieces.clear()

    def part_of(self, storage: torch.UntypedStorage) -> Part:
        """What of the user's is written where torch has written `storage`."""
        return self.parts.get(storage._cdata, (storage, 0, None))

    def _pickler_class(self) -> type[pickle.Pickler]:
        # A class is garbage that only the collector finds: what was recorded, and the user's tensors, must not wait.
        recorder = weakref.proxy(self)

        class RecordingPickler(pickle.Pickler):
            """torch.save derives its own pickler from this class and defines `persistent_id` there."""

            def __init_subclass__(cls, **kwargs: Any) -> None:
                super().__init_subclass__(**kwargs)
                inner = cls.__dict__["persistent_id"]

                def persistent_id(self: Any, obj: Any) -> Any:
                    # Asked of every object; torch's own has an answer for storages alone.
                    if not isinstance(obj, _STORAGES):
                        return None
                    recorder._met.append(obj)
                    result = inner(self, obj)
                    storage = _storage(obj)
                    if not recorder.uses[storage._cdata]:
                        recorder.storages.append(storage)
                        recorder.persistent_ids.append(result)
                    recorder.uses[storage._cdata] += 1
                    return result

                cls.persistent_id = persistent_id  # type: ignore[method-assign]

            def __init__(self, file: BytesIO, *arguments: Any, **options: Any) -> None:
                super().__init__(SimpleNamespace(write=recorder._pieces.append), *arguments, **options)

            def dump(self, obj: Any) -> None:
                super().dump(obj)
                raise _Pickled

            def reducer_override(self, obj: Any) -> Any:
                recorder._met.append(obj)
                if isinstance(obj, torch.Tensor):
                    recorder.tensors.append(obj)
                    recorder.versions += version_counters([obj])
                    if recorder._substitute is not None:
                        return recorder._substitute(obj)
                elif type(obj).__name__ == "ndarray" and is_numpy(type(obj)) and _is_left_out(obj):
                    token = secrets.token_hex(_TOKEN_BYTES // 2).encode()
                    recorder._arrays[token] = obj
                    return _reduced(obj, token)
                return NotImplemented

        return RecordingPickler


def _is_left_out(array: Any) -> bool:
    """Whether the pickler, which would copy them several times, is given a token in place of the bytes of `array`."""
    is_plain = array.nbytes > APART_BYTES and not array.dtype.hasobject
    return is_plain and _reduces_as_known()


def _reduced(array: Any, data: bytes) -> Any:
    """What numpy makes of `array`, with `data` in place of its bytes."""
    numpy = sys.modules["numpy"]
    rebuild, arguments, (version, *_) = numpy.empty(0, array.dtype).__reduce__()
    return rebuild, arguments, (version, array.shape, array.dtype, array.flags.fnc, data)


@lru_cache(maxsize=1)
def _reduces_as_known() -> bool:
    numpy = sys.modules["numpy"]
    samples = [
        numpy.arange(6.0),
        numpy.arange(6.0).reshape(2, 3),
        numpy.arange(6.0).reshape(2, 3).T,
        numpy.arange(6.0)[::2],
    ]
    return all(sample.__reduce__() == _reduced(sample, sample.tobytes("A")) for sample in samples)


def _with_arrays(pieces: Iterable[bytes], arrays: dict[bytes, Any]) -> Iterator[bytes]:
    """The pieces of a pickle, with the bytes of arrays in place of their tokens, which come in this order.

    Protocol 2 writes bytes as UTF-8, as if each were a character: those from 128 on take two. So they cannot be copied
    from where they lie, and the place of everything behind them depends on them.
    """
    opcode = b"X" + struct.pack("<I", _TOKEN_BYTES)
    none_left: tuple[bytes, Any] = (b"", None)
    left = iter(arrays.items())
    token, array = next(left, none_left)
    for piece in pieces:
        done = 0
        while token and (at := piece.find(opcode + token, done)) >= 0:
            # Where its elements do not lie in a row, only those of one block are put into one.
            flat = array.ravel(order="K") if array.flags.forc else array.flat
            num_items = max(1, APART_BYTES // array.itemsize)
            # One by one, so that other threads get the GIL between them.
            blocks = [
                str(flat[low : low + num_items].view("u1").data, "latin1").encode()
                for low in range(0, array.size, num_items)
            ]
            num_bytes = sum(map(len, blocks))
            if num_bytes > _MAX_TEXT_BYTES:
                # As pickle says it.
                raise RecordingError([array]) from OverflowError("cannot serialize a string larger than 4GiB")
            yield piece[done:at] + b"X" + struct.pack("<I", num_bytes)
            yield from blocks
            done = at + len(opcode) + _TOKEN_BYTES
            token, array = next(left, none_left)
        yield piece[done:]


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


def record_compact(obj: Any) -> Recorded:
    """`Recorded` with `compact_views`: torch pickles shortened storages in place of those of which only views are met.

    Two runs: the first learns every view, the second writes. Raises RecordingError like `Recorded`.
    """
    compactor = _Compactor()
    compactor.settle(Recorded(obj, compactor.learn).uses)
    recorded = Recorded(obj, compactor.shorten)
    recorded.parts = compactor.parts
    return recorded


class _Compactor:
    def __init__(self) -> None:
        self.views: dict[int, tuple[int, int, int]] = {}
        """By storage, from where to where views cover bytes of it, and how many views these are."""
        self.shortened: dict[int, torch.UntypedStorage] = {}
        self.parts: dict[int, Part] = {}

    def learn(self, tensor: torch.Tensor) -> Any:
        reduced = _plain_view(tensor)
        if reduced is not NotImplemented:
            held, offset, size, stride = reduced[1][:4]
            key = _storage(held)._cdata
            low, high, num_views = self.views.get(key, (0, 0, 0))
            start, stop = (edge * tensor.dtype.itemsize for edge in view_span(size, stride, offset))
            if start < stop:
                low, high = (min(low, start), max(high, stop)) if low < high else (start, stop)
            self.views[key] = low, high, num_views + 1
        return reduced

    def settle(self, uses: Mapping[int, int]) -> None:
        """Forget storages that something else than a plain view refers to: those are written whole."""
        self.views = {key: found for key, found in self.views.items() if uses.get(key) == found[2]}

    def shorten(self, tensor: torch.Tensor) -> Any:
        reduced = _plain_view(tensor)
        if reduced is NotImplemented or _storage(reduced[1][0])._cdata not in self.views:
            return reduced
        held, offset, size, stride, *rest = reduced[1]
        storage, item = _storage(held), tensor.dtype.itemsize
        low, high, num_views = self.views[storage._cdata]
        lazy_bits = type(rest[-1]) is dict
        if num_views == 1 and prod(size) * item < high - low and not lazy_bits:
            # As long as what is written, which is not what lies there.
            short = storage[low : low + prod(size) * item]
            self.parts[short._cdata] = storage, low, Strided(tensor.dtype, tuple(size), tuple(stride))
            offset, stride = 0, torch.empty(size, device="meta").stride()
        else:
            short = self.shortened.setdefault(storage._cdata, storage[low:high])
            self.parts[short._cdata] = storage, low, None
            offset = 0 if 0 in size else offset - low // item
        wrapped: Any = short
        if held is not storage:
            wrapped = torch.storage.TypedStorage(wrap_storage=short, dtype=held.dtype, _internal=True)
        return reduced[0], (wrapped, offset, size, stride, *rest)


def _plain_view(tensor: torch.Tensor) -> Any:
    """torch's reduce value if it is (rebuild, (storage, offset, size, stride, ...)) of a plain strided view, else
    NotImplemented.
    """
    reduced: Any = tensor.__reduce_ex__(2) if type(tensor) is torch.Tensor else None
    is_view = reduced is not None and reduced[0].__name__ in ("_rebuild_tensor_v2", "_rebuild_tensor_v3")
    return reduced if is_view else NotImplemented


def _storage(held: Any) -> torch.UntypedStorage:
    found: torch.UntypedStorage = held if isinstance(held, torch.UntypedStorage) else held._untyped_storage
    return found
