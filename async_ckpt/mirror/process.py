"""Uploads in a process of their own: reading, checksums and requests never take the interpreter lock from a training.

`Uploader` is the parent's side, `serve` runs in the child. Over a socket pair they exchange tuples of plain objects,
pickled; the first member says what follows:

- to the child: what its `MirrorContext` is made of, once; "upload" (tag, abilities), "answer" (error), "stop".
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
from dataclasses import replace
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
from .upload import upload

_MAX_THREADS = 16
_PROGRESS_S = 1.0
_PR_SET_PDEATHSIG = 1
# Nothing is imported before the path is right: the working directory, which comes first, may hold a "random.py".
_CHILD = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import serve; serve()"
_SHARED = ("mirror", "filesystem", "root", "may_overwrite", "uploaders_per_node")
"""The fields of a `MirrorContext` that are the same in the child."""
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


class Uploader:
    """Runs the uploads of one mirror: in a process of their own, or on threads of this one where that cannot be.
    `start`, `upload` and `close` are called by the mirror's thread, `stop` and `kill` by any."""

    def __init__(self, context: MirrorContext) -> None:
        self._context = context
        self._settings: bytes | None = None
        """None where an upload needs what exists in this process alone: another file system, or options that are no
        plain values (a provider of credentials); and where no interpreter can be started."""
        is_runnable = sys.executable and not getattr(sys, "frozen", False)
        if is_runnable and type(context.filesystem) is FileSystem and _is_plain(context.mirror.options):
            shared = {name: getattr(context, name) for name in _SHARED}
            shared["mirror"] = replace(context.mirror, retention=None)
            self._settings = pickle.dumps((shared, context.agreement.rank, context.agreement.leads))
        self._executor: DaemonExecutor | None = None
        """Where uploads run in this process."""
        self._lock = Lock()
        """Held to send, and to change the fields below."""
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection

    def upload(self, tag: str, metrics: MirrorMetrics) -> None:
        """Mirror a checkpoint and fill in `metrics`, once a second and at the end. Blocks; raises what `upload.upload`
        does, and PassingFailure where the child dies or cannot be started."""
        context = self._context
        self.start()
        if self._executor is not None:
            upload(context, self._executor, tag, metrics)
            return
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
        """Start the process or the threads, where they do not run; does not wait for them. Raises PassingFailure."""
        if self._executor is not None or (self._process is not None and self._process.poll() is None):
            return
        self.close()
        try:
            if self._settings is None:
                self._executor = _threads(self._context.mirror)
            else:
                self._start(self._settings)
        except (OSError, RuntimeError) as error:
            self.close()
            raise PassingFailure(f"no upload can be started: {error}", url=self._context.mirror.url) from error

    def _start(self, settings: bytes) -> None:
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
                self._channel.send_bytes(settings)

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
        """Let all work for this mirror end where it next looks."""
        self._context.stop()
        with self._lock, contextlib.suppress(OSError):
            if self._process is not None and self._process.poll() is None:
                self._channel.send(["stop"])

    def kill(self) -> None:
        """End the child wherever it is."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def close(self) -> int | None:
        """End the child, or the threads after what they do; the child's exit status, None where there was none."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return None
        self._channel.close()
        process.kill()
        return process.wait()


def _is_plain(value: object) -> bool:
    """Whether it means the same where none of the user's modules is."""
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    return type(value) in (str, bytes, int, float, bool, timedelta, type(None))


def _threads(mirror: Mirror) -> DaemonExecutor:
    # The child has one more at work: an upload waits for its objects.
    return DaemonExecutor("async-ckpt-mirror", 1 + min(_MAX_THREADS, mirror.parallel), on_start=lower_priority)


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
        settings = channel.recv()
        child: _Child | None = None
        while child is None:
            try:
                child = _Child(channel, *settings)
            except Exception as error:  # noqa: BLE001 -- the next upload fails with it; then it is tried again
                channel.recv()
                channel.send(("ended", portable(error, settings[0]["mirror"].url)))
        child.run()
    os._exit(0)


class _Child(logging.Handler):
    """Runs uploads, one at a time, on a thread of its own; to it this is also the `Agreement` of the parent, and what
    becomes of its log."""

    def __init__(self, channel: Connection, shared: dict[str, Any], rank: int | None, leads: bool) -> None:
        super().__init__()
        self.rank, self.leads = rank, leads
        self._channel = channel
        self._sending = Lock()
        self._answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._running: MirrorMetrics | None = None
        hooks = MirrorHooks(on_span=lambda span: self._send("span", span))
        self._context = context = MirrorContext(**shared, agreement=self, hooks=hooks)
        context.store = open_store(context.mirror, context.filesystem)
        self._executor = _threads(context.mirror)
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
            upload(self._context, self._executor, metrics.tag, metrics)
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
