"""What each opcode of a pickle does to a `PickleReader`."""

from __future__ import annotations

import codecs
import struct

from .pickles import Handler, Opcodes, PickleReader, Placed

_UINT16, _INT32, _DOUBLE = struct.Struct("<H"), struct.Struct("<i"), struct.Struct(">d")


def _quoted(text: str) -> str:
    raw = text.encode("utf-8", "surrogateescape")
    return str(codecs.escape_decode(raw[1:-1])[0], "latin1")


def _int(text: str) -> int:
    # How protocol 0 spells booleans.
    return text == "01" if text in ("00", "01") else int(text)


def _put(reader: PickleReader, key: int) -> None:
    reader.memo[key] = reader.stack[-1]


def _signed(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _placed(handler: Handler) -> Handler:
    def run(reader: PickleReader) -> None:
        start = reader.position - 1
        handler(reader)
        reader.stack[-1] = Placed(reader.stack[-1], start, reader.position)

    return run


_SCALARS: dict[int | str, Handler] = {
    "N": lambda r: r.stack.append(None),
    0x88: lambda r: r.stack.append(True),
    0x89: lambda r: r.stack.append(False),
    "K": lambda r: r.push(r.number(1)),
    "M": lambda r: r.unpacked(_UINT16),
    "J": lambda r: r.unpacked(_INT32),
    0x8A: lambda r: r.push(_signed(r.sized(1))),
    0x8B: lambda r: r.push(_signed(r.sized(4))),
    "G": lambda r: r.unpacked(_DOUBLE),
    "X": lambda r: r.push(str(r.sized(4), "utf-8", "surrogatepass")),
}
_PROTOCOL_2: dict[int | str, Handler] = {
    **_SCALARS,
    0x80: lambda r: r.take(1),
    0x86: lambda r: r.push((r.stack.pop(-2), r.stack.pop())),
    0x87: lambda r: r.push((r.stack.pop(-3), r.stack.pop(-2), r.stack.pop())),
    ")": lambda r: r.stack.append(()),
    "}": lambda r: r.stack.append({}),
    "]": lambda r: r.stack.append([]),
    "u": lambda r: r.set_items(r.pop_mark()),
    "s": lambda r: r.set_items((r.stack.pop(-2), r.stack.pop())),
    "a": lambda r: r.extend([r.stack.pop()]),
    "e": lambda r: r.extend(r.pop_mark()),
    "c": lambda r: r.name(r.line(), r.line()),
    0x81: PickleReader.reduce,
    "b": PickleReader.build,
}
_ALL: dict[int | str, Handler] = {
    **_PROTOCOL_2,
    "p": lambda r: _put(r, int(r.line())),
    0x94: lambda r: _put(r, len(r.memo)),
    "g": lambda r: r.push(r.memo[int(r.line())]),
    "0": PickleReader.pop,
    "1": PickleReader.pop_mark,
    "2": lambda r: r.push(r.stack[-1]),
    "I": lambda r: r.push(_int(r.line())),
    "L": lambda r: r.push(int(r.line().rstrip("L"))),
    "F": lambda r: r.push(float(r.line())),
    0x8C: lambda r: r.push(str(r.sized(1), "utf-8", "surrogatepass")),
    0x8D: lambda r: r.push(str(r.sized(8), "utf-8", "surrogatepass")),
    "V": lambda r: r.push(str(r.line().encode("utf-8", "surrogateescape"), "raw-unicode-escape")),
    "S": lambda r: r.push(_quoted(r.line())),
    "T": lambda r: r.push(str(r.sized(4), "latin1")),
    "U": lambda r: r.push(str(r.sized(1), "latin1")),
    "B": lambda r: r.push(r.sized(4)),
    "C": lambda r: r.push(r.sized(1)),
    0x8E: lambda r: r.push(r.sized(8)),
    0x96: lambda r: r.push(r.sized(8)),
    0x8F: lambda r: r.push([]),
    "l": lambda r: r.push(r.pop_mark()),
    0x91: lambda r: r.push(r.pop_mark()),
    "d": PickleReader.new_dict,
    0x90: lambda r: r.extend(r.pop_mark()),
    0x93: lambda r: r.name(r.stack.pop(-2), r.stack.pop()),
    0x92: lambda r: r.push(r.called(r.stack.pop(-3), (r.stack.pop(-2), r.stack.pop())[0])),
    "o": PickleReader.from_mark,
    "i": PickleReader.instance,
    "P": lambda r: r.push(r.maker.persistent(r.line())),
    0x95: lambda r: r.take(8),
    0x82: lambda r: r.push(r.maker.name("extension", str(r.number(1)))),
    0x83: lambda r: r.push(r.maker.name("extension", str(r.number(2)))),
    0x84: lambda r: r.push(r.maker.name("extension", str(r.number(4)))),
    0x97: lambda r: r.push(r.maker.persistent("buffer")),
    0x98: lambda r: None,
}


def _table(handlers: dict[int | str, Handler], *, places: bool = False) -> Opcodes:
    table: Opcodes = [None] * 256
    for opcode, handler in handlers.items():
        placed = _placed(handler) if places and opcode in _SCALARS else handler
        table[ord(opcode) if isinstance(opcode, str) else opcode] = placed
    if not places:
        # The reader's own loop reads BININT1 and BINUNICODE.
        table[0x4B] = table[0x58] = None
    return table


EVERY_OPCODE = _table(_ALL)
PROTOCOL_2 = _table(_PROTOCOL_2)
"""What torch's own files are made of."""
PLACING_PROTOCOL_2 = _table(_PROTOCOL_2, places=True)
"""The same; numbers, None, booleans and text become `Placed`."""
