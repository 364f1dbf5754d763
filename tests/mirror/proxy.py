"""A small proxy in front of a real server that breaks chosen requests."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

Fault = str | None
"""None: pass on. "503", "429", "409", "404": say so. "skew": 403 RequestTimeTooSkewed ("without a code": AccessDenied).
"reset": reset the connection before, "lost": after the server has done it. "stall": no answer until the proxy closes.
"cut": half of the reply's body. "cut request": half of the request's body reaches the server. "duplicate": the request
reaches the server twice, the second reply is given. "wrong body": one byte of the reply is flipped. "wrong request":
one byte of the request's body is flipped, and the server gets no checksum."""

_XML = "<Error><Code>{0}</Code><Message>{1}</Message></Error>"
_SAID = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "429": (429, "TooManyRequests", "Please reduce your request rate."),
    "409": (409, "ConditionalRequestConflict", "A conflicting operation occurred."),
    "404": (404, "NotFound", "There is no such page."),
    "skew": (403, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large."),
    "skew without a code": (
        403,
        "AccessDenied",
        "The difference between the request time and the server's time is big.",
    ),
}


class Proxy:
    """Use as a context manager. `plan(number, method, path)` is called for each request, numbered from 1, on the
    proxy's threads."""

    def __init__(
        self, upstream: str, plan: Callable[[int, str, str], Fault] = lambda number, method, path: None
    ) -> None:
        self.plan = plan
        self.seen: list[tuple[str, str]] = []
        self.num_reply_bytes = 0
        self._upstream = urlsplit(upstream)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def handle_any(self) -> None:
                proxy.serve(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def log_message(self, format: str, *args: Any) -> None:
                return None

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    self.close_connection = True

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                return None

        self._server = Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, request: Any) -> None:
        with self._lock:
            self.seen.append((request.command, request.path))
            number = len(self.seen)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = self.plan(number, request.command, request.path)
        if fault in _SAID:
            status, code, message = _SAID[fault]
            self._reply(request, status, [], _XML.format(code, message).encode())
        elif fault == "stall":
            self._closing.wait(60)
            request.close_connection = True
        elif fault == "reset":
            self._reset(request)
        else:
            self._pass_on(request, body, fault)

    def _pass_on(self, request: Any, body: bytes, fault: Fault) -> None:
        if fault == "wrong request" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        try:
            status, headers, reply = self.ask(request, body, half=fault == "cut request")
            if fault == "duplicate":
                status, headers, reply = self.ask(request, body)
        except (OSError, http.client.HTTPException):
            self._reset(request)
            return
        if fault == "lost":
            self._reset(request)
            return
        if fault == "wrong body" and reply:
            reply = reply[:-1] + bytes([reply[-1] ^ 1])
        self._reply(request, status, headers, reply, half=fault == "cut")

    def ask(self, request: Any, body: bytes, *, half: bool = False) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self._upstream.hostname or "", self._upstream.port, timeout=60)
        try:
            connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders()
            connection.send(body[: len(body) // 2] if half else body)
            if half:
                raise OSError("cut")
            answer = connection.getresponse()
            body = answer.read()
            with self._lock:
                self.num_reply_bytes += len(body)
            return answer.status, answer.getheaders(), body
        finally:
            connection.close()

    def _reply(
        self, request: Any, status: int, headers: list[tuple[str, str]], body: bytes, *, half: bool = False
    ) -> None:
        request.send_response_only(status)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(body)))
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                request.send_header(name, value)
        request.send_header("Content-Length", length if request.command == "HEAD" else str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body[: len(body) // 2] if half else body)
        request.wfile.flush()
        if half:
            request.close_connection = True

    def _reset(self, request: Any) -> None:
        request.close_connection = True
        # Linger of zero: the peer sees a reset, not an orderly end.
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.connection.close()
