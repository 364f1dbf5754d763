"""Finds the targets of a load that share memory, and whether the file has one value for every byte of it.

Two targets agree where both map target bytes to file bytes in the same way (tied in the file too), or where what the
file holds for both is equal wherever they overlap: then the order in which they are filled does not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..format.tensors import TensorExtent
from .build import dtype_of

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_ALIGNMENT_BYTES = 64
_QUANTIZED_AS = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


class _Pair(NamedTuple):
    """A target, its key path, and what is to fill it."""

    path: str
    target: torch.Tensor
    source: Any


Read = Callable[[Sequence[Any]], Sequence[torch.Tensor]]
"""Reads sources into memory."""


def parts_of(tensor: Any) -> list[Any]:
    """The strided tensors over the memory that is written to where `tensor` is filled: itself, or what it is made of;
    none where it is given other memory (sparse ones with coordinates), or where that cannot be told."""
    if isinstance(tensor, TensorExtent):
        return [tensor]
    is_strided = tensor.layout == torch.strided and not tensor.is_quantized
    if is_strided and type(tensor) in PLAIN_TYPES:
        return [tensor]
    if hasattr(tensor, "__tensor_flatten__"):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return [part for held in inner if isinstance(held, torch.Tensor) for part in parts_of(held)]
    if tensor.layout in COMPRESSED:
        by_rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        ends, indices = ("crow_indices", "col_indices") if by_rows else ("ccol_indices", "row_indices")
        return [tensor.values(), getattr(tensor, ends)(), getattr(tensor, indices)()]
    if tensor.dtype in _QUANTIZED_AS:
        place = tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        return [torch.empty(0, dtype=_QUANTIZED_AS[tensor.dtype], device=tensor.device).set_(*place)]
    with contextlib.suppress(RuntimeError, NotImplementedError), torch._C.DisableTorchFunctionSubclass():
        plain = tensor.as_subclass(torch.Tensor)
        return [plain] if is_strided and plain.data_ptr() else []
    return []


def shares_own_memory(tensor: torch.Tensor) -> bool:
    """Whether two elements of a strided tensor lie in the same place (expanded, overlapping windows)."""
    if tensor.is_contiguous():
        return False
    dims = sorted((step, num) for num, step in zip(tensor.shape, tensor.stride(), strict=True) if num > 1)
    reach = 0
    for step, num in dims:
        if step <= reach:
            break
        reach += (num - 1) * step
    else:
        return False
    if dims[0][0] == 0:
        return True
    # Interleaved dimensions may still miss each other: count the places.
    reach = sum((num - 1) * step for step, num in dims)
    places = torch.zeros(reach + 1, dtype=torch.uint8, device="cpu")
    places.as_strided(tensor.shape, tensor.stride()).fill_(1)
    return int(places.count_nonzero()) < tensor.numel()


def compare_shared(found: Mapping[str, Any], wanted: Mapping[str, torch.Tensor], read: Read) -> dict[str, str]:
    """Targets that share memory, but not what the file holds for it, by key path, in words. Blocks for `read`, where it
    must."""
    parts = [(path, k, part) for path, target in wanted.items() for k, part in enumerate(parts_of(target))]
    clashes: list[tuple[str, str]] = []
    for group in overlapping([part for _, _, part in parts]):
        cluster = [_Pair(path, part, parts_of(found[path])[k]) for path, k, part in map(parts.__getitem__, group)]
        if not all(_agree(cluster[0], other) for other in cluster):
            clashes += _differing(cluster, read([pair.source for pair in cluster]))
    in_memory = {path for path, _, _ in parts}
    objects: dict[int, str] = {}
    for path, target in wanted.items() if len(in_memory) < len(wanted) else ():
        first = objects.setdefault(id(target), path)
        if path not in in_memory and found[first] is not found[path]:
            clashes.append((first, path))
    words = "{}: the given tensor shares memory with {}, and the file holds different bytes for them"
    return {path: words.format(path, other) for a, b in clashes for path, other in ((b, a), (a, b))}


def overlapping(targets: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Groups of more than one target, by index, each overlapping another of its group in its range of bytes. There are
    none, mostly: nothing but numbers is made for each target."""
    # Addresses of two devices have nothing to do with each other.
    where = {i: (target.get_device(), target.data_ptr()) for i, target in enumerate(targets) if target.numel()}
    group: list[int] = []
    reach = (-2, 0)
    for i in sorted(where, key=where.__getitem__):
        device, first = where[i]
        if device != reach[0] or first >= reach[1]:
            if len(group) > 1:
                yield group
            group, reach = [], (device, 0)
        group.append(i)
        reach = device, max(reach[1], _extent(targets[i])[1])
    if len(group) > 1:
        yield group


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    first = tensor.data_ptr()
    if tensor.is_contiguous():
        return first, first + tensor.nbytes
    last = sum((num - 1) * step for num, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.dtype.itemsize


def _agree(a: _Pair, b: _Pair) -> bool:
    (byte_a, layout_a), (byte_b, layout_b) = _geometry(a.source), _geometry(b.source)
    (to_a, target_a), (to_b, target_b) = _geometry(a.target), _geometry(b.target)
    if (to_a, target_a) == (to_b, target_b):
        return (byte_a, layout_a) == (byte_b, layout_b)
    return byte_a - to_a == byte_b - to_b and layout_a == target_a and layout_b == target_b


def _geometry(tensor: TensorExtent | torch.Tensor) -> tuple[int, tuple[Any, ...]]:
    """Where its first byte is, in the file or in memory, and what decides which byte is which element."""
    if isinstance(tensor, TensorExtent):
        first, bits = tensor.offset, (False, False)
    else:
        first, bits = tensor.data_ptr(), (tensor.is_conj(), tensor.is_neg())
    return first, (dtype_of(tensor), tuple(tensor.shape), dims_of(tensor), *bits)


def dims_of(tensor: TensorExtent | torch.Tensor) -> tuple[tuple[int, int], ...]:
    """What of its shape and strides says where its elements lie: of a dimension of one, the stride means nothing."""
    stride = tensor.stride if isinstance(tensor, TensorExtent) else tensor.stride()
    return tuple((num, step) for num, step in zip(tensor.shape, stride, strict=True) if num > 1)


def _differing(cluster: Sequence[_Pair], values: Sequence[torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Fill a copy of the memory in order, and see whom the later ones have overwritten with something else."""
    if any(pair.target.shape != value.shape for pair, value in zip(cluster, values, strict=True)):
        # Parts of tensors that are spread over the ranks in another way.
        yield from ((cluster[0].path, other.path) for other in cluster[1:])
        return
    start = min(_extent(pair.target)[0] for pair in cluster) // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES
    storage = torch.UntypedStorage(max(_extent(pair.target)[1] for pair in cluster) - start)
    places = [_place(pair.target, storage, start) for pair in cluster]
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
    for i, (pair, place, value) in enumerate(zip(cluster, places, values, strict=True)):
        if same_bytes(place, value):
            continue
        for k in range(i + 1, len(cluster)):
            place.copy_(value)
            places[k].copy_(values[k])
            if not same_bytes(place, value):
                yield pair.path, cluster[k].path


def _place(target: torch.Tensor, storage: torch.UntypedStorage, start: int) -> torch.Tensor:
    offset = (target.data_ptr() - start) // target.dtype.itemsize
    place: torch.Tensor = torch.empty(0, dtype=target.dtype, device="cpu").set_(
        storage, offset, target.shape, target.stride()
    )
    place = torch._neg_view(place) if target.is_neg() else place
    return place.conj() if target.is_conj() else place


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two strided tensors of one shape hold the same values, bit by bit."""
    return torch.equal(*(t.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8) for t in (a, b)))
