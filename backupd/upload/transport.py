"""httpx over our own network stream."""

from __future__ import annotations

import ssl
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import httpcore
import httpx

from backupd.upload.backend import WireBackend
from backupd.upload.line import Line
from backupd.upload.pool import HearingPool
from backupd.upload.secret import secrets_of, without
from backupd.upload.wire import DIRECT, Route

MOST_OF_AN_ANSWER = 1024 * 1024
"""Bytes of an answer's body that are taken in at all, whoever reads it."""

_MOST_WORDS = 500
"""Characters of an error: what is no HTTP is quoted in it, however long."""

_KEEPALIVE = 30.0
"""Seconds for which an idle connection is kept; most servers close theirs after 60 or more."""


class Transport(httpx.BaseTransport):
    """An httpx transport whose connections keep to the bounds of a `Line`."""

    def __init__(
        self,
        context: ssl.SSLContext,
        line: Line,
        *,
        http2: bool = False,
        route: Route = DIRECT,
        proxy: httpcore.Proxy | None = None,
    ) -> None:
        self._proxy_secrets = _secrets_of_proxy(proxy)
        self._pool = HearingPool(
            ssl_context=context,
            max_connections=2,
            keepalive_expiry=_KEEPALIVE,
            http2=http2 and proxy is None,
            network_backend=WireBackend(line, route, to_proxy=proxy is not None),
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
                if taken > MOST_OF_AN_ANSWER:
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
        raise raised(without(str(error), secrets)[:_MOST_WORDS]) from error


def _secrets_of_proxy(proxy: httpcore.Proxy | None) -> tuple[str, ...]:
    if proxy is None or proxy.auth is None:
        return ()
    user, password = (part.decode("utf-8") for part in proxy.auth)
    return password, f"{user}:{password}"
