"""HTTP/1.1 over a `Stream`, by h11: one request at a time; an early response ends its sending."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import h11
import httpx

from backupd.upload.http.http_connection import (
    EXPECT_CONTINUE,
    EarlyResponseError,
    HttpConnection,
    RequestRefusedError,
    ResponseHead,
)
from backupd.upload.http.stream import Stream

_MAX_HEAD_BYTES = 100 * 1024
"""Bytes of the head of a response."""

_INTERIM = b"HTTP/1.1 1"
"""The beginning of an interim response."""

_STATUS_LINE = b"HTTP/"
"""The beginning of every response."""

_END_OF_HEAD = re.compile(rb"\n\r?\n")
_INTERIM_STATUS = re.compile(rb"HTTP/1\.[0-9] 1[0-9][0-9]")

_LENIENT_STATUS_LINE = re.compile(rb"HTTP/(\d(?:\.\d)?)[ \t]+(\d{3})((?:[ \t].*)?\r?)")
_FIELD_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROLS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""Characters that no field value may contain (RFC 9110 section 5.5)."""

_MAX_QUOTED_BYTES = 100
"""Bytes of an unexpected line that an error quotes."""

_DISCONNECTED = "disconnected without a response"

_CONTINUE = 100
"""Status with which a server asks for the body (RFC 9110 section 10.1.1)."""

_MAX_WAIT_FOR_CONTINUE = 1.0
"""Seconds to wait for that: many servers do not support it. curl waits for as long."""

_WAIT_FOR_RESPONSE = 0.2
"""Seconds to wait for the response or TLS alert that explains why the server closed the connection."""

_WAIT_FOR_END = 2.0
"""Seconds to wait for more of a body of which the length is unknown because of a faulty head."""


