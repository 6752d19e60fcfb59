"""A small HTTP server for pages that only read: metrics, health and the state of the daemon.

A fixed number of threads limits its connections, and each connection has little time, so that no client can
take memory, descriptors or time from the deliveries.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus

from backupd.config.types import host_and_port, is_loopback
from backupd.telemetry.thread_watchdog import ThreadWatchdog

MAX_CONNECTIONS = 4
"""Connections that are served at a time; the kernel queues some more."""

_BACKLOG = 16
"""Connections that the kernel queues; it refuses more."""

_REQUEST_TIMEOUT = 5.0
"""Seconds within which the TLS handshake has to end and the request to arrive, however it is divided."""

_RESPONSE_TIMEOUT = 10.0
"""Seconds within which the client has to read the response."""

_MAX_REQUEST_BYTES = 8192

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""The name of a header; source: RFC 9110, section 5.6.2."""

_VALUE = re.compile(r"[\t -~]*")
"""The value of a header; other bytes are obsolete, and a page may use it in a response."""

_ACCEPT_PAUSE = 1.0
"""Seconds until the next attempt to accept a connection if the process has no descriptor left."""

_SECURITY_HEADERS = (
    "X-Frame-Options: DENY",
    "X-Content-Type-Options: nosniff",
    "Referrer-Policy: no-referrer",
    "Cache-Control: no-store",
    "Connection: close",
)


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A GET or HEAD request; `query` and `accept` are empty if they are missing."""

    path: str
    query: str = ""
    accept: str = ""


@dataclass(frozen=True, slots=True)
class PageResponse:
    """The response of a page; `content_type` has the charset, `content_policy` permits style and images."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    content_policy: str = "default-src 'none'"


Pages = Mapping[str, Callable[[PageRequest], PageResponse]]
"""The function of each path, such as `/metrics`; it is called in a thread of the server."""


