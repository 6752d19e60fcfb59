"""From what httpx and the sockets raise to the reasons of the policy: made once, here."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import httpx

from backupd.core.policy import Reason
from backupd.upload.wire import PIN_MISMATCH

_NO_FAULT = (ssl.SSLWantReadError, ssl.SSLWantWriteError)

_BY_TYPE: tuple[tuple[type[httpx.TransportError], Reason], ...] = (
    (httpx.ConnectTimeout, Reason.CONNECT_TIMEOUT),
    (httpx.ReadTimeout, Reason.READ_TIMEOUT),
    (httpx.WriteTimeout, Reason.WRITE_TIMEOUT),
    (httpx.PoolTimeout, Reason.POOL_TIMEOUT),
    (httpx.ConnectError, Reason.CONNECT),
    (httpx.LocalProtocolError, Reason.PROTOCOL),
    (httpx.UnsupportedProtocol, Reason.PROTOCOL),
)


def reason_of(error: httpx.TransportError | OSError) -> tuple[Reason, str]:
    """Return the reason for a transport error, and words for it."""
    if str(error).startswith(PIN_MISMATCH):
        return Reason.TLS, str(error)
    if isinstance(error, httpx.ProxyError):
        return Reason.PROXY, str(error)
    if not isinstance(error, httpx.TimeoutException):
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, _NO_FAULT):
                return _of_tls(cause)
            if isinstance(cause, socket.gaierror):
                return Reason.DNS, cause.strerror or str(cause)
    words = str(error) or type(error).__name__
    for kind, reason in _BY_TYPE:
        if isinstance(error, kind):
            return reason, words
    if isinstance(error, httpx.RemoteProtocolError) and not _is_cut(error):
        return Reason.PROTOCOL, words
    return Reason.CONNECTION_LOST, words


def _is_cut(error: httpx.RemoteProtocolError) -> bool:
    """Tell whether the connection ended before, or in the middle of, the answer; httpcore and h11 say so."""
    return "disconnected" in str(error) or "peer closed connection" in str(error)


def _of_tls(error: ssl.SSLError) -> tuple[Reason, str]:
    """Tell an alert about our certificate from other trouble; under TLS 1.3 it comes after the handshake."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Reason.TLS, f"the destination's certificate: {error.verify_message}"
    name = (error.reason or "").upper()
    words = (error.reason or str(error)).replace("_", " ").lower()
    if "ALERT" in name and ("CERTIFICATE" in name or "UNKNOWN_CA" in name or "ACCESS_DENIED" in name):
        return Reason.TLS_CLIENT, words
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return Reason.CONNECTION_LOST, words
    return Reason.TLS, words


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
