"""A proxy before a bucket that fails as buckets do."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Faults(ThreadingHTTPServer):
    """Passes requests on to a bucket's server. `fault(method, path)` returns what happens to a request instead: `503`,
    `403`, `cut` (the connection ends in mid-body), or nothing. `delay`: seconds before each answer."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = host, port
        self.fault: Callable[[str, str], str | None] = lambda _method, _path: None
        self.delay = 0.0
        self.requests = 0

    def handle_error(self, *_: object) -> None:
        """A client that has gone is not printed."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faults

    def handle_request(self) -> None:
        self.server.requests += 1
        body = self.body()
        time.sleep(self.server.delay)
        fault = self.server.fault(self.command, self.path)
        if fault in ("503", "403"):
            self.answer(int(fault), {"Content-Type": "application/xml"}, SLOW_DOWN if fault == "503" else DENIED)
            return
        connection = http.client.HTTPConnection(*self.server.behind)
        drop = {"transfer-encoding", "expect", "content-length"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in drop}
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        headers = {name: value for name, value in answer.getheaders() if name.lower() != "transfer-encoding"}
        self.answer(answer.status, headers, data, cut=fault == "cut" and len(data) > 1)

    def body(self) -> bytes:
        """Reads what the client sends: as long as it says, or in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request  # noqa: N815 - as http.server calls them

    def log_message(self, *_: object) -> None:
        """Requests are not printed."""


@contextmanager
def faults_before(host: str, port: int) -> Iterator[Faults]:
    with Faults(host, port) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()
