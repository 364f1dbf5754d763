"""A store that takes what is sent and keeps only what is small: `python -m benchmarks.s3_sink`. Prints its port.

In life a store is another machine. One that hashes and writes takes more of this machine's processors than what sends
to it; this one takes little more than the kernel needs to receive. It speaks as much of S3 as a mirror asks for, keeps
conditions, and answers no question about what it did not keep.
"""

from __future__ import annotations

import itertools
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_KEPT_BYTES = 1 << 20


@dataclass
class Kept:
    """One object; of a large one only its size."""

    size_bytes: int
    data: bytes
    e_tag: str


@dataclass
class Bucket:
    """All objects, by their paths, and the sizes of the parts of unfinished uploads."""

    objects: dict[str, Kept] = field(default_factory=dict)
    uploads: dict[str, dict[int, int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def put(self, path: str, size_bytes: int, data: bytes, wanted: str | None, absent: bool) -> str | None:
        """The new entity tag; None where the condition does not hold."""
        with self.lock:
            known = self.objects.get(path)
            if (absent and known) or (wanted is not None and (known is None or known.e_tag != wanted)):
                return None
            self.objects[path] = Kept(size_bytes, data, f'"{next(self.numbers):032x}-1"')
            return self.objects[path].e_tag


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    bucket = Bucket()
    memory = threading.local()

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def do_PUT(self) -> None:
        path, query = self._asked()
        size_bytes = int(self.headers["Content-Length"])
        data = self._received(size_bytes)
        if "uploadId" in query:
            self.bucket.uploads[query["uploadId"]][int(query["partNumber"])] = size_bytes
            self._reply(200, e_tag=f'"{size_bytes:032x}"')
            return
        wanted, absent = self.headers["If-Match"], self.headers["If-None-Match"] is not None
        e_tag = self.bucket.put(path, size_bytes, data, wanted, absent)
        self._reply(200 if e_tag else 412, e_tag=e_tag)

    def do_POST(self) -> None:
        path, query = self._asked()
        self._received(int(self.headers["Content-Length"] or 0))
        if "uploads" in query:
            number = f"{next(self.bucket.numbers)}"
            self.bucket.uploads[number] = {}
            inside = f"<Bucket>b</Bucket><Key>{path}</Key><UploadId>{number}</UploadId>"
            self._reply(200, f"<InitiateMultipartUploadResult>{inside}</InitiateMultipartUploadResult>".encode())
            return
        e_tag = self.bucket.put(path, sum(self.bucket.uploads.pop(query["uploadId"]).values()), b"", None, False)
        inside = f"<Location>l</Location><Bucket>b</Bucket><Key>{path}</Key><ETag>{e_tag}</ETag>"
        self._reply(200, f"<CompleteMultipartUploadResult>{inside}</CompleteMultipartUploadResult>".encode())

    def do_GET(self) -> None:
        path, query = self._asked()
        if "uploads" in query:
            self._reply(200, b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")
        elif "list-type" in query:
            self._reply(200, self._listed(f"{path}/{query.get('prefix', '')}"))
        else:
            self._tell(self.bucket.objects.get(path))

    def do_HEAD(self) -> None:
        self._tell(self.bucket.objects.get(self._asked()[0]))

    def do_DELETE(self) -> None:
        self.bucket.objects.pop(self._asked()[0], None)
        self._reply(204)

    def log_message(self, format: str, *args: object) -> None:
        return None

    def _asked(self) -> tuple[str, dict[str, str]]:
        found = urlsplit(self.path)
        query = parse_qs(found.query, keep_blank_values=True)
        return unquote(found.path).rstrip("/"), {name: values[0] for name, values in query.items()}

    def _received(self, size_bytes: int) -> bytes:
        if size_bytes <= _KEPT_BYTES:
            return self.rfile.read(size_bytes)
        buffer = memoryview(bytearray(_KEPT_BYTES))
        left = size_bytes
        while left:
            num_bytes = self.rfile.readinto(buffer[: min(left, _KEPT_BYTES)])
            if not num_bytes:
                raise ConnectionError("the client is gone")
            left -= num_bytes
        return b""

    def _listed(self, below: str) -> bytes:
        with self.bucket.lock:
            paths = [path for path in self.bucket.objects if path.startswith(below)]
        start = below.index("/", 1) + 1
        folders = sorted({path[: path.index("/", len(below)) + 1] for path in paths if "/" in path[len(below) :]})
        found = [f"<CommonPrefixes><Prefix>{folder[start:]}</Prefix></CommonPrefixes>" for folder in folders]
        for path in paths:
            if "/" not in path[len(below) :]:
                kept = self.bucket.objects[path]
                inside = f"<Key>{path[start:]}</Key><Size>{kept.size_bytes}</Size><ETag>{kept.e_tag}</ETag>"
                found.append(f"<Contents>{inside}<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>")
        return f"<ListBucketResult>{''.join(found)}<IsTruncated>false</IsTruncated></ListBucketResult>".encode()

    def _tell(self, kept: Kept | None) -> None:
        if kept is None:
            self._reply(404, b"" if self.command == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>")
            return
        data, asked = kept.data, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if asked:
            data = data[int(asked[1]) : int(asked[2]) + 1]
        size_bytes = kept.size_bytes if self.command == "HEAD" else len(data)
        span = {"Content-Range": f"bytes {asked[1]}-{asked[2]}/{kept.size_bytes}"} if asked else {}
        self._reply(206 if asked else 200, data, kept.e_tag, size_bytes, span)

    def _reply(
        self,
        status: int,
        data: bytes = b"",
        e_tag: str | None = None,
        size_bytes: int | None = None,
        more: dict[str, str] | None = None,
    ) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(data) if size_bytes is None else size_bytes))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        for name, value in {**({"ETag": e_tag} if e_tag else {}), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()


class Listener(ThreadingHTTPServer):
    """Takes each connection to a thread of its own."""

    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    listener = Listener(("127.0.0.1", 0), Handler)
    print(listener.server_address[1], flush=True)
    listener.serve_forever()
