"""A file system in user space that passes everything through to a directory, and lies where it is told to.

It stands for what networks and buckets are mounted with: NFS, sshfs, s3fs, gcsfuse, rclone. It speaks the kernel's own
protocol (linux/fuse.h) on /dev/fuse, so that each request can be answered wrongly, late or never; a process of its own
serves it, whose end is the "transport endpoint is not connected" of a real one.

    with lying(tmp_path, kind="fuse.rclone") as mounted:
        mounted.lie(errors={"FSYNCDIR": errno.EIO})         # by the request's name: see REQUESTS
        mounted.lie(ignored=["truncate"], rename="replaces")
        mounted.kill()
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUESTS = {
    1: "LOOKUP", 2: "FORGET", 3: "GETATTR", 4: "SETATTR", 5: "READLINK", 6: "SYMLINK", 8: "MKNOD", 9: "MKDIR",
    10: "UNLINK", 11: "RMDIR", 12: "RENAME", 13: "LINK", 14: "OPEN", 15: "READ", 16: "WRITE", 17: "STATFS",
    18: "RELEASE", 20: "FSYNC", 25: "FLUSH", 26: "INIT", 27: "OPENDIR", 28: "READDIR", 29: "RELEASEDIR",
    30: "FSYNCDIR", 35: "CREATE", 36: "INTERRUPT", 38: "DESTROY", 42: "BATCH_FORGET", 43: "FALLOCATE", 45: "RENAME2",
}  # fmt: skip
NO_ANSWER = {"FORGET", "BATCH_FORGET", "INTERRUPT"}
NOREPLACE, EXCHANGE = 1, 2
_SET_MODE, _SET_SIZE = 1, 8
_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_MAX_WRITE = 1 << 17


@dataclass
class Mounted:
    """A mounted lying file system: the root of the lies, what really is there, and who serves it."""

    point: Path
    real: Path
    _lies: Path
    _server: subprocess.Popen[bytes]

    def lie(self, **lies: Any) -> None:
        """From the next request on, and instead of all lies before.

        Args:
            errors: an errno by request. ignored: "truncate", "fsync". latency_s: before each answer, or those to the
                requests that are `late`.
            hangs: requests that are never answered, nor is anything after them.
            rename: "replaces" puts a directory in the place of one that is not empty, and knows no flags; "no flags"
                ignores them.
            identity: "unstable" gives a file another number each time.
        """
        fresh = self._lies.with_suffix(".new")
        fresh.write_text(json.dumps(lies))
        fresh.rename(self._lies)

    def kill(self) -> None:
        """End the server: whoever asks from now on, or is waiting, is told that nobody is there."""
        self._server.kill()
        self._server.wait()


def why_not() -> str | None:
    """Why nothing can be mounted here; None when it can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse to use"
    return None if os.geteuid() == 0 else "mounting takes root"


@contextlib.contextmanager
def lying(where: Path, kind: str = "fuse.lying") -> Iterator[Mounted]:
    """Mount below `where`, and unmount at the end, whatever the server is doing."""
    libc = ctypes.CDLL(None, use_errno=True)
    point, real, lies = where / "mounted", where / "real", where / "lies.json"
    point.mkdir()
    real.mkdir()
    lies.write_text("{}")
    channel = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={channel},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions".encode()
        if libc.mount(b"lying", os.fsencode(point), kind.encode(), ctypes.c_ulong(6), options) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(point))
        command = [sys.executable, "-m", "tests.support.lying_fuse", str(channel), str(real), str(lies)]
        server = subprocess.Popen(command, pass_fds=[channel], cwd=Path(__file__).parents[2])
    finally:
        os.close(channel)
    try:
        yield Mounted(point, real, lies, server)
    finally:
        server.kill()
        server.wait()
        libc.umount2(os.fsencode(point), 2)


