"""The network stream below httpcore: it notices a response while it sends, and every wait can be aborted.

httpcore's own stream does not read while it sends: a response that comes before the body is complete is lost
with the connection, and nothing interrupts a stalled write.
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

PIN_MISMATCH = "pin mismatch"
"""The beginning of the error for a certificate with a public key that is not in `pin_sha256`."""

_READ_BYTES = 64 * 1024
"""Bytes that are read from the socket at a time, and the limit for interim responses."""

_ENCRYPT_BYTES = 256 * 1024
"""Bytes that are encrypted before they are sent."""

_MAX_HEAD_BYTES = 16 * 1024
"""Longest request head in bytes that is sent together with the first bytes of the body."""

_MAX_RESPONSE_BYTES = 1024 * 1024
"""Bytes that are read for one request; a server could send interim responses indefinitely."""

_SENT_PER_RECEIVED = 8
"""Bytes of an HTTP/2 upload that permit one more byte from the server, such as of WINDOW_UPDATE frames."""

_WANT_READ = (ssl.SSLWantReadError,)
_WANT_WRITE = (ssl.SSLWantWriteError,)


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """How to connect to the endpoint.

    `connect_to` is the host and port to connect to instead of those in the URL. `local_address` is the
    address to connect from, `server_name` the name in the certificate instead of the URL's host; empty for
    none. `pins` are the SHA-256 of acceptable public keys in base64; empty accepts every key.
    """

    connect_to: tuple[str, int] | None = None
    local_address: str = ""
    server_name: str = ""
    pins: frozenset[str] = frozenset()


DIRECT = ConnectOptions()


class Stream(httpcore.NetworkStream):
    """A plain or TLS connection on a non-blocking socket, within the limits of an attempt.

    With `is_http2` the frames of the server are part of sending, and the connection has to call
    `begin_request`.
    """

    def __init__(
        self,
        sock: socket.socket | TlsSocket,
        limits: AttemptLimits,
        connect_options: ConnectOptions = DIRECT,
    ) -> None:
        self._sock = sock
        self.limits = limits
        self._connect_options = connect_options
        self._held_head = b""
        self._begins_request = True
        self._received = bytearray()
        self._is_closed_by_peer = False
        self._error: OSError | None = None
        self._response_bytes = 0
        self.is_http2 = isinstance(sock, TlsSocket) and sock.tls.selected_alpn_protocol() == "h2"

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Return a stream after the TLS handshake; `timeout` is for each of its waits, in seconds."""
        try:
            if isinstance(self._sock, TlsSocket):
                raise httpcore.ConnectError("TLS within TLS is not supported")
            name = self._connect_options.server_name or server_hostname
            sock = TlsSocket(ssl_context, self._sock, name, self.limits)
            self._do_handshake(sock, timeout)
            self._check_pins(sock)
            self.limits.server_certificate_expires = _expiry(sock.tls)
        except (OSError, ValueError) as error:
            self.close()
            raise httpcore.ConnectError(str(error)) from error
        except BaseException:
            self.close()
            raise
        return Stream(sock, self.limits, self._connect_options)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send a buffer; `timeout` is for each wait without progress, in seconds.

        Holds the head of a request back, to send it with the first bytes of the body in one write. Raises
        WriteError as soon as the server starts to respond or closes the connection; `read` then
        returns the response.
        """
        if self._held_head:
            buffer, self._held_head = self._held_head + buffer, b""
        is_head, self._begins_request = self._begins_request, False  # a body can end with an empty line, too
        if is_head and not self.is_http2 and len(buffer) < _MAX_HEAD_BYTES and buffer.endswith(b"\r\n\r\n"):
            self._held_head = buffer
            return
        self._send(buffer, timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return received bytes, `b""` at the end of the connection; `timeout` is in seconds.

        The next `write` begins a request.
        """
        if not (self._begins_request or self.is_http2):  # reading an early response ends the sending as well
            self.limits.body_sent()
        self._begins_request = True
        if self._held_head:
            head, self._held_head = self._held_head, b""
            with suppress(httpcore.WriteError):  # the response that caused it is read below
                self._send(head, timeout)
        if self._received:
            data = bytes(self._received[:max_bytes])
            del self._received[:max_bytes]
            return self._count_response(data)
        if self.is_http2:  # frames can arrive without a pause and without a response, so that no wait checks
            self.limits.check()
        while not self._is_closed_by_peer:
            try:
                return self._count_response(self._sock.recv(max_bytes))
            except (*_WANT_READ, BlockingIOError):
                is_ready = self.limits.wait(self._sock.fileno(), select.POLLIN, timeout)
            except _WANT_WRITE:
                is_ready = self.limits.wait(self._sock.fileno(), select.POLLOUT, timeout)
            except OSError as error:
                raise httpcore.ReadError(str(error)) from error
            if not is_ready:
                raise httpcore.ReadTimeout("no response")
        self._raise_earlier_error()
        return b""

    def begin_request(self) -> None:
        """Start to count the bytes received for another request."""
        self._response_bytes = 0

    def close(self) -> None:
        """Close the connection at once."""
        self._sock.close()

    def get_extra_info(self, info: str) -> Any:
        """See `httpcore.NetworkStream.get_extra_info`."""
        match info:
            case "ssl_object":
                return self._sock.tls if isinstance(self._sock, TlsSocket) else None
            case "is_readable":
                return self._is_readable()
            case "socket":
                return self._sock
            case _:
                return None

    def _do_handshake(self, sock: TlsSocket, timeout: float | None) -> None:
        while True:
            try:
                sock.do_handshake()
            except _WANT_READ:
                is_ready = self.limits.wait(sock.fileno(), select.POLLIN, timeout)
            except _WANT_WRITE:
                is_ready = self.limits.wait(sock.fileno(), select.POLLOUT, timeout)
            else:
                return
            if not is_ready:
                raise httpcore.ConnectTimeout("no response in the TLS handshake")

    def _check_pins(self, sock: TlsSocket) -> None:
        if not self._connect_options.pins:
            return
        pin = spki_pin(sock.tls.getpeercert(binary_form=True) or b"")
        if pin not in self._connect_options.pins:
            raise httpcore.ConnectError(f"{PIN_MISMATCH}: the SHA-256 of the endpoint's public key is {pin}")

    def _send(self, buffer: bytes, timeout: float | None) -> None:
        view = memoryview(buffer)
        if self.is_http2:
            self._response_bytes -= min(self._response_bytes, len(view) // _SENT_PER_RECEIVED)
        elif view:
            self.begin_request()
            self._check_response()
        while view:
            piece = view[: self._acquire_bandwidth(len(view))]
            self._send_piece(piece, timeout)
            view = view[len(piece) :]

    def _acquire_bandwidth(self, wanted: int) -> int:
        """Return how many bytes the bandwidth limit permits now, after a wait if necessary."""
        while True:
            granted, wait = self.limits.acquire_bandwidth(wanted)
            if granted:
                return granted
            fd = -1 if self.is_http2 else self._sock.fileno()
            if self.limits.wait(fd, select.POLLIN, wait):
                self._check_response()

    def _send_piece(self, view: memoryview, timeout: float | None) -> None:
        while view:
            try:
                count = self._sock.send(view)
            except (*_WANT_WRITE, BlockingIOError):
                self._wait_to_send(select.POLLOUT, timeout)
            except _WANT_READ:
                self._wait_to_send(0, timeout)
            except OSError as error:
                self._receive_after_error()
                raise httpcore.WriteError(str(error)) from error
            else:
                view = view[count:]
                if not isinstance(self._sock, TlsSocket):  # which counts by itself, after each system call
                    self.limits.count_bytes(count)

    def _wait_to_send(self, events: int, timeout: float | None) -> None:
        if not self.is_http2 or not events:  # HTTP/2 frames are not read here: they would end every wait
            events |= select.POLLIN
        if not self.limits.wait(self._sock.fileno(), events, timeout):
            raise httpcore.WriteTimeout("the destination has stopped reading")
        if not self.is_http2:
            self._check_response()

    def _check_response(self) -> None:
        """Receive without a wait; raise WriteError on a response or at the end of the connection."""
        poller = select.poll()
        poller.register(self._sock.fileno(), select.POLLIN)
        if (isinstance(self._sock, TlsSocket) and self._sock.has_buffered_data) or poller.poll(0):
            self._receive()
        if self._is_closed_by_peer or _has_final_response(self._received):
            raise httpcore.WriteError("the destination responded before it had the whole request")
        if len(self._received) >= _READ_BYTES:
            raise httpcore.RemoteProtocolError("interim responses exceed 64 KiB")

    def _receive(self) -> None:
        try:
            while not self._is_closed_by_peer and len(self._received) < _READ_BYTES:
                data = self._sock.recv(_READ_BYTES)
                self._received += data
                self._is_closed_by_peer = not data
        except (*_WANT_READ, *_WANT_WRITE, BlockingIOError):
            return
        except OSError as error:
            self._is_closed_by_peer, self._error = True, error

    def _receive_after_error(self) -> None:
        """Receive the response or TLS alert that explains a failed send, if there is one."""
        self._receive()
        is_silent = not (self._received or self._is_closed_by_peer)
        if is_silent and self.limits.wait(self._sock.fileno(), select.POLLIN, 0.2):
            self._receive()
        self._is_closed_by_peer = True

    def _raise_earlier_error(self) -> None:
        """Raise the error that ended the connection during a write: httpcore ignores that of the write."""
        if self._error is not None:
            try:
                raise self._error
            except OSError as error:  # kept as the context: httpcore removes the cause of an exception
                raise httpcore.ReadError(str(error)) from error

    def _count_response(self, data: bytes) -> bytes:
        self._response_bytes += len(data)
        if self._response_bytes > _MAX_RESPONSE_BYTES:
            raise httpcore.RemoteProtocolError("the response exceeds 1 MiB")
        return data

    def _is_readable(self) -> bool:
        """Return whether an idle connection has ended; a TLS session ticket does not count."""
        if self._sock.fileno() < 0:
            return True
        try:
            self._check_response()
        except (httpcore.WriteError, httpcore.RemoteProtocolError, AttemptEndedError):
            return True
        return bool(self._received)


def spki_pin(certificate: bytes) -> str:
    """Return the SHA-256, in base64, of the public key in a DER certificate (RFC 7469 section 2.4)."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(der).digest()).decode("ascii")


def _expiry(tls: ssl.SSLObject) -> float | None:
    """Return when the server's certificate expires, in seconds since the epoch; None if not verified."""
    not_after = (tls.getpeercert() or {}).get("notAfter")
    return ssl.cert_time_to_seconds(not_after) if isinstance(not_after, str) else None


def _has_final_response(received: bytearray) -> bool:
    """Return whether a final response has started, after any interim (1xx) ones (RFC 9110 section 15.2)."""
    at = 0
    while received.startswith(b"HTTP/1.1 1", at):
        end = received.find(b"\r\n\r\n", at)
        if end < 0:
            return False
        at = end + 4
    return len(received) - at >= len(b"HTTP/1.1 2") or (
        len(received) > at and not b"HTTP/1.1 1".startswith(received[at:])
    )


class TlsSocket:
    """A non-blocking TLS client over a socket, with the exceptions of `ssl.SSLSocket`.

    It counts the bytes of each system call, checks the limits of the attempt even if the peer never lets it
    wait, and closes without a close_notify alert.
    """

    def __init__(
        self, context: ssl.SSLContext, sock: socket.socket, server_hostname: str | None, limits: AttemptLimits
    ) -> None:
        self._sock = sock
        self._limits = limits
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self._unsent = memoryview(b"")
        self._encrypted_bytes = 0

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    @property
    def has_buffered_data(self) -> bool:
        """Return whether bytes were received that `recv` has not returned: poll(2) does not report them."""
        return bool(self._incoming.pending or self.tls.pending())

    def do_handshake(self) -> None:
        """See `ssl.SSLSocket.do_handshake`."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._receive()
            except OSError:
                with suppress(OSError):  # send the alert that explains the failure, if possible
                    self._flush()
                raise
            else:
                self._flush()
                return

    def send(self, view: memoryview) -> int:
        """Send some bytes and return how many.

        After SSLWantWriteError, the next call must begin with the same bytes.
        """
        if not self._encrypted_bytes:
            while self._encrypted_bytes < min(len(view), _ENCRYPT_BYTES):
                self._encrypted_bytes += self.tls.write(view[self._encrypted_bytes : _ENCRYPT_BYTES])
        self._flush()
        sent, self._encrypted_bytes = self._encrypted_bytes, 0
        return sent

    def recv(self, count: int) -> bytes:
        """Return up to `count` bytes; none at the end, with or without a close_notify alert."""
        while True:
            try:
                return self.tls.read(count)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""
            except ssl.SSLWantReadError:
                with suppress(OSError):  # TLS may have to respond; `send` reports an error of the socket
                    self._flush()
                self._receive()

    def _flush(self) -> None:
        while True:
            while self._unsent:
                try:
                    count = self._sock.send(self._unsent)
                except BlockingIOError:
                    raise ssl.SSLWantWriteError from None
                self._unsent = self._unsent[count:]
                self._limits.count_bytes(count)
            if not self._outgoing.pending:
                return
            self._unsent = memoryview(self._outgoing.read())

    def _receive(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            raise ssl.SSLWantReadError from None
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        self._limits.check()
