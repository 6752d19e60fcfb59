"""Judging an answer: a success with a receipt that matches, or a failure in words."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import httpx

from backupd.config.models import ReceiptConfig
from backupd.core.backoff import parse_retry_after
from backupd.core.failure import failure
from backupd.core.model import Deferred, Delivered, Digest, Outcome, Receipt, Rejected
from backupd.core.policy import Reason, reason_of_status
from backupd.core.verify import ReceiptExpectation, verify_receipt
from backupd.upload.http.redact import quotable
from backupd.upload.http.stream import PIN_MISMATCH

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


def reason_from_error(error: httpx.TransportError | OSError) -> tuple[Reason, str]:
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


_MOST = 64 * 1024
"""Bytes of an answer that are read."""
_LONGEST_DIGEST = 1024
_LARGEST = 2**63
"""More bytes than any file has; what states more, or a negative size, is no less wrong for being cut."""

_NO_WORD_ABOUT_THE_ARCHIVE = {
    "The SSL certificate error": Reason.TLS_CLIENT,
    "No required SSL certificate was sent": Reason.TLS_CLIENT,
    "The plain HTTP request was sent to HTTPS port": Reason.PROTOCOL,
}
"""What nginx says with a 400 where it means its own 495, 496 and 497: no archive is to be charged for it."""


class ResponseEvaluator:
    """Judges the answers of one destination."""

    def __init__(self, config: ReceiptConfig) -> None:
        self._config = config
        self._expected = ReceiptExpectation(config.digest != "none", config.encoding, config.prefix)

    def evaluate_success(self, response: httpx.Response, sent: Digest, size: int) -> Outcome:
        """Return `Delivered` if the receipt in an answer is for what was sent, else why it is not."""
        return self._judged(response, _read(response), sent, size)

    def evaluate_duplicate(self, response: httpx.Response, sent: Digest, size: int) -> Delivered | Rejected:
        """Return `Delivered` if a 409 states the very content that was to be sent, else the rejection."""
        body = _read(response)
        if self._expected.required:
            outcome = self._judged(response, body, sent, size)
            if isinstance(outcome, Delivered):
                return outcome
        refused = _refusal(response, body)
        assert isinstance(refused, Rejected)  # noqa: S101 -- what the policy says of a 409
        return refused

    def _judged(self, response: httpx.Response, body: bytes, sent: Digest, size: int) -> Outcome:
        digest = _stated(self._config.digest, response.headers, body)
        receipt = self._receipt(response, body, digest if isinstance(digest, str) else None)
        outcome = verify_receipt(sent, size, receipt, self._expected)
        if isinstance(outcome, Delivered) or not isinstance(digest, str):
            return outcome
        hidden = replace(receipt, digest=quotable(digest, response.request, _LONGEST_DIGEST))
        return verify_receipt(
            sent, size, hidden, self._expected
        )  # no less of a failure, in words that can be told

    def _receipt(self, response: httpx.Response, body: bytes, digest: str | None) -> Receipt:
        size = _stated(self._config.size, response.headers, body) if self._config.size else None
        return Receipt(
            response.status_code,
            None if digest is None else digest[:_LONGEST_DIGEST],
            _as_count(size),
            _quoted(response, body, 4096),
        )


def failure_from_response(response: httpx.Response) -> Deferred | Rejected:
    """Return what the policy makes of an answer that is no success, in the destination's own words."""
    try:
        return _refusal(response, _read(response))
    except httpx.TransportError:
        return _refusal(response, b"")


def _refusal(response: httpx.Response, body: bytes) -> Deferred | Rejected:
    status, explained = response.status_code, _explained(response, body)
    asked = response.headers.get("Retry-After")
    wait = parse_retry_after(asked, datetime.now(UTC)) if asked else None
    return failure(reason_from_refusal(status, explained), explained, status, wait)


def reason_from_refusal(status: int, said: str) -> Reason:
    """Return why an answer that is no success is a failure, `said` being the beginning of its body."""
    if status == 400:
        for words, reason in _NO_WORD_ABOUT_THE_ARCHIVE.items():
            if words in said:
                return reason
    return reason_of_status(status)


def _stated(where: str, headers: Mapping[str, str], body: bytes) -> object:
    """Return the value at `body:/json/pointer` (RFC 6901) or `header:Name`; None if it is not there."""
    kind, _, place = where.partition(":")
    if kind == "header":
        return headers.get(place)
    if kind != "body":
        return None
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    for token in place.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isascii() and key.isdigit() and int(key[:9]) < len(value):
            value = value[int(key[:9])]
        else:
            return None
    return value


def _as_count(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return min(max(value, -1), _LARGEST)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value[:20])
    return None


def _read(response: httpx.Response) -> bytes:
    data = b""
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > _MOST:
            break
    return data[:_MOST]


def _explained(response: httpx.Response, body: bytes) -> str:
    """Return a status with the beginning of what the destination says about it."""
    said = _quoted(response, body, 300).strip()
    line = f"{response.status_code} {quotable(response.reason_phrase, response.request, 100)}".strip()
    if 300 <= response.status_code < 400:
        place = quotable(response.headers.get("Location", "nowhere"), response.request, 200)
        line += f" to {place.partition('?')[0]}"
    return f"{line}: {said}" if said else line


def _quoted(response: httpx.Response, body: bytes, most: int) -> str:
    """Return the beginning of a body, to be logged and kept: it may echo the secrets of the request."""
    said = body.decode("utf-8", "backslashreplace")
    return quotable(said, response.request, most, is_cut=len(body) == _MOST)
