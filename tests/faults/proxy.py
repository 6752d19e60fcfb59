"""A proxy between daemon and receiver that spoils one connection after another, by a schedule."""

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
from tests.scripted import EndedError, Peer, ScriptedServer, answer, server_context

_PIECE = 64 * 1024
_IN_HANDSHAKE = 1_000
"""Bytes from the receiver that come before its side of the handshake is over."""

_ALERT = bytes.fromhex("1503030002022a")
"""A TLS alert, in the open, where only encrypted records may come."""


class Kind(enum.Enum):
    """What happens to a connection; the ones that need to read the answer end TLS in the proxy."""

    REFUSED = "refused from then on"
    RESET_AT_ONCE = "reset at once"
    RESET_IN_HANDSHAKE = "reset in the handshake"
    HANG = "accepted, and nothing more"
    RESET_IN_BODY = "reset in the body"
    STALL_IN_BODY = "stalled in the body"
    SLOW_BODY = "a byte at a time in the body"
    ALERT_IN_BODY = "a TLS alert in the body"
    STALL_BEFORE_ANSWER = "stalled before the answer"
    RESET_COMING_BACK = "reset in what comes back"
    WRONG_CERTIFICATE = "another certificate"
    NO_ANSWER = "closed before the answer"
    HALF_AN_ANSWER = "cut within the answer"
    RESET_IN_ANSWER = "reset in the answer"
    BAD_GATEWAY = "a 502 in place of the answer"
    SLOW_ANSWER = "a byte at a time in the answer"
    TWO_ANSWERS = "answered twice"
    CLOSED_TWICE = "closed by header, twice, and by both layers"


_IN_THE_BODY = {
    Kind.RESET_IN_BODY,
    Kind.STALL_IN_BODY,
    Kind.SLOW_BODY,
    Kind.ALERT_IN_BODY,
    Kind.STALL_BEFORE_ANSWER,
    Kind.RESET_COMING_BACK,
}


BELOW_HTTP = (
    Kind.REFUSED,
    Kind.RESET_AT_ONCE,
    Kind.RESET_IN_HANDSHAKE,
    Kind.HANG,
    Kind.WRONG_CERTIFICATE,
    *sorted(_IN_THE_BODY, key=lambda kind: kind.value),
)
"""What needs to understand neither requests nor answers."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a connection, after so many bytes that the daemon sent, or answers that went well.

    `pace` is the seconds from byte to byte where it is slow.
    """

    kind: Kind
    after: int = 0
    good: int = 0
    pace: float = 1.0