class Http1Connection(HttpConnection):
    """An HTTP/1.1 connection."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        self._early_response: h11.Response | None = None
        self._head = b""
        """The part of a response's head that was received, until it is complete."""
        self._is_head_over = False
        self._is_new = True
        self._was_repaired = False
        """Whether a response had a faulty head: the connection is not used again."""
        self._ends_unknown = False
        """Whether its head states no length of the body."""

    def send(self, request: httpx.Request, target: bytes) -> ResponseHead:
        """See `HttpConnection.send`."""
        timeout = request.extensions["timeout"]
        self._stream.begin_request()
        self._is_head_over = False
        with _httpx_errors():
            try:
                self._send_request(request, target, timeout["write"])
                response = self._receive_response(timeout["read"])
            except EarlyResponseError:
                self._stream.limits.body_sent()
                response = self._early_response or self._receive_response(timeout["read"])
        version = b"HTTP/" + response.http_version
        return ResponseHead(response.status_code, response.reason, version, [*response.headers])

    def chunks(self, timeout: float | None) -> Iterator[bytes]:
        """See `HttpConnection.chunks`."""
        if self._ends_unknown:
            timeout = min(_WAIT_FOR_END, timeout or _WAIT_FOR_END)
        with _httpx_errors():
            try:
                while isinstance(event := self._next_event(timeout), h11.Data):
                    yield bytes(event.data)
            except httpx.ReadTimeout:
                if not self._ends_unknown:
                    raise

    def end_response(self) -> bool:
        """See `HttpConnection.end_response`."""
        with _httpx_errors():
            while self._h11.their_state is h11.SEND_BODY and self._h11.next_event() is not h11.NEED_DATA:
                pass
            is_complete = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
            if not is_complete or self._was_repaired or self._h11.trailing_data[0]:
                return False
            self._h11.start_next_cycle()
            return True

    def is_reusable(self) -> bool:
        """Return whether another request can be sent: nothing came after the last response."""
        try:
            return self._stream.receive_now() is None
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """See `HttpConnection.close`."""
        self._stream.close()

    def _send_request(self, request: httpx.Request, target: bytes, timeout: float | None) -> None:
        assert isinstance(request.stream, httpx.SyncByteStream)  # noqa: S101 -- the client is not async
        headers = request.headers.raw
        asks_first = self._is_new and request.extensions.get(EXPECT_CONTINUE, False)
        self._is_new = False
        if asks_first:
            headers = [*headers, (b"Expect", b"100-continue")]
        head = h11.Request(method=request.method, target=target, headers=headers)
        pieces = self._h11.send_with_data_passthrough(head) or []
        if asks_first:
            self._write(pieces, timeout)
            self._wait_for_continue()
            pieces = []
        for chunk in request.stream:  # the head and the first bytes of the body are sent together
            pieces += self._h11.send_with_data_passthrough(h11.Data(data=chunk)) or ()
            self._write(pieces, timeout)
            pieces = []
        pieces += self._h11.send_with_data_passthrough(h11.EndOfMessage()) or ()
        self._write(pieces, timeout)

    def _wait_for_continue(self) -> None:
        """Wait until the server asks for the body, for a while; raise EarlyResponseError if it responds."""
        until = time.monotonic() + _MAX_WAIT_FOR_CONTINUE
        while (left := until - time.monotonic()) > 0:
            try:
                self._received(self._stream.receive(left))
            except httpx.ReadTimeout:
                return
            is_asked = False
            while (event := self._h11.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Response):
                    self._early_response = event
                    raise EarlyResponseError
                is_asked = is_asked or getattr(event, "status_code", None) == _CONTINUE
            if is_asked:
                return

    def _write(self, pieces: list[bytes], timeout: float | None) -> None:
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if not data:
            return
        try:
            self._stream.send(data, timeout, self._check_response)
        except httpx.WriteError as error:
            self._explain(error)

    def _check_response(self) -> None:
        """Read what has arrived; raise EarlyResponseError if it is a response.

        What arrived before the first byte of the request was sent responds to no request of ours (RFC 9112
        section 9.2).
        """
        data = self._stream.receive_now()
        if data is None:
            return
        if not self._stream.has_sent:
            line = data.partition(b"\r\n")[0][:_MAX_QUOTED_BYTES]
            raise RequestRefusedError(
                f"the destination sent {line!r} before the request" if data else _DISCONNECTED
            )
        self._received(data)
        self._raise_response()

    def _explain(self, error: httpx.WriteError) -> NoReturn:
        """Raise the response or TLS alert that explains a failed write, else the error."""
        try:
            while True:
                self._received(self._stream.receive(_WAIT_FOR_RESPONSE))
                self._raise_response()
        except (httpx.ReadTimeout, httpx.RemoteProtocolError):
            raise error from error.__cause__

    def _raise_response(self) -> None:
        """Raise EarlyResponseError if a response has started, after any interim (1xx) ones."""
        while (event := self._h11.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.Response):
                self._early_response = event
                raise EarlyResponseError
        beginning = (self._h11.trailing_data[0] or self._head)[: len(_INTERIM)]
        if not _INTERIM.startswith(beginning):
            raise EarlyResponseError

    def _receive_response(self, timeout: float | None) -> h11.Response:
        while not isinstance(event := self._next_event(timeout), h11.Response):
            pass
        return event

    def _next_event(self, timeout: float | None) -> object:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            self._received(self._stream.receive(timeout))
        return event

    def _received(self, data: bytes) -> None:
        if not data and self._h11.their_state is h11.SEND_RESPONSE:
            raise httpx.RemoteProtocolError(_DISCONNECTED)
        if self._is_head_over:
            self._h11.receive_data(data)
            return
        self._head += data
        while not self._is_head_over and (end := _END_OF_HEAD.search(self._head)):
            head, self._head = self._head[: end.end()], self._head[end.end() :]
            self._is_head_over = not _INTERIM_STATUS.match(head)
            self._h11.receive_data(self._repaired(head))
        is_http = self._head.startswith(_STATUS_LINE[: len(self._head)])
        if self._is_head_over or not is_http or len(self._head) > _MAX_HEAD_BYTES:
            self._is_head_over = True
            if self._head:  # without data, h11 takes it for the end of the connection
                self._h11.receive_data(self._head)
            self._head = b""

    def _repaired(self, head: bytes) -> bytes:
        """Return a head in the form that h11 accepts; other clients accept more.

        Lines that are no header fields are left out. White space before a colon is removed, as RFC 9112
        section 5.1 has proxies do it. If the body has no length then, it ends where nothing more arrives
        within `_WAIT_FOR_END` seconds.
        """
        self._ends_unknown = False  # an interim response has no body
        status_line, *lines = head.split(b"\n")
        repaired, names, is_kept = list[bytes](), set[bytes](), True
        for line in lines[:-2]:
            name, colon, value = line.partition(b":")
            token = name.rstrip(b" \t")
            if line[:1] not in b" \t":  # else the value above goes on
                is_kept = bool(colon and _FIELD_NAME.fullmatch(token) and not _CONTROLS.search(value[:-1]))
                names |= {token.lower()} if is_kept else set()
            if is_kept:
                repaired.append(line if token == name else token + colon + value)
        repaired = [_usual_status_line(status_line), *_usual_codings(repaired)]
        if repaired == [status_line, *lines[:-2]]:
            return head
        self._was_repaired = True
        self._ends_unknown = not names & {b"content-length", b"transfer-encoding"}
        return b"\n".join([*repaired, *lines[-2:]])


def _usual_status_line(line: bytes) -> bytes:
    """Return a status line with single spaces, and HTTP/1.1 in place of a version that it can't be."""
    if not (match := _LENIENT_STATUS_LINE.fullmatch(line)):
        return line
    version = match[1] if match[1] in (b"1.0", b"1.1") else b"1.1"
    return b"HTTP/%s %s%s" % (version, match[2], match[3])


def _usual_codings(lines: list[bytes]) -> list[bytes]:
    """Return the fields of a head with `chunked` only once, and without the obsolete `identity`."""
    stated = [line for line in lines if line.lower().startswith(b"transfer-encoding:")]
    codings = [each.strip().lower() for line in stated for each in line.partition(b":")[2].split(b",")]
    if not {*codings} <= {b"chunked", b"identity"} or codings == [b"chunked"]:
        return lines
    others = [line for line in lines if line not in stated]
    return [*others, b"Transfer-Encoding: chunked\r"] if b"chunked" in codings else others


@contextmanager
def _httpx_errors() -> Iterator[None]:
    try:
        yield
    except h11.RemoteProtocolError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
    except h11.LocalProtocolError as error:
        raise httpx.LocalProtocolError(str(error)) from error
