"""Judging an answer: a success with a receipt that matches, or a failure in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import httpx

from backupd.config.destination import ReceiptConfig
from backupd.core.failure import failure
from backupd.core.model import Deferred, Delivered, Digest, Outcome, Receipt, Rejected
from backupd.core.policy import Reason
from backupd.core.retry import parse_retry_after
from backupd.core.statuses import reason_of_status
from backupd.core.verify import Expectation, judge
from backupd.upload.secret import quotable

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


class Judge:
    """Judges the answers of one destination."""

    def __init__(self, config: ReceiptConfig) -> None:
        self._config = config
        self._expected = Expectation(config.digest != "none", config.encoding, config.prefix)

    def of_success(self, response: httpx.Response, sent: Digest, size: int) -> Outcome:
        """Return `Delivered` if the receipt in an answer is for what was sent, else why it is not."""
        return self._judged(response, _read(response), sent, size)

    def of_duplicate(self, response: httpx.Response, sent: Digest, size: int) -> Delivered | Rejected:
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
        outcome = judge(sent, size, receipt, self._expected)
        if isinstance(outcome, Delivered) or not isinstance(digest, str):
            return outcome
        hidden = replace(receipt, digest=quotable(digest, response.request, _LONGEST_DIGEST))
        return judge(sent, size, hidden, self._expected)  # no less of a failure, in words that can be told

    def _receipt(self, response: httpx.Response, body: bytes, digest: str | None) -> Receipt:
        size = _stated(self._config.size, response.headers, body) if self._config.size else None
        return Receipt(
            response.status_code,
            None if digest is None else digest[:_LONGEST_DIGEST],
            _as_count(size),
            _quoted(response, body, 4096),
        )


def refusal(response: httpx.Response) -> Deferred | Rejected:
    """Return what the policy makes of an answer that is no success, in the destination's own words."""
    try:
        return _refusal(response, _read(response))
    except httpx.TransportError:
        return _refusal(response, b"")


def _refusal(response: httpx.Response, body: bytes) -> Deferred | Rejected:
    status, explained = response.status_code, _explained(response, body)
    asked = response.headers.get("Retry-After")
    wait = parse_retry_after(asked, datetime.now(UTC)) if asked else None
    return failure(reason_of_refusal(status, explained), explained, status, wait)


def reason_of_refusal(status: int, said: str) -> Reason:
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
