"""httpx over our own network stream."""

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

_MOST_UNSENT = 512 * 1024
"""Bytes that may wait in the kernel unsent: enough for any line, and not megabytes past a refusal."""

_NO_WAY_THERE = (errno.EAFNOSUPPORT, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE)
"""What a host without IPv6 says of an address of it, and one without a descriptor of any."""


class StreamBackend(httpcore.NetworkBackend):
    """Makes `Wire`s; all of them keep to the bounds of one `Line`.

    With `to_proxy` what it connects to is a proxy, and a failure is told as that.
    """

    def __init__(
        self, line: AttemptLimits, route: ConnectOptions = DIRECT, *, to_proxy: bool = False
    ) -> None:
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
                return Stream(sock, self._line, self._route)
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


class EarlyResponsePool(httpcore.ConnectionPool):
    """A pool whose connections hear an answer while they send; through a proxy they speak no HTTP/2."""

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
            except OSError as error:  # no descriptor left
                stream.close()
                raise httpcore.ConnectError(error.strerror or str(error)) from error
            return Http2Connection(self._origin, stream, self._keepalive_expiry)
        return httpcore.HTTP11Connection(self._origin, stream, self._keepalive_expiry)


MAX_RESPONSE_BYTES = 1024 * 1024
"""Bytes of an answer's body that are taken in at all, whoever reads it."""

_MOST_WORDS = 500
"""Characters of an error: what is no HTTP is quoted in it, however long."""

_KEEPALIVE = 30.0
"""Seconds for which an idle connection is kept; most servers close theirs after 60 or more."""


class HttpTransport(httpx.BaseTransport):
    """An httpx transport whose connections keep to the bounds of a `Line`."""

    def __init__(
        self,
        context: ssl.SSLContext,
        line: AttemptLimits,
        *,
        http2: bool = False,
        route: ConnectOptions = DIRECT,
        proxy: httpcore.Proxy | None = None,
    ) -> None:
        self._proxy_secrets = _secrets_of_proxy(proxy)
        self._pool = EarlyResponsePool(
            ssl_context=context,
            max_connections=2,
            keepalive_expiry=_KEEPALIVE,
            http2=http2 and proxy is None,
            network_backend=StreamBackend(line, route, to_proxy=proxy is not None),
            proxy=proxy,
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises httpx's exceptions."""
        secrets = (*secrets_of(request), *self._proxy_secrets)
        with _as_httpx(secrets):
            answer = self._pool.handle_request(
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
            status_code=answer.status,
            # we ask for no encoding: whoever encodes all the same is taken at the letter, or a small
            # answer could become a large one
            headers=[(key, value) for key, value in answer.headers if key.lower() != b"content-encoding"],
            stream=_Answer(answer, secrets),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


class _Answer(httpx.SyncByteStream):
    def __init__(self, answer: httpcore.Response, secrets: Collection[str]) -> None:
        self._answer = answer
        self._secrets = secrets

    def __iter__(self) -> Iterator[bytes]:
        taken = 0
        with _as_httpx(self._secrets):
            for chunk in self._answer.iter_stream():
                taken += len(chunk)
                if taken > MAX_RESPONSE_BYTES:
                    return
                yield chunk

    def close(self) -> None:
        self._answer.close()


@contextmanager
def _as_httpx(secrets: Collection[str]) -> Iterator[None]:
    """Raise the exception of httpx that has the name of httpcore's; its words may quote the other side."""
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
        raise raised(redact(str(error), secrets)[:_MOST_WORDS]) from error


def _secrets_of_proxy(proxy: httpcore.Proxy | None) -> tuple[str, ...]:
    if proxy is None or proxy.auth is None:
        return ()
    user, password = (part.decode("utf-8") for part in proxy.auth)
    return password, f"{user}:{password}"
