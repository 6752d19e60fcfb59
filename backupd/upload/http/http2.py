"""HTTP/2 over a `Stream`, by h2: one request at a time; notices a response while it sends."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import httpx
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import Frame, GoAwayFrame

from backupd.upload.http.http_connection import (
    EarlyResponseError,
    HttpConnection,
    RequestRefusedError,
    ResponseHead,
)
from backupd.upload.http.stream import Stream

_MAX_IDLE_READS = 8
"""Reads from an idle connection before it is closed: a server that goes on sending is not kept."""

_MIN_COUNTED_BODY = 1024
"""Bytes of the body in a frame from which on the overhead of HTTP/2 and TLS counts as progress as well."""

_STATUS = re.compile(rb"[1-9][0-9][0-9]")

_NOT_IN_HTTP2 = frozenset({b"host", b"connection", b"transfer-encoding"})
"""Header fields that HTTP/2 replaces (RFC 9113 section 8.2.2)."""

_FRAME_HEAD_BYTES = 9

_CONFIG = h2.config.H2Configuration(header_encoding=None, validate_inbound_headers=False)
"""Accepts header fields that are invalid and harmless, as other clients do."""

_MAX_FRAME_BYTES = 16 * 1024
"""Length of the longest frame that the server may send, without its head."""


class Http2Connection(HttpConnection):
    """An HTTP/2 connection (RFC 9113)."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._frames = _GoAwayFilter()
        self._h2 = h2.connection.H2Connection(_CONFIG)
        settings = self._h2.local_settings
        settings[h2.settings.SettingCodes.ENABLE_PUSH] = 0
        del settings[h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL]  # some servers refuse unknown settings
        self._h2.initiate_connection()
        self._write_timeout: float | None = None
        self._knows_settings = False
        self._is_ending = False
        """Whether the server accepts no further requests, or a request or response is incomplete."""
        self._is_closed = False
        """Whether the server has ended the connection with an error."""
        self._stream_id = 0
        self._events: deque[h2.events.Event] = deque()
        """The events of the current stream that were received and not used yet."""
        self._response_started = self._response_complete = False

    def send(self, request: httpx.Request, target: bytes) -> ResponseHead:
        """See `HttpConnection.send`."""
        self._write_timeout = request.extensions["timeout"]["write"]
        read_timeout = request.extensions["timeout"]["read"]
        self._stream.begin_request()
        with _httpx_errors():
            self._flush()
            while not self._knows_settings:  # some servers refuse a body that was sent before their SETTINGS
                self._receive(read_timeout)
            self._raise_if_refused(self._is_ending)
            try:
                self._send_request(request, target)
            except EarlyResponseError:
                self._is_ending = True
                self._stream.limits.body_sent()
            return self._receive_head(read_timeout)

    def chunks(self, timeout: float | None) -> Iterator[bytes]:
        """See `HttpConnection.chunks`."""
        with _httpx_errors():
            while not self._response_complete:
                match self._next_event(timeout):
                    case h2.events.DataReceived() as event:
                        self._acknowledge(event)
                        yield event.data or b""
                    case h2.events.StreamEnded():
                        self._response_complete = True

    def end_response(self) -> bool:
        """See `HttpConnection.end_response`."""
        with _httpx_errors():
            for event in self._events:
                if isinstance(event, h2.events.DataReceived):  # else the connection's window stays smaller
                    self._acknowledge(event)
                self._response_complete |= isinstance(event, h2.events.StreamEnded)
        # the rest of an incomplete response must not reach the next request
        self._is_ending |= not self._response_complete
        return not self._is_ending

    def is_reusable(self) -> bool:
        """Return whether another request can be sent; receives the frames that arrived while idle."""
        try:
            for _ in range(_MAX_IDLE_READS):
                if self._is_ending:
                    return False
                data = self._stream.receive_now()
                if data is None:
                    return True
                with _httpx_errors():
                    self._received(data)
        except httpx.TransportError:
            pass
        return False

    def close(self) -> None:
        """See `HttpConnection.close`."""
        self._stream.close()

    def _send_request(self, request: httpx.Request, target: bytes) -> None:
        assert isinstance(request.stream, httpx.SyncByteStream)  # noqa: S101 -- the client is not async
        self._stream_id = self._h2.get_next_available_stream_id()
        self._events.clear()
        self._response_started = self._response_complete = False
        headers = [
            (b":method", request.method.encode("ascii")),
            (b":authority", request.headers["Host"].encode("ascii")),
            (b":scheme", b"https"),
            (b":path", target),
            *((k.lower(), v) for k, v in request.headers.raw if k.lower() not in _NOT_IN_HTTP2),
        ]
        has_body = "Content-Length" in request.headers or "Transfer-Encoding" in request.headers
        self._h2.send_headers(self._stream_id, headers, end_stream=not has_body)
        if has_body:
            for chunk in request.stream:
                self._send_data(memoryview(chunk))
            self._h2.end_stream(self._stream_id)
        self._flush()

    def _send_data(self, data: memoryview) -> None:
        """Send bytes of the body; only these count for `min_rate`, and not the frames around them."""
        while data:
            size = min(self._wait_for_window(), len(data))
            self._h2.send_data(self._stream_id, bytes(data[:size]))
            counts = size >= _MIN_COUNTED_BODY
            self._flush(counts_as_progress=counts)
            if not counts:
                self._stream.limits.count_bytes(size)
            data = data[size:]

    def _wait_for_window(self) -> int:
        """Return how many bytes the flow-control windows permit; raise EarlyResponseError on a response."""
        until = None if self._write_timeout is None else time.monotonic() + self._write_timeout
        while True:
            if (data := self._stream.receive_now()) is not None:
                self._received(data)
            if self._events:
                raise EarlyResponseError
            window = self._h2.local_flow_control_window(self._stream_id)
            flow = min(window, self._h2.max_outbound_frame_size)
            if flow > 0:  # new SETTINGS can make the window negative
                return flow
            left = None if until is None else until - time.monotonic()
            try:
                if left is not None and left <= 0:  # even while other frames arrive
                    raise httpx.ReadTimeout("")
                self._flush()  # the head of the request: the server may open the window after it
                self._receive(left)
            except httpx.ReadTimeout as error:
                raise httpx.WriteTimeout("the destination has stopped reading") from error

    def _receive_head(self, timeout: float | None) -> ResponseHead:
        while not isinstance(event := self._next_event(timeout), h2.events.ResponseReceived):
            pass
        self._response_started = True
        headers = [(name, value) for name, value in event.headers or () if isinstance(name, bytes)]
        statuses = [value for name, value in headers if name == b":status"]
        if len(statuses) != 1 or not _STATUS.fullmatch(statuses[0]):
            raise httpx.RemoteProtocolError("invalid HTTP status in the response")
        fields = [(name, value) for name, value in headers if not name.startswith(b":")]
        return ResponseHead(int(statuses[0]), b"", b"HTTP/2", fields)

    def _next_event(self, timeout: float | None) -> h2.events.Event:
        """Return the next event of the current stream."""
        while not self._events:
            self._receive(timeout)
        event = self._events.popleft()
        if isinstance(event, h2.events.StreamReset):
            self._raise_if_refused(event.error_code == h2.errors.ErrorCodes.REFUSED_STREAM)
            raise _remote_error("the server reset the stream", event.error_code)
        return event

    def _acknowledge(self, event: h2.events.DataReceived) -> None:
        if not self._is_closed:
            self._h2.acknowledge_received_data(event.flow_controlled_length or 0, self._stream_id)
            self._flush()

    def _receive(self, timeout: float | None) -> None:
        self._received(self._stream.receive(timeout))

    def _received(self, data: bytes) -> None:
        """Process received bytes, and respond to them as HTTP/2 demands."""
        if not data:
            raise httpx.RemoteProtocolError("disconnected without a complete response")
        for event in self._h2.receive_data(self._frames.without_goaway(data)):
            match event:
                case h2.events.ConnectionTerminated():
                    self._is_ending = self._is_closed = True
                    if not any(isinstance(each, h2.events.StreamEnded) for each in self._events):
                        raise _remote_error("the server sent GOAWAY", event.error_code)
                case h2.events.RemoteSettingsChanged():
                    self._knows_settings = True
                case (
                    h2.events.ResponseReceived()
                    | h2.events.DataReceived()
                    | h2.events.StreamEnded()
                    | h2.events.StreamReset()
                ):
                    if event.stream_id == self._stream_id:
                        self._events.append(event)
        if self._frames.last_stream_id is not None:
            self._is_ending = True
            self._raise_if_refused(self._stream_id > self._frames.last_stream_id and not self._events)
        self._flush()

    def _raise_if_refused(self, is_refused: bool) -> None:
        """Raise RequestRefusedError for a request that the server did not process."""
        if is_refused and not self._response_started:
            self._stream.limits.body_sent()
            raise RequestRefusedError("disconnected: the destination accepts no requests at present")

    def _flush(self, *, counts_as_progress: bool = False) -> None:
        """Send the frames that are due; frames of the server do not end this wait."""
        with nullcontext() if counts_as_progress else self._stream.limits.uncounted():
            self._stream.send(self._h2.data_to_send(), self._write_timeout)


