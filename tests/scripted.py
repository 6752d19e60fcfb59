"""A server that runs a script for each connection, over TCP or TLS, and records the requests."""

from __future__ import annotations

import hashlib
import json
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.pki import KeyPair, Pki
from tests.stage import TIMEOUT

_PIECE = 64 * 1024
_RECEIVE_BUFFER = 64 * 1024
"""Small, so that the client notices early that a script has stopped to read."""


class EndedError(Exception):
    """The client ended the connection before the script did."""


@dataclass(frozen=True, slots=True)
class Request:
    """A complete request; `archive` is the content of its file part."""

    head: bytes
    body: bytes

    @property
    def path(self) -> str:
        return self.head.split(b" ")[1].decode()

    def header(self, name: str) -> str | None:
        return header_of(self.head, name)

    @property
    def archive(self) -> bytes:
        boundary = (self.header("content-type") or "").partition("boundary=")[2].encode()
        _, _, part = self.body.partition(b'; filename="')
        _, _, rest = part.partition(b"\r\n\r\n")
        return rest.partition(b"\r\n--" + boundary)[0]


class Peer:
    """One connection, from the point of view of the script that serves it."""

    def __init__(self, server: ScriptedServer, number: int, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._read_ahead = b""
        self.number = number
        self.closed = threading.Event()
        self.head = b""
        self.received = 0
        self.fault: BaseException | None = None
        self.tls_version: str | None = None
        self.client_certificate: Any = None

    def do_handshake(self, context: ssl.SSLContext) -> None:
        self._sock = context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
        self._sock.do_handshake()
        self.tls_version = self._sock.version()
        self.client_certificate = self._sock.getpeercert()

    def read_head(self) -> bytes:
        """Read the request line and the header fields."""
        data = self._read_ahead
        while b"\r\n\r\n" not in data:
            data += self._piece()
        head, _, self._read_ahead = data.partition(b"\r\n\r\n")
        self.head = head
        self._server.heads.append(head)
        return head

    def read(self, size: int) -> bytes:
        """Read `size` bytes of a body."""
        pieces, left = [], size
        while left:
            piece = self._read_ahead or self._piece()
            piece, self._read_ahead = piece[:left], piece[left:]
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def read_request(self) -> Request:
        """Read a complete request."""
        head = self.read_head()
        request = Request(head, self.read(int(header_of(head, "content-length") or 0)))
        self._server.requests.append(request)
        return request

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def drip(self, data: bytes, every: float) -> None:
        """Send one byte every `every` seconds."""
        for number in range(len(data)):
            self.send(data[number : number + 1])
            self._server.stopping.wait(every)

    def half_close(self) -> None:
        """Close the sending side only: the script can still read."""
        if isinstance(self._sock, ssl.SSLSocket):
            self._sock.settimeout(0)
            with suppress(ssl.SSLError):  # close_notify was sent; the client's has not arrived yet
                self._sock.unwrap()
            self._sock.settimeout(TIMEOUT)
        socket.socket.shutdown(self._sock, socket.SHUT_WR)  # SSLSocket.shutdown would drop the TLS layer

    def drain(self) -> None:
        """Read and discard until the client closes the connection."""
        try:
            while True:
                self._piece()
        except (EndedError, OSError):
            return

    def stop_reading(self) -> None:
        """Read nothing more until the client or the test closes the connection."""
        watch = select.poll()
        watch.register(self._sock, select.POLLRDHUP)
        watch.poll(TIMEOUT * 1000)

    @property
    def socket(self) -> socket.socket:
        """Return the connection, for a script that passes unknown bytes on."""
        return self._sock

    def reset(self) -> None:
        """Close the connection with a TCP reset."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def pause(self) -> None:
        """Stop to read until the test calls `resume`."""
        self._server.paused.set()
        self._server.resumed.wait(TIMEOUT)

    def interrupt(self) -> None:
        """End every wait of the script for the network; called by another thread."""
        try:
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Close the connection; `closed` is set once the client can notice it."""
        self._sock.close()  # its fileno() is -1 already before the system call returns
        self.closed.set()

    def _piece(self) -> bytes:
        piece = self._sock.recv(_PIECE)
        if not piece:
            raise EndedError
        self.received += len(piece)
        return piece


Script = Callable[[Peer], None]


class ScriptedServer:
    """Runs a script for each connection on the loopback interface, in a thread of its own.

    `heads` holds the heads of all requests, `requests` those that a script read completely. The end of the
    block closes all connections and raises the exception of a script, unless its connection ended.
    """

    def __init__(self, script: Script, context: ssl.SSLContext | None = None) -> None:
        self.peers: list[Peer] = []
        self.heads: list[bytes] = []
        self.requests: list[Request] = []
        self.paused = threading.Event()
        self.resumed = threading.Event()
        self.stopping = threading.Event()
        self._script = script
        self._context = context
        self._holder = socket.socket()  # reserves the port while there is no listener
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind(("127.0.0.1", 0))
        self.port: int = self._holder.getsockname()[1]
        self.scheme = "https" if context else "http"
        self._listening = threading.Lock()
        self._listen()
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/v1/upload"

    @property
    def received(self) -> int:
        """Return the number of bytes that were read from all connections."""
        return sum(peer.received for peer in self.peers)

    def resume(self) -> None:
        """End every `pause`."""
        self.resumed.set()

    def refuse(self) -> None:
        """Refuse new connections until `accept_again`; the existing ones continue."""
        with self._listening:
            if not self.stopping.is_set():
                self._stop_listening()

    def accept_again(self) -> None:
        """Accept connections again after `refuse`."""
        with self._listening:
            if self.is_refusing:
                self._listen()
                self._acceptor.start()

    @property
    def is_refusing(self) -> bool:
        """Return whether new connections are refused."""
        return self._listener.fileno() < 0

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._acceptor = threading.Thread(target=self._accept, name="scripted-server")

    def _stop_listening(self) -> None:
        if not self.is_refusing:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._acceptor.join()
            self._listener.close()

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self.resumed.set()
        with self._listening:
            self._stop_listening()
        self._holder.close()
        for peer in self.peers:
            peer.interrupt()
        for thread in self._threads:
            thread.join()
        for peer in self.peers:
            if error is None and peer.fault and not isinstance(peer.fault, EndedError | OSError):
                raise peer.fault

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(TIMEOUT)
            # otherwise a response after TLS 1.3's tickets waits for the client, and a reset discards it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = Peer(self, len(self.peers), sock)
            self.peers.append(peer)
            thread = threading.Thread(target=self._serve, args=(peer,), name=f"scripted-{peer.number}")
            self._threads.append(thread)
            thread.start()

    def _serve(self, peer: Peer) -> None:
        try:
            if self._context is not None:
                peer.do_handshake(self._context)
            self._script(peer)
        except BaseException as fault:  # noqa: BLE001 -- `__exit__` raises it in the test
            peer.fault = fault
        finally:
            peer.close()


def in_turn(*scripts: Script) -> Script:
    """Return a script that runs the next one for each connection; the last one runs for all further ones."""

    def script(peer: Peer) -> None:
        scripts[min(peer.number, len(scripts) - 1)](peer)

    return script


def accept_all(peer: Peer) -> None:
    """Store every archive of the connection and respond with its receipt, as a good endpoint does."""
    while True:
        peer.send(receipt_for(peer.read_request().archive))


def http_response(status: int, body: bytes = b"", **headers: str) -> bytes:
    """Return an HTTP/1.1 response; underscores in keywords become dashes of header names."""
    lines = [f"HTTP/1.1 {status} As Scripted", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def receipt_for(content: bytes, status: int = 201, **headers: str) -> bytes:
    """Return the response of an endpoint that stored this content."""
    receipt = {
        "id": "1",
        "name": "archive",
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return http_response(status, json.dumps(receipt).encode(), **headers)


def header_of(head: bytes, name: str) -> str | None:
    """Return a header field of a request's head."""
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.decode("latin-1").lower() == name.lower():
            return value.strip().decode("latin-1")
    return None


def server_context(
    pki: Pki,
    pair: KeyPair | None = None,
    *,
    client_ca: Path | None = None,
    version: ssl.TLSVersion | None = None,
) -> ssl.SSLContext:
    """Return a context that requires a client certificate; `version` is the only supported one."""
    pair = pair or KeyPair(pki.server_cert, pki.server_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(client_ca or pki.ca_pem)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context
