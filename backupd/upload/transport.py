"""httpx over our own network stream."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import httpcore
import httpx

from backupd.upload.backend import WireBackend
from backupd.upload.http2 import HearingPool
from backupd.upload.line import Line
from backupd.upload.wire import DIRECT, Route

MOST_OF_AN_ANSWER = 1024 * 1024
"""Bytes of an answer's body that are taken in at all, whoever reads it."""

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
        self._pool = HearingPool(
            ssl_context=context,
            max_connections=2,
            keepalive_expiry=_KEEPALIVE,
            http2=http2,
            network_backend=WireBackend(line, route, to_proxy=proxy is not None),
            proxy=proxy,
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises httpx's exceptions."""
        with _as_httpx():
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
            stream=_Answer(answer),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


class _Answer(httpx.SyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        taken = 0
        with _as_httpx():
            for chunk in self._answer.iter_stream():
                taken += len(chunk)
                if taken > MOST_OF_AN_ANSWER:
                    return
                yield chunk

    def close(self) -> None:
        self._answer.close()


@contextmanager
def _as_httpx() -> Iterator[None]:
    """Raise the exception of httpx that has the name of httpcore's."""
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
        raise raised(str(error)) from error
