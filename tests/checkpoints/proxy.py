"""An HTTP proxy that does to a server's answers what networks and object stores do."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}, says the test</Message></Error>'


@dataclass
class Fault:
    """What happens to the requests that `match` accepts, `times` times.

    Attributes:
        answer: status and S3 error code to answer with, unasked.
        cut_request: hang up after so many bytes of the request's body.
        cut_response: hang up after so many bytes of the answer's body.
        delay: seconds before the answer.
        flip: turn the bits of the first byte of the answer's body.
        hold: answer only when it is set.
    """

    match: Callable[[str, str], bool] = lambda method, path: True
    times: float = 1
    answer: tuple[int, str] | None = None
    cut_request: int | None = None
    cut_response: int | None = None
    delay: float = 0
    flip: bool = False
    hold: threading.Event | None = None


@dataclass
class Proxy:
    """Passes requests at 127.0.0.1:`port` on to 127.0.0.1:`target`."""

    port: int
    target: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and path, in their order

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Listen, again."""
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.proxy = self
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Hang up on everybody and refuse connections."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._server.open.copy():
            reset(connection)

    def inject(self, method: str = "", contains: str = "", **what: Any) -> Fault:
        """Add a fault for requests of `method` whose path contains `contains` ('' = any)."""
        fault = Fault(lambda verb, path: method in ("", verb) and contains in path, **what)
        self.faults.append(fault)
        return fault

    def next_fault(self, method: str, path: str) -> Fault:
        self.requests.append((method, path))
        for fault in self.faults:
            if fault.times and fault.match(method, path):
                fault.times -= 1
                return fault
        return Fault()


def reset(connection: socket.socket) -> None:
    """Break a connection as a dying machine does, without a goodbye."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    connection.close()


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    proxy: Proxy

    def __init__(self, *arguments: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients hang up, too


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_expect_100(self) -> bool:
        return True  # do_any answers, once it knows what

    def do_any(self) -> None:
        fault = self.server.proxy.next_fault(self.command, self.path)
        if fault.answer:
            status, code = fault.answer
            body = b"" if self.command == "HEAD" else ERROR.format(code=code).encode()
            self._answer(status, [("Content-Length", str(len(body))), ("Connection", "close")], body)
            self.close_connection = True
            return
        if "100-continue" in self.headers.get("Expect", ""):
            self.send_response_only(100)
            self.end_headers()
        body = self._body(fault.cut_request)
        if body is None:
            return self._hang_up()
        if fault.hold:
            fault.hold.wait()
        time.sleep(fault.delay)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.proxy.target)
        dropped = ("expect", "transfer-encoding", "connection")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        headers["Content-Length"] = str(len(body))
        upstream.request(self.command, self.path, body=body, headers=headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault.flip:
            content = bytes([content[0] ^ 0xFF]) + content[1:]
        hop = ("transfer-encoding", "connection", "content-length", "date", "server")
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in hop]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        if answer.status != 204:
            headers.append(("Content-Length", length or "0"))
        if fault.cut_response is not None:
            self._answer(answer.status, headers, content[: fault.cut_response])
            return self._hang_up()
        self._answer(answer.status, headers, content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any

    def _body(self, cut: int | None) -> bytes | None:
        """The request's body, or None if the fault or the client ends it early."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body if cut is None else None
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length if cut is None else min(cut, length))
        return body if len(body) == length and cut is None else None

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.server.open.discard(self.connection)
        reset(self.connection)
