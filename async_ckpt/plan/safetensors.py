"""The safetensors layout: a JSON header, then the tensors back to back, as `safetensors.torch.save` writes them.

The format knows neither sharing nor strides: tensors that share a storage are written once each, and a tensor that is
not contiguous is written row by row. The order of dtypes and their names are asked from the safetensors library itself.
"""

from __future__ import annotations

import json
import sys
from math import prod
from typing import Any

import torch

from ..errors import ConfigError, UnsupportedStateError
from ..format.safetensors import MAX_HEADER_BYTES
from .plan import FilePlan, PlannedState, version_counters
from .strided import Strided
from .structure import TENSOR_TYPES, NotPlainError, picker
from .tensor_columns import Columns, Live, look_at

Bits = dict[int, tuple[bool, bool]]
"""By tensor, of those that have one: the conjugate and the negative bit."""


class SafetensorsPlan:
    """One set of names, dtypes and shapes laid out. Keeps no tensor; can be reused while names and facts are equal."""

    def __init__(
        self, names: list[str], live: Live, facts: Columns, bits: Bits, metadata: dict[str, str] | None
    ) -> None:
        self.names = names
        self.facts = names, facts, bits, metadata
        """All that must be equal."""
        formats = _formats(names, facts.dtypes)
        order = sorted(range(len(names)), key=lambda index: (formats[facts.dtypes[index]][0], names[index].encode()))
        entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        filled: list[int] = []
        begins: list[int] = []
        payload_nbytes: list[int] = []
        end = 0
        for index in order:
            dtype, shape = facts.dtypes[index], list(facts.sizes[index])
            begin, end = end, end + prod(shape) * dtype.itemsize
            if begin < end:
                filled.append(index)
                begins.append(begin)
                payload_nbytes.append(end - begin)
            _, dtype_name, factor = formats[dtype]
            shape[-1:] = [length * factor for length in shape[-1:]]
            entries[names[index]] = {"dtype": dtype_name, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER_BYTES:
            raise UnsupportedStateError(
                f"the safetensors header would have {len(text)} bytes; the format allows {MAX_HEADER_BYTES}"
            )
        header = len(text).to_bytes(8, "little") + text
        self._pick = picker(filled)
        self._starts = [facts.offsets[index] * facts.dtypes[index].itemsize for index in filled]
        self.plan = FilePlan(
            file_bytes=len(header) + end,
            literals=((0, header),),
            payload_offsets=[len(header) + begin for begin in begins],
            payload_nbytes=payload_nbytes,
            format="safetensors",
            planner="safetensors",
            strided={
                payload: Strided(facts.dtypes[index], facts.sizes[index], facts.strides[index], *bits.get(index, ()))
                for payload, index in enumerate(filled)
                if index in bits or not live.tensors[index].is_contiguous()
            },
        )

    def planned(
        self, tensors: list[torch.Tensor], versions: list[int | None], live: Live, *, cached: bool
    ) -> PlannedState:
        names, storages = self.names, self._pick(live.storages)
        return PlannedState(
            plan=self.plan,
            storages=storages,
            starts=self._starts,
            storage_ids=self._pick(live.storage_ids),
            devices=frozenset(storage.device for storage in storages),
            tensors=tensors,
            versions=versions,
            tensor_paths=lambda: [f"[{n!r}]" for n in names],
            cached=cached,
        )


def plan_safetensors(obj: Any, previous: SafetensorsPlan | None) -> tuple[SafetensorsPlan, PlannedState]:
    """Plan a flat dict of str -> dense tensor, reusing `previous` where it fits. Raises UnsupportedStateError with the
    key path.

    "__metadata__" may hold a dict of str -> str, as in the file's header.
    """
    metadata, obj = _metadata(obj)
    names, tensors = _flat(obj)
    versions, bits = version_counters(tensors), Bits()
    try:
        live, facts = look_at(tensors)
    except NotPlainError:
        bits = {i: (t.is_conj(), t.is_neg()) for i, t in enumerate(tensors) if t.is_conj() or t.is_neg()}
        live, facts = look_at([_plain(name, tensor) for name, tensor in zip(names, tensors, strict=True)])
    if any(live.storages[i].data_ptr() == 0 for i, size in enumerate(facts.sizes) if 0 not in size):
        raise UnsupportedStateError("a tensor of the state has no readable data; nothing was written")
    if previous is not None and previous.facts == (names, facts, bits, metadata):
        return previous, previous.planned(tensors, versions, live, cached=True)
    plan = SafetensorsPlan(names, live, facts, bits, metadata)
    return plan, plan.planned(tensors, versions, live, cached=False)


def _metadata(obj: Any) -> tuple[dict[str, str] | None, Any]:
    if not isinstance(obj, dict) or "__metadata__" not in obj:
        return None, obj
    found = obj["__metadata__"]
    if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise _refused("takes a dict of str to str here", "__metadata__")
    return dict(found), {key: value for key, value in obj.items() if key != "__metadata__"}


def _flat(obj: Any) -> tuple[list[str], list[torch.Tensor]]:
    if not isinstance(obj, dict):
        raise _refused(f"takes a dict of tensors, not a {type(obj).__name__}")
    for key, value in obj.items():
        if not isinstance(key, str):
            raise _refused(f"takes str keys, not {type(key).__name__}", key)
        if type(value) not in TENSOR_TYPES:
            raise _refused(f"takes tensors, not {type(value).__name__}", key)
    return list(obj), list(obj.values())


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The memory of `tensor`, without Python attributes and its conjugate and negative bit, or an error that names
    it."""
    try:
        memory = tensor.detach().conj() if tensor.is_conj() else tensor.detach()
        memory = torch._neg_view(memory) if memory.is_neg() else memory
        look_at([memory])
    except (NotPlainError, RuntimeError, NotImplementedError) as error:
        raise _refused(f"takes dense tensors whose bytes can be copied ({error})", name) from error
    return memory


def _formats(names: list[str], dtypes: list[torch.dtype]) -> dict[torch.dtype, tuple[int, str, int]]:
    """Each dtype's rank in the file, name in the header, and how many elements the header counts per torch element.
    Raises UnsupportedStateError with the key path: the library does not know one.
    """
    try:
        import safetensors.torch as library
    except ModuleNotFoundError as error:
        message = 'format="safetensors" needs the safetensors package: install async-ckpt[safetensors]'
        raise ConfigError(message) from error
    refusals = (ValueError, LookupError, TypeError, RuntimeError, sys.modules["safetensors"].SafetensorError)
    examples: dict[str, torch.Tensor] = {}
    listed: list[torch.dtype] = []
    raw = library.save(examples)
    for dtype in dict.fromkeys(dtypes):
        examples[str(len(listed))] = torch.empty((0, 3), dtype=dtype, device="cpu")
        listed.append(dtype)
        try:
            raw = library.save(examples)
        except refusals as error:
            raise _refused(f"has no {dtype}", names[dtypes.index(dtype)]) from error
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {
        listed[int(key)]: (rank, entry["dtype"], entry["shape"][1] // 3)
        for rank, (key, entry) in enumerate(header.items())
    }


def _refused(what: str, *key: object) -> UnsupportedStateError:
    where = f"state[{key[0]!r}]: " if key else ""
    return UnsupportedStateError(f"{where}safetensors {what}; nothing was written")
