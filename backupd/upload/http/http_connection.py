"""The interface of an HTTP connection, whatever its version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import httpx

EXPECT_CONTINUE = "backupd.expect_continue"
"""Name of the request extension that tells whether to send `Expect: 100-continue` over a new connection."""


class ResponseHead(NamedTuple):
    """The head of a response: status, reason phrase, version such as `HTTP/1.1`, and header fields."""

    status: int
    reason: bytes
    http_version: bytes
    headers: list[tuple[bytes, bytes]]


class RequestRefusedError(httpx.RemoteProtocolError):
    """The server has not processed the request, so that it can be sent again on another connection.

    It closes the connection (RFC 9113 section 8.7), or has not received a byte of the request.
    """


class EarlyResponseError(Exception):
    """The server responds although it does not have the whole request."""


class HttpConnection(Protocol):
    """A connection for one request at a time: `send`, `chunks`, `end_response`.

    Every method but `close` raises `httpx.TransportError` or AttemptEndedError, and `send` what the body of
    the request raises. After any exception the connection has to be closed.
    """

    def send(self, request: httpx.Request, target: bytes) -> ResponseHead:
        """Send a request and return the head of its response.

        `target` is the request target (RFC 9112 section 3.2). A response that arrives before the whole
        request is sent ends the sending: a server may refuse an archive by its head, and then close the
        connection.
        """
        ...

    def chunks(self, timeout: float | None) -> Iterator[bytes]:
        """Yield the body of the response; `timeout` is for each wait, in seconds."""
        ...

    def end_response(self) -> bool:
        """Return whether the connection can be kept for another request: the whole response has arrived."""
        ...

    def is_reusable(self) -> bool:
        """Return whether another request can be sent."""
        ...

    def close(self) -> None:
        """Close the connection at once."""
        ...
