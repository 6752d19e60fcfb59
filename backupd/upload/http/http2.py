"""HTTP/2 connections for httpcore that notice a response while they send, and honour GOAWAY.

httpcore's own connection leaves a response unread while it waits for the flow-control window. It also gives
up the running request after a GOAWAY that only refuses further ones, sends before it knows the server's
SETTINGS, and reuses a connection that has ended.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import httpcore

from backupd.upload.http.limits import AttemptEndedError
from backupd.upload.http.stream import Stream

_NO_WAIT = httpcore.Request("GET", "https://none/", extensions={"timeout": {"read": 0, "write": 0}})
"""A request with time-outs of zero, to receive the frames in the socket's buffer without a wait."""

_MAX_IDLE_READS = 8
"""Reads from an idle connection before it is closed: a server that goes on sending is not kept."""

_MIN_COUNTED_BODY = 1024
"""Bytes of the body in a frame from which on the overhead of HTTP/2 and TLS counts as progress as well."""

_STATUS = re.compile(rb"[1-9][0-9][0-9]")


class Http2Connection(httpcore.HTTP2Connection):
    """A connection on a `Stream`, for one request at a time."""

    def __init__(self, origin: httpcore.Origin, stream: Stream, keepalive_expiry: float | None) -> None:
        super().__init__(origin, stream, keepalive_expiry)
        self._stream = stream
        self._h2_state: _GracefulConnection = _GracefulConnection(config=self.CONFIG)
        self._knows_settings = False
        self._counts_as_progress = False
        self._response_started = False
        self._response_complete = False

    def has_expired(self) -> bool:
        """Return whether the connection can't be used again; receives the frames that arrived while idle."""
        return super().has_expired() or (self.is_idle() and not self._is_usable())

    def _is_usable(self) -> bool:
        for _ in range(_MAX_IDLE_READS):
            if not self._stream.get_extra_info("is_readable"):
                return self.is_available()
            try:
                self._receive_events(_NO_WAIT)
            except (
                httpcore.NetworkError,
                httpcore.ProtocolError,
                httpcore.TimeoutException,
                AttemptEndedError,
            ):
                return False
        return False

    def _send_request_headers(self, request: httpcore.Request, stream_id: int) -> None:
        self._stream.begin_request()
        self._response_started = self._response_complete = False
        while not self._knows_settings:  # some servers refuse a body that was sent before their SETTINGS
            self._receive_events(request)
        super()._send_request_headers(request, stream_id)

    def _receive_remote_settings_change(self, event: h2.events.RemoteSettingsChanged) -> None:
        self._knows_settings = True
        super()._receive_remote_settings_change(event)

    def _send_request_body(self, request: httpcore.Request, stream_id: int) -> None:
        try:
            super()._send_request_body(request, stream_id)
        except BaseException as error:
            self._used_all_stream_ids = True  # the request is incomplete: close after its response
            if not isinstance(error, _EarlyResponseError):
                raise
            self._stream.limits.body_sent()

    def _send_stream_data(self, request: httpcore.Request, stream_id: int, data: bytes) -> None:
        while data:
            size = min(self._wait_for_outgoing_flow(request, stream_id), len(data))
            self._h2_state.send_data(stream_id, data[:size])
            self._counts_as_progress = size >= _MIN_COUNTED_BODY
            try:
                self._write_outgoing_data(request)
            finally:
                counted, self._counts_as_progress = self._counts_as_progress, False
            if not counted:
                self._stream.limits.count_bytes(size)
            data = data[size:]

    def _wait_for_outgoing_flow(self, request: httpcore.Request, stream_id: int) -> int:
        """Return how many bytes the flow-control windows permit; raise _EarlyResponseError on a response."""
        timeout = request.extensions.get("timeout", {}).get("write")
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._stream.get_extra_info("is_readable"):
                self._receive_events(request)
            if self._events.get(stream_id):
                raise _EarlyResponseError
            window = self._h2_state.local_flow_control_window(stream_id)
            flow = min(window, self._h2_state.max_outbound_frame_size)
            if flow > 0:  # new SETTINGS can make the window negative
                return flow
            left = None if until is None else until - time.monotonic()
            try:
                if left is not None and left <= 0:  # even while other frames arrive
                    raise httpcore.ReadTimeout
                self._receive_events(_with_read_timeout(left, request))
            except httpcore.ReadTimeout as error:
                raise httpcore.WriteTimeout("the destination has stopped reading") from error

    def _write_outgoing_data(self, request: httpcore.Request) -> None:
        with nullcontext() if self._counts_as_progress else self._stream.limits.uncounted():
            super()._write_outgoing_data(request)

    def _read_incoming_data(self, request: httpcore.Request) -> list[h2.events.Event]:
        with _as_protocol_error():
            events = super()._read_incoming_data(request)
        last = self._h2_state.last_stream_id
        if last is not None:
            self._used_all_stream_ids = True
            responded = {event.stream_id for event in events if isinstance(event, h2.events.ResponseReceived)}
            refused = {stream for stream, received in self._events.items() if stream > last and not received}
            if refused - responded and not self._response_started:
                self._raise_refused()
        return events

    def _raise_refused(self) -> None:
        """Raise the error for a request that the server did not process, so that it is sent again.

        The pool repeats it on a new connection, unless it was the first one on this connection.
        """
        self._stream.limits.body_sent()
        if self._request_count > 1:
            raise httpcore.ConnectionNotAvailable
        raise httpcore.RemoteProtocolError("disconnected: the destination accepts no requests at present")

    def _response_closed(self, stream_id: int) -> None:
        left = self._events[stream_id]
        unread = sum(e.flow_controlled_length or 0 for e in left if isinstance(e, h2.events.DataReceived))
        self._response_complete |= any(isinstance(event, h2.events.StreamEnded) for event in left)
        if self._response_complete and unread:
            with suppress(h2.exceptions.H2Error):  # otherwise the connection's window would stay smaller
                self._h2_state.acknowledge_received_data(unread, stream_id)
        # the rest of an incomplete response must not reach the next request
        self._used_all_stream_ids |= not self._response_complete
        super()._response_closed(stream_id)

    def _receive_stream_event(
        self, request: httpcore.Request, stream_id: int
    ) -> h2.events.ResponseReceived | h2.events.DataReceived | h2.events.StreamEnded:
        try:
            event = super()._receive_stream_event(request, stream_id)
        except httpcore.RemoteProtocolError as error:
            if not self._response_started and _is_refused_stream(error):
                self._used_all_stream_ids = True
                self._raise_refused()
            raise
        self._response_complete = isinstance(event, h2.events.StreamEnded)
        if isinstance(event, h2.events.ResponseReceived):
            self._response_started = True
            statuses = [value for name, value in event.headers or () if name == b":status"]
            if len(statuses) != 1 or not _STATUS.fullmatch(statuses[0]):
                raise httpcore.RemoteProtocolError("invalid HTTP status in the response")
        return event

    def _receive_response_body(self, request: httpcore.Request, stream_id: int) -> Iterator[bytes]:
        with _as_protocol_error():
            yield from super()._receive_response_body(request, stream_id)


