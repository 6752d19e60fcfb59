"""The httpx transport over the network stream of `stream`, through httpcore's connection pool."""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx

from backupd.upload.http.limits import AttemptLimits
from backupd.upload.http.redact import redact, secrets_of
from backupd.upload.http.stream import DIRECT, ConnectOptions, Stream

MAX_RESPONSE_BYTES = 1024 * 1024
"""Bytes of a response body that are passed on; the rest is not read."""

_MAX_ERROR_LENGTH = 500
"""Characters of an error text: h11 quotes the received bytes in it."""

_KEEPALIVE = 30.0
"""Seconds for which an idle connection is kept; most servers close theirs after 60 or more."""

_MAX_UNSENT_BYTES = 512 * 1024
"""Bytes in the socket's send buffer: enough for every network, and few after an early refusal."""

_LOCAL_ERRORS = (errno.EAFNOSUPPORT, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE)
"""Errors of this host, such as that it has no IPv6 or no free descriptor."""


class HttpTransport(httpx.BaseTransport):
    """An httpx transport that keeps to the limits of an attempt in every wait."""

    def __init__(
        self,
        context: ssl.SSLContext,
        limits: AttemptLimits,
        *,
        http2: bool = False,
        connect_options: ConnectOptions = DIRECT,
        proxy: httpcore.Proxy | None = None,
    ) -> None:
        self._proxy_secrets = _secrets_of_proxy(proxy)
        self._pool = EarlyResponsePool(
            ssl_context=context,
            max_connections=2,
            keepalive_expiry=_KEEPALIVE,
            http2=http2 and proxy is None,
            network_backend=StreamBackend(limits, connect_options, to_proxy=proxy is not None),
            proxy=proxy,
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises httpx's exceptions, with error texts that contain no secret."""
        secrets = (*secrets_of(request), *self._proxy_secrets)
        with _as_httpx_errors(secrets):
            response = self._pool.handle_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(
                        scheme=request.url.raw_scheme,
                        host=request.url.raw_host,
                        port=request.url.port,
                        target=request.url.raw_path,
                    ),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            status_code=response.status,
            # the request accepts no encoding: a body that is encoded anyway is not decoded, because a small
            # body could become a large one
            headers=[(key, value) for key, value in response.headers if key.lower() != b"content-encoding"],
            stream=_ResponseBody(response, secrets),
            extensions=response.extensions,
        )

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


class _ResponseBody(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response, secrets: Collection[str]) -> None:
        self._response = response
        self._secrets = secrets

    def __iter__(self) -> Iterator[bytes]:
        received = 0
        with _as_httpx_errors(self._secrets):
            for chunk in self._response.iter_stream():
                received += len(chunk)
                if received > MAX_RESPONSE_BYTES:
                    return
                yield chunk

    def close(self) -> None:
        self._response.close()


@contextmanager
def _as_httpx_errors(secrets: Collection[str]) -> Iterator[None]:
    """Convert an httpcore exception to the httpx exception of the same name.

    The text is redacted, because it may quote the server.
    """
    try:
        yield
    except (
        httpcore.TimeoutException,
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.ProxyError,
        httpcore.UnsupportedProtocol,
    ) as error:
        raised: type[httpx.TransportError] = getattr(httpx, type(error).__name__)
        raise raised(redact(str(error), secrets)[:_MAX_ERROR_LENGTH]) from error


def _secrets_of_proxy(proxy: httpcore.Proxy | None) -> tuple[str, ...]:
    if proxy is None or proxy.auth is None:
        return ()
    user, password = (part.decode("utf-8") for part in proxy.auth)
    return password, f"{user}:{password}"


class EarlyResponsePool(httpcore.ConnectionPool):
    """A pool of connections that notice a response while they send; through a proxy only HTTP/1.1."""

    def create_connection(self, origin: httpcore.Origin) -> httpcore.ConnectionInterface:
        """See `httpcore.ConnectionPool.create_connection`."""
        if not self._http2:
            return super().create_connection(origin)
        return _Connection(
            origin,
            ssl_context=self._ssl_context,
            keepalive_expiry=self._keepalive_expiry,
            http2=True,
            network_backend=self._network_backend,
        )


