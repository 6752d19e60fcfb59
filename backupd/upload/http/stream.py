"""The network stream under httpcore: it hears an answer while it sends, and every wait can be ended.

The stock stream is deaf while it sends: an answer that comes before the body is complete gets lost with
the connection, and nothing can interrupt a stalled write.
"""

from __future__ import annotations

import base64
import hashlib
import select
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpcore
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from backupd.upload.http.limits import AttemptEndedError, AttemptLimits

_AT_ONCE = 256 * 1024
"""Bytes that are encrypted before they are sent."""

_READ = 64 * 1024


class TlsSocket:
    """Like a non-blocking `ssl.SSLSocket`, whose exceptions it raises; it closes without a farewell.

    `line` is told what the connection took, and may end what would go on for ever without any data.
    """

    def __init__(
        self, context: ssl.SSLContext, sock: socket.socket, server_hostname: str | None, line: AttemptLimits
    ) -> None:
        self._sock = sock
        self._line = line
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self._unsent = memoryview(b"")
        self._owed = 0

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    @property
    def holds_some(self) -> bool:
        """Whether something has arrived that `recv` has not returned, so that no poll(2) tells of it."""
        return bool(self._incoming.pending or self.tls.pending())

    def do_handshake(self) -> None:
        """See `ssl.SSLSocket.do_handshake`."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._take_in()
            except OSError:
                with suppress(OSError):  # the other side is to hear why, if it can
                    self._flush()
                raise
            else:
                self._flush()
                return

    def send(self, view: memoryview) -> int:
        """Send some bytes and return how many.

        After SSLWantWriteError it has to be called again with what begins with the same bytes.
        """
        if not self._owed:
            while self._owed < min(len(view), _AT_ONCE):
                self._owed += self.tls.write(view[self._owed : _AT_ONCE])
        self._flush()
        sent, self._owed = self._owed, 0
        return sent

    def recv(self, count: int) -> bytes:
        """Return up to so many bytes, none at the end, however the other side made it."""
        while True:
            try:
                return self.tls.read(count)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""
            except ssl.SSLWantReadError:
                with suppress(OSError):  # TLS may have something to answer; `send` tells of what hinders it
                    self._flush()
                self._take_in()

    def _flush(self) -> None:
        while True:
            while self._unsent:
                try:
                    count = self._sock.send(self._unsent)
                except BlockingIOError:
                    raise ssl.SSLWantWriteError from None
                self._unsent = self._unsent[count:]
                self._line.count_bytes(count)
            if not self._outgoing.pending:
                return
            self._unsent = memoryview(self._outgoing.read())

    def _take_in(self) -> None:
        try:
            data = self._sock.recv(_READ)
        except BlockingIOError:
            raise ssl.SSLWantReadError from None
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        self._line.check()


_WANT_READ = (ssl.SSLWantReadError,)
_WANT_WRITE = (ssl.SSLWantWriteError,)
PIN_MISMATCH = "pin mismatch"
_LARGEST_HEAD = 16 * 1024
_WIRE_READ = 64 * 1024
_LONGEST_ANSWER = 1024 * 1024
"""Bytes that are read for one request; interim answers could go on for ever."""
_HEARD_FOR_SENT = 8
"""In HTTP/2 one byte may be heard besides for so many that are sent: of windows, pings and the like."""


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """How to get to a destination, where that is not simply what its url says.

    `connect_to` is a host and port; `server_name` the name to ask for and expect; `pins` are SHA-256
    values, in base64, of the public keys (SubjectPublicKeyInfo) one of which the other side has to show.
    """

    connect_to: tuple[str, int] | None = None
    local_address: str = ""
    server_name: str = ""
    pins: frozenset[str] = frozenset()


DIRECT = ConnectOptions()


class Stream(httpcore.NetworkStream):
    """A connection, plain or TLS, on a socket that never blocks, within the bounds of a `Line`.

    With `is_http2` frames of the other side are part of sending, and `begin_request` is to be called.
    """

    def __init__(
        self, sock: socket.socket | TlsSocket, line: AttemptLimits, route: ConnectOptions = DIRECT
    ) -> None:
        self._sock = sock
        self.line = line
        self._route = route
        self._held = b""
        self._begins_request = True
        self._heard = bytearray()
        self._ended = False
        self._fault: OSError | None = None
        self._answered = 0
        self.is_http2 = isinstance(sock, TlsSocket) and sock.tls.selected_alpn_protocol() == "h2"

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Shake hands; `timeout` in seconds is for each wait of it."""
        try:
            if isinstance(self._sock, TlsSocket):
                raise httpcore.ConnectError("there is TLS on the connection already")
            name = self._route.server_name or server_hostname
            sock = TlsSocket(ssl_context, self._sock, name, self.line)
            self._shake_hands(sock, timeout)
            self._check_pins(sock)
            self.line.peer_expires = _expiry(sock.tls)
        except (OSError, ValueError) as error:
            self.close()
            raise httpcore.ConnectError(str(error)) from error
        except BaseException:
            self.close()
            raise
        return Stream(sock, self.line, self._route)

    def _shake_hands(self, sock: TlsSocket, timeout: float | None) -> None:
        while True:
            try:
                sock.do_handshake()
            except _WANT_READ:
                done = self.line.wait(sock.fileno(), select.POLLIN, timeout)
            except _WANT_WRITE:
                done = self.line.wait(sock.fileno(), select.POLLOUT, timeout)
            else:
                return
            if not done:
                raise httpcore.ConnectTimeout("no answer in the TLS handshake")

    def _check_pins(self, sock: TlsSocket) -> None:
        if not self._route.pins:
            return
        shown = spki_pin(sock.tls.getpeercert(binary_form=True) or b"")
        if shown not in self._route.pins:
            raise httpcore.ConnectError(f"{PIN_MISMATCH}: the endpoint's public key is {shown}")

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of a buffer; `timeout` in seconds is for each wait without any progress.

        A request's head is held back, to leave with the first data in one write. Raises WriteError as
        soon as the destination has begun to answer, or is gone; `read` then returns what it said.
        """
        if self._held:
            buffer, self._held = self._held + buffer, b""
        is_head, self._begins_request = self._begins_request, False  # a body may end like a head
        if is_head and not self.is_http2 and len(buffer) < _LARGEST_HEAD and buffer.endswith(b"\r\n\r\n"):
            self._held = buffer
            return
        self._send(buffer, timeout)

    def begin_request(self) -> None:
        """Note that what is heard from now on belongs to another request."""
        self._answered = 0

    def _send(self, buffer: bytes, timeout: float | None) -> None:
        view = memoryview(buffer)
        if self.is_http2:
            self._answered -= min(self._answered, len(view) // _HEARD_FOR_SENT)
        elif view:
            self.begin_request()
            self._listen()
        while view:
            piece = view[: self._grant(len(view))]
            self._send_piece(piece, timeout)
            view = view[len(piece) :]

    def _grant(self, wanted: int) -> int:
        """Return how many bytes the bandwidth limit lets out now, after having waited for some."""
        while True:
            granted, wait = self.line.acquire_bandwidth(wanted)
            if granted:
                return granted
            fd = -1 if self.is_http2 else self._sock.fileno()
            if self.line.wait(fd, select.POLLIN, wait):
                self._listen()

    def _send_piece(self, view: memoryview, timeout: float | None) -> None:
        while view:
            try:
                count = self._sock.send(view)
            except (*_WANT_WRITE, BlockingIOError):
                self._wait_to_send(select.POLLOUT, timeout)
            except _WANT_READ:
                self._wait_to_send(0, timeout)
            except OSError as error:
                self._hear_last_words()
                raise httpcore.WriteError(str(error)) from error
            else:
                view = view[count:]
                if not isinstance(self._sock, TlsSocket):  # which tells by itself, and of less at a time
                    self.line.count_bytes(count)

    def _wait_to_send(self, events: int, timeout: float | None) -> None:
        if not self.is_http2 or not events:  # in HTTP/2 nobody here reads what would end the wait
            events |= select.POLLIN
        if not self.line.wait(self._sock.fileno(), events, timeout):
            raise httpcore.WriteTimeout("the other side has stopped reading")
        if not self.is_http2:
            self._listen()

    def _listen(self) -> None:
        """Take in what has arrived, without waiting; raise WriteError if it is an answer or the end."""
        poller = select.poll()
        poller.register(self._sock.fileno(), select.POLLIN)
        if (isinstance(self._sock, TlsSocket) and self._sock.holds_some) or poller.poll(0):
            self._hear()
        if self._ended or _is_final(self._heard):
            raise httpcore.WriteError("the destination answered before it had the whole request")
        if len(self._heard) >= _WIRE_READ:
            raise httpcore.RemoteProtocolError("interim answers without an end")

    def _hear(self) -> None:
        try:
            while not self._ended and len(self._heard) < _WIRE_READ:
                data = self._sock.recv(_WIRE_READ)
                self._heard += data
                self._ended = not data
        except (*_WANT_READ, *_WANT_WRITE, BlockingIOError):
            return
        except OSError as error:
            self._ended, self._fault = True, error

    def _hear_last_words(self) -> None:
        """After a failed send: an answer, or the alert that says why, may still be there to be read."""
        self._hear()
        if not (self._heard or self._ended) and self.line.wait(self._sock.fileno(), select.POLLIN, 0.2):
            self._hear()
        self._ended = True

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what the other side sent, `b""` at its end; `timeout` in seconds.

        What is written next begins a request.
        """
        if not (self._begins_request or self.is_http2):  # an early answer is no sending either
            self.line.body_sent()
        self._begins_request = True
        if self._held:
            held, self._held = self._held, b""
            with suppress(httpcore.WriteError):  # of a head alone; what came instead is read below
                self._send(held, timeout)
        if self._heard:
            data = bytes(self._heard[:max_bytes])
            del self._heard[:max_bytes]
            return self._counted(data)
        if self.is_http2:  # whose frames need not be an answer, and may leave nothing to wait for
            self.line.check()
        while not self._ended:
            try:
                return self._counted(self._sock.recv(max_bytes))
            except (*_WANT_READ, BlockingIOError):
                ready = self.line.wait(self._sock.fileno(), select.POLLIN, timeout)
            except _WANT_WRITE:
                ready = self.line.wait(self._sock.fileno(), select.POLLOUT, timeout)
            except OSError as error:
                raise httpcore.ReadError(str(error)) from error
            if not ready:
                raise httpcore.ReadTimeout("no answer")
        self._tell_fault()
        return b""

    def _tell_fault(self) -> None:
        """Say why a write failed, if one did: httpcore forgets it, and it may be an alert."""
        if self._fault is not None:
            try:
                raise self._fault
            except OSError as error:  # as the context: httpcore wipes the cause off what passes through it
                raise httpcore.ReadError(str(error)) from error

    def _counted(self, data: bytes) -> bytes:
        self._answered += len(data)
        if self._answered > _LONGEST_ANSWER:
            raise httpcore.RemoteProtocolError("an answer without an end")
        return data

    def close(self) -> None:
        """Close the connection at once."""
        self._sock.close()

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore asks of a stream."""
        match info:
            case "ssl_object":
                return self._sock.tls if isinstance(self._sock, TlsSocket) else None
            case "is_readable":
                return self._is_readable()
            case "socket":
                return self._sock
            case _:
                return None

    def _is_readable(self) -> bool:
        """Tell whether an idle connection is at its end; a TLS session ticket is no end."""
        if self._sock.fileno() < 0:
            return True
        try:
            self._listen()
        except (httpcore.WriteError, httpcore.RemoteProtocolError, AttemptEndedError):
            return True
        return bool(self._heard)


def _expiry(tls: ssl.SSLObject) -> float | None:
    ends = (tls.getpeercert() or {}).get("notAfter")
    return ssl.cert_time_to_seconds(ends) if isinstance(ends, str) else None


def spki_pin(certificate: bytes) -> str:
    """Return the SHA-256, in base64, of the public key in a DER certificate (RFC 7469 section 2.4)."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(der).digest()).decode("ascii")


def _is_final(heard: bytearray) -> bool:
    """Tell whether a final answer has begun after any interim (1xx) ones; RFC 9110 section 15.2."""
    at = 0
    while heard.startswith(b"HTTP/1.1 1", at):
        end = heard.find(b"\r\n\r\n", at)
        if end < 0:
            return False
        at = end + 4
    return len(heard) - at >= len(b"HTTP/1.1 2") or (
        len(heard) > at and not b"HTTP/1.1 1".startswith(heard[at:])
    )
