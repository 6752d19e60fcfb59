"""A proxy between the daemon and the receiver that injects one fault after another, by a schedule."""

from __future__ import annotations

import enum
import http.client
import select
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from tests.pki import Pki
from tests.scripted import EndedError, Peer, ScriptedServer, http_response, server_context

_PIECE = 64 * 1024
_HANDSHAKE_BYTES = 1_000
"""Bytes of the receiver that are sent before its side of the handshake is complete."""

_ALERT = bytes.fromhex("1503030002022a")
"""A TLS alert in plain text, where only encrypted records are allowed."""


class Kind(enum.Enum):
    """A fault of a connection; for the faults that need to read the response, TLS ends in the proxy."""

    REFUSED = "connections refused"
    RESET_AT_ONCE = "reset after accept"
    RESET_IN_HANDSHAKE = "reset in the TLS handshake"
    HANG = "accepted, then silent"
    RESET_IN_BODY = "reset in the request body"
    STALL_IN_BODY = "stalled in the request body"
    SLOW_BODY = "one byte at a time in the request body"
    ALERT_IN_BODY = "TLS alert in the request body"
    STALL_BEFORE_RESPONSE = "stalled before the response"
    RESET_AFTER_BODY = "reset in the next bytes from the receiver"
    WRONG_CERTIFICATE = "certificate of another CA"
    NO_RESPONSE = "closed before the response"
    PARTIAL_RESPONSE = "closed in the response"
    RESET_IN_RESPONSE = "reset in the response"
    BAD_GATEWAY = "502 instead of the response"
    SLOW_RESPONSE = "one byte at a time in the response"
    RESPONSE_TWICE = "response sent twice"
    CLOSED_TWICE = "two Connection: close headers, then closed"


_IN_THE_BODY = {
    Kind.RESET_IN_BODY,
    Kind.STALL_IN_BODY,
    Kind.SLOW_BODY,
    Kind.ALERT_IN_BODY,
    Kind.STALL_BEFORE_RESPONSE,
    Kind.RESET_AFTER_BODY,
}


BELOW_HTTP = (
    Kind.REFUSED,
    Kind.RESET_AT_ONCE,
    Kind.RESET_IN_HANDSHAKE,
    Kind.HANG,
    Kind.WRONG_CERTIFICATE,
    *sorted(_IN_THE_BODY, key=lambda kind: kind.value),
)
"""The faults for which the proxy needs no HTTP."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a connection, after so many bytes from the daemon, or after so many good responses.

    `pace` is the number of seconds between two bytes of a slow connection.
    """

    kind: Kind
    after: int = 0
    responses_before: int = 0
    pace: float = 1.0


