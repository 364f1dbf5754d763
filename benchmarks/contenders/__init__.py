"""Every contender by name, imported only in the process that runs it: one that is not installed costs nothing and is a
row.

`load(name)` gives the class or raises `Unavailable` with the reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass

from benchmarks.contenders.base import Contender, Unavailable


@dataclass(frozen=True)
class Entry:
    """Where a contender lives and which distribution must be installed for it ("" for none beside torch)."""

    module: str
    attribute: str
    distribution: str = ""


REGISTRY: dict[str, Entry] = {
    "torch_save": Entry("torch_save", "TorchSave"),
    "torch_save_fsync": Entry("torch_save", "TorchSaveFsync"),
    "torch_save_fsync_dir": Entry("torch_save", "TorchSaveFsyncDir"),
    "thread_clone": Entry("torch_save", "ThreadClone"),
    "safetensors": Entry("safetensors_file", "SafetensorsFile", "safetensors"),
    "safetensors_fsync": Entry("safetensors_file", "SafetensorsFileFsync", "safetensors"),
    "dcp_save": Entry("dcp", "DcpSave"),
    "dcp_async_thread": Entry("dcp", "DcpAsyncThread"),
    "dcp_async_process": Entry("dcp", "DcpAsyncProcess"),
    "dcp_stager_cached": Entry("dcp", "DcpStagerCached"),
    "dcp_stager_lazy": Entry("dcp", "DcpStagerLazy"),
    "torch_checkpointing": Entry("torch_checkpointing_manager", "TorchCheckpointing", "torch_checkpointing"),
    "torchsnapshot": Entry("torchsnapshot_take", "TorchsnapshotAsyncTake", "torchsnapshot"),
    "lightning_async": Entry("lightning_io", "LightningAsyncCheckpointIO", "lightning"),
    "orbax": Entry("orbax_numpy", "OrbaxAsync", "orbax-checkpoint"),
    "nvidia_resiliency": Entry("nvidia_resiliency", "NvidiaResiliency", "nvidia-resiliency-ext"),
    "dlrover": Entry("dlrover_flash", "DlroverFlash", "dlrover"),
    "deepspeed_torch": Entry("deepspeed_engines", "DeepspeedTorch", "deepspeed"),
    "deepspeed_fast": Entry("deepspeed_engines", "DeepspeedFast", "deepspeed"),
    "deepspeed_fast_python": Entry("deepspeed_engines", "DeepspeedFastPython", "deepspeed"),
    "async_ckpt_eager": Entry("async_ckpt_engine", "AsyncCkptEager"),
    "async_ckpt_guarded": Entry("async_ckpt_engine", "AsyncCkptGuarded"),
}
NAMES = tuple(REGISTRY)


def load(name: str) -> type[Contender]:
    """The contender's class. Raises `Unavailable` (not installed, or its import fails) with the reason."""
    if name not in REGISTRY:
        raise Unavailable(f"unknown contender {name!r}; known: {', '.join(NAMES)}")
    entry = REGISTRY[name]
    if entry.distribution:
        try:
            importlib.metadata.version(entry.distribution)
        except importlib.metadata.PackageNotFoundError as error:
            raise Unavailable(f"not installed: {entry.distribution}") from error
    try:
        module = importlib.import_module(f"benchmarks.contenders.{entry.module}")
    except ImportError as error:
        raise Unavailable(f"import failed: {error}") from error
    kind: type[Contender] = getattr(module, entry.attribute)
    return kind
