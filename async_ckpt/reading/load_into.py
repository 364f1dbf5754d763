"""Fills existing tensors from a committed file.

Guarantees:
- All names, shapes and dtypes are compared, and all differences listed, before the first byte moves; so are the values
  for memory that several of the given tensors share. What is returned is put together before it, too.
- With `atomic=True`, a failure leaves the tensors as they were: on the CPU old bytes are set aside and written back,
  tensors on a GPU are untouched until every byte was read (and verified, with `verify="full"`).
- Values are moved bit by bit; autograd's version counters see the change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import ConfigError, StateMismatchError
from ..format.tensors import TensorExtent
from ..host.device import beside_captures, is_copyable, synchronize_device
from ..host.facts import available_memory_bytes
from ..threads.locks import TRIES
from .build import CPU, TensorBuilder, dtype_of
from .errors import telling_overwritten
from .scatter import Rollback, stream_into
from .shared_memory import COMPRESSED, PLAIN_TYPES, compare_shared, dims_of, shares_own_memory
from .state_tree import dotted, flatten, match_leaves, replace_leaves
from .verified_file import VerifiedFile

if TYPE_CHECKING:
    from collections.abc import Mapping

Atomic = bool | Literal["auto"]
Source = TensorExtent | torch.Tensor


@dataclass(frozen=True)
class Restored:
    """What `load_into` did. `state` is the file's structure with your tensors in it; `loaded` and `mismatches` name key
    paths."""

    state: Any
    loaded: tuple[str, ...]
    mismatches: tuple[str, ...] = ()
    read_bytes: int = 0
    """What of the file was read by this process, from the disk or store; more than its size where it was read twice."""
    tag: str = ""
    """The checkpoint that it came from."""


def match(
    file: VerifiedFile,
    structure: Any,
    target: Any,
    *,
    strict: bool = True,
    select: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> tuple[Mover, Restored]:
    """What of `structure` (leaves: `TensorExtent`, or tensors already in memory) is to move where in `target`, and what
    comes of it; no byte is moved yet. With `select` only the extents that hold the
    selected tensors are to be read. Raises StateMismatchError: with `strict`, if anything differs; names of `select` or
    `rename` do not fit."""
    leaves = {path: leaf for path, leaf in flatten(structure, file.size_bytes) if isinstance(leaf, Source)}
    wanted = {path: leaf for path, leaf in flatten(target) if isinstance(leaf, torch.Tensor)}
    found, origin = leaves, {path: path for path in leaves}
    if select is not None or rename:
        found, wanted, origin = match_leaves(leaves, wanted, select or "", rename or {}, file.name)
    differences = compare(found, wanted)
    fitting = {path: wanted[path] for path in wanted if path not in differences}
    differences |= compare_shared(found, fitting, partial(_read, file))
    if strict and differences:
        listed = "".join(f"\n  {line}" for line in differences.values())
        raise StateMismatchError(
            f"{file.name} does not match the given state in {len(differences)} places; no tensor was changed:{listed}",
            tuple(differences.values()),
        )
    loaded = {path: tensor for path, tensor in wanted.items() if path not in differences}
    mover = Mover(range(file.num_extents) if select is None else _extents_of(file, [found[path] for path in loaded]))
    for path, tensor in loaded.items():
        mover.add(found[path], tensor)
    # Whatever may fail comes before the first byte moves.
    placed = {origin[path]: tensor for path, tensor in loaded.items()}
    if select is None:
        rest = {path: mover.fresh(leaf) for path, leaf in leaves.items() if path not in placed}
        state = replace_leaves(structure, {**rest, **placed})
    else:
        state = {dotted(path): tensor for path, tensor in placed.items()}
    return mover, Restored(state, tuple(loaded), tuple(differences.values()))


def compare(found: Mapping[str, Source], wanted: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What differs, by key path, in words."""
    differences: dict[str, str] = {}
    for path, tensor in wanted.items():
        source = found.get(path)
        if source is None:
            differences[path] = f"missing: {path} is not in the file"
            continue
        words = []
        dtype = dtype_of(source)
        if dtype != tensor.dtype:
            words.append(f"dtype {dtype} in the file, {tensor.dtype} given")
        if tensor.is_nested or (isinstance(source, torch.Tensor) and source.is_nested):
            words.append("nested tensors cannot be filled in place")
        elif tuple(source.shape) != tuple(tensor.shape):
            words.append(f"shape {tuple(source.shape)} in the file, {tuple(tensor.shape)} given")
        words += _unfit(source, tensor)
        if words:
            differences[path] = f"{path}: " + ", ".join(words)
    for path in found:
        if path not in wanted:
            differences[path] = f"unexpected: {path} is only in the file"
    return differences