class HttpServer:
    """Serves `pages` at an address; the caller starts its `threads` and requests their stop.

    `context` returns the TLS context for the next connection; without it, the server speaks plain HTTP.
    `on_error` is called with an exception of a page. Raises OSError if the address can't be used.
    """

    def __init__(
        self,
        address: str,
        pages: Pages,
        on_error: Callable[[Exception], None],
        context: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self.stop = threading.Event()
        self._pages = pages
        self._on_error = on_error
        self._context = context
        host, port = host_and_port(address)
        self._is_local = is_loopback(host)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self.threads = [HttpServerThread(number, self._serve_next) for number in range(MAX_CONNECTIONS)]

    def request_stop(self) -> None:
        """End all waits of the threads at once and free the address; do not wait for the threads."""
        self.stop.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # `close` alone would not wake the threads
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                _abort(connection)

    def _serve_next(self, watchdog: ThreadWatchdog) -> None:
        """Wait for a connection and serve it; never raises."""
        try:
            connection, _ = self._listener.accept()
        except OSError:  # stopped, or no descriptor is left
            self.stop.wait(_ACCEPT_PAUSE)
            return
        watchdog.alive()
        with suppress(OSError), connection:  # clients may go away at any time, and may not speak TLS
            try:
                self._serve(connection)
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001 -- no bug here may end the daemon
                self._on_error(error)
        watchdog.idle()

    def _serve(self, connection: socket.socket) -> None:
        until = time.monotonic() + _REQUEST_TIMEOUT
        connection.settimeout(_REQUEST_TIMEOUT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context is not None:
            connection = self._context().wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        with connection:
            self._register(connection)
            try:
                if isinstance(connection, ssl.SSLSocket):
                    connection.do_handshake()
                _send_all(connection, self._respond(_read_head(connection, until)))
            finally:
                with self._lock:
                    self._connections.discard(connection)

    def _register(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)
            if self.stop.is_set():
                _abort(connection)

    def _respond(self, head: bytes | None) -> bytes:
        """Return the bytes of the response to the head of a request; None is one that is too long."""
        if head is None:
            return _error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        lines = head.decode("latin-1").split("\r\n")
        start = re.fullmatch(r"([A-Z]+) (/[!-~]*) HTTP/1\.([01])", lines[0])
        headers = _headers(lines[1:])
        if start is None or headers is None:
            return _error(HTTPStatus.BAD_REQUEST)
        hosts = headers.get("host", [])
        if len(hosts) > 1 or (not hosts and start[3] == "1"):
            return _error(HTTPStatus.BAD_REQUEST)
        if hosts and not self._accepts_host(hosts[0]):
            return _error(HTTPStatus.MISDIRECTED_REQUEST)
        path, _, query = start[2].partition("?")
        if path not in self._pages:
            return _error(HTTPStatus.NOT_FOUND)
        if start[1] not in {"GET", "HEAD"}:
            return _error(HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET, HEAD")
        page = self._page(PageRequest(path, query, ", ".join(headers.get("accept", []))))
        return _message(page, with_body=start[1] == "GET")

    def _accepts_host(self, host: str) -> bool:
        """Return whether a request was meant for this server.

        A web page can have its own name resolved to a loopback address, and so read a server there with the
        browser of a user of this host. Such a request has the name of the page in its Host header.
        """
        name = re.sub(r":[0-9]*\Z", "", host)
        return not self._is_local or name.lower() == "localhost" or _is_address(name)

    def _page(self, request: PageRequest) -> PageResponse:
        try:
            return self._pages[request.path](request)
        except Exception as error:  # noqa: BLE001 -- a bug in a page must not end the daemon
            self._on_error(error)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            return PageResponse(f"{status.phrase}\n".encode(), status=status)


class HttpServerThread:
    """One of the threads of a server; it serves one connection at a time."""

    def __init__(self, number: int, serve_next: Callable[[ThreadWatchdog], None]) -> None:
        self._serve_next = serve_next
        self.watchdog = ThreadWatchdog(f"http {number}", may_hang=True)

    def run(self, stop: threading.Event) -> None:
        """Serve connections until the stop event is set."""
        while not stop.is_set():
            self._serve_next(self.watchdog)


def _abort(connection: socket.socket) -> None:
    """End all waits of another thread on a connection."""
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # that of SSLSocket would change its state


def _read_head(connection: socket.socket, until: float) -> bytes | None:
    """Return the request up to the blank line, None if it is too long; raises OSError if it is incomplete.

    `until` is a monotonic time.
    """
    data = b""
    while b"\r\n\r\n" not in data:
        if len(data) >= _MAX_REQUEST_BYTES:
            return None
        connection.settimeout(max(until - time.monotonic(), 0.001))
        piece = connection.recv(_MAX_REQUEST_BYTES - len(data))
        if not piece:
            raise ConnectionAbortedError
        data += piece
    return data.partition(b"\r\n\r\n")[0]


def _send_all(connection: socket.socket, data: bytes) -> None:
    """Send a response within its time; `sendall` would grant that time to each record of TLS."""
    until, sent = time.monotonic() + _RESPONSE_TIMEOUT, 0
    while sent < len(data):
        connection.settimeout(max(until - time.monotonic(), 0.001))
        sent += connection.send(memoryview(data)[sent:])


def _headers(lines: Sequence[str]) -> Mapping[str, list[str]] | None:
    """Return the values of each header by its name in lower case, None if a line is malformed."""
    headers: dict[str, list[str]] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            return None
        headers.setdefault(name.lower(), []).append(value.strip(" \t"))
    return headers


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _error(status: HTTPStatus, *headers: str) -> bytes:
    return _message(PageResponse(f"{status.phrase}\n".encode(), status=status), *headers)


def _message(page: PageResponse, *headers: str, with_body: bool = True) -> bytes:
    lines = (
        f"HTTP/1.1 {page.status.value} {page.status.phrase}",
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Type: {page.content_type}",
        f"Content-Length: {len(page.body)}",
        f"Content-Security-Policy: {page.content_policy}",
        *_SECURITY_HEADERS,
        *headers,
    )
    head = "".join(f"{line}\r\n" for line in lines) + "\r\n"
    return head.encode("ascii") + (page.body if with_body else b"")
