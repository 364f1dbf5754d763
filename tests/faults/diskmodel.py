"""What a disk may hold after power loss, computed from recorded calls.

The model is harsher than any real file system. For the calls before a chosen instant:

- File data and length are kept as of the file's last fsync; what came later may be absent, there, half there, or zeros
  of the new length, for each file on its own. O_DIRECT changes nothing: without a sync the device may lose it.
- A change of names is kept for certain only when its directory was fsynced afterwards. Of the others any subset may be
  kept, in any order of directories; one rename or exchange is atomic. fsync of a file keeps no name.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.support.faulty_filesystem import Operation

Fate = Literal["lost", "kept", "half", "zeros", "no tail"]
FATES: tuple[Fate, ...] = ("lost", "kept", "half", "zeros", "no tail")
State = dict[str, bytes | None]
"""Relative path to content; None is a directory."""


@dataclass
class _Data:
    """One file."""

    durable: bytes = b""
    now: bytearray = field(default_factory=bytearray)
    last_write: tuple[int, int] = (0, 0)

    def after(self, fate: Fate) -> bytes:
        now, (start, stop) = bytes(self.now), self.last_write
        if now == self.durable or fate == "lost":
            return self.durable
        left = {"kept": now, "half": now[: len(now) // 2], "zeros": bytes(len(now))}
        return left.get(fate, now[:start] + bytes(stop - start) + now[stop:])


Change = dict[tuple[int, str], int | None]
"""(directory, name) to what it names from now on; one atomic change of names."""


class DiskModel:
    """Feed it the calls in order with `apply`; `states` are what may be found if the power fails now."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.normpath(root)
        self._files: dict[int, _Data] = {}
        self._names: dict[tuple[int, str], int] = {}
        self._pending: list[Change] = []
        self._folders = {0}
        self._next = 1
        self._load(Path(self._root), 0)
        self._durable = dict(self._names)

    def _load(self, path: Path, folder: int) -> None:
        for inner in sorted(path.iterdir()):
            number = self._new()
            self._names[folder, inner.name] = number
            if inner.is_dir():
                self._folders.add(number)
                self._load(inner, number)
            else:
                data = inner.read_bytes()
                self._files[number] = _Data(data, bytearray(data))

    def _new(self) -> int:
        self._next += 1
        return self._next - 1

    def _find(self, path: str) -> tuple[tuple[int, str], int | None]:
        """((directory, name), what it names now)."""
        relative = os.path.relpath(path, self._root)
        if relative == ".":
            return (-1, ""), 0
        *folders, name = relative.split("/")
        folder = 0
        for part in folders:
            folder = self._names[folder, part]
        return (folder, name), self._names.get((folder, name))

    def _change(self, change: Change) -> None:
        self._pending.append(change)
        _apply(self._names, change)

    def apply(self, op: Operation) -> None:
        """One call that succeeded."""
        if op.outcome != "ok" or not os.path.normpath(op.path).startswith(self._root):
            return
        if op.name in ("pwrite", "clone", "truncate", "allocate"):
            self._write(op)
        elif op.name == "fsync":
            self._sync(op)
        elif op.name in ("create", "mkdir"):
            number = self._new()
            if op.name == "create":
                self._files[number] = _Data()
            else:
                self._folders.add(number)
            self._change({self._find(op.path)[0]: number})
        elif op.name in ("unlink", "rmdir"):
            self._change({self._find(op.path)[0]: None})
        elif op.name in ("rename", "exchange", "link"):
            assert op.dst is not None
            (source, what), (target, other) = self._find(op.path), self._find(op.dst)
            left = {} if op.name == "link" else {source: other if op.name == "exchange" else None}
            self._change({**left, target: what})

    def _write(self, op: Operation) -> None:
        number = self._find(op.path)[1]
        assert number is not None and op.num_bytes is not None
        data = self._files[number]
        if op.name in ("pwrite", "clone"):
            assert op.offset is not None and op.data is not None
            end = op.offset + op.num_bytes
            data.now.extend(bytes(max(0, end - len(data.now))))
            data.now[op.offset : end] = op.data
            data.last_write = (op.offset, end)
        elif op.name == "truncate":
            del data.now[op.num_bytes :]
            data.now.extend(bytes(op.num_bytes - len(data.now)))
            data.last_write = (min(data.last_write[0], op.num_bytes), min(data.last_write[1], op.num_bytes))
        else:
            data.now.extend(bytes(max(0, (op.offset or 0) + op.num_bytes - len(data.now))))

    def _sync(self, op: Operation) -> None:
        number = self._find(op.path)[1]
        assert number is not None
        if number in self._files:
            data = self._files[number]
            data.durable = bytes(data.now)
            return
        kept = [change for change in self._pending if any(folder == number for folder, _ in change)]
        for change in kept:
            _apply(self._durable, change)
        self._pending = [change for change in self._pending if change not in kept]

    # What may be there.

    def states(self, chance: random.Random, num_random: int) -> Iterator[tuple[str, State]]:
        """Legal states after power loss now: extremes, each single change lost or alone kept, and some at random."""
        everything = range(len(self._pending))
        subsets: list[tuple[str, Iterable[int]]] = [("no names kept", ()), ("all names kept", everything)]
        for k in everything:
            what = ", ".join(name for _, name in self._pending[k])
            subsets += [(f"only {what} kept", (k,)), (f"only {what} lost", [i for i in everything if i != k])]
        for _ in range(num_random):
            subsets.append(("random names kept", [i for i in everything if chance.random() < 0.5]))
        for text, subset in subsets:
            fates: list[Fate | None] = [chance.choice(FATES), None] if "only" in text else [*FATES, None]
            for fate in fates:
                chosen = {number: fate or chance.choice(FATES) for number in sorted(self._files)}
                yield f"{text}, unsynced data {fate or 'mixed'}", self._state(subset, chosen)

    def _state(self, subset: Iterable[int], fates: dict[int, Fate]) -> State:
        names = copy.copy(self._durable)
        for k in subset:
            _apply(names, self._pending[k])
        state: State = {}

        def walk(folder: int, prefix: str, seen: frozenset[int]) -> None:
            for (where, name), number in names.items():
                if where != folder or number in seen:
                    continue
                if number in self._folders:
                    state[prefix + name] = None
                    walk(number, prefix + name + "/", seen | {number})
                else:
                    state[prefix + name] = self._files[number].after(fates[number])

        walk(0, "", frozenset({0}))
        return state


def _apply(names: dict[tuple[int, str], int], change: Change) -> None:
    for key, number in change.items():
        if number is None:
            names.pop(key, None)
        else:
            names[key] = number


def write_state(state: State, root: Path) -> None:
    """Make `root` hold that state."""
    root.mkdir()
    for name in sorted(state):
        content = state[name]
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
