"""HTTP/2 connections for httpcore that hear an answer while they send.

The stock connection waits for the window to open and leaves an answer that came meanwhile unread: an early
refusal, after which no server opens the window any more, would be heard only when the connection ends.
"""

from __future__ import annotations

import time

import httpcore


class _AnsweredError(Exception):
    """The destination answered before it had the whole request."""


class HearingPool(httpcore.ConnectionPool):
    """A pool whose direct connections are of this kind where HTTP/2 is agreed on."""

    def create_connection(self, origin: httpcore.Origin) -> httpcore.ConnectionInterface:
        """See `httpcore.ConnectionPool.create_connection`."""
        if self._proxy is not None or not self._http2:
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
        connection = stream.get_extra_info("ssl_object")
        if connection is not None and connection.selected_alpn_protocol() == "h2":
            return _Http2Connection(self._origin, stream, self._keepalive_expiry)
        return httpcore.HTTP11Connection(self._origin, stream, self._keepalive_expiry)


class _Http2Connection(httpcore.HTTP2Connection):
    def _send_request_body(self, request: httpcore.Request, stream_id: int) -> None:
        try:
            super()._send_request_body(request, stream_id)
        except _AnsweredError:
            self._used_all_stream_ids = True  # the request stays unfinished: close once its answer is read

    def _wait_for_outgoing_flow(self, request: httpcore.Request, stream_id: int) -> int:
        patience = request.extensions.get("timeout", {}).get("write")
        began = time.monotonic()
        while True:
            if self._network_stream.get_extra_info("is_readable"):
                self._receive_events(request)
            if self._events.get(stream_id):
                raise _AnsweredError
            window = self._h2_state.local_flow_control_window(stream_id)
            if flow := min(window, self._h2_state.max_outbound_frame_size):
                return flow
            if patience is not None and time.monotonic() - began >= patience:  # however much else is heard
                raise httpcore.WriteTimeout("the other side has stopped reading")
            self._receive_events(request)
