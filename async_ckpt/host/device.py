"""Every device that torch has, through `torch.accelerator`, `torch.Stream` and `torch.Event`: nothing else knows how
devices differ.

Guarantees:
- The device and stream that a caller has chosen are the same after each call here. A thread of the package keeps what
  it was given: to go back to device 0 would make a context there, in every rank.
- Memory is pinned under the device that was the caller's when it asked for it, on whatever thread that happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch

from ..errors import ConfigError, TransactionStateError, UnsupportedStateError

THREAD_PREFIX = "async-ckpt"
"""How the names of all threads of the package begin."""

_POOL_STREAMS = 32
"""As many as torch has of one device and priority."""

_RELAXED = 2
"""The capture mode of a thread that the captures of others forbid nothing; as CUDA and HIP count them."""


class Driver(NamedTuple):
    """What a device's driver does and torch does not offer. What returns an int returns 0, or an error code."""

    register: Callable[[int, int], object]
    """Pin (address, bytes) of memory that exists already."""
    unregister: Callable[[int], object]
    exchange_capture_mode: Callable[[int], int]
    """Give this thread another stream capture mode; returns the one before."""


def _cuda_driver() -> Driver:
    cudart = torch.cuda.cudart()
    # The driver's own function: the runtime's of that name would make a context on the current device.
    libraries, name = ["libcuda.so.1"], "cuThreadExchangeStreamCaptureMode"
    if torch.version.hip:
        major = torch.version.hip.split(".")[0]
        libraries, name = ["libamdhip64.so", f"libamdhip64.so.{major}"], "hipThreadExchangeStreamCaptureMode"
    exchange: Any = None
    for library in libraries:
        with contextlib.suppress(OSError, AttributeError):
            exchange = getattr(ctypes.CDLL(library), name)

    def exchange_capture_mode(mode: int) -> int:
        held = ctypes.c_int(mode)
        # Before the driver is initialized nobody captures, and every thread has mode 0.
        return held.value if exchange is not None and exchange(ctypes.byref(held)) == 0 else 0

    return Driver(
        lambda address, num_bytes: cudart.cudaHostRegister(address, num_bytes, 0),
        cudart.cudaHostUnregister,
        exchange_capture_mode,
    )


drivers: dict[str, Callable[[], Driver]] = {"cuda": functools.cache(_cuda_driver)}
"""By device type (ROCm's is "cuda"). A device that is not here pins only memory that it allocates itself, and lets
other threads do as they like while a graph is captured."""


@contextlib.contextmanager
def beside_captures(device: torch.device) -> Iterator[None]:
    """What this thread asks of `device` in the block spoils no graph that another thread captures meanwhile.

    By default (CUDA's global mode) a capture forbids every thread to pin or allocate memory and to wait for events,
    and breaks where one does. What is done here concerns no captured work."""
    driver = drivers.get(device.type)
    if driver is None:
        yield
        return
    exchange = driver().exchange_capture_mode
    before = exchange(_RELAXED)
    try:
        yield
    finally:
        exchange(before)


def is_copyable(device: torch.device) -> bool:
    """Whether bytes on `device` can be copied to the host: those of the CPU and of the one kind of accelerator that a
    process has."""
    own = torch.accelerator.current_accelerator()
    return device.type == "cpu" or (own is not None and device.type == own.type)


def accelerators(devices: Iterable[torch.device]) -> set[torch.device]:
    """Those of `devices` whose bytes are copied by streams. Raises UnsupportedStateError: bytes on one of them cannot
    be copied; it is named. TransactionStateError: the caller captures a graph there."""
    found = {device for device in devices if device.type != "cpu"}
    for device in found:
        if not is_copyable(device):
            told = f"a tensor lies on device '{device}', whose bytes cannot be copied; move it with .cpu() before save"
            raise UnsupportedStateError(f"{told}. Nothing was written for this file")
        refuse_capture("tensors cannot be snapshotted", [device])
    return found


@contextlib.contextmanager
def on_stream(stream: torch.Stream) -> Iterator[None]:
    """What this thread queues in the block goes to `stream`, on its device, beside any capture."""
    outer, inner = torch.accelerator.current_stream(), torch.accelerator.current_stream(stream.device)
    try:
        torch.accelerator.set_stream(stream)
        with beside_captures(stream.device):
            yield
    finally:
        if not threading.current_thread().name.startswith(THREAD_PREFIX):
            torch.accelerator.set_stream(inner)
            torch.accelerator.set_stream(outer)


def synchronize(queued: Iterable[torch.Stream | torch.Event]) -> None:
    """Block until everything queued on these streams, or before these events, has run."""
    for one in queued:
        with beside_captures(one.device):
            one.synchronize()