class _EarlyResponseError(Exception):
    """The destination responded before it had the whole request."""


class _GracefulConnection(h2.connection.H2Connection):
    """Continues the running request after a GOAWAY without an error (RFC 9113 section 6.8).

    `last_stream_id` is the last stream that the server processes; None without a GOAWAY.
    """

    last_stream_id: int | None = None

    def _receive_goaway_frame(self, frame: Any) -> Any:
        if frame.error_code != h2.errors.ErrorCodes.NO_ERROR:
            return super()._receive_goaway_frame(frame)
        self.last_stream_id = frame.last_stream_id
        return [], []


@contextmanager
def _as_protocol_error() -> Iterator[None]:
    try:
        yield
    except h2.exceptions.H2Error as error:
        raise httpcore.RemoteProtocolError(str(error) or type(error).__name__) from error
    except (
        httpcore.ConnectionNotAvailable
    ) as error:  # raised during a response, after which no request can be repeated
        raise httpcore.RemoteProtocolError("disconnected within the response") from error


def _is_refused_stream(error: httpcore.RemoteProtocolError) -> bool:
    """Return whether the server refused a request without processing it (RFC 9113 section 8.7)."""
    reset = error.args[0] if error.args else None
    return (
        isinstance(reset, h2.events.StreamReset) and reset.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
    )


def _with_read_timeout(seconds: float | None, request: httpcore.Request) -> httpcore.Request:
    """Return a copy of a request with another read time-out."""
    timeout = {**request.extensions.get("timeout", {}), "read": seconds}
    return httpcore.Request(
        request.method, request.url, extensions={**request.extensions, "timeout": timeout}
    )