def _unfit(source: Source, tensor: torch.Tensor) -> Iterable[str]:
    if tensor.is_meta:
        yield "the given tensor has no memory (meta device)"
    elif type(tensor) not in PLAIN_TYPES and type(tensor) is not type(source):
        yield f"the given tensor is a {type(tensor).__name__}, the one in the file is plain"
    elif type(tensor) is not type(source) and hasattr(source, "__tensor_flatten__"):
        yield f"the tensor in the file is a {type(source).__name__}, the given one is plain"
    elif isinstance(source, torch.Tensor) and source.layout != tensor.layout:
        yield f"layout {source.layout} in the file, {tensor.layout} given"
    elif tensor.is_nested:
        return
    elif tensor.layout != torch.strided:
        if isinstance(source, TensorExtent):
            yield f"layout torch.strided in the file, {tensor.layout} given"
        elif tensor.layout in COMPRESSED and source.values().shape != tensor.values().shape:
            yield f"values of shape {tuple(source.values().shape)} in the file, {tuple(tensor.values().shape)} given"
    elif tensor.is_quantized and isinstance(source, torch.Tensor) and source.qscheme() != tensor.qscheme():
        yield f"{source.qscheme()} in the file, {tensor.qscheme()} given"
    elif shares_own_memory(tensor):
        yield "elements of the given tensor share memory (expanded, or overlapping windows)"


def _read(file: VerifiedFile, sources: Sequence[Source]) -> list[torch.Tensor]:
    """The values of some tensors of the file, in fresh memory."""
    mover = Mover(())
    values = [mover.fresh(source).detach() for source in sources]
    mover.read(file, _extents_of(file, sources))
    return values


def _extents_of(file: VerifiedFile, sources: Iterable[Source]) -> list[int]:
    """The extents that hold these tensors' storages, ascending."""
    found = (file.extents_of(s.storage.offset, s.storage.num_bytes) for s in sources if isinstance(s, TensorExtent))
    return sorted(set[int]().union(*found))