def _remote_error(text: str, code: int | None) -> httpx.RemoteProtocolError:
    if code == h2.errors.ErrorCodes.HTTP_1_1_REQUIRED:
        # as Apache does if it asks for a client certificate once it knows the path
        return httpx.RemoteProtocolError(
            "the destination requires HTTP/1.1 for this request: set `http2 = false`"
        )
    return httpx.RemoteProtocolError(f"{text}, error {code}")


class _GoAwayFilter:
    """Removes GOAWAY frames without an error from the bytes of a server (RFC 9113 sections 4.1 and 6.8).

    h2 takes no further data after a GOAWAY, although the server goes on with the streams up to
    `last_stream_id`; None before the first GOAWAY.
    """

    def __init__(self) -> None:
        self._incomplete = b""
        self.last_stream_id: int | None = None

    def without_goaway(self, data: bytes) -> bytes:
        """Return the complete frames in the bytes received so far that were not returned yet."""
        data = self._incomplete + data
        kept, start = [], 0
        while len(data) - start >= _FRAME_HEAD_BYTES:
            length = int.from_bytes(data[start : start + 3])
            if length > _MAX_FRAME_BYTES:
                raise httpx.RemoteProtocolError("the server sent a frame of more than 16 KiB")
            end = start + _FRAME_HEAD_BYTES + length
            if end > len(data):
                break
            if not self._is_graceful_goaway(data[start:end]):
                kept.append(data[start:end])
            start = end
        self._incomplete = data[start:]
        return b"".join(kept)

    def _is_graceful_goaway(self, frame_bytes: bytes) -> bool:
        if frame_bytes[3] != GoAwayFrame.type:
            return False
        try:
            frame, _ = Frame.parse_frame_header(memoryview(frame_bytes[:_FRAME_HEAD_BYTES]))
            frame.parse_body(memoryview(frame_bytes[_FRAME_HEAD_BYTES:]))
        except HyperframeError:
            return False  # h2 reports it
        if not isinstance(frame, GoAwayFrame) or frame.error_code != h2.errors.ErrorCodes.NO_ERROR:
            return False
        self.last_stream_id = frame.last_stream_id
        return True


@contextmanager
def _httpx_errors() -> Iterator[None]:
    try:
        yield
    except h2.exceptions.H2Error as error:
        raise httpx.RemoteProtocolError(str(error) or type(error).__name__) from error