class FaultProxy:
    """Serves while in its block, with one fault of the schedule for each connection, and then without faults.

    A fault is kept for the next connection if its connection ends first. `injected` counts the faults.
    """

    def __init__(self, pki: Pki, port: int, schedule: Sequence[Fault], other: Pki | None = None) -> None:
        self._target = port
        self._schedule = list(schedule)
        self._planned = len(schedule)
        self._with_fault: set[int] = set()
        self._lock = threading.Lock()
        self._stored = threading.Event()
        """Cleared while the receiver stores an archive behind a stalled connection: a query may follow."""
        self._stored.set()
        self._tls_context = server_context(pki)
        self._wrong_context = server_context(pki, (other or Pki(pki.folder / "other")).issue_server())
        self._client_context = ssl.create_default_context(cafile=pki.ca_pem)
        self._client_context.load_cert_chain(pki.client_cert, pki.client_key)
        self._server = ScriptedServer(self._serve)
        self._clean: list[Peer] = []
        self._held: dict[int, Fault] = {}
        self.injected: Counter[Kind] = Counter()
        self.port = self._server.port

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.__exit__(None, None, None)

    @property
    def is_done(self) -> bool:
        """Whether every fault of the schedule was injected."""
        with self._lock:
            return self.injected.total() == self._planned

    @property
    def remaining(self) -> str:
        """A description of the faults that were not injected yet."""
        with self._lock:
            held = [fault for number, fault in self._held.items() if number not in self._with_fault]
            return f"waiting: {self._schedule}, on connections: {held}"

    @property
    def is_refusing(self) -> bool:
        """Whether connections are refused, until `accept_again`."""
        return self._server.is_refusing

    def accept_again(self) -> None:
        """Accept connections again."""
        self._server.accept_again()

    def close_clean_connections(self) -> None:
        """Close the idle connections without a fault, so that new ones get the remaining faults."""
        with self._lock:
            for peer in self._clean:
                peer.interrupt()
            self._clean.clear()

    def _serve(self, peer: Peer) -> None:
        self._stored.wait()
        with self._lock:
            fault = self._schedule.pop(0) if self._schedule else None
            if fault is None:
                self._clean.append(peer)
        if fault is None:
            self._relay(peer, None)
            return
        with self._lock:
            self._held[peer.number] = fault
        try:
            self._serve_fault(peer, fault)
        finally:
            if fault.kind is Kind.STALL_BEFORE_RESPONSE:
                self._stored.set()
            with self._lock:
                del self._held[peer.number]
                if peer.number not in self._with_fault:
                    self._schedule.insert(0, fault)

    def _serve_fault(self, peer: Peer, fault: Fault) -> None:
        match fault.kind:
            case Kind.REFUSED:
                self._server.refuse()
                self._record(peer, fault)
                peer.reset()
            case Kind.RESET_AT_ONCE:
                self._record(peer, fault)
                peer.reset()
            case Kind.RESET_IN_HANDSHAKE:
                self._reset_in_handshake(peer, fault)
            case Kind.HANG:
                self._record(peer, fault)
                peer.stop_reading()
            case Kind.WRONG_CERTIFICATE:
                self._record(peer, fault)
                peer.do_handshake(self._wrong_context)
            case kind if kind in _IN_THE_BODY:
                self._relay(peer, fault)
            case _:
                peer.do_handshake(self._tls_context)
                self._serve_responses(peer, fault)

    def _record(self, peer: Peer, fault: Fault) -> None:
        with self._lock:
            self._with_fault.add(peer.number)
            self.injected[fault.kind] += 1

    def _reset_in_handshake(self, peer: Peer, fault: Fault) -> None:
        with socket.create_connection(("127.0.0.1", self._target)) as far:
            hello = peer.socket.recv(_PIECE)
            if not hello:
                return
            far.sendall(hello)
            peer.send(far.recv(1 + fault.after % _HANDSHAKE_BYTES))
            self._record(peer, fault)
            peer.reset()

    def _relay(self, peer: Peer, fault: Fault | None) -> None:
        """Relay both directions of a connection, until the fault is due."""
        near = peer.socket
        with socket.create_connection(("127.0.0.1", self._target)) as far:
            sent, is_due = 0, False
            while True:
                readable, _, _ = select.select([near, far], [], [])
                if far in readable:
                    data = far.recv(_PIECE)
                    if is_due and fault and fault.kind is Kind.STALL_BEFORE_RESPONSE:
                        self._stored.set()  # the daemon does not get this response
                    elif not data:
                        return
                    elif is_due and fault:
                        near.sendall(data[: fault.after % len(data)])
                        self._record(peer, fault)
                        peer.reset()
                        return
                    else:
                        near.sendall(data)
                if near not in readable:
                    continue
                data = near.recv(_PIECE)
                if not data:
                    self._await_response(far)
                    return
                sent += len(data)
                far.sendall(data)
                if fault is not None and not is_due and sent > fault.after:
                    is_due = True
                    if self._inject(peer, near, far, fault):
                        return

    def _inject(self, peer: Peer, near: socket.socket, far: socket.socket, fault: Fault) -> bool:
        """Inject the fault that is due; return whether that ended the connection."""
        if fault.kind is Kind.RESET_AFTER_BODY:
            return False  # it is due with the next bytes from the receiver
        self._record(peer, fault)
        match fault.kind:
            case Kind.STALL_BEFORE_RESPONSE:
                self._stored.clear()
                return False
            case Kind.RESET_IN_BODY:
                peer.reset()
            case Kind.STALL_IN_BODY:
                peer.stop_reading()
            case Kind.ALERT_IN_BODY:
                near.sendall(_ALERT)
                peer.drain()
            case Kind.SLOW_BODY:
                while data := near.recv(1):
                    far.sendall(data)
                    if self._server.stopping.wait(fault.pace):
                        return True
            case _:
                return False
        return True

    def _await_response(self, far: socket.socket) -> None:
        """Wait for the response that the daemon does not get, or for the receiver to give up the request."""
        if not self._stored.is_set():
            far.shutdown(socket.SHUT_WR)
            far.recv(_PIECE)

    def _serve_responses(self, peer: Peer, fault: Fault) -> None:
        """Forward complete requests to the receiver, and inject the fault into one of its responses."""
        remaining = fault.responses_before
        while True:
            peer.read_head()
            response = self._forward(peer)
            if remaining:
                remaining -= 1
                peer.send(response)
                continue
            self._record(peer, fault)
            match fault.kind:
                case Kind.PARTIAL_RESPONSE:
                    peer.send(response[: 1 + fault.after % (len(response) - 1)])
                case Kind.RESET_IN_RESPONSE:
                    peer.send(response[: fault.after % len(response)])
                    peer.reset()
                case Kind.BAD_GATEWAY:
                    peer.send(http_response(502))
                case Kind.SLOW_RESPONSE:
                    peer.drip(response, fault.pace)
                case Kind.RESPONSE_TWICE:
                    peer.send(response + response)
                    peer.drain()
                case Kind.CLOSED_TWICE:
                    status, _, rest = response.partition(b"\r\n")
                    peer.send(status + b"\r\nConnection: close\r\nConnection: close\r\n" + rest)
                    peer.half_close()
                    peer.drain()
                case _:
                    pass
            return

    def _forward(self, peer: Peer) -> bytes:
        method, path, _ = peer.head.split(b"\r\n")[0].decode("ascii").split(" ")
        lines = [line.partition(b":") for line in peer.head.split(b"\r\n")[1:]]
        headers = {key.decode("latin-1"): value.strip().decode("latin-1") for key, _, value in lines}
        length = {key.lower(): value for key, value in headers.items()}.get("content-length", "0")
        body = peer.read(int(length))
        connection = http.client.HTTPSConnection("127.0.0.1", self._target, context=self._client_context)
        try:
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            content = response.read()
        except OSError as error:
            raise EndedError from error
        finally:
            connection.close()
        fields = [(k, v) for k, v in response.getheaders() if k.lower() not in _HOP_BY_HOP]
        head = [f"HTTP/1.1 {response.status} As Stored", *(f"{k}: {v}" for k, v in fields)]
        head.append(f"Content-Length: {len(content)}")
        return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + content


_HOP_BY_HOP = {"connection", "content-length", "transfer-encoding", "keep-alive"}
