"""Reads DCP's `.metadata` without running code: only the classes that DCP itself puts there are found."""

from __future__ import annotations

import io
import pickle
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from ...errors import CorruptCheckpointError

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath"},
}
_DTYPE_MODULE = "torch"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == _DTYPE_MODULE:
            import torch

            found = getattr(torch, name, None)
            if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which DCP metadata does not hold")


def decode_metadata(raw: bytes, *, source: str) -> Metadata:
    """The `Metadata` in `raw`.

    Raises:
        CorruptCheckpointError: it is no DCP metadata, or names anything else; nothing of it was run.
    """
    try:
        metadata = _Unpickler(io.BytesIO(raw)).load()
    except (pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"{source} is not readable as DCP metadata: {error}", path=source) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CorruptCheckpointError(f"{source} holds no DCP metadata", path=source)
    return metadata