class FaultProxy:
    """Serves while in its block; connections beyond the schedule are passed on. `struck` counts faults.

    A fault whose connection ends before its time has come is for another connection.
    """

    def __init__(self, pki: Pki, port: int, schedule: Sequence[Fault], other: Pki | None = None) -> None:
        self._target = port
        self._schedule = list(schedule)
        self._planned = len(schedule)
        self._stricken: set[int] = set()
        self._lock = threading.Lock()
        self._answered = threading.Event()
        """Cleared while an answer is awaited that nobody is to hear: what comes next may ask for it."""
        self._answered.set()
        self._ours = server_context(pki)
        self._wrong = server_context(pki, (other or Pki(pki.folder / "other")).issue_server())
        self._towards = ssl.create_default_context(cafile=pki.ca_pem)
        self._towards.load_cert_chain(pki.client_cert, pki.client_key)
        self._server = ScriptedServer(self._serve)
        self._clean: list[Peer] = []
        self._held: dict[int, Fault] = {}
        self.struck: Counter[Kind] = Counter()
        self.port = self._server.port

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.__exit__(None, None, None)

    @property
    def is_over(self) -> bool:
        """Whether every fault of the schedule has struck."""
        with self._lock:
            return self.struck.total() == self._planned

    @property
    def left(self) -> str:
        """What has not struck yet: waiting for a connection, or on one."""
        with self._lock:
            on = [fault for number, fault in self._held.items() if number not in self._stricken]
            return f"waiting: {self._schedule}, on connections: {on}"

    @property
    def is_refusing(self) -> bool:
        """Whether connections are refused, until `take_again`."""
        return self._server.is_refusing

    def take_again(self) -> None:
        """Take connections again."""
        self._server.take_again()

    def end_clean(self) -> None:
        """End the connections without a fault, which are at rest: others are to come in their place."""
        with self._lock:
            for peer in self._clean:
                peer.hang_up()
            self._clean.clear()

    def _serve(self, peer: Peer) -> None:
        self._answered.wait()
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
            self._serve_badly(peer, fault)
        finally:
            if fault.kind is Kind.STALL_BEFORE_ANSWER:
                self._answered.set()
            with self._lock:
                del self._held[peer.number]
                if peer.number not in self._stricken:
                    self._schedule.insert(0, fault)

    def _serve_badly(self, peer: Peer, fault: Fault) -> None:
        match fault.kind:
            case Kind.REFUSED:
                self._server.refuse()
                self._strike(peer, fault)
                peer.reset()
            case Kind.RESET_AT_ONCE:
                self._strike(peer, fault)
                peer.reset()
            case Kind.RESET_IN_HANDSHAKE:
                self._cut_handshake(peer, fault)
            case Kind.HANG:
                self._strike(peer, fault)
                peer.drain_nothing()
            case Kind.WRONG_CERTIFICATE:
                self._strike(peer, fault)
                peer.shake_hands(self._wrong)
            case kind if kind in _IN_THE_BODY:
                self._relay(peer, fault)
            case _:
                peer.shake_hands(self._ours)
                self._answer(peer, fault)

    def _strike(self, peer: Peer, fault: Fault) -> None:
        with self._lock:
            self._stricken.add(peer.number)
            self.struck[fault.kind] += 1

    def _cut_handshake(self, peer: Peer, fault: Fault) -> None:
        with socket.create_connection(("127.0.0.1", self._target)) as far:
            hello = peer.socket.recv(_PIECE)
            if not hello:
                return
            far.sendall(hello)
            peer.send(far.recv(1 + fault.after % _IN_HANDSHAKE))
            self._strike(peer, fault)
            peer.reset()

    def _relay(self, peer: Peer, fault: Fault | None) -> None:
        """Pass bytes on, until the fault has its time; the same thread sees to both directions."""
        near = peer.socket
        with socket.create_connection(("127.0.0.1", self._target)) as far:
            sent, spoiled = 0, False
            while True:
                readable, _, _ = select.select([near, far], [], [])
                if far in readable:
                    data = far.recv(_PIECE)
                    if spoiled and fault and fault.kind is Kind.STALL_BEFORE_ANSWER:
                        self._answered.set()  # the receiver has it all, and nobody hears of it
                    elif not data:
                        return
                    elif spoiled and fault:
                        near.sendall(data[: fault.after % len(data)])
                        self._strike(peer, fault)
                        peer.reset()
                        return
                    else:
                        near.sendall(data)
                if near not in readable:
                    continue
                data = near.recv(_PIECE)
                if not data:
                    self._hear_out(far)
                    return
                sent += len(data)
                far.sendall(data)
                if fault is not None and not spoiled and sent > fault.after:
                    spoiled = True
                    if self._spoil(peer, near, far, fault):
                        return

    def _spoil(self, peer: Peer, near: socket.socket, far: socket.socket, fault: Fault) -> bool:
        """Do to a connection what is due; return whether that was its end."""
        if fault.kind is Kind.RESET_COMING_BACK:
            return False  # its time is that of what comes next
        self._strike(peer, fault)
        match fault.kind:
            case Kind.STALL_BEFORE_ANSWER:
                self._answered.clear()
                return False
            case Kind.RESET_IN_BODY:
                peer.reset()
            case Kind.STALL_IN_BODY:
                peer.drain_nothing()
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

    def _hear_out(self, far: socket.socket) -> None:
        """Wait for the answer that nobody hears, or for the receiver to give a request up."""
        if not self._answered.is_set():
            far.shutdown(socket.SHUT_WR)
            far.recv(_PIECE)

    def _answer(self, peer: Peer, fault: Fault) -> None:
        """Take whole requests, hand them to the receiver, and spoil one of its answers."""
        good = fault.good
        while True:
            peer.read_head()
            stored = self._answer_of(peer)
            if good:
                good -= 1
                peer.send(stored)
                continue
            self._strike(peer, fault)
            match fault.kind:
                case Kind.HALF_AN_ANSWER:
                    peer.send(stored[: 1 + fault.after % (len(stored) - 1)])
                case Kind.RESET_IN_ANSWER:
                    peer.send(stored[: fault.after % len(stored)])
                    peer.reset()
                case Kind.BAD_GATEWAY:
                    peer.send(answer(502))
                case Kind.SLOW_ANSWER:
                    peer.drip(stored, fault.pace)
                case Kind.TWO_ANSWERS:
                    peer.send(stored + stored)
                    peer.drain()
                case Kind.CLOSED_TWICE:
                    status, _, rest = stored.partition(b"\r\n")
                    peer.send(status + b"\r\nConnection: close\r\nConnection: close\r\n" + rest)
                    peer.half_close()
                    peer.drain()
                case _:
                    pass
            return

    def _answer_of(self, peer: Peer) -> bytes:
        method, path, _ = peer.head.split(b"\r\n")[0].decode("ascii").split(" ")
        lines = [line.partition(b":") for line in peer.head.split(b"\r\n")[1:]]
        headers = {key.decode("latin-1"): value.strip().decode("latin-1") for key, _, value in lines}
        length = {key.lower(): value for key, value in headers.items()}.get("content-length", "0")
        body = peer.read(int(length))
        connection = http.client.HTTPSConnection("127.0.0.1", self._target, context=self._towards)
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
