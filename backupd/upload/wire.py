"""The network stream under httpcore: it hears an answer while it sends, and every wait can be ended.

The stock stream is deaf while it sends: an answer that comes before the body is complete gets lost with
the connection, and nothing can interrupt a stalled write.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore

from backupd.upload.line import Line

_WANT_READ = (ssl.SSLWantReadError,)
_WANT_WRITE = (ssl.SSLWantWriteError,)
_LARGEST_HEAD = 16 * 1024
_READ = 64 * 1024
_LONGEST_ANSWER = 1024 * 1024
"""Bytes that are read for one request; interim answers could go on for ever."""


class WireBackend(httpcore.NetworkBackend):
    """Makes `Wire`s; all of them keep to the bounds of one `Line`."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers; `timeout` in seconds is for each."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(str(error)) from error
        failure: httpcore.NetworkError | httpcore.TimeoutException | None = None
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                self._connect(sock, address, timeout, local_address, socket_options or ())
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
            else:
                return Wire(sock, self._line)
        raise failure or httpcore.ConnectError(f"no address for {host}")

    def _connect(
        self,
        sock: socket.socket,
        address: Any,
        timeout: float | None,
        local_address: str | None,
        options: Iterable[httpcore.SOCKET_OPTION],
    ) -> None:
        sock.setblocking(False)
        try:
            if local_address:
                sock.bind((local_address, 0))
            for option in options:
                sock.setsockopt(*option)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            code = sock.connect_ex(address)
            if code == 115:  # EINPROGRESS
                if not self._line.wait(sock.fileno(), select.POLLOUT, timeout):
                    raise httpcore.ConnectTimeout(f"no answer from {address[0]} port {address[1]}")
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, f"{os.strerror(code)} ({address[0]} port {address[1]})")
        except OSError as error:
            raise httpcore.ConnectError(error.strerror or str(error)) from error


class Wire(httpcore.NetworkStream):
    """A connection, plain or TLS, on a socket that never blocks."""

    def __init__(self, sock: socket.socket, line: Line) -> None:
        self._sock = sock
        self._line = line
        self._held = b""
        self._heard = bytearray()
        self._ended = False
        self._fault: OSError | None = None
        self._answered = 0
        # in HTTP/2 frames of the other side are part of sending
        self._is_http2 = isinstance(sock, ssl.SSLSocket) and sock.selected_alpn_protocol() == "h2"

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Shake hands; `timeout` in seconds is for each wait of it."""
        try:
            sock = ssl_context.wrap_socket(
                self._sock, server_hostname=server_hostname, do_handshake_on_connect=False
            )
            self._sock = sock
            while True:
                try:
                    sock.do_handshake()
                    break
                except _WANT_READ:
                    done = self._line.wait(sock.fileno(), select.POLLIN, timeout)
                except _WANT_WRITE:
                    done = self._line.wait(sock.fileno(), select.POLLOUT, timeout)
                if not done:
                    raise httpcore.ConnectTimeout("no answer in the TLS handshake")
        except (OSError, ValueError) as error:
            self.close()
            raise httpcore.ConnectError(str(error)) from error
        except BaseException:
            self.close()
            raise
        return Wire(sock, self._line)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of a buffer; `timeout` in seconds is for each wait without any progress.

        A request's head is held back, to leave with the first data in one write. Raises WriteError as
        soon as the destination has begun to answer, or is gone; `read` then returns what it said.
        """
        if self._held:
            buffer, self._held = self._held + buffer, b""
        if not self._is_http2 and len(buffer) < _LARGEST_HEAD and buffer.endswith(b"\r\n\r\n"):
            self._held = buffer
            return
        self._send(buffer, timeout)

    def _send(self, buffer: bytes, timeout: float | None) -> None:
        self._answered = 0
        view = memoryview(buffer)
        if view and not self._is_http2:
            self._listen()
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
                self._line.moved(count)

    def _wait_to_send(self, events: int, timeout: float | None) -> None:
        if not self._line.wait(self._sock.fileno(), events | select.POLLIN, timeout):
            raise httpcore.WriteTimeout("the other side has stopped reading")
        if not self._is_http2:
            self._listen()

    def _listen(self) -> None:
        """Take in what has arrived, without waiting; raise WriteError if it is an answer or the end."""
        poller = select.poll()
        poller.register(self._sock.fileno(), select.POLLIN)
        if poller.poll(0):
            self._hear()
        if self._ended or _is_final(self._heard):
            raise httpcore.WriteError("the destination answered before it had the whole request")
        if len(self._heard) >= _READ:
            raise httpcore.RemoteProtocolError("interim answers without an end")

    def _hear(self) -> None:
        try:
            while not self._ended and len(self._heard) < _READ:
                data = self._sock.recv(_READ)
                self._heard += data
                self._ended = not data
        except (*_WANT_READ, *_WANT_WRITE, BlockingIOError):
            return
        except OSError as error:
            self._ended, self._fault = True, error

    def _hear_last_words(self) -> None:
        """After a failed send: an answer, or the alert that says why, may still be there to be read."""
        self._hear()
        if not self._heard and not self._ended and self._line.wait(self._sock.fileno(), select.POLLIN, 0.2):
            self._hear()
        self._ended = True

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what the other side sent, `b""` at its end; `timeout` in seconds."""
        if self._held:
            held, self._held = self._held, b""
            self._send(held, timeout)
        if self._heard:
            data = bytes(self._heard[:max_bytes])
            del self._heard[:max_bytes]
            return data
        while not self._ended:
            try:
                return self._counted(self._sock.recv(max_bytes))
            except (*_WANT_READ, BlockingIOError):
                ready = self._line.wait(self._sock.fileno(), select.POLLIN, timeout)
            except _WANT_WRITE:
                ready = self._line.wait(self._sock.fileno(), select.POLLOUT, timeout)
            except OSError as error:
                raise httpcore.ReadError(str(error)) from error
            if not ready:
                raise httpcore.ReadTimeout("no answer")
        if self._fault is not None:  # httpcore forgets why a write failed, and it may be an alert
            try:
                raise self._fault
            except OSError as error:  # as the context: httpcore wipes the cause off what passes through it
                raise httpcore.ReadError(str(error)) from error
        return b""

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
                return self._sock if isinstance(self._sock, ssl.SSLSocket) else None
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
        except (httpcore.WriteError, httpcore.RemoteProtocolError):
            return True
        return bool(self._heard)


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
