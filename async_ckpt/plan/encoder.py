"""Protocol-2 pickle of plain states, byte for byte as CPython's C pickler and torch's reducers write it.

What has to agree: memo numbers (one per string, container, global and reduced object, in the order the pickler meets them, and by
identity), batches of 1000 items (closed differently for a dict than for the items of a reduced OrderedDict), the shortest integer
opcodes, and the fresh tuples torch's reducers make. `selfcheck` compares the result with torch's own.
"""

from __future__ import annotations

import codecs
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .object_parts import LATIN1, global_opcode
from .structure import NotPlainError, Opened, Structure
from .tensor_columns import LiveTensors
from .tensorkinds import TensorKind

BATCH = 1000
SCALAR_TYPES = (int, bool, type(None), float)
_pack_float = struct.Struct(">d").pack
_pack_u32 = struct.Struct("<I").pack
_pack_i32 = struct.Struct("<i").pack
_ORDERED_DICT = global_opcode(OrderedDict)
_SIZE = global_opcode(torch.Size)
_CODECS_ENCODE = global_opcode(codecs.encode)
_REBUILD_PARAMETER = global_opcode(torch._utils._rebuild_parameter)
_TUPLE_OPCODES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}


def encode_scalar(value: Any) -> bytes:
    """Opcodes of an int, float, bool or None (exact types), and of the text that bytes are written as."""
    if value is None:
        return b"N"
    if value is True:
        return b"\x88"
    if value is False:
        return b"\x89"
    if type(value) is float:
        return b"G" + _pack_float(value)
    if type(value) is bytes:
        data = value.decode(LATIN1).encode("utf-8")
        return b"X" + _pack_u32(len(data)) + data
    return encode_int(value)


def encode_int(value: int) -> bytes:
    """The shortest of BININT1, BININT2, BININT, LONG1, LONG4."""
    if 0 <= value <= 0xFF:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value <= 0xFFFF:
        return b"M" + value.to_bytes(2, "little")
    if -0x80000000 <= value <= 0x7FFFFFFF:
        return b"J" + _pack_i32(value)
    data = pickle.encode_long(value)
    if len(data) < 256:
        return b"\x8a" + len(data).to_bytes(1, "little") + bytes(data)
    return b"\x8b" + _pack_i32(len(data)) + bytes(data)


@dataclass(slots=True)
class Written:
    """What is written of each tensor's storage, and the view's place in it (elements); plain plans write whole storages."""

    offsets: Sequence[int]
    strides: Sequence[tuple[int, ...]]
    storage_of: Sequence[int]
    """Per tensor: which written storage."""
    nbytes: Sequence[int]
    """Per written storage."""


@dataclass(slots=True)
class Encoded:
    """A pickle in pieces: scalars stand alone so that changed ones can be replaced."""

    pieces: list[bytes]
    piece_of: dict[int, int]
    """Flat position of a scalar leaf -> index into `pieces`."""
    key_order: list[int]
    """Written storages in the order of their keys."""


def encode(structure: Structure, leaves: list[Any], live: LiveTensors, kinds: Sequence[TensorKind], written: Written) -> Encoded:
    """Pickle the flat state. `kinds`: one per tensor of `live`. About 8 us per tensor; raises RecursionError for deep nesting."""
    encoder = _Encoder(structure, leaves, live, kinds, written)
    encoder.out.append(b"\x80\x02")
    encoder.save(0)
    encoder.out.append(b".")
    return encoder.finish()


