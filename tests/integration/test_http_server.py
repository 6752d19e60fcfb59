"""The HTTP server of the metrics: limits, refusals, TLS, and its end."""

from __future__ import annotations

import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path

import pytest

from backupd.telemetry import http_server
from backupd.telemetry.http_server import MAX_CONNECTIONS, HttpServer, PageRequest, PageResponse, Pages
from tests.pki import Pki
from tests.stage import until

HOST = "127.0.0.1"


def hello(request: PageRequest) -> PageResponse:
    return PageResponse(f"{request.path} {request.query} {request.accept}\n".encode())


def broken(_request: PageRequest) -> PageResponse:
    raise ValueError("a bug")


class Served:
    """A server in threads; `errors` are the exceptions of its pages."""

    def __init__(self, address: str, pages: Pages, context: Callable[[], ssl.SSLContext] | None) -> None:
        self.errors: list[Exception] = []
        self.server = HttpServer(address, pages, self.errors.append, context)
        self.port = int(address.rpartition(":")[2])
        self.threads = [
            threading.Thread(target=each.run, args=(self.server.stop,)) for each in self.server.threads
        ]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.server.request_stop()
        for thread in self.threads:
            thread.join()

    def send(self, data: bytes) -> bytes:
        """Send the bytes of a request and return the whole response."""
        with socket.create_connection((HOST, self.port), 30) as connection:
            connection.sendall(data)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    pieces = []
    while piece := connection.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


PAGES: Pages = {"/": hello, "/broken": broken}


@contextmanager
def served(
    context: Callable[[], ssl.SSLContext] | None = None, host: str = HOST, pages: Pages = PAGES
) -> Iterator[Served]:
    with socket.socket() as holder:  # holds the port until the server listens
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        running = Served(f"{host}:{holder.getsockname()[1]}", pages, context)
        try:
            yield running
        finally:
            running.stop()


def a_request(line: str = "GET / HTTP/1.1", host: str = HOST, more: str = "") -> bytes:
    return f"{line}\r\nHost: {host}\r\n{more}\r\n".encode()


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_REQUEST_TIMEOUT", 0.5)


def test_a_page_gets_path_query_and_accept_header() -> None:
    with served() as running:
        response = running.send(a_request("GET /?a=b HTTP/1.1", more="Accept: text/plain\r\n"))

    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body == b"/ a=b text/plain\n"
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"default-src 'none'" in head
    assert b"X-Content-Type-Options: nosniff" in head
    assert b"Server:" not in head


def test_a_head_request_gets_the_same_head_without_a_body() -> None:
    with served() as running:
        response = running.send(a_request("HEAD / HTTP/1.1"))

    assert b"Content-Length: 4\r\n" in response
    assert response.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (a_request("GET /missing HTTP/1.1"), HTTPStatus.NOT_FOUND),
        (a_request("POST / HTTP/1.1"), HTTPStatus.METHOD_NOT_ALLOWED),
        (a_request("GET http://127.0.0.1/ HTTP/1.1"), HTTPStatus.BAD_REQUEST),
        (a_request("GET / HTTP/2.0"), HTTPStatus.BAD_REQUEST),
        (a_request("nonsense"), HTTPStatus.BAD_REQUEST),
        (b"GET / HTTP/1.1\r\n\r\n", HTTPStatus.BAD_REQUEST),
        (a_request(more="Host: 127.0.0.1\r\n"), HTTPStatus.BAD_REQUEST),
        (a_request(more="no colon\r\n"), HTTPStatus.BAD_REQUEST),
        (a_request(more="Accept: a\nX: b\r\n"), HTTPStatus.BAD_REQUEST),
        (a_request(more="Accept: \u00b2\r\n"), HTTPStatus.BAD_REQUEST),
        (a_request(more=f"X: {'x' * 9000}\r\n")[:8192], HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE),
        (a_request(host="evil.example"), HTTPStatus.MISDIRECTED_REQUEST),
        (a_request(host="evil.example:9184"), HTTPStatus.MISDIRECTED_REQUEST),
        (a_request("GET /broken HTTP/1.1"), HTTPStatus.INTERNAL_SERVER_ERROR),
        (a_request(host="localhost:80"), HTTPStatus.OK),
        (a_request(host="[::1]:80"), HTTPStatus.OK),
        (a_request(host="192.0.2.1"), HTTPStatus.OK),
        (b"GET / HTTP/1.0\r\n\r\n", HTTPStatus.OK),
    ],
    ids=lambda value: value.name if isinstance(value, HTTPStatus) else "",
)
def test_a_request_gets_its_status(request_bytes: bytes, status: HTTPStatus) -> None:
    with served() as running:
        response = running.send(request_bytes)

        assert int(response.split()[1]) == status
        assert [str(error) for error in running.errors] == ["a bug"] * (status >= 500)


