"""Making connections for httpcore: without blocking, so that every wait can be ended."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterable
from typing import Any

import httpcore

from backupd.upload.line import Line
from backupd.upload.wire import DIRECT, Route, Wire

_MOST_UNSENT = 512 * 1024
"""Bytes that may wait in the kernel unsent: enough for any line, and not megabytes past a refusal."""

_NO_WAY_THERE = (errno.EAFNOSUPPORT, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE)
"""What a host without IPv6 says of an address of it, and one without a descriptor of any."""


class WireBackend(httpcore.NetworkBackend):
    """Makes `Wire`s; all of them keep to the bounds of one `Line`.

    With `to_proxy` what it connects to is a proxy, and a failure is told as that.
    """

    def __init__(self, line: Line, route: Route = DIRECT, *, to_proxy: bool = False) -> None:
        self._line = line
        self._route = route
        self._to_proxy = to_proxy

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002 -- httpcore's signature; the route has it
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers; `timeout` in seconds is for each."""
        try:
            return self._connect_tcp(*(self._route.connect_to or (host, port)), timeout, socket_options or ())
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
            if self._to_proxy:
                raise httpcore.ProxyError(f"no connection to the proxy: {error}") from error
            raise

    def _connect_tcp(
        self, host: str, port: int, timeout: float | None, options: Iterable[httpcore.SOCKET_OPTION]
    ) -> httpcore.NetworkStream:
        try:
            with self._line.unwatched():
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(str(error)) from error
        failures: list[httpcore.ConnectError | httpcore.ConnectTimeout] = []
        for family, kind, protocol, _, address in found:
            try:
                sock = _a_socket(family, kind, protocol)
                self._connect_or_close(sock, address, timeout, options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failures.append(error)
            else:
                return Wire(sock, self._line, self._route)
        raise min(failures, key=_says_little, default=httpcore.ConnectError(f"no address for {host}"))

    def _connect_or_close(
        self,
        sock: socket.socket,
        address: Any,
        timeout: float | None,
        options: Iterable[httpcore.SOCKET_OPTION],
    ) -> None:
        try:
            self._connect(sock, address, timeout, options)
        except BaseException:
            sock.close()
            raise

    def _connect(
        self,
        sock: socket.socket,
        address: Any,
        timeout: float | None,
        options: Iterable[httpcore.SOCKET_OPTION],
    ) -> None:
        sock.setblocking(False)
        try:
            self._bind(sock)
            for option in options:
                sock.setsockopt(*option)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MOST_UNSENT)
            code = sock.connect_ex(address)
            if code == errno.EINPROGRESS:
                if not self._line.wait(sock.fileno(), select.POLLOUT, timeout):
                    raise httpcore.ConnectTimeout(f"no answer from {address[0]} port {address[1]}")
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, f"{os.strerror(code)} ({address[0]} port {address[1]})")
        except OSError as error:
            raise httpcore.ConnectError(error.strerror or str(error)) from error

    def _bind(self, sock: socket.socket) -> None:
        ours = self._route.local_address
        try:
            if ours:
                sock.bind((ours, 0))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} ({ours}, our own)") from error


def _a_socket(family: int, kind: int, protocol: int) -> socket.socket:
    try:
        return socket.socket(family, kind, protocol)
    except OSError as error:  # no such addresses on this host, or no descriptor left
        raise httpcore.ConnectError(error.strerror or str(error)) from error


def _says_little(failure: Exception) -> bool:
    """Tell whether a failure is about our own end: what another address answered is worth more."""
    cause = failure.__cause__
    return isinstance(cause, OSError) and cause.errno in _NO_WAY_THERE
