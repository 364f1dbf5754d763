"""Every device that torch has, through `torch.accelerator`, `torch.Stream` and `torch.Event`: nothing else knows how
devices differ.

Guarantees:
- The device and stream that a caller has chosen are the same after each call here. A thread of the package keeps what
  it was given: to go back to device 0 would make a context there, in every rank.
- Memory is pinned under the device that was the caller's when it asked for it, on whatever thread that happens.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch

from ..errors import ConfigError, TransactionStateError, UnsupportedStateError

THREAD_PREFIX = "async-ckpt"
"""Of the names of all threads of the package."""

Registrar = tuple[Callable[[int, int], object], Callable[[int], object]]
"""What pins (address, bytes) of memory that exists already, and what unpins it; both return 0, or an error code of the
device's.
"""


def _cuda_registrar() -> Registrar:
    cudart = torch.cuda.cudart()
    return lambda address, num_bytes: cudart.cudaHostRegister(address, num_bytes, 0), cudart.cudaHostUnregister


registrars: dict[str, Callable[[], Registrar]] = {"cuda": _cuda_registrar}
"""By device type (ROCm's is "cuda"). A device that is not here pins only memory that it allocates itself."""


def is_copyable(device: torch.device) -> bool:
    """Whether bytes on `device` can be copied to the host: those of the CPU and of the one kind of accelerator that a
    process has.
    """
    own = torch.accelerator.current_accelerator()
    return device.type == "cpu" or (own is not None and device.type == own.type)


def accelerators(devices: Iterable[torch.device]) -> set[torch.device]:
    """Those of `devices` whose bytes are copied by streams.

    Raises:
        UnsupportedStateError: bytes on one of them cannot be copied; it is named.
        TransactionStateError: the caller captures a graph there.
    """
    found = {device for device in devices if device.type != "cpu"}
    for device in found:
        if not is_copyable(device):
            raise UnsupportedStateError(
                f"a tensor lies on device '{device}', whose bytes cannot be copied; "
                "move it with .cpu() before save. Nothing was written for this file"
            )
    refuse_capture("tensors cannot be snapshotted", found)
    return found


@contextlib.contextmanager
def on_stream(stream: torch.Stream) -> Iterator[None]:
    """What this thread queues in the block goes to `stream`, on its device."""
    outer, inner = torch.accelerator.current_stream(), torch.accelerator.current_stream(stream.device)
    try:
        torch.accelerator.set_stream(stream)
        yield
    finally:
        if not threading.current_thread().name.startswith(THREAD_PREFIX):
            torch.accelerator.set_stream(inner)
            torch.accelerator.set_stream(outer)


def synchronize(streams: Iterable[torch.Stream]) -> None:
    """Block until everything queued on `streams` has run."""
    for stream in streams:
        stream.synchronize()


def keep_for(tensor: torch.Tensor, stream: torch.Stream) -> None:
    """Keep the memory of `tensor` from being given to others, should its owner free it, until `stream` has done what it
    has now.
    """
    with contextlib.suppress(NotImplementedError):  # A device whose memory is never given to others early.
        tensor.record_stream(stream)


def without_default_device() -> contextlib.AbstractContextManager[Any]:
    """Tensors made in the block lie where it says, or on the CPU, whatever default device the caller has set."""
    # Not `torch.get_default_device`: torch 2.7's knows nothing of ``with torch.device(...)``.
    is_set = torch.empty(0).device.type != "cpu"
    return torch._C.DisableTorchFunction() if is_set else contextlib.nullcontext()


def side_stream(device: torch.device) -> torch.Stream:
    """A new stream; the caller's current one where the device has no others."""
    try:
        return torch.Stream(device)
    except (RuntimeError, NotImplementedError):
        return torch.accelerator.current_stream(device)


def record_now(device: torch.device) -> torch.Event:
    """An event at the end of what the current stream of `device` was given."""
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event


def wait_on_stream(event: torch.Event) -> None:
    """Order what comes on the current stream of the event's device behind `event`; does not block the CPU."""
    torch.accelerator.current_stream(event.device).wait_event(event)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` records a graph instead of running what it is given."""
    if device.type == "cpu":
        return False
    stream: Any = torch.accelerator.current_stream(device)
    if hasattr(stream, "is_capturing"):
        return bool(stream.is_capturing())
    ask = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return ask is not None and bool(ask())


def refuse_capture(consequence: str, devices: Iterable[torch.device]) -> None:
    """Raise TransactionStateError while the caller captures a graph on one of `devices`: what it queues would not run
    now.
    """
    for device in devices:
        if is_capturing(device):
            raise TransactionStateError(
                f"{consequence} while a graph is being captured on '{device}'; nothing was changed. Do it before "
                "the capture or after it"
            )


class Pinning:
    """How staging memory is pinned, and for which device: that of the thread that made this object. Any thread."""

    def __init__(self, stream: torch.Stream) -> None:
        self.stream = stream
        registrar = registrars.get(stream.device.type)
        self._registrar = None if registrar is None else registrar()

    @property
    def needs_own_memory(self) -> bool:
        """Whether `allocate` gives pinned memory; else `register` pins what is there."""
        return self._registrar is None

    def register(self, address: int, num_bytes: int) -> None:
        """Pin memory that exists.

        Raises:
            TransactionStateError: the device refused, or a graph is being captured; the memory is as before.
        """
        refuse_capture("staging memory cannot be pinned", [self.stream.device])
        if self._registrar is not None:
            self._call(self._registrar[0], address, num_bytes)

    def unregister(self, *addresses: int) -> None:
        """Undo `register` for each of them. Raises TransactionStateError: the device refused some."""
        if self._registrar is None:
            return
        with contextlib.ExitStack() as every:
            # Whatever one of them raises, the others are tried.
            for address in addresses:
                every.callback(self._call, self._registrar[1], address)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """New pinned memory, uint8, page-aligned. Raises as `register` does."""
        refuse_capture("staging memory cannot be pinned", [self.stream.device])
        memory: torch.Tensor = self._call(_empty_pinned, num_bytes)
        if memory.data_ptr() % mmap.PAGESIZE:
            memory = self._call(_empty_pinned, num_bytes + mmap.PAGESIZE)
            memory = memory[-memory.data_ptr() % mmap.PAGESIZE :][:num_bytes]
        return memory

    def _call(self, function: Callable[..., Any], *args: int) -> Any:
        with on_stream(self.stream):
            try:
                result = function(*args)
            except RuntimeError as error:
                raise _refused(error) from error
        if not isinstance(result, torch.Tensor) and result is not None and int(result):
            raise _refused(f"error {int(result)}")
        return result


def _empty_pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def _refused(reason: object) -> TransactionStateError:
    return TransactionStateError(f"the device refused to pin or unpin staging memory ({reason}); set pin_memory=False")


def pinning(wanted: bool | Literal["auto"]) -> Pinning | None:
    """How to pin memory for the caller's device; None where it is not wanted, or with "auto" not possible.

    Raises:
        ConfigError: wanted, and there is no accelerator, or it has no pinned memory.
    """
    if wanted is False:
        return None
    if not torch.accelerator.is_available():
        if wanted is True:
            raise ConfigError(
                "pin_memory=True, but torch sees no accelerator that memory could be pinned for; set it to "
                "'auto' or False"
            )
        return None
    try:
        made = Pinning(torch.accelerator.current_stream())
        if made.needs_own_memory:
            made.allocate(1)
    except RuntimeError as error:
        if wanted is True:
            raise ConfigError(
                f"pin_memory=True, but this device pins no memory ({error}); set it to 'auto' or False"
            ) from error
        return None
    return made
