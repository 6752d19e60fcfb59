"""HTTP/2 connections for httpcore that hear an answer while they send, and take a GOAWAY as it is meant.

The stock connection waits for the window to open and leaves an answer that came meanwhile unread. It gives up
the request under way where the other side only wants no further ones, sends before it knows the other side's
settings, and uses a connection again that has ended.
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

_AT_REST = httpcore.Request("GET", "https://none/", extensions={"timeout": {"read": 0, "write": 0}})
"""Stands for no request: nothing is waited for."""

_MOST_AT_REST = 8
"""Reads that an idle connection may be good for; who talks on is not kept."""

_MOSTLY_BODY = 1024
"""Bytes of the body in a frame from which on what TLS and HTTP/2 add to it may count as progress."""

_A_STATUS = re.compile(rb"[1-9][0-9][0-9]")


class _AnsweredError(Exception):
    """The destination answered before it had the whole request."""


class _State(h2.connection.H2Connection):
    """Goes on with what is under way after a GOAWAY that is no error (RFC 9113 section 6.8).

    `last_stream` is the last one that the other side answers, None while it takes further ones.
    """

    last_stream: int | None = None

    def _receive_goaway_frame(self, frame: Any) -> Any:
        if frame.error_code != h2.errors.ErrorCodes.NO_ERROR:
            return super()._receive_goaway_frame(frame)
        self.last_stream = frame.last_stream_id
        return [], []


class Http2Connection(httpcore.HTTP2Connection):
    """A connection on a wire, for one request at a time."""

    def __init__(self, origin: httpcore.Origin, wire: Stream, keepalive_expiry: float | None) -> None:
        super().__init__(origin, wire, keepalive_expiry)
        self._wire = wire
        self._h2_state: _State = _State(config=self.CONFIG)
        self._knows_settings = False
        self._is_progress = False
        self._is_answered = False
        self._is_whole = False

    def has_expired(self) -> bool:
        """Tell whether the connection is of no more use; what came while it was idle is taken in."""
        return super().has_expired() or (self.is_idle() and not self._is_usable())

    def _is_usable(self) -> bool:
        for _ in range(_MOST_AT_REST):
            if not self._wire.get_extra_info("is_readable"):
                return self.is_available()
            try:
                self._receive_events(_AT_REST)
            except (
                httpcore.NetworkError,
                httpcore.ProtocolError,
                httpcore.TimeoutException,
                AttemptEndedError,
            ):
                return False
        return False

    def _send_request_headers(self, request: httpcore.Request, stream_id: int) -> None:
        self._wire.begin_request()
        self._is_answered = self._is_whole = False
        while not self._knows_settings:  # some refuse a body that was sent before they were heard
            self._receive_events(request)
        super()._send_request_headers(request, stream_id)

    def _receive_remote_settings_change(self, event: h2.events.RemoteSettingsChanged) -> None:
        self._knows_settings = True
        super()._receive_remote_settings_change(event)

    def _send_request_body(self, request: httpcore.Request, stream_id: int) -> None:
        try:
            super()._send_request_body(request, stream_id)
        except BaseException as error:
            self._used_all_stream_ids = True  # the request stays unfinished: close once its answer is read
            if not isinstance(error, _AnsweredError):
                raise
            self._wire.line.body_sent()

    def _send_stream_data(self, request: httpcore.Request, stream_id: int, data: bytes) -> None:
        while data:
            size = min(self._wait_for_outgoing_flow(request, stream_id), len(data))
            self._h2_state.send_data(stream_id, data[:size])
            self._is_progress = size >= _MOSTLY_BODY
            try:
                self._write_outgoing_data(request)
            finally:
                counted, self._is_progress = self._is_progress, False
            if not counted:
                self._wire.line.count_bytes(size)
            data = data[size:]

    def _wait_for_outgoing_flow(self, request: httpcore.Request, stream_id: int) -> int:
        patience = request.extensions.get("timeout", {}).get("write")
        until = None if patience is None else time.monotonic() + patience
        while True:
            if self._wire.get_extra_info("is_readable"):
                self._receive_events(request)
            if self._events.get(stream_id):
                raise _AnsweredError
            window = self._h2_state.local_flow_control_window(stream_id)
            flow = min(window, self._h2_state.max_outbound_frame_size)
            if flow > 0:  # new settings can make it less than nothing
                return flow
            left = None if until is None else until - time.monotonic()
            try:
                if left is not None and left <= 0:  # however much else is heard
                    raise httpcore.ReadTimeout
                self._receive_events(_within(left, request))
            except httpcore.ReadTimeout as error:
                raise httpcore.WriteTimeout("the other side has stopped reading") from error

    def _write_outgoing_data(self, request: httpcore.Request) -> None:
        with nullcontext() if self._is_progress else self._wire.line.without_timeouts():
            super()._write_outgoing_data(request)

    def _read_incoming_data(self, request: httpcore.Request) -> list[h2.events.Event]:
        with _as_protocol_error():
            events = super()._read_incoming_data(request)
        last = self._h2_state.last_stream
        if last is not None:
            self._used_all_stream_ids = True
            answered = {event.stream_id for event in events if isinstance(event, h2.events.ResponseReceived)}
            late = {stream for stream, heard in self._events.items() if stream > last and not heard}
            if late - answered and not self._is_answered:
                self._refuse()
        return events

    def _refuse(self) -> None:
        """Have a request that came too late sent once more, on a connection of its own."""
        self._wire.line.body_sent()
        if self._request_count > 1:
            raise httpcore.ConnectionNotAvailable
        raise httpcore.RemoteProtocolError("disconnected: the destination takes no requests now")

    def _response_closed(self, stream_id: int) -> None:
        left = self._events[stream_id]
        unread = sum(e.flow_controlled_length or 0 for e in left if isinstance(e, h2.events.DataReceived))
        self._is_whole |= any(isinstance(event, h2.events.StreamEnded) for event in left)
        if self._is_whole and unread:
            with suppress(h2.exceptions.H2Error):  # or the connection's window would lack it for good
                self._h2_state.acknowledge_received_data(unread, stream_id)
        self._used_all_stream_ids |= not self._is_whole  # what is left of the answer is not the next one's
        super()._response_closed(stream_id)

    def _receive_stream_event(
        self, request: httpcore.Request, stream_id: int
    ) -> h2.events.ResponseReceived | h2.events.DataReceived | h2.events.StreamEnded:
        try:
            event = super()._receive_stream_event(request, stream_id)
        except httpcore.RemoteProtocolError as error:
            if not self._is_answered and _is_refusal(error):
                self._used_all_stream_ids = True
                self._refuse()
            raise
        self._is_whole = isinstance(event, h2.events.StreamEnded)
        if isinstance(event, h2.events.ResponseReceived):
            self._is_answered = True
            statuses = [value for name, value in event.headers or () if name == b":status"]
            if len(statuses) != 1 or not _A_STATUS.fullmatch(statuses[0]):
                raise httpcore.RemoteProtocolError("the answer's status is none")
        return event

    def _receive_response_body(self, request: httpcore.Request, stream_id: int) -> Iterator[bytes]:
        with _as_protocol_error():
            yield from super()._receive_response_body(request, stream_id)


@contextmanager
def _as_protocol_error() -> Iterator[None]:
    try:
        yield
    except h2.exceptions.H2Error as error:
        raise httpcore.RemoteProtocolError(str(error) or type(error).__name__) from error
    except httpcore.ConnectionNotAvailable as error:  # for a request that is answered already
        raise httpcore.RemoteProtocolError("disconnected in the middle of the answer") from error


def _is_refusal(error: httpcore.RemoteProtocolError) -> bool:
    """Tell whether a request was refused before anything was done about it (RFC 9113 section 8.7)."""
    reset = error.args[0] if error.args else None
    return (
        isinstance(reset, h2.events.StreamReset) and reset.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
    )


def _within(seconds: float | None, request: httpcore.Request) -> httpcore.Request:
    """Return a request for which no read waits longer."""
    timeout = {**request.extensions.get("timeout", {}), "read": seconds}
    return httpcore.Request(
        request.method, request.url, extensions={**request.extensions, "timeout": timeout}
    )