class Mover:
    """Collects moves, then does them all at once, reading these extents."""

    def __init__(self, extents: Sequence[int]) -> None:
        self.extents = extents
        self._builder = TensorBuilder(lambda tag: CPU)
        self.scatter = self._builder.scatter
        self._direct: list[torch.Tensor] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, source: Source, target: torch.Tensor) -> None:
        """Move `source` into `target`: straight where the bytes lie in the same order, else through a copy."""
        if isinstance(source, TensorExtent) and _same_order(source, target):
            first = int(target.storage_offset()) * target.dtype.itemsize
            self.scatter.add(source.offset, source.num_bytes, target.untyped_storage(), first)
            self._direct.append(target)
        else:
            self._copies.append((target, self.fresh(source)))

    def fresh(self, source: Source) -> torch.Tensor:
        """A new CPU tensor for `source`; tensors that share a storage in the file share one again."""
        return source if isinstance(source, torch.Tensor) else self._builder.tensor(source)

    def read(self, file: VerifiedFile, extents: Iterable[int]) -> None:
        """Fill what `fresh` has made. Blocks."""
        self.scatter.freeze()
        stream_into(file, self.scatter, extents)

    def run(self, file: VerifiedFile, atomic: Atomic) -> None:
        """Read, verify, move. Raises ConfigError: too little memory for `atomic=True`; and as `VerifiedFile`."""
        held = self._held_extents(file, atomic)
        with self.changing():
            if atomic and not self.scatter.streams:
                self._overwrite_or_restore(file, held)
                return
            if atomic:
                file.keep(held)
                file.stream(None, self.extents[len(held) :])
            self._overwrite(file)
            self.copy()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Around whatever puts the file's bytes through `scatter`, and then calls `copy`."""
        self.scatter.freeze()
        targets = [*self._direct, *(target for target, _ in self._copies)]
        for device in {tensor.device for tensor in targets if tensor.device.type != "cpu"}:
            # Kernels that still read the old values may be queued on any stream.
            synchronize_device(device)
        tracked = [tensor for tensor in self._direct if not tensor.is_inference()]
        for tensor in tracked:
            # A snapshot that is being taken of it must see the first change, not only the last.
            torch.autograd.graph.increment_version(tensor)
        yield
        for tensor in tracked:
            torch.autograd.graph.increment_version(tensor)

    def _held_extents(self, file: VerifiedFile, atomic: Atomic) -> Sequence[int]:
        """The first extents, whose old or new bytes are held in memory: all, or as many as half of it takes."""
        available = available_memory_bytes()
        if atomic is not True:
            return self.extents[: available // 2 // file.extent_bytes]
        copied = sum(target.nbytes for target, _ in self._copies)
        needed = copied + (file.size_bytes if self.scatter.streams else self.scatter.num_target_bytes)
        if needed > available:
            raise ConfigError(
                f"{file.name}: atomic=True sets {needed} bytes aside and {available} are available; no tensor was "
                "changed. atomic='auto' verifies what does not fit before it overwrites it, and reads it twice"
            )
        return self.extents

    def _overwrite_or_restore(self, file: VerifiedFile, held: Sequence[int]) -> None:
        """Read into the targets, the old bytes set aside as far as memory goes; what exceeds it is verified before, and
        read again."""
        rest = self.extents[len(held) :]
        rollback = Rollback(self.scatter, file.lend, file.extent_bytes)
        before: list[tuple[torch.Tensor, torch.Tensor]] = []
        # What was written last goes first.
        steps_back = partial(_copy, before), rollback.roll_back
        try:
            file.stream(None, rest)
            file.stream(rollback, held)
            if rest:
                self._overwrite(file, rest)
            before += [(target, target.detach().clone()) for target, _ in self._copies]
            self.copy()
        except BaseException:
            interrupted: BaseException | None = None
            # Not in a function: an interrupt at its call would leave new values beside old ones.
            for undo in steps_back:
                for _ in TRIES:
                    try:
                        undo()
                        break
                    except BaseException as error:  # noqa: BLE001 -- raised below
                        interrupted = error
            if interrupted is not None:
                raise interrupted  # noqa: B904 -- its context is what was raised first
            raise
        finally:
            rollback.close()

    def copy(self) -> None:
        """Move what does not lie in the file in the same order, once `scatter` has all bytes."""
        _copy(self._copies)

    def _overwrite(self, file: VerifiedFile, extents: Iterable[int] | None = None) -> None:
        with telling_overwritten():
            stream_into(file, self.scatter, self.extents if extents is None else extents)


@torch.no_grad()
def _copy(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give each first tensor the values of the second."""
    for target, source in pairs:
        with beside_captures(target.device):
            target.copy_(source)


def _same_order(source: TensorExtent, target: torch.Tensor) -> bool:
    """Whether the elements are one run of bytes on both sides, in one order: contiguous, or the same permutation, such
    as channels_last or a transpose."""
    if type(target) not in PLAIN_TYPES or not is_copyable(target.device) or target.is_conj() or target.is_neg():
        return False
    # No two elements of the target share a place, as was looked at before: where none is left out, it is dense.
    is_dense = source.extent_bytes == source.num_bytes
    return is_dense and (source.stride == target.stride() or dims_of(source) == dims_of(target))
