"""Loads the safetensors format in parallel. No pickle anywhere."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedStateError
from ..format.safetensors import SafetensorsTensor, read_safetensors
from .build import Place, place_for
from .scatter import Scatter, new_storage, stream_into
from .verified_file import VerifiedFile


def read_tensors(file: VerifiedFile) -> list[tuple[SafetensorsTensor, torch.dtype]]:
    """The file's header, checked, and each tensor's dtype.

    Raises:
        CorruptCheckpointError: the header is malformed. UnsupportedStateError: a dtype that this version or torch does
            not know.
    """
    found = []
    for tensor in read_safetensors(file.view, file.size_bytes, name=file.name):
        dtype = getattr(torch, tensor.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise UnsupportedStateError(
                f"{file.name}: tensor {tensor.name!r} is {tensor.dtype}, which torch {torch.__version__} lacks"
            )
        found.append((tensor, dtype))
    return found


def load_safetensors(file: VerifiedFile, map_location: Any) -> dict[str, torch.Tensor]:
    """All tensors, as `safetensors.torch.load_file` gives them. Blocks.

    Raises:
        UnsupportedStateError: `map_location` is a callable or a mapping (the format has no location tags).
    """
    place: Place | None = place_for(map_location)
    if place is None:
        raise UnsupportedStateError(
            "a safetensors file has no location tags: map_location must be None, a device or its name"
        )
    device = place("cpu")
    scatter = Scatter()
    tensors: dict[str, torch.Tensor] = {}
    for tensor, dtype in read_tensors(file):
        storage = new_storage(tensor.num_bytes, device)
        scatter.add(tensor.offset, tensor.num_bytes, storage)
        empty = torch.empty(0, dtype=dtype, device=device)
        tensors[tensor.name] = empty.set_(storage, 0, tensor.shape, tensor.stride)
    scatter.freeze()
    stream_into(file, scatter)
    return tensors
