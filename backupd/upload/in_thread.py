"""The transport of uploads under an async client.

httpx's own async transport knows neither our stream nor its checks: pins would be looked at after the
credentials went out, and the alert that says why a certificate was refused would get lost.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass

import httpx

_ABOUT_THE_BODY = (b"content-encoding", b"content-length", b"transfer-encoding")


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of the other side's TLS: its version, and its certificate in DER."""

    version: str | None = None
    certificate: bytes | None = None


class InThread(httpx.AsyncBaseTransport):
    """Asks in a thread of the loop's executor; the answer's `seen` extension is a `Seen`.

    Of an answer's body only the first piece is taken, and only of a 400, whose words matter.
    """

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises what the transport raises."""
        return await asyncio.to_thread(self._exchange, request)

    async def aclose(self) -> None:
        """Close the transport."""
        await asyncio.to_thread(self._transport.close)

    def _exchange(self, request: httpx.Request) -> httpx.Response:
        response = self._transport.handle_request(request)
        try:
            seen = _seen(response)  # first: with the body's last byte the connection may be gone
            assert isinstance(response.stream, httpx.SyncByteStream)  # noqa: S101 -- what our transport gives
            said = next(iter(response.stream), b"") if response.status_code == 400 else b""
        finally:
            response.close()
        return httpx.Response(
            response.status_code,
            headers=[(k, v) for k, v in response.headers.raw if k.lower() not in _ABOUT_THE_BODY],
            content=said,
            extensions={"http_version": response.extensions["http_version"], "seen": seen},
        )


def _seen(response: httpx.Response) -> Seen:
    connection = response.extensions["network_stream"].get_extra_info("ssl_object")
    if not isinstance(connection, ssl.SSLObject):
        return Seen()
    return Seen(connection.version(), connection.getpeercert(binary_form=True))
