"""Uploads in a process of their own: reading, checksums and requests never take the interpreter lock from a training.

`UploadProcess` stands for `Upload` in the parent, `serve` runs `Upload` in the child. Over a socket pair they exchange
tuples of plain objects, pickled; the first member says what follows:

- to the child: `Settings` once; "upload" (tag, abilities), "answer" (error), "stop".
- to the parent: "span", "log" (level, text), "metrics", "ask" (a method of `Agreement`, arguments), "ended" (error).

Guarantees:
- The child runs no code of the user's and imports no torch. It has the lowest priority for processor and disk. It hears
  no signal but SIGKILL, and ends with its parent, however that ends.
- A child that dies in an upload is an error that may pass: the next upload starts another one, which goes on from the
  state on disk. One that dies at other times is replaced, and nobody is told.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from ..errors import MirrorError, report
from ..metrics import MirrorMetrics
from ..storage.filesystem import FileSystem
from ..threads.executor import DaemonExecutor, lower_priority
from ..threads.locks import Lock
from .config import Mirror
from .context import MirrorContext, MirrorHooks
from .pending import COUNTS
from .remote import open_store
from .store import PassingFailure
from .upload import Upload

_PROGRESS_S = 1.0
_END_S = 5.0
_PR_SET_PDEATHSIG = 1
# Nothing is imported before the path is right: the working directory, which comes first, may hold a "random.py".
_CHILD = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import serve; serve()"
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


@dataclass(frozen=True)
class Settings:
    """What the child makes its `MirrorContext` of."""

    mirror: Mirror
    filesystem: FileSystem
    root: str
    may_overwrite: bool
    uploaders_per_node: int | None
    rank: int | None
    leads: bool
    num_threads: int


class UploadProcess:
    """The child of one mirror. `start`, `upload` and `close` are called by the mirror's thread, `stop` and `kill` by
    any."""

    def __init__(self, context: MirrorContext, settings: bytes) -> None:
        self._context = context
        self._settings = settings
        self._lock = Lock()
        """Held to send, and to change the fields below."""
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection

    @classmethod
    def of(cls, context: MirrorContext, num_threads: int) -> UploadProcess | None:
        """None where an upload needs what exists in this process alone: another file system, or options that are
        no plain values (a provider of credentials); and where no interpreter can be started."""
        is_runnable = sys.executable and not getattr(sys, "frozen", False)
        if not is_runnable or type(context.filesystem) is not FileSystem or not _is_plain(context.mirror.options):
            return None
        mirror, agreement = replace(context.mirror, retention=None), context.agreement
        settings = Settings(
            mirror,
            context.filesystem,
            context.root,
            context.may_overwrite,
            context.uploaders_per_node,
            agreement.rank,
            agreement.leads,
            num_threads,
        )
        return cls(context, pickle.dumps(settings))

    def upload(self, tag: str, metrics: MirrorMetrics) -> None:
        """Mirror a checkpoint and fill in `metrics`, once a second and at the end. Blocks; raises what `Upload.run`
        does, and PassingFailure where the child dies or cannot be started."""
        context = self._context
        self.start()
        # Whoever stops it from here on finds the child.
        context.sleep()
        try:
            self._send("upload", tag, context.abilities)
            while (told := self._channel.recv())[0] != "ended":
                self._heed(metrics, *told)
        except (EOFError, OSError) as failure:
            context.sleep()
            text = f"the process that uploads has ended with status {self.close()}; another one goes on"
            raise PassingFailure(text, url=context.mirror.url) from failure
        finally:
            context.states.reload(tag)
        if told[1] is not None:
            raise told[1]

    def start(self) -> None:
        """Start it, where it does not run; does not wait for it. Raises PassingFailure."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        try:
            self._start()
        except OSError as error:
            self.close()
            told = f"no process that uploads can be started: {error}"
            raise PassingFailure(told, url=self._context.mirror.url) from error

    def _start(self) -> None:
        # The child inherits it: signals are for the training, which may still wait for what is on its way. (In a
        # session of its own it would hear few too, but the scheduler weighs sessions against each other, whatever their
        # niceness.) And that it has died is an error here, never SIGPIPE.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        path = [entry for entry in sys.path if isinstance(entry, str)]
        # Found by an entry that is relative to an earlier working directory, or by no entry.
        path[:0] = [] if _HOME in path else [_HOME]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen([sys.executable, "-c", _CHILD, *path], stdin=theirs.fileno())
            with self._lock:
                self._process, self._channel = process, Connection(ours.detach())
                self._channel.send_bytes(self._settings)

    def _send(self, *message: Any) -> None:
        with self._lock:
            self._channel.send(message)

    def _heed(self, metrics: MirrorMetrics, kind: str, *content: Any) -> None:
        if kind == "span":
            self._context.hooks.on_span(*content)
        elif kind == "log":
            report(content[0], "%s", content[1])
        elif kind == "metrics":
            for name in COUNTS:
                setattr(metrics, name, getattr(content[0], name))
        else:
            method, *given = content
            error: BaseException | None = None
            try:
                getattr(self._context.agreement, method)(*given)
            except Exception as failure:  # noqa: BLE001 -- the child raises it
                error = failure
            self._send("answer", error)

    def stop(self) -> None:
        """Let the upload end where it next looks."""
        with self._lock, contextlib.suppress(OSError):
            if self._process is not None and self._process.poll() is None:
                self._channel.send(["stop"])

    def kill(self) -> None:
        """End the child wherever it is."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def close(self) -> int | None:
        """End the child; its exit status, None where there was none."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return None
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_END_S)
        process.kill()
        return process.wait()


