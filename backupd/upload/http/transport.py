"""The httpx transport of one worker: a single connection, opened again when it cannot be reused."""

from __future__ import annotations

import base64
import re
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from backupd.upload.http.http1 import Http1Connection
from backupd.upload.http.http_connection import (
    EXPECT_CONTINUE,
    HttpConnection,
    RequestRefusedError,
    ResponseHead,
)
from backupd.upload.http.limits import AttemptLimits
from backupd.upload.http.redact import redact, secrets_of
from backupd.upload.http.response import CONTENT_ENCODING
from backupd.upload.http.stream import DIRECT, ConnectOptions, Stream, connect

TLS = "backupd.tls"
"""Name of the response extension that holds the `ssl.SSLObject` of the connection; None without TLS."""

IS_REUSED = "backupd.is_reused"
"""Name of the response extension that tells whether the response may be a stray one: one that responds to an
earlier request, and arrived when this one was sent. HTTP/2 assigns each response to its request."""

_MAX_ERROR_LENGTH = 500
"""Characters of an error text: h11 quotes the received bytes in it."""

_MAX_IDLE = 30.0
"""Seconds for which an idle connection is kept; most servers close theirs after 60 or more."""

_MAX_AGE = 300.0
"""Seconds after which a connection is not used again, so that changes of the name service take effect."""

_EXPECTATION_FAILED = 417
"""Status of a server that does not support `Expect: 100-continue`."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy; an empty `user` is none."""

    host: str
    port: int
    user: str = ""
    password: str = ""

    @property
    def secrets(self) -> tuple[str, ...]:
        """Return the texts that no error may contain."""
        return (self.password, f"{self.user}:{self.password}") if self.user else ()

    @property
    def headers(self) -> dict[str, str]:
        """Return the header fields that sign in to the proxy (RFC 9110 section 11.7.2)."""
        if not self.user:
            return {}
        encoded = base64.b64encode(f"{self.user}:{self.password}".encode()).decode("ascii")
        return {"Proxy-Authorization": f"Basic {encoded}"}


@dataclass(slots=True)
class _Open:
    """The open connection, and the server to which it leads."""

    connection: HttpConnection
    origin: tuple[str, str, int]
    tls: ssl.SSLObject | None
    opened_at: float
    used_at: float
    is_new: bool = True


class HttpTransport(httpx.BaseTransport):
    """An httpx transport that keeps to the limits of an attempt in every wait; for one thread.

    With `is_kept` False, each request over HTTP/1.1 has its own connection. A connection that is `max_age`
    seconds old is not used again.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        limits: AttemptLimits,
        *,
        connect_options: ConnectOptions = DIRECT,
        proxy: Proxy | None = None,
        is_kept: bool = True,
        max_age: float = _MAX_AGE,
    ) -> None:
        self._is_kept = is_kept
        self._max_age = max_age
        self._context = context
        self._limits = limits
        self._connect_options = connect_options
        self._proxy = proxy
        self._open: _Open | None = None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises httpx's exceptions, with error texts that contain no secret."""
        if self._proxy and request.url.scheme == "http":
            request.headers.update(self._proxy.headers)
        while True:
            try:
                with self.redacted_errors(request):
                    opened = self._reusable(request.url) or self._connect(request)
                    self._open = opened
                    head = opened.connection.send(request, _target(request.url, self._proxy))
            except BaseException as error:
                self.close()
                if isinstance(error, RequestRefusedError) and not opened.is_new:
                    continue
                raise
            if head.status == _EXPECTATION_FAILED and request.extensions.get(EXPECT_CONTINUE):
                self.close()
                request.extensions[EXPECT_CONTINUE] = False
                continue
            return httpx.Response(
                status_code=head.status,
                # httpx would decode an encoded body, of any size
                headers=[(key, value) for key, value in head.headers if key.lower() != b"content-encoding"],
                stream=_ResponseBody(self, opened.connection, request),
                extensions={
                    "http_version": head.http_version,
                    "reason_phrase": head.reason,
                    TLS: opened.tls,
                    CONTENT_ENCODING: _field(head, b"content-encoding"),
                    IS_REUSED: not opened.is_new and head.http_version != b"HTTP/2",
                },
            )

    def end_response(self) -> None:
        """Keep the connection for another request, or close it."""
        if self._open is None:
            return
        try:
            if self._open.connection.end_response():
                self._open.is_new, self._open.used_at = False, time.monotonic()
                return
        except httpx.TransportError:
            pass
        self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._open is not None:
            self._open.connection.close()
            self._open = None

    @contextmanager
    def redacted_errors(self, request: httpx.Request) -> Iterator[None]:
        """Remove the secrets of a request from the texts of errors, which may quote the server."""
        try:
            yield
        except httpx.TransportError as error:
            secrets = (*secrets_of(request), *(self._proxy.secrets if self._proxy else ()))
            raise type(error)(redact(str(error), secrets)[:_MAX_ERROR_LENGTH]) from error

    def _reusable(self, url: httpx.URL) -> _Open | None:
        """Return the open connection if it can take a request to a URL, else close it."""
        now, opened = time.monotonic(), self._open
        if (
            opened is not None
            and (self._is_kept or not isinstance(opened.connection, Http1Connection))
            and opened.origin == _origin(url)
            and now < opened.used_at + _MAX_IDLE
            and now < opened.opened_at + self._max_age
            and opened.connection.is_reusable()
        ):
            return opened
        self.close()
        return None

    def _connect(self, request: httpx.Request) -> _Open:
        origin = scheme, host, port = _origin(request.url)
        timeout = request.extensions["timeout"]["connect"]
        if self._proxy:
            try:
                stream = connect(
                    self._proxy.host, self._proxy.port, timeout, self._limits, self._connect_options
                )
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise httpx.ProxyError(f"no connection to the proxy: {error}") from error
        else:
            stream = connect(host, port, timeout, self._limits, self._connect_options)
        try:
            if scheme == "https":
                if self._proxy:
                    _open_tunnel(stream, host, port, self._proxy, request)
                stream.start_tls(self._context, host, timeout, self._connect_options)
            connection = _http_connection(stream)
        except BaseException:
            stream.close()
            raise
        now = time.monotonic()
        return _Open(connection, origin, stream.tls, now, now)