def test_a_server_for_other_hosts_accepts_any_name() -> None:
    with served(host="0.0.0.0") as running:
        assert b" 200 " in running.send(a_request(host="backup1.example.net"))


def test_clients_that_send_nothing_do_not_keep_others_out(short_timeout: None) -> None:
    with served() as running:
        silent = [socket.create_connection((HOST, running.port)) for _ in range(MAX_CONNECTIONS + 2)]
        assert b" 200 " in running.send(a_request())
        for connection in silent:
            connection.close()


def test_a_request_in_small_pieces_is_ended_in_time(short_timeout: None) -> None:
    """Each piece arrives in less than the time-out."""
    with served() as running, socket.create_connection((HOST, running.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        connection.settimeout(0.1)

        def has_ended() -> bool:
            try:
                connection.sendall(b"x")
                return connection.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        until(has_ended, "the end of the connection")


def test_a_client_that_reads_slowly_is_ended_in_time_also_with_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads each record of TLS in less than the time-out."""
    monkeypatch.setattr(http_server, "_RESPONSE_TIMEOUT", 0.5)
    pki, size = Pki(tmp_path), 40_000_000
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.server_cert, pki.server_key)
    client = ssl.create_default_context(cafile=pki.ca_pem)
    with served(lambda: context, pages={"/": lambda _: PageResponse(bytes(size))}) as running:
        with (
            socket.create_connection((HOST, running.port), 30) as plain,
            client.wrap_socket(plain, server_hostname=HOST) as connection,
        ):
            connection.sendall(a_request())
            received = 0
            with suppress(OSError):
                while (piece := len(connection.recv(65536))) and received < size:
                    received += piece
                    threading.Event().wait(0.01)
        assert 0 < received < size


def test_the_stop_ends_waits_for_clients_at_once_and_frees_the_address() -> None:
    with served() as running:
        silent = [socket.create_connection((HOST, running.port)) for _ in range(MAX_CONNECTIONS)]
        started = time.monotonic()
        running.stop()
        assert time.monotonic() - started < 4  # less than the time-out of a request
        HttpServer(f"{HOST}:{running.port}", {}, running.errors.append).request_stop()
        for connection in silent:
            connection.close()


def test_a_port_in_use_raises_an_error() -> None:
    with served() as running, pytest.raises(OSError, match="in use"):
        HttpServer(f"{HOST}:{running.port}", {}, running.errors.append)


def test_a_client_needs_a_certificate_where_one_is_required(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.server_cert, pki.server_key)
    context.load_verify_locations(pki.ca_pem)
    context.verify_mode = ssl.CERT_REQUIRED
    with served(lambda: context) as running:
        url = f"https://127.0.0.1:{running.port}/"
        client = ssl.create_default_context(cafile=pki.ca_pem)
        with pytest.raises(OSError, match=r"certificate required|reset|EOF"):
            urllib.request.urlopen(url, context=client, timeout=30).read()
        client.load_cert_chain(pki.client_cert, pki.client_key)
        with urllib.request.urlopen(url, context=client, timeout=30) as response:
            assert response.status == HTTPStatus.OK
        with suppress(ConnectionResetError):
            assert running.send(a_request()) == b""  # not TLS
    assert running.errors == []