class Server:
    """Answers requests one after another until the file system is unmounted."""

    def __init__(self, channel: int, real: str, lies: str) -> None:
        self._channel = channel
        self._lies_path = lies
        self._lies: dict[str, Any] = {}
        self._told = 0
        self._paths = {1: real}
        self._next_node = 2
        self._handles: dict[int, int] = {}

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self._channel, _MAX_WRITE + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return
            _, code, unique, node, *_ = _IN.unpack_from(request)
            name = REQUESTS.get(code, "")
            self._listen()
            if name in self._lies.get("late", REQUESTS.values()):
                time.sleep(self._lies.get("latency_s", 0))
            while name in self._lies.get("hangs", ()):
                time.sleep(3600)
            payload, refusal = b"", self._lies.get("errors", {}).get(name, 0)
            handler = getattr(self, f"_{name.lower()}", self._unknown)
            try:
                if not refusal:
                    payload = handler(node, request[_IN.size :])
            except OSError as error:
                refusal = error.errno or errno.EIO
            if name in NO_ANSWER:
                continue
            with contextlib.suppress(FileNotFoundError):
                os.write(self._channel, _OUT.pack(_OUT.size + len(payload), -refusal, unique) + payload)

    def _listen(self) -> None:
        changed = os.stat(self._lies_path).st_mtime_ns
        if changed != self._told:
            self._told = changed
            with open(self._lies_path, encoding="utf-8") as file:
                self._lies = json.load(file)

    def _ignores(self, what: str) -> bool:
        return what in self._lies.get("ignored", ())

    # Nodes.

    def _child(self, node: int, name: bytes) -> str:
        return os.path.join(self._paths[node], os.fsdecode(name.rstrip(b"\0")))

    def _node_of(self, path: str) -> int:
        for node, known in self._paths.items():
            if known == path:
                return node
        self._paths[self._next_node] = path
        self._next_node += 1
        return self._next_node - 1

    def _forget_path(self, path: str) -> None:
        self._paths = {node: known for node, known in self._paths.items() if not f"{known}/".startswith(f"{path}/")}

    def _attributes(self, found: os.stat_result) -> bytes:
        number = time.monotonic_ns() if self._lies.get("identity") == "unstable" else found.st_ino
        times = (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)
        return struct.pack(
            "<6Q10I",
            *(number, found.st_size, found.st_blocks),
            *(t // 10**9 for t in times),
            *(t % 10**9 for t in times),
            *(found.st_mode, found.st_nlink, found.st_uid, found.st_gid, 0, 4096, 0),
        )

    def _entry(self, path: str) -> bytes:
        found = os.lstat(path)
        return struct.pack("<4Q2I", self._node_of(path), 0, 0, 0, 0, 0) + self._attributes(found)

    # Requests.

    def _unknown(self, node: int, data: bytes) -> bytes:
        raise OSError(errno.ENOSYS, "no such request")

    def _init(self, node: int, data: bytes) -> bytes:
        return struct.pack("<4I2H2I2HI7I", 7, 31, 1 << 17, 0, 16, 12, _MAX_WRITE, 1, 32, 0, 0, *[0] * 7)

    def _lookup(self, node: int, data: bytes) -> bytes:
        return self._entry(self._child(node, data))

    def _flush(self, node: int, data: bytes) -> bytes:
        return b""

    _destroy = _forget = _batch_forget = _interrupt = _flush

    def _getattr(self, node: int, data: bytes) -> bytes:
        flags, _, handle = struct.unpack_from("<IIQ", data)
        is_open = flags & 1 and handle in self._handles
        found = os.fstat(self._handles[handle]) if is_open else os.lstat(self._paths[node])
        return struct.pack("<QII", 0, 0, 0) + self._attributes(found)

    def _setattr(self, node: int, data: bytes) -> bytes:
        valid, _, _, size, *_ = struct.unpack_from("<IIQQ", data)
        (mode,) = struct.unpack_from("<I", data, 68)
        if valid & _SET_SIZE and not self._ignores("truncate"):
            os.truncate(self._paths[node], size)
        if valid & _SET_MODE:
            os.chmod(self._paths[node], stat.S_IMODE(mode))
        return struct.pack("<QII", 0, 0, 0) + self._attributes(os.lstat(self._paths[node]))

    def _mkdir(self, node: int, data: bytes) -> bytes:
        mode, umask = struct.unpack_from("<II", data)
        path = self._child(node, data[8:])
        os.mkdir(path)
        os.chmod(path, stat.S_IMODE(mode) & ~umask)
        return self._entry(path)

    def _unlink(self, node: int, data: bytes, remove: Callable[[str], None] = os.unlink) -> bytes:
        remove(self._child(node, data))
        self._forget_path(self._child(node, data))
        return b""

    def _rmdir(self, node: int, data: bytes) -> bytes:
        return self._unlink(node, data, os.rmdir)

    def _rename(self, node: int, data: bytes, start: int = 8, flags: int = 0) -> bytes:
        (parent,) = struct.unpack_from("<Q", data)
        old, new, *_ = data[start:].split(b"\0")
        source, target = self._child(node, old), self._child(parent, new)
        how = self._lies.get("rename", "")
        if flags == EXCHANGE and not how:
            _renameat2(source, target, EXCHANGE)
            self._paths = {
                n: _moved(_moved(_moved(p, target, "\0"), source, target), "\0", source) for n, p in self._paths.items()
            }
            return b""
        if flags == NOREPLACE and not how and os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "exists")
        if how == "replaces" and os.path.isdir(target):
            shutil.rmtree(target)
        os.rename(source, target)
        self._forget_path(target)
        self._paths = {n: _moved(p, source, target) for n, p in self._paths.items()}
        return b""

    def _rename2(self, node: int, data: bytes) -> bytes:
        _, flags, _ = struct.unpack_from("<QII", data)
        return self._rename(node, data, 16, flags)

    def _link(self, node: int, data: bytes) -> bytes:
        (old,) = struct.unpack_from("<Q", data)
        os.link(self._paths[old], self._child(node, data[8:]))
        return self._entry(self._child(node, data[8:]))

    def _opened(self, fd: int) -> bytes:
        self._handles[fd] = fd
        return struct.pack("<QII", fd, 0, 0)

    def _open(self, node: int, data: bytes) -> bytes:
        (flags,) = struct.unpack_from("<I", data)
        return self._opened(os.open(self._paths[node], flags & ~os.O_DIRECT & ~os.O_NOFOLLOW))

    def _create(self, node: int, data: bytes) -> bytes:
        flags, mode, umask, _ = struct.unpack_from("<4I", data)
        path = self._child(node, data[16:])
        fd = os.open(path, (flags & ~os.O_DIRECT) | os.O_CREAT, 0o600)
        os.fchmod(fd, stat.S_IMODE(mode) & ~umask)
        return self._entry(path) + self._opened(fd)

    def _read(self, node: int, data: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", data)
        return os.pread(self._handles[handle], size, offset)

    def _write(self, node: int, data: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", data)
        return struct.pack("<II", os.pwrite(self._handles[handle], data[40 : 40 + size], offset), 0)

    def _release(self, node: int, data: bytes) -> bytes:
        (handle,) = struct.unpack_from("<Q", data)
        os.close(self._handles.pop(handle))
        return b""

    def _fsync(self, node: int, data: bytes) -> bytes:
        (handle,) = struct.unpack_from("<Q", data)
        if not self._ignores("fsync"):
            os.fsync(self._handles[handle])
        return b""

    def _opendir(self, node: int, data: bytes) -> bytes:
        return self._opened(os.open(self._paths[node], os.O_RDONLY | os.O_DIRECTORY))

    _releasedir, _fsyncdir = _release, _fsync

    def _readdir(self, node: int, data: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", data)
        listing = b""
        for k, name in enumerate(sorted(os.listdir(self._paths[node]))[offset:], offset + 1):
            raw = os.fsencode(name)
            entry = struct.pack("<QQII", 2, k, len(raw), 0) + raw
            entry += bytes(-len(entry) % 8)
            if len(listing) + len(entry) > size:
                break
            listing += entry
        return listing

    def _statfs(self, node: int, data: bytes) -> bytes:
        found = os.statvfs(self._paths[1])
        numbers = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        return struct.pack("<5Q4I6I", *numbers, found.f_bsize, 255, found.f_frsize, 0, *[0] * 6)


def _moved(path: str, source: str, target: str) -> str:
    return target + path[len(source) :] if path == source or path.startswith(source + "/") else path


def _renameat2(source: str, target: str, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(source), -100, os.fsencode(target), ctypes.c_uint(flags)) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


if __name__ == "__main__":
    Server(int(sys.argv[1]), sys.argv[2], sys.argv[3]).serve()
