"""An HTTP proxy in front of one server, which counts requests and lets some of them fail.

Ways to fail: "503" is answered without asking the server; "dropped" closes the connection without an answer; "lost" has
the server do what was asked, and then closes; "hang" keeps the client waiting, half the time with the work done.
"""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

WAYS = ("503", "dropped", "lost", "hang")
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, says the proxy</Message></Error>"
_NAMES = {"403": "AccessDenied", "429": "SlowDown", "501": "NotImplemented", "503": "ServiceUnavailable"}

Fate = Callable[[str, str], str]


class FlakyProxy:
    """What becomes of requests: `fate(method, path)` is "pass", a way to fail, or an HTTP status to answer with.

    seen: method and path of each request so far. conditional: whether conditions of writes reach the server.
    """

    def __init__(self, target: str) -> None:
        self.seen: list[tuple[str, str]] = []
        self.fates: list[str] = []
        self.fate: Fate = lambda method, path: "pass"
        self.conditional = True
        self.target = urlsplit(target).netloc
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.url = ""

    def fail(self, share: float, seed: int = 0) -> None:
        """Let this share of the requests fail, in all ways alike."""
        dice = random.Random(seed)
        self.fate = lambda method, path: dice.choice(WAYS) if dice.random() < share else "pass"

    def fail_next(self, method: str, *ways: str, path: str = "") -> None:
        """Let the next requests of a method, for paths that contain `path`, fail in these ways, one after another."""
        left = list(ways)

        def fate(asked: str, where: str) -> str:
            return left.pop(0) if left and asked == method and path in where else "pass"

        self.fate = fate

    def count(self, method: str, path: str = "") -> int:
        """Requests so far of a method, for paths that contain `path`."""
        return sum(asked == method and path in where for asked, where in self.seen)

    def decide(self, method: str, path: str) -> str:
        with self.lock:
            self.seen.append((method, path))
            self.fates.append(self.fate(method, path))
            return self.fates[-1]


@contextmanager
def flaky_proxy(target: str) -> Iterator[FlakyProxy]:
    """A proxy in front of `target` while the context lasts."""
    proxy = FlakyProxy(target)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(proxy))
    server.daemon_threads = True
    server.block_on_close = False
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.stopped.set()
        server.shutdown()
        server.server_close()


def _handler(proxy: FlakyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer leaves in one piece

        def handle_any(self) -> None:
            body = self._body()
            fate = proxy.decide(self.command, self.path)
            if fate == "pass":
                self._answer(*self._forward(body))
            elif fate.isdecimal():
                self._answer(int(fate), [], _ERROR.format(code=_NAMES[fate]).encode())
            else:
                if fate == "lost" or (fate == "hang" and len(proxy.seen) % 2):
                    self._forward(body)
                if fate == "hang":
                    proxy.stopped.wait(60)
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

        def handle_expect_100(self) -> bool:
            going_on = super().handle_expect_100()
            self.wfile.flush()
            return going_on

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            dropped = {"transfer-encoding", "content-length", "connection", "expect"}
            if not proxy.conditional:
                dropped.add("if-none-match")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            connection = http.client.HTTPConnection(proxy.target)
            try:
                connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
                response = connection.getresponse()
                return response.status, response.getheaders(), response.read()
            finally:
                connection.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response_only(status)
            length = str(len(body))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            self.wfile.flush()

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:  # the client waits no longer
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Tests look at `seen` instead."""

    return Handler
