"""The simulated accelerator from Python: builds and registers it, orders its schedule and failures, asks what went
wrong.

`load` registers it as torch's PrivateUse1 device, called "simulated", for the whole process and for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SOURCE = Path(__file__).with_name("simulated.cpp")
NAME = "simulated"
MODES = ("immediate", "random", "lazy", "contrary")
CAPTURE_MODES = ("global", "thread_local", "relaxed")
BUILD_TIMEOUT_S = 500.0


class CannotBuild(Exception):
    """There is no compiler here, or it cannot build for this torch; says why."""


def build() -> Path:
    """The extension's file, compiled if it was not before, for this source, torch, Python version and user."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CannotBuild("no C++ compiler (g++) on this machine")
    include = Path(torch.__file__).parent / "include"
    if not (include / "ATen" / "ATen.h").exists():
        raise CannotBuild("this torch was installed without its C++ headers")
    arguments = [
        *("-std=c++20", "-O1", "-fPIC", "-shared", f"-DTORCH_EXTENSION_NAME={NAME}"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-I{sysconfig.get_paths()['include']}"),
        str(SOURCE),
        *(f"-L{include.parent / 'lib'}", f"-Wl,-rpath,{include.parent / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"),
    ]
    told = "\0".join([SOURCE.read_text(), torch.__version__, torch.__file__, sys.version, compiler, *arguments])
    built = _cache() / f"{NAME}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            fresh = Path(folder) / built.name
            command = [compiler, *arguments, "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
            if done.returncode:
                what = f"{SOURCE.name} for torch {torch.__version__}"
                raise CannotBuild(f"{compiler} cannot build {what}:\n{done.stderr[-4000:]}")
            fresh.replace(built)
    return built


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (home / "async-ckpt-tests", Path(tempfile.gettempdir()) / f"async-ckpt-tests-{os.getuid()}"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise CannotBuild("no folder to keep the compiled extension in")


@dataclass(frozen=True)
class HostWait:
    """Where a thread waited for a device."""

    kind: str
    thread: str
    stack: tuple[str, ...]
    """Lines "file:line function", the innermost last."""


class Simulator:
    """The one simulated accelerator of this process."""

    def __init__(self, extension: Any) -> None:
        self.extension = extension
        self.waits: list[HostWait] = []
        """Every wait for a device so far, on any thread."""
        self._forbidding: set[int] = set()
        extension.on_host_wait(self._note_wait)

    # The schedule.

    @contextlib.contextmanager
    def mode(self, name: str, seed: int = 0) -> Iterator[None]:
        """How queued work runs meanwhile: one of `MODES`."""
        self.extension.set_mode(name, seed)
        try:
            yield
        finally:
            self.extension.set_mode("immediate", 0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing runs on any device meanwhile; who waits for it waits for the end of the block."""
        self.extension.set_paused(True)
        try:
            yield
        finally:
            self.extension.set_paused(False)

    def begin_anew(self) -> None:
        """Run everything that is queued, and forget what went wrong: the next test must not suffer from it."""
        self.extension.drain()
        self.extension.forget_past()
        self.waits.clear()

    # The host's waits.

    @contextlib.contextmanager
    def no_host_sync(self) -> Iterator[None]:
        """This thread may not wait for a device in the block: the call that does raises RuntimeError with its stack."""
        me = threading.get_ident()
        self._forbidding.add(me)
        try:
            yield
        finally:
            self._forbidding.discard(me)

    def _note_wait(self, kind: str) -> str:
        frames = traceback.extract_stack(limit=12)[:-1]
        stack = tuple(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
        self.waits.append(HostWait(kind, threading.current_thread().name, stack))
        if threading.get_ident() not in self._forbidding:
            return ""
        return f"the host waits for a device ({kind}) where it must not:\n  " + "\n  ".join(stack)

    # Failures.

    @contextlib.contextmanager
    def inject(self, kind: str, after: int = 0) -> Iterator[None]:
        """After so many more, one call fails: "copy", "alloc", "event", "pin", "stream", "launch"; "run": a task."""
        self.extension.inject(kind, after)
        try:
            yield
        finally:
            self.extension.drain()
            self.extension.take_back_injected()

    # What went wrong.

    def races(self) -> list[str]:
        """Pairs of accesses to the same memory that nothing orders, since it was last asked."""
        return list(self.extension.take_races())

    @property
    def num_registered(self) -> int:
        """Stretches of memory that `host_register` has pinned and nobody has unpinned."""
        return int(self.extension.num_registered())

    # Graphs.

    def is_capturing(self, stream: torch.Stream) -> bool:
        """Whether `stream` records instead of running."""
        return bool(self.extension.is_capturing(stream.device_index, stream.stream_id))

    @contextlib.contextmanager
    def capture(self, graph: Graph, error_mode: str = "global") -> Iterator[None]:
        """What the block queues on a stream of its own is recorded in `graph`, and does not run.

        `error_mode`: one of `CAPTURE_MODES`, as of torch's graphs: whom it forbids what is unsafe meanwhile.
        """
        stream = torch.Stream(torch.device(NAME, torch.accelerator.current_device_index()))
        before = torch.accelerator.current_stream()
        stream.wait_stream(before)
        torch.accelerator.set_stream(stream)
        self.extension.begin_capture(stream.device_index, stream.stream_id, CAPTURE_MODES.index(error_mode))
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):
                self.extension.end_capture(stream.device_index, stream.stream_id)
            raise
        else:
            graph.handle = self.extension.end_capture(stream.device_index, stream.stream_id)
        finally:
            torch.accelerator.set_stream(before)

    @contextlib.contextmanager
    def captured_elsewhere(self, tensor: torch.Tensor) -> Iterator[Graph]:
        """Another thread captures what changes `tensor`, in torch's default mode, for as long as the block."""
        has_begun, may_end, graph = threading.Event(), threading.Event(), Graph()

        def capture() -> None:
            with self.capture(graph):
                tensor.add_(10)
                has_begun.set()
                may_end.wait(BUILD_TIMEOUT_S)
                tensor.mul_(2)

        with ThreadPoolExecutor(1) as thread:
            captured = thread.submit(capture)
            try:
                assert has_begun.wait(BUILD_TIMEOUT_S)
                yield graph
            finally:
                may_end.set()
                captured.result(BUILD_TIMEOUT_S)


@dataclass
class Graph:
    """Recorded work."""

    handle: int | None = None

    def replay(self) -> None:
        """Queue it on the current stream."""
        stream = torch.accelerator.current_stream()
        loaded().extension.replay(self.handle, stream.device_index, stream.stream_id)


_loaded: list[Simulator] = []


def loaded() -> Simulator:
    """What `load` has made."""
    return _loaded[0]


def load() -> Simulator:
    """Build the simulated accelerator and make it this process's. Raises CannotBuild."""
    if not _loaded:
        spec = importlib.util.spec_from_file_location(NAME, build())
        assert spec is not None and spec.loader is not None
        torch.utils.rename_privateuse1_backend(NAME)
        torch._register_device_module(NAME, _device_module())
        extension = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(extension)
        _loaded.append(Simulator(extension))
    return _loaded[0]


def load_for_package() -> Simulator:
    """`load`, and the package knows how memory is registered with this device."""
    from async_ckpt.host import device

    made = load()
    extension = made.extension
    driver = device.Driver(extension.host_register, extension.host_unregister, extension.exchange_capture_mode)
    device.drivers[NAME] = lambda: driver
    return made


class _OnDevice:
    """As `torch.cuda.device`: the current device in a block."""

    def __init__(self, device: Any) -> None:
        self._index = device if isinstance(device, int) else torch.device(device).index
        self._before = 0

    def __enter__(self) -> None:
        self._before = torch.accelerator.current_device_index()
        if self._index is not None:
            torch.accelerator.set_device_index(self._index)

    def __exit__(self, *_: object) -> None:
        torch.accelerator.set_device_index(self._before)


def _device_module() -> ModuleType:
    """`torch.simulated`: the little that torch itself asks a device's module for."""
    module: Any = ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module._lazy_init = lambda: None
    module.is_initialized = lambda: True
    # Streams themselves tell it in later versions of torch.
    module.is_current_stream_capturing = lambda: loaded().is_capturing(torch.accelerator.current_stream())
    module.device_count = lambda: 2
    module.device = _OnDevice
    module.current_device = lambda: torch.accelerator.current_device_index()
    module.manual_seed_all = lambda seed: None
    module._is_in_bad_fork = lambda: False
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    made: ModuleType = module
    return made