def _is_plain(value: object) -> bool:
    """Whether it means the same where none of the user's modules is."""
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    return type(value) in (str, bytes, int, float, bool, timedelta, type(None))


# The child.


def serve() -> None:
    """The main thread of the child; ends the process."""
    channel = Connection(0)
    if sys.platform == "linux":
        # Processes that the parent has forked hold its end of the socket too.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Threads inherit it. No lock is shared with a training, so this may starve beside one.
    lower_priority()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 19)
    with contextlib.suppress(EOFError, OSError):
        # Until the parent is gone, or wants no more.
        settings: Settings = channel.recv()
        child: _Child | None = None
        while child is None:
            try:
                child = _Child(channel, settings)
            except Exception as error:  # noqa: BLE001 -- the next upload fails with it; then it is tried again
                channel.recv()
                channel.send(("ended", portable(error, settings.mirror.url)))
        child.run()
    os._exit(0)


class _Child(logging.Handler):
    """Runs uploads, one at a time, on a thread of its own; to it this is also the `Agreement` of the parent, and what
    becomes of its log."""

    def __init__(self, channel: Connection, settings: Settings) -> None:
        super().__init__()
        self.rank, self.leads = settings.rank, settings.leads
        self._channel = channel
        self._sending = Lock()
        self._answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._running: MirrorMetrics | None = None
        self._executor = DaemonExecutor("async-ckpt-mirror", 1 + settings.num_threads)
        self._context = MirrorContext(
            settings.mirror,
            settings.filesystem,
            settings.root,
            self._executor,
            self,
            settings.may_overwrite,
            settings.uploaders_per_node,
            MirrorHooks(on_span=lambda span: self._send("span", span)),
        )
        self._context.store = open_store(settings.mirror, settings.filesystem)
        logger = logging.getLogger("async_ckpt")
        logger.addHandler(self)
        logger.propagate = False

    def run(self) -> None:
        """Blocks; raises EOFError where the parent is gone."""
        while True:
            while self._running is not None and not self._channel.poll(_PROGRESS_S):
                with self._sending:
                    if self._running is not None:
                        self._send("metrics", self._running)
            kind, *content = self._channel.recv()
            if kind == "upload":
                self._running = MirrorMetrics(content[0])
                self._context.abilities = content[1]
                self._executor.submit(self._upload, self._running)
            elif kind == "answer":
                self._answers.put(content[0])
            else:
                self._context.stop()

    def _upload(self, metrics: MirrorMetrics) -> None:
        error: BaseException | None = None
        try:
            self._context.states.reload(metrics.tag)
            Upload(self._context, metrics.tag, metrics).run()
        except BaseException as failure:  # noqa: BLE001 -- the parent raises it
            error = failure
        with self._sending:
            self._running = None
            self._send("metrics", metrics)
            self._send("ended", portable(error, self._context.mirror.url))

    def _send(self, *message: Any) -> None:
        with self._sending:
            self._channel.send(message)

    def emit(self, record: logging.LogRecord) -> None:
        self._send("log", record.levelno, record.getMessage())

    # The agreement.

    def all_sent(self, name: str) -> None:
        self._ask("all_sent", name)

    def concluded(self, name: str, error: str) -> None:
        self._ask("concluded", name, error)

    def _ask(self, *question: str) -> None:
        self._send("ask", *question)
        error = self._answers.get()
        if error is not None:
            raise error


def portable(error: BaseException | None, url: str) -> BaseException | None:
    """`error`, or its text where the other process could not read it, or would end with it."""
    try:
        if error is None or isinstance(pickle.loads(pickle.dumps(error)), Exception):
            return error
    except BaseException:  # noqa: BLE001 -- whatever its class does
        pass
    return MirrorError(f"{type(error).__name__}: {error}", url=url)
