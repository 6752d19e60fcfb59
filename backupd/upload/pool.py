"""httpcore's pool, with connections of our own where HTTP/2 is agreed on."""

from __future__ import annotations

import httpcore

from backupd.upload.wire import Wire


class HearingPool(httpcore.ConnectionPool):
    """A pool whose connections hear an answer while they send; through a proxy they speak no HTTP/2."""

    def create_connection(self, origin: httpcore.Origin) -> httpcore.ConnectionInterface:
        """See `httpcore.ConnectionPool.create_connection`."""
        if not self._http2:
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
        if isinstance(stream, Wire) and stream.is_http2:
            try:
                from backupd.upload.http2 import Http2Connection  # noqa: PLC0415 -- h2 is an extra
            except OSError as error:  # no descriptor left
                stream.close()
                raise httpcore.ConnectError(error.strerror or str(error)) from error
            return Http2Connection(self._origin, stream, self._keepalive_expiry)
        return httpcore.HTTP11Connection(self._origin, stream, self._keepalive_expiry)