class _Encoder:
    def __init__(self, structure: Structure, leaves: list[Any], live: LiveTensors, kinds: Sequence[TensorKind], written: Written) -> None:
        self.leaves = leaves
        self.types = structure.types
        self.global_opcodes = structure.global_opcodes
        self.blob_positions = structure.blob_positions
        # By identity: depth first, pickle may meet a shared container at another place than the flat list did.
        self.opened: dict[int, Opened] = {id(leaves[item.position]): item for item in structure.opened}
        self.live = live
        self.kinds = kinds
        self.written = written
        self.tensor_index = {id(tensor): index for index, tensor in enumerate(live.tensors)}
        self.out: list[bytes] = []
        self.scalars: list[tuple[int, int]] = []
        self.memo: dict[int | bytes, int] = {}
        self.memo_nextfree = 0
        self.keys: dict[int, str] = {}
        self.savers: dict[type, Callable[[int], None]] = {
            str: lambda position: self.save_str(self.leaves[position]),
            dict: self.save_dict,
            OrderedDict: self.save_ordered_dict,
            list: self.save_list,
            tuple: self.save_tuple,
            torch.Size: self.save_size,
            bytes: self.save_bytes,
            torch.Tensor: self.save_tensor,
            torch.nn.Parameter: self.save_parameter,
        }
        for kind in set(self.types).difference(self.savers, SCALAR_TYPES):
            self.savers[kind] = self.save_other

    def put(self) -> bytes:
        """Memoise something that can never be met again (or was noted by the caller)."""
        index = self.memo_nextfree
        self.memo_nextfree = index + 1
        return b"q" + index.to_bytes(1, "little") if index < 256 else b"r" + _pack_u32(index)

    def put_as(self, key: int | bytes) -> bytes:
        self.memo[key] = self.memo_nextfree
        return self.put()

    @staticmethod
    def get(index: int) -> bytes:
        return b"h" + index.to_bytes(1, "little") if index < 256 else b"j" + _pack_u32(index)

    def save(self, position: int) -> None:
        saver = self.savers.get(self.types[position])
        if saver is not None:
            saver(position)
            return
        self.scalars.append((position, len(self.out)))
        self.out.append(encode_scalar(self.leaves[position]))

    def remembered(self, position: int) -> bool:
        """Write a reference where this very object was written before."""
        index = self.memo.get(id(self.leaves[position]))
        if index is None:
            return False
        self.out.append(self.get(index))
        return True

    def str_bytes(self, value: str) -> bytes:
        index = self.memo.get(id(value))
        if index is not None:
            return self.get(index)
        data = value.encode("utf-8", "surrogatepass")
        return b"X" + _pack_u32(len(data)) + data + self.put_as(id(value))

    def save_str(self, value: str) -> None:
        self.out.append(self.str_bytes(value))

    def global_bytes(self, opcode: bytes) -> bytes:
        index = self.memo.get(opcode)
        return opcode + self.put_as(opcode) if index is None else self.get(index)

    # Containers

    def save_dict(self, position: int) -> None:
        if self.remembered(position):
            return
        self.out.append(b"}" + self.put_as(id(self.leaves[position])))
        item = self.opened[id(self.leaves[position])]
        count, keys = item.count, item.first
        if count == 1:
            self.save(keys)
            self.save(keys + 1)
            self.out.append(b"s")
            return
        done = 0
        while count:
            # The C pickler opens another batch whenever the last one was full, also when nothing is left for it.
            stop = min(done + BATCH, count)
            self.save_pairs(keys, count, done, stop)
            full = stop - done == BATCH
            done = stop
            if not full:
                break

    def save_pairs(self, keys: int, count: int, start: int, stop: int) -> None:
        self.out.append(b"(")
        for index in range(keys + start, keys + stop):
            self.save(index)
            self.save(index + count)
        self.out.append(b"u")

    def save_ordered_dict(self, position: int) -> None:
        if self.remembered(position):
            return
        self.out.append(self.global_bytes(_ORDERED_DICT) + b")R" + self.put_as(id(self.leaves[position])))
        item = self.opened[id(self.leaves[position])]
        self.save_dict_items(item.first, item.count)
        if item.attributes >= 0:
            self.save(item.attributes)
            self.out.append(b"b")

    def save_dict_items(self, keys: int, count: int) -> None:
        """The pairs of an object that is no dict: they come from an iterator, so that a batch of one is seen as such."""
        for start in range(0, count, BATCH):
            stop = min(start + BATCH, count)
            if stop - start == 1:
                self.save(keys + start)
                self.save(keys + start + count)
                self.out.append(b"s")
            else:
                self.save_pairs(keys, count, start, stop)

    def save_list_items(self, first: int, count: int) -> None:
        """The items of an object that is no list; as `save_dict_items`."""
        for start in range(0, count, BATCH):
            stop = min(start + BATCH, count)
            if stop - start == 1:
                self.save(first + start)
                self.out.append(b"a")
            else:
                self.out.append(b"(")
                for index in range(first + start, first + stop):
                    self.save(index)
                self.out.append(b"e")

    def save_list(self, position: int) -> None:
        if self.remembered(position):
            return
        self.out.append(b"]" + self.put_as(id(self.leaves[position])))
        item = self.opened[id(self.leaves[position])]
        if item.count == 1:
            self.save(item.first)
            self.out.append(b"a")
            return
        for start in range(0, item.count, BATCH):
            self.out.append(b"(")
            for index in range(item.first + start, item.first + min(start + BATCH, item.count)):
                self.save(index)
            self.out.append(b"e")

    def save_tuple(self, position: int) -> None:
        if self.remembered(position):
            return
        obj = self.leaves[position]
        if not obj:
            self.out.append(b")")
            return
        item = self.opened[id(self.leaves[position])]
        short = _TUPLE_OPCODES.get(item.count)
        if short is None:
            self.out.append(b"(")
        for index in range(item.first, item.first + item.count):
            self.save(index)
        if id(obj) in self.memo:
            # It contains itself through another container and was written on the way down, its scalars twice.
            raise NotPlainError("a tuple that contains itself")
        self.out.append((short or b"t") + self.put_as(id(obj)))

    # Objects

    def save_size(self, position: int) -> None:
        if self.remembered(position):
            return
        item = self.opened[id(self.leaves[position])]
        self.out.append(self.global_bytes(_SIZE))
        self.save_fresh_tuple(item.first, item.count)
        self.out.append(b"\x85" + self.put() + b"R" + self.put_as(id(self.leaves[position])))

    def save_fresh_tuple(self, first: int, count: int) -> None:
        """A tuple that reducing has made and nobody else holds."""
        short = _TUPLE_OPCODES.get(count)
        if count == 0:
            self.out.append(b")")
            return
        if short is None:
            self.out.append(b"(")
        for index in range(first, first + count):
            self.save(index)
        self.out.append((short or b"t") + self.put())

    def save_bytes(self, position: int) -> None:
        blob = self.blob_positions.get(id(self.leaves[position]))
        if blob is None:
            self.save_reduced(position)
            return
        if self.remembered(position):
            return
        self.out.append(self.global_bytes(_CODECS_ENCODE))
        self.scalars.append((blob, len(self.out)))
        self.out.append(encode_scalar(self.leaves[position]))
        text = self.put()
        self.out.append(text + self.str_bytes(LATIN1) + b"\x86" + self.put() + b"R" + self.put_as(id(self.leaves[position])))

    def save_other(self, position: int) -> None:
        opcode = self.global_opcodes.get(id(self.leaves[position]))
        if opcode is None:
            self.save_reduced(position)
        else:
            self.out.append(self.global_bytes(opcode))

    def save_reduced(self, position: int) -> None:
        if self.remembered(position):
            return
        key = id(self.leaves[position])
        item = self.opened[key]
        form, first = item.form, item.first
        assert form is not None
        self.save(first)
        if form.is_new:
            self.save_fresh_tuple(first + 1, form.num_called - 1)
            self.out.append(b"\x81")
        else:
            self.save(first + 1)
            self.out.append(b"R")
        if key in self.memo:
            raise NotPlainError("an object that is made of itself")
        self.out.append(self.put_as(key))
        state = first + form.num_called
        items = state + form.has_state
        self.save_list_items(items, form.num_items)
        self.save_dict_items(items + form.num_items, form.num_pairs)
        if form.has_state:
            self.save(state)
            self.out.append(b"b")

    # Tensors

    def save_tensor(self, position: int) -> None:
        if self.remembered(position):
            return
        key = id(self.leaves[position])
        index = self.tensor_index[key]
        self.out.append(self.tensor_bytes(index, self.live.requires_grad[index]) + self.put_as(key))

    def save_parameter(self, position: int) -> None:
        if self.remembered(position):
            return
        key = id(self.leaves[position])
        index = self.tensor_index[key]
        self.out.append(
            self.global_bytes(_REBUILD_PARAMETER)
            + self.tensor_bytes(index, False)
            + self.put()
            + (b"\x88" if self.live.requires_grad[index] else b"\x89")
            + self.hooks_bytes()
            + b"\x87"
            + self.put()
            + b"R"
            + self.put_as(key)
        )

    def tensor_bytes(self, index: int, requires_grad: bool) -> bytes:
        """A tensor's reduce value, up to and with REDUCE. The pieces are joined in writing order: each takes its memo number in turn."""
        kind = self.kinds[index]
        return (
            self.global_bytes(kind.rebuild)
            + b"("
            + self.storage_bytes(index, kind)
            + encode_int(self.written.offsets[index])
            + self.ints_bytes(self.live.sizes[index])
            + self.ints_bytes(self.written.strides[index])
            + (b"\x88" if requires_grad else b"\x89")
            + self.hooks_bytes()
            + (b"" if kind.dtype is None else self.global_bytes(kind.dtype))
            + b"t"
            + self.put()
            + b"R"
        )

    def storage_bytes(self, index: int, kind: TensorKind) -> bytes:
        storage = self.written.storage_of[index]
        key = self.keys.get(storage)
        if key is None:
            key = self.keys[storage] = str(len(self.keys))
        head = b"(" + self.str_bytes(kind.marker) + self.global_bytes(kind.storage_class) + self.str_bytes(key)
        if kind.fresh_location:
            data = kind.location.encode()
            location = b"X" + _pack_u32(len(data)) + data + self.put()
        else:
            location = self.str_bytes(kind.location)
        return head + location + encode_int(self.written.nbytes[storage] // kind.unit_nbytes) + b"t" + self.put() + b"Q"

    def ints_bytes(self, values: Sequence[int]) -> bytes:
        count = len(values)
        if count == 0:
            return b")"
        items = b"".join(map(encode_int, values))
        short = _TUPLE_OPCODES.get(count)
        return (items + short if short else b"(" + items + b"t") + self.put()

    def hooks_bytes(self) -> bytes:
        return self.global_bytes(_ORDERED_DICT) + b")R" + self.put()

    def finish(self) -> Encoded:
        """Join what lies between scalars."""
        pieces: list[bytes] = []
        piece_of: dict[int, int] = {}
        start = 0
        for position, index in self.scalars:
            pieces.append(b"".join(self.out[start:index]))
            piece_of[position] = len(pieces)
            pieces.append(self.out[index])
            start = index + 1
        pieces.append(b"".join(self.out[start:]))
        return Encoded(pieces, piece_of, list(self.keys))