def synchronize_device(device: torch.device) -> None:
    """Block until everything queued on any stream of `device` has run. Raises TransactionStateError: some thread
    captures a graph there on one of torch's streams. A wait for the device would break that."""
    # torch hands out its streams, those of captures too, from a pool in turn.
    if any(is_stream_capturing(side_stream(device)) for _ in range(_POOL_STREAMS)):
        told = f"'{device}' cannot be waited for while another thread captures a graph on it; nothing was changed"
        raise TransactionStateError(f"{told}. Do it before the capture or after it")
    torch.accelerator.synchronize(device)


def keep_for(tensor: torch.Tensor, stream: torch.Stream) -> None:
    """Keep the memory of `tensor` from being given to others, should its owner free it, until `stream` has done what it
    has now."""
    with contextlib.suppress(NotImplementedError):  # A device whose memory is never given to others early.
        tensor.record_stream(stream)


def without_default_device() -> contextlib.AbstractContextManager[Any]:
    """Tensors made in the block lie where it says, or on the CPU, whatever default device the caller has set."""
    # Not `torch.get_default_device`: torch 2.7's knows nothing of ``with torch.device(...)``.
    is_set = torch.empty(0).device.type != "cpu"
    return torch._C.DisableTorchFunction() if is_set else contextlib.nullcontext()


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Without the modes and default devices of the user: for work on memory, which is nobody's tensor."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.inference_mode(False):
        yield


def side_stream(device: torch.device) -> torch.Stream:
    """A new stream; the caller's current one where the device has no others."""
    try:
        with beside_captures(device):
            return torch.Stream(device)
    except (RuntimeError, NotImplementedError):
        return torch.accelerator.current_stream(device)


def record_now(device: torch.device) -> torch.Event:
    """An event at the end of what the current stream of `device` was given."""
    with beside_captures(device):
        event = torch.Event(device)
        event.record(torch.accelerator.current_stream(device))
    return event


def wait_on_stream(event: torch.Event) -> None:
    """Order what comes on the current stream of the event's device behind `event`; does not block the CPU."""
    torch.accelerator.current_stream(event.device).wait_event(event)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` records a graph instead of running what it is given."""
    if device.type == "cpu" or not is_copyable(device):
        return False
    return is_stream_capturing(torch.accelerator.current_stream(device))


def is_stream_capturing(stream: torch.Stream) -> bool:
    known: Any = stream
    if hasattr(known, "is_capturing"):
        return bool(known.is_capturing())
    # Before torch 2.11 only the current stream is asked, and by few devices.
    ask = getattr(torch.get_device_module(stream.device), "is_current_stream_capturing", None)
    if ask is None:
        return False
    with on_stream(stream):
        return bool(ask())


def refuse_capture(consequence: str, devices: Iterable[torch.device]) -> None:
    """Raise TransactionStateError while the caller captures a graph on one of `devices`: what it queues would not run
    now."""
    for device in devices:
        if is_capturing(device):
            told = f"{consequence} while a graph is being captured on '{device}'; nothing was changed"
            raise TransactionStateError(f"{told}. Do it before the capture or after it")


class Pinning:
    """How staging memory is pinned, and for which device: that of the thread that made this object. Any thread."""

    def __init__(self, stream: torch.Stream) -> None:
        self.stream = stream
        driver = drivers.get(stream.device.type)
        self._driver = None if driver is None else driver()

    @property
    def needs_own_memory(self) -> bool:
        """Whether `allocate` gives pinned memory; else `register` pins what is there."""
        return self._driver is None

    def register(self, address: int, num_bytes: int) -> None:
        """Pin memory that exists. Raises TransactionStateError: the device refused, or a graph is being captured; the
        memory is as before."""
        refuse_capture("staging memory cannot be pinned", [self.stream.device])
        if self._driver is not None:
            self._call(self._driver.register, address, num_bytes)

    def unregister(self, *addresses: int) -> None:
        """Undo `register` for each of them. Raises TransactionStateError: the device refused some."""
        if self._driver is None:
            return
        with contextlib.ExitStack() as every:
            # Whatever one of them raises, the others are tried.
            for address in addresses:
                every.callback(self._call, self._driver.unregister, address)

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
                if not isinstance(result, torch.Tensor) and result is not None and int(result):
                    raise RuntimeError(f"error {int(result)}")
            except RuntimeError as error:
                told = f"the device refused to pin or unpin staging memory ({error}); set pin_memory=False"
                raise TransactionStateError(told) from error
        return result


def _empty_pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def pinning(wanted: bool | Literal["auto"]) -> Pinning | None:
    """How to pin memory for the caller's device; None where it is not wanted, or with "auto" not possible. Raises
    ConfigError: wanted, and there is no accelerator, or it has no pinned memory."""
    if wanted is False:
        return None
    try:
        if not torch.accelerator.is_available():
            raise RuntimeError("torch sees no accelerator")
        made = Pinning(torch.accelerator.current_stream())
        if made.needs_own_memory:
            made.allocate(1)
    except RuntimeError as error:
        if wanted is True:
            told = f"pin_memory=True, but this device pins no memory ({error}); set it to 'auto' or False"
            raise ConfigError(told) from error
        return None
    return made