class _Connection(httpcore.HTTPConnection):
    """A connection with the HTTP version that the TLS handshake selected."""

    def handle_request(self, request: httpcore.Request) -> httpcore.Response:
        with self._request_lock:
            if self._connection is None:
                self._connection = self._open(request)
        return super().handle_request(request)

    def _open(self, request: httpcore.Request) -> httpcore.ConnectionInterface:
        try:
            stream = self._connect(request)
        except BaseException:
            self._connect_failed = True
            raise
        if isinstance(stream, Stream) and stream.is_http2:
            try:
                from backupd.upload.http.http2 import Http2Connection  # noqa: PLC0415 -- h2 is an extra
            except OSError as error:  # no free descriptor
                stream.close()
                raise httpcore.ConnectError(error.strerror or str(error)) from error
            return Http2Connection(self._origin, stream, self._keepalive_expiry)
        return httpcore.HTTP11Connection(self._origin, stream, self._keepalive_expiry)


class StreamBackend(httpcore.NetworkBackend):
    """Opens `Stream`s that share the limits of an attempt.

    With `to_proxy` it connects to a proxy, and a failure is raised as ProxyError.
    """

    def __init__(
        self, limits: AttemptLimits, connect_options: ConnectOptions = DIRECT, *, to_proxy: bool = False
    ) -> None:
        self._limits = limits
        self._connect_options = connect_options
        self._to_proxy = to_proxy

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002 -- httpcore's signature; see ConnectOptions
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that accepts; `timeout` is for each address, in seconds."""
        target = self._connect_options.connect_to or (host, port)
        try:
            return self._connect_tcp(*target, timeout, socket_options or ())
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
            if self._to_proxy:
                raise httpcore.ProxyError(f"no connection to the proxy: {error}") from error
            raise

    def _connect_tcp(
        self, host: str, port: int, timeout: float | None, options: Iterable[httpcore.SOCKET_OPTION]
    ) -> httpcore.NetworkStream:
        try:
            with self._limits.unbounded_wait():
                addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(str(error)) from error
        failures: list[httpcore.ConnectError | httpcore.ConnectTimeout] = []
        for family, kind, protocol, _, address in addresses:
            try:
                sock = _make_socket(family, kind, protocol)
                self._connect_or_close(sock, address, timeout, options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failures.append(error)
            else:
                return Stream(sock, self._limits, self._connect_options)
        # a failure at another address explains more than that this host has no IPv6
        raise min(failures, key=_is_local, default=httpcore.ConnectError(f"no address for {host}"))

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
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES)
            code = sock.connect_ex(address)
            if code == errno.EINPROGRESS:
                if not self._limits.wait(sock.fileno(), select.POLLOUT, timeout):
                    raise httpcore.ConnectTimeout(f"no response from {address[0]} port {address[1]}")
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, f"{os.strerror(code)} ({address[0]} port {address[1]})")
        except OSError as error:
            raise httpcore.ConnectError(error.strerror or str(error)) from error

    def _bind(self, sock: socket.socket) -> None:
        address = self._connect_options.local_address
        try:
            if address:
                sock.bind((address, 0))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} (local_address {address})") from error


def _make_socket(family: int, kind: int, protocol: int) -> socket.socket:
    try:
        return socket.socket(family, kind, protocol)
    except OSError as error:  # this host has no such addresses, or no free descriptor
        raise httpcore.ConnectError(error.strerror or str(error)) from error


def _is_local(failure: Exception) -> bool:
    """Return whether a failure to connect is caused by this host."""
    cause = failure.__cause__
    return isinstance(cause, OSError) and cause.errno in _LOCAL_ERRORS
