"""Pickles that nobody has written by hand: damaged real ones, and random rows of opcodes that refer to each other.

``python -m tests.format.pickle_fuzz 100000`` reads so many, each within a bound on its time and memory.
"""

from __future__ import annotations

import contextlib
import io
import random
import resource
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from async_ckpt.errors import CheckpointError
from async_ckpt.format.inert import Fingerprint, MalformedPickleError, describe
from async_ckpt.format.named import listing, names_in, places_named
from async_ckpt.format.pickles import read_inert
from async_ckpt.format.tensors import leaves
from async_ckpt.format.zip_directory import Record
from async_ckpt.reading.build import NotPlainError, load_plain
from async_ckpt.reading.records import refuse_crafted

MAX_S = 2.0
MAX_S_PER_BYTE = 50e-6
MAX_BYTES = 64 << 20
MAX_BYTES_PER_BYTE = 1000

RECORDS = {f"data/{key}": Record(64, num_bytes, 0) for key, num_bytes in (("0", 24), ("1", 24), ("2", 16))}
NAMES = [
    b"ccollections\nOrderedDict\n",
    b"ccollections\nCounter\n",
    b"cbuiltins\nset\n",
    b"c__builtin__\nlist\n",
    b"cbuiltins\nbytearray\n",
    b"ctorch\nSize\n",
    b"ctorch\ndevice\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nfloat32\n",
    b"ctorch\nonnx\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"c_codecs\nencode\n",
    b"cos\n\x1b[31msystem\n",
]


def real_pickles() -> list[bytes]:
    """What torch itself writes."""
    weight = torch.ones(2, 3)
    ordered = OrderedDict(w=weight, t=weight.t(), size=weight.shape)
    ordered._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    states: list[Any] = [
        {
            "m": ordered,
            "p": torch.nn.Parameter(weight),
            "n": [1, -5, 70_000, 1 << 80, 0.5, None, True],
            (1, "a"): b"bytes",
        },
        [{1, 2}, torch.ones(2, dtype=torch.complex64).conj(), torch.device("cpu"), torch.float16, "text"],
    ]
    found = []
    for state in states:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        found.append(zipfile.ZipFile(buffer).read("archive/data.pkl"))
    return found


def mutant(chance: random.Random, real: bytes) -> bytes:
    """A real pickle, damaged in a few places, some of them by whole opcodes."""
    raw = bytearray(real)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(raw))
        kind = chance.randrange(4)
        if kind == 0:
            raw[at] = chance.randrange(256)
        elif kind == 1:
            del raw[at : at + chance.randint(1, 20)]
        elif kind == 2:
            raw[at:at] = opcode(chance)
        else:
            start = chance.randrange(len(raw))
            raw[at:at] = raw[start : start + chance.randint(1, 200)] * chance.choice((1, 1, 50))
    return bytes(raw)


def opcode(chance: random.Random) -> bytes:
    """One opcode with its arguments; references are to the first few things put into the memo."""
    small = bytes((chance.randrange(6),))
    return chance.choice(
        (
            chance.choice(NAMES),
            b"K" + small,
            b"\x8a\x08" + chance.randbytes(8),
            b"G" + chance.randbytes(8),
            b"X\x03\0\0\0" + chance.choice((b"abc", b"cpu", b"\x1b[0")),
            b"q" + small,
            b"h" + small,
            b"h" + small,
            b"h" + small,
            *(bytes((code,)) for code in b"N\x88\x89)]}(tRb\x81Qaesu\x85\x86\x8702"),
        )
    )


def row(chance: random.Random) -> bytes:
    """A random row of opcodes; a part of it may be said again and again."""
    parts = [opcode(chance) for _ in range(chance.randint(1, 60))]
    if chance.random() < 0.5:
        at = chance.randrange(len(parts))
        again = parts[at : at + chance.randint(1, 6)] * chance.choice((10, 300, 5000))
        parts[at:at] = again
    return b"\x80\x02" + b"".join(parts) + b"."


def inputs(num: int, seed: int) -> Iterator[bytes]:
    """`num` of them, half of each kind."""
    chance = random.Random(seed)
    real = real_pickles()
    for number in range(num):
        yield row(chance) if number % 2 else mutant(chance, chance.choice(real))


def look_into(pickled: bytes) -> None:
    """What `inspect` does."""
    with contextlib.suppress(MalformedPickleError, CheckpointError):
        for leaf in leaves(pickled, RECORDS):
            assert str(getattr(leaf, "text", "")).isprintable()
        structure = read_inert(pickled)
        assert describe(structure).isprintable()
        Fingerprint(len(pickled))(structure)


def read_plainly(pickled: bytes) -> None:
    """What `load` does first."""
    with contextlib.suppress(NotPlainError, CheckpointError):
        load_plain(pickled, RECORDS)


def read_before_torch(pickled: bytes) -> None:
    """What `load` does where only torch can read it, and what it says if torch refuses."""
    with contextlib.suppress(MalformedPickleError, CheckpointError):
        refuse_crafted(pickled, "m.pt", "data.pkl", RECORDS)
        assert len(listing(places_named(pickled, names_in(pickled)))) < 100_000


READERS: tuple[Callable[[bytes], None], ...] = (look_into, read_plainly, read_before_torch)


def check(pickled: bytes) -> None:
    """Read `pickled` in every way, within the bounds."""
    for reader in READERS:
        before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        started = time.thread_time()
        reader(pickled)
        took_s = time.thread_time() - started
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes
        assert took_s < MAX_S + MAX_S_PER_BYTE * len(pickled), (
            f"{reader.__name__}: {took_s:.1f} s for {len(pickled)} bytes"
        )
        assert grown < MAX_BYTES + MAX_BYTES_PER_BYTE * len(pickled), (
            f"{reader.__name__}: {grown} bytes for {len(pickled)}"
        )


def fuzz(num: int, seed: int) -> None:
    """Check `num` inputs; what fails is in the message."""
    for pickled in inputs(num, seed):
        try:
            check(pickled)
        except Exception as error:
            raise AssertionError(
                f"{pickled[:2000]!r} ({len(pickled)} bytes): {type(error).__name__}: {error}"
            ) from error


if __name__ == "__main__":
    fuzz(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 1)
