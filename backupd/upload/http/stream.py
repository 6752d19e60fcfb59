"""The network stream below HTTP: a TCP or TLS connection on which every wait keeps to an attempt's limits."""

from __future__ import annotations

import base64
import hashlib
import select
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import httpx

from backupd.config.certificate_facts import CertificateFacts, public_key_info
from backupd.core.certificate_life import Validity
from backupd.upload.http.dialing import dial
from backupd.upload.http.limits import AttemptLimits

PIN_MISMATCH = "pin mismatch"
"""The beginning of the error for a certificate with a public key that is not in `pin_sha256`."""

_READ_BYTES = 64 * 1024
"""Bytes that are read from the socket at a time."""

_ENCRYPT_BYTES = 256 * 1024
"""Bytes that are encrypted before they are sent."""

_MAX_RECEIVED_BYTES = 1024 * 1024
"""Bytes that are received for one request; a server could send interim responses or frames indefinitely."""

_SENT_PER_RECEIVED = 8
"""Bytes of an upload that permit one more byte from the server, such as of WINDOW_UPDATE frames."""

_WANT_READ = (ssl.SSLWantReadError, BlockingIOError)
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


class Stream:
    """A plain or TLS connection on a non-blocking socket, for the requests of one worker.

    All timeouts are in seconds and for each wait without progress; None is no limit. Every method that waits
    raises AttemptEndedError if the attempt is aborted or exceeds a limit.
    """

    def __init__(self, sock: socket.socket, limits: AttemptLimits) -> None:
        self._sock: socket.socket | TlsSocket = sock
        self._received_bytes = 0
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self.has_sent = False
        """Whether bytes of the current request may have been sent."""
        self.limits = limits

    @property
    def tls(self) -> ssl.SSLObject | None:
        """Return the TLS session; None for a plain connection."""
        return self._sock.tls if isinstance(self._sock, TlsSocket) else None

    def start_tls(
        self, context: ssl.SSLContext, host: str, timeout: float | None, options: ConnectOptions
    ) -> None:
        """Do the TLS handshake with `host`; raises ConnectError or ConnectTimeout."""
        assert isinstance(self._sock, socket.socket)  # noqa: S101 -- TLS starts once
        try:
            sock = TlsSocket(context, self._sock, options.server_name or host, self.limits)
            self._do_handshake(sock, timeout)
            _check_pins(sock, options.pins)
            self.limits.server_certificate = _validity(sock.tls)
            self.limits.tls_version = sock.tls.version() or ""
        except (OSError, ValueError) as error:
            raise httpx.ConnectError(str(error)) from error
        self._sock = sock

    def begin_request(self) -> None:
        """Start to count the bytes received for another request."""
        self._received_bytes, self.has_sent = 0, False

    def send(self, data: bytes, timeout: float | None, on_readable: Callable[[], None] | None = None) -> None:
        """Send all bytes; raises WriteError, WriteTimeout, or what `on_readable` raises.

        `on_readable` is called before each piece and in each wait, if the server has sent something. Without
        it, nothing that the server sends ends a wait.
        """
        self._received_bytes = max(0, self._received_bytes - len(data) // _SENT_PER_RECEIVED)
        view = memoryview(data)
        if on_readable and self.is_readable():
            on_readable()
        while view:
            piece = view[: self._acquire_bandwidth(len(view), on_readable)]
            self._send_piece(piece, timeout, on_readable)
            view = view[len(piece) :]

    def receive(self, timeout: float | None) -> bytes:
        """Return received bytes, none at the end of the connection; raises ReadError or ReadTimeout."""
        data, events = None, 0 if self._has_buffered_data else select.POLLIN
        while data is None:
            if events and not self.limits.wait(self._sock.fileno(), events, timeout):
                raise httpx.ReadTimeout("no response")
            data, events = self._receive()
        return data

    def receive_now(self) -> bytes | None:
        """Return as `receive` does, or None if nothing arrived yet; raises ReadError."""
        return self._receive()[0] if self.is_readable() else None

    def is_readable(self) -> bool:
        """Return whether `receive_now` may return bytes; a TLS session ticket looks as if it does."""
        return self._has_buffered_data or bool(self._readable.poll(0))

    def close(self) -> None:
        """Close the connection at once."""
        self._sock.close()

    @property
    def _has_buffered_data(self) -> bool:
        return isinstance(self._sock, TlsSocket) and self._sock.has_buffered_data

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
                raise httpx.ConnectTimeout("no response in the TLS handshake")

    def _acquire_bandwidth(self, wanted: int, on_readable: Callable[[], None] | None) -> int:
        """Return how many bytes the bandwidth limit permits now, after a wait if necessary."""
        while True:
            granted, wait = self.limits.acquire_bandwidth(wanted)
            if granted:
                return granted
            if self.limits.wait(self._sock.fileno() if on_readable else -1, select.POLLIN, wait):
                assert on_readable is not None  # noqa: S101 -- no descriptor, no event
                on_readable()

    def _send_piece(
        self, view: memoryview, timeout: float | None, on_readable: Callable[[], None] | None
    ) -> None:
        self.has_sent = True
        while view:
            try:
                count = self._sock.send(view)
            except (*_WANT_WRITE, BlockingIOError):
                events = select.POLLOUT
            except _WANT_READ:
                events = select.POLLIN
            except OSError as error:
                raise httpx.WriteError(str(error)) from error
            else:
                view = view[count:]
                if not isinstance(self._sock, TlsSocket):  # which counts by itself, after each system call
                    self.limits.count_bytes(count)
                continue
            events |= select.POLLIN if on_readable else 0
            if not self.limits.wait(self._sock.fileno(), events, timeout):
                raise httpx.WriteTimeout("the destination has stopped reading")
            if on_readable and self.is_readable():
                on_readable()

    def _receive(self) -> tuple[bytes | None, int]:
        """Return received bytes, or None and the poll(2) events to wait for."""
        try:
            data = self._sock.recv(_READ_BYTES)
        except _WANT_READ:
            return None, select.POLLIN
        except _WANT_WRITE:
            return None, select.POLLOUT
        except OSError as error:
            raise httpx.ReadError(str(error)) from error
        self._received_bytes += len(data)
        if self._received_bytes > _MAX_RECEIVED_BYTES:
            raise httpx.RemoteProtocolError("the response exceeds 1 MiB")
        return data, 0


def connect(
    host: str, port: int, timeout: float | None, limits: AttemptLimits, options: ConnectOptions
) -> Stream:
    """Connect to the first address of a host that accepts; `timeout` is for each address, in seconds.

    Raises ConnectError or ConnectTimeout.
    """
    host, port = options.connect_to or (host, port)
    try:
        with limits.unbounded_wait():
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpx.ConnectError(str(error)) from error
    sock = dial(addresses, timeout, limits, options.local_address)
    limits.address = _address_of(sock)
    return Stream(sock, limits)


def _address_of(sock: socket.socket) -> str:
    """Return the address and port that a socket is connected to; empty if it has been reset."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_pins(sock: TlsSocket, pins: frozenset[str]) -> None:
    if not pins:
        return
    pin = spki_pin(sock.tls.getpeercert(binary_form=True) or b"")
    if pin not in pins:
        raise httpx.ConnectError(f"{PIN_MISMATCH}: the SHA-256 of the endpoint's public key is {pin}")


def spki_pin(certificate: bytes) -> str:
    """Return the SHA-256, in base64, of the public key in a DER certificate (RFC 7469 section 2.4)."""
    return base64.b64encode(hashlib.sha256(public_key_info(certificate)).digest()).decode("ascii")


def _validity(tls: ssl.SSLObject) -> Validity | None:
    """Return the validity of the server's certificate; None if that was not verified, or can't be read."""
    if tls.context.verify_mode is ssl.CERT_NONE:
        return None
    return CertificateFacts.of(tls.getpeercert(binary_form=True) or b"").validity


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