class _ResponseBody(httpx.SyncByteStream):
    def __init__(self, transport: HttpTransport, connection: HttpConnection, request: httpx.Request) -> None:
        self._transport = transport
        self._connection = connection
        self._request = request

    def __iter__(self) -> Iterator[bytes]:
        timeout = self._request.extensions["timeout"]["read"]
        try:
            with self._transport.redacted_errors(self._request):
                yield from self._connection.chunks(timeout)
        except Exception:
            self._transport.close()
            raise

    def close(self) -> None:
        self._transport.end_response()


def _http_connection(stream: Stream) -> HttpConnection:
    """Return a connection with the HTTP version that the TLS handshake selected."""
    if stream.tls is None or stream.tls.selected_alpn_protocol() != "h2":
        return Http1Connection(stream)
    try:
        from backupd.upload.http.http2 import Http2Connection  # noqa: PLC0415 -- h2 is an extra
    except OSError as error:  # no free descriptor
        raise httpx.ConnectError(error.strerror or str(error)) from error
    return Http2Connection(stream)


def _open_tunnel(stream: Stream, host: str, port: int, proxy: Proxy, request: httpx.Request) -> None:
    """Ask a proxy for a connection to the destination (RFC 9110 section 9.3.6)."""
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    connect_request = httpx.Request(
        "CONNECT",
        request.url,
        headers={"Host": authority, "Accept": "*/*", **proxy.headers},
        extensions={"timeout": request.extensions["timeout"]},
    )
    try:
        head = Http1Connection(stream).send(connect_request, authority.encode("ascii"))
    except httpx.TransportError as error:
        raise httpx.ProxyError(f"no tunnel through the proxy: {error}") from error
    if not 200 <= head.status < 300:
        raise httpx.ProxyError(_describe_refusal(head, (*secrets_of(request), *proxy.secrets)))


_AUTH_SCHEME = re.compile(r"(?:^|,)\s*([A-Za-z][\w-]*)(?=\s|,|$)")
"""The name of a scheme in Proxy-Authenticate, and no parameter, which a `=` follows (RFC 9110 section 11)."""


def _describe_refusal(head: ResponseHead, secrets: Iterable[str]) -> str:
    """Return the status of a proxy, with the schemes that it offers instead of Basic, or its redirect.

    The secrets are removed before the text is cut.
    """
    text = f"{head.status} {head.reason.decode('ascii', 'replace')}".strip()
    if location := redact(_field(head, b"location"), secrets):
        return f"{text} to {location.partition('?')[0][:200]}"
    schemes = _AUTH_SCHEME.findall(_field(head, b"proxy-authenticate"))
    if schemes and "basic" not in map(str.lower, schemes):
        return f"{text} (it offers {', '.join(schemes)}, and backupd supports Basic alone)"
    return text


def _field(head: ResponseHead, name: bytes) -> str:
    """Return the values of a header field, empty if there is none."""
    return ",".join(v.decode("ascii", "replace") for key, v in head.headers if key.lower() == name)


def _origin(url: httpx.URL) -> tuple[str, str, int]:
    return url.scheme, url.raw_host.decode("ascii"), url.port or _DEFAULT_PORTS[url.scheme]


def _target(url: httpx.URL, proxy: Proxy | None) -> bytes:
    """Return the request target: the whole URL for a plain request to a proxy (RFC 9112 section 3.2.2)."""
    return str(url).encode("ascii") if proxy and url.scheme == "http" else url.raw_path
