"""The evaluation of responses and network errors: delivered with a matching receipt, or a failure."""

from __future__ import annotations

import codecs
import errno
import html
import json
import re
import socket
import ssl
import zlib
from collections.abc import Iterator
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
from backupd.upload.http.limits import AttemptEndedError
from backupd.upload.http.redact import quotable
from backupd.upload.http.stream import PIN_MISMATCH

CONTENT_ENCODING = "backupd.content_encoding"
"""Name of the response extension with the value of that header field, which the request does not ask for."""

_MAX_BODY_BYTES = 64 * 1024
"""Bytes of a response body that are read."""

_MAX_DIGEST_LENGTH = 1024
"""Characters of a stated digest that are kept."""

_MAX_QUOTED_LENGTH = 300
"""Characters of a body that an error quotes."""

_MAX_SIZE = 2**63
"""Upper bound of a stated size in bytes; no file has this size, so a larger one mismatches as well."""

_MAX_HTML_BYTES = 8 * 1024
"""Bytes of an HTML or XML body that are searched for its text."""

_CAUSES_OF_400 = [
    (re.compile(text, re.IGNORECASE), reason)
    for text, reason in (
        (r"The SSL certificate error", Reason.TLS_CLIENT),  # nginx's 495
        (r"No required SSL certificate was sent", Reason.TLS_CLIENT),  # nginx's 496
        (r"The plain HTTP request was sent to HTTPS port", Reason.PROTOCOL),  # nginx's 497
        (r"speaking plain HTTP to an SSL-enabled server port", Reason.PROTOCOL),  # Apache
        (r"HTTP request to an HTTPS server", Reason.PROTOCOL),  # Go
        (r"requires TLS", Reason.PROTOCOL),  # Tomcat
        (r"Header Or Cookie Too Large", Reason.HEAD_TOO_LARGE),  # nginx's 494
        (r"Header Fields Too Large", Reason.HEAD_TOO_LARGE),
        (r"Size of a request header field exceeds server limit", Reason.HEAD_TOO_LARGE),  # Apache
        (r"[\"']invalid_token\b", Reason.UNAUTHORIZED),  # RFC 6750 section 3.1
        (r"(?-i:\b(Expired|Invalid)Token\b)", Reason.UNAUTHORIZED),  # S3
        (r"(?-i:\bTokenRefreshRequired\b)", Reason.UNAUTHORIZED),
        (r"(?-i:\bRequestTimeout\b)", Reason.SERVER_ERROR),  # S3
    )
]
"""Texts in a 400 that does not concern the archive, although it is for faults of the request."""


class ResponseEvaluator:
    """Evaluates the responses of one destination."""

    def __init__(self, config: ReceiptConfig) -> None:
        self._config = config
        self._expected = ReceiptExpectation(
            config.digest != "none", config.encoding, config.prefix, bool(config.size)
        )

    def evaluate_success(self, response: httpx.Response, sent: Digest, size: int) -> Outcome:
        """Return `Delivered` if the receipt matches the sent digest and size, else a failure."""
        return self._evaluate_receipt(response, read_body(response), sent, size)

    def evaluate_duplicate(
        self, response: httpx.Response, sent: Digest, size: int, *, is_webdav: bool = False
    ) -> Outcome:
        """Return `Delivered` if the receipt in a 409 matches the archive, else the failure.

        To a WebDAV server (RFC 4918 section 9.7.1), a 409 without a receipt means that the folder is missing.
        """
        body = read_body(response)
        outcome = self._evaluate_receipt(response, body, sent, size) if self._expected.required else None
        if isinstance(outcome, Delivered):
            return outcome
        if is_webdav and (outcome is None or outcome.reason is Reason.UNVERIFIED):
            description = _describe(response, plain_text(response, body))
            return Deferred(Reason.NO_FOLDER, description, response.status_code)
        return _failure(response, body)

    def _evaluate_receipt(
        self, response: httpx.Response, body: bytes, sent: Digest, size: int
    ) -> Delivered | Deferred:
        digest = _stated(self._config.digest, response, body)
        receipt = self._receipt(response, body, digest if isinstance(digest, str) else None)
        outcome = verify_receipt(sent, size, receipt, self._expected)
        if not isinstance(outcome, Deferred):
            return outcome
        if digest is None and len(body) == _MAX_BODY_BYTES and self._config.digest.startswith("body:"):
            return replace(outcome, error="the response is longer than 64 KiB: it is not read as a receipt")
        if not isinstance(digest, str):
            return outcome
        redacted = replace(receipt, digest=quotable(digest, response.request, _MAX_DIGEST_LENGTH))
        without_secret = verify_receipt(sent, size, redacted, self._expected)
        if isinstance(without_secret, Deferred):
            return replace(outcome, error=without_secret.error)
        return replace(outcome, error="the receipt states several digests, and one is a secret")

    def _receipt(self, response: httpx.Response, body: bytes, digest: str | None) -> Receipt:
        size = _stated(self._config.size, response, body) if self._config.size else None
        return Receipt(
            response.status_code,
            None if digest is None else digest[:_MAX_DIGEST_LENGTH],
            _as_size(size),
            _body_text(response, body, 4096),
        )


def failure_from_response(response: httpx.Response) -> Deferred | Rejected:
    """Return the failure for a response that is not a success, with the beginning of its body.

    Its status counts whether or not its body arrives.
    """
    try:
        return _failure(response, read_body(response))
    except (AttemptEndedError, httpx.TransportError):
        return _failure(response, b"")


def reason_from_refusal(status: int, text: str) -> Reason:
    """Return the reason for a response that is not a success; `text` is the beginning of its body."""
    if status == 400:
        for cause, reason in _CAUSES_OF_400:
            if cause.search(text):
                return reason
    return reason_of_status(status)


def reason_from_error(error: httpx.TransportError | OSError) -> tuple[Reason, str]:
    """Return the reason for a transport error, and its description."""
    if str(error).startswith(PIN_MISMATCH):
        return Reason.TLS, str(error)
    if isinstance(error, httpx.ProxyError):
        return Reason.PROXY, str(error)
    if not isinstance(error, httpx.TimeoutException):
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, _TLS_NOT_READY):
                return _reason_from_tls_error(cause)
            if (reason := _reason_on_this_host(cause)) is not None:
                return reason, getattr(cause, "strerror", None) or str(cause)
    description = str(error) or type(error).__name__
    for kind, reason in _REASON_BY_TYPE:
        if isinstance(error, kind):
            return reason, description
    if isinstance(error, httpx.RemoteProtocolError) and not is_disconnect(error):
        return Reason.PROTOCOL, description
    return Reason.CONNECTION_LOST, description


def _reason_on_this_host(error: BaseException) -> Reason | None:
    if isinstance(error, socket.gaierror):
        return Reason.DNS
    return Reason.HOST_LIMIT if getattr(error, "errno", None) in _HOST_LIMITS else None


_HOST_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)

_TLS_NOT_READY = (ssl.SSLWantReadError, ssl.SSLWantWriteError)

_REASON_BY_TYPE: tuple[tuple[type[httpx.TransportError], Reason], ...] = (
    (httpx.ConnectTimeout, Reason.CONNECT_TIMEOUT),
    (httpx.ReadTimeout, Reason.READ_TIMEOUT),
    (httpx.WriteTimeout, Reason.WRITE_TIMEOUT),
    (httpx.ConnectError, Reason.CONNECT),
    (httpx.LocalProtocolError, Reason.PROTOCOL),
    (httpx.UnsupportedProtocol, Reason.PROTOCOL),
)


def is_disconnect(error: httpx.RemoteProtocolError) -> bool:
    """Return whether the connection ended before or within the response, as our code and h11 report it."""
    return "disconnected" in str(error) or "peer closed connection" in str(error)


def _reason_from_tls_error(error: ssl.SSLError) -> tuple[Reason, str]:
    """Distinguish alerts about the client certificate; in TLS 1.3 they arrive after the handshake."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Reason.TLS, f"the destination's certificate: {_in_words(error.verify_message)}"
    name = (error.reason or "").upper()
    # Python has no name for some alerts, and its text has the library and the line around that of OpenSSL
    bare = re.sub(r"^\[\w+\] | \(_ssl\.c:\d+\)$", "", str(error))
    text = (error.reason or bare).replace("_", " ").lower()
    # OpenSSL puts the version in front that brought the alert, not that of the connection
    description = _in_words(re.sub(r"^(sslv3|tlsv1|tlsv13) alert", "TLS alert", text))
    if "ALERT" in name and ("CERTIFICATE" in name or "UNKNOWN_CA" in name or "ACCESS_DENIED" in name):
        return Reason.TLS_CLIENT, description
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return Reason.CONNECTION_LOST, description
    return Reason.TLS, description


_TLS_WORDS = {
    "unable to get": "`ca` lacks the authority that issued it, or the destination sends no intermediate",
    "self-signed certificate": "`ca` holds another authority",
    "self signed certificate": "`ca` holds another authority",
    "signature failure": "`ca` holds another authority of that name",
    "invalid ca certificate": "a certificate in the chain is not marked as an authority: CA:TRUE is missing",
    "dh key too small": "its Diffie-Hellman parameters are shorter than OpenSSL accepts on this host",
    "subtree violation": "an authority of its chain may not issue certificates for this name",
    "path length constraint": "an authority of its chain may have none of so many others below it",
    "no application protocol": "it speaks none of the versions of HTTP that were offered: see `http2`",
    "unsupported protocol": "the destination supports only versions of TLS below `tls_min`",
    "key too weak": "its key is shorter than OpenSSL accepts on this host",
    "key too small": "its key is shorter than OpenSSL accepts on this host",
    "md too weak": "it is signed with an old digest such as SHA-1",
    "digest algorithm too weak": "it is signed with an old digest such as SHA-1",
    "legacy renegotiation": "the destination does not support secure renegotiation, RFC 5746",
    "certificate purpose": "it is not issued for servers",
    "wrong version number": "the destination does not speak TLS at this port",
    "internal error": "the destination failed in the handshake: see its log",
    "alert protocol version": "the destination supports only other versions of TLS: see `tls_min`",
    "alert unknown ca": "it does not trust the CA of `cert`, or that file lacks an intermediate certificate",
    "alert certificate expired": "it regards the client certificate as expired",
    "alert certificate revoked": "the client certificate was revoked",
    "alert unsupported certificate": "it is not issued for clients, or its kind is not supported",
    "alert bad certificate": "it could not verify the client certificate: see its log",
    "alert certificate unknown": "it could not verify the client certificate: see its log",
    "certificate required": "it requires a client certificate: set `cert` and `key`",
    "alert access denied": "it trusts the client certificate, and does not permit it",
    "unrecognized name": "it serves other host names: see `server_name`",
    "handshake failure": "the two sides have no cipher in common, or the destination requires a certificate",
}
"""The meaning of OpenSSL's texts that are not plain."""


def _in_words(text: str) -> str:
    meaning = next((words for part, words in _TLS_WORDS.items() if part in text.lower()), None)
    return f"{text} ({meaning})" if meaning else text


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _failure(response: httpx.Response, body: bytes) -> Deferred | Rejected:
    status, text = response.status_code, plain_text(response, body)
    retry_after = response.headers.get("Retry-After")
    wait = parse_retry_after(retry_after, datetime.now(UTC)) if retry_after else None
    reason = reason_from_refusal(status, text)
    if status == 413 and retry_after is not None:  # the condition is temporary (RFC 9110 section 15.5.14)
        reason = Reason.SERVER_ERROR
    return failure(reason, _describe(response, text), status, wait)


def _describe(response: httpx.Response, text: str) -> str:
    """Return status and reason phrase of a response, and the beginning of the text in its body."""
    text = text[:_MAX_QUOTED_LENGTH]
    line = f"{response.status_code} {quotable(response.reason_phrase, response.request, 100)}".strip()
    if 300 <= response.status_code < 400:
        location = quotable(response.headers.get("Location", "nowhere"), response.request, 200)
        line += f" to {location.partition('?')[0]}"
    return f"{line}: {text}" if text else line


def _body_text(response: httpx.Response, body: bytes, max_length: int) -> str:
    """Return the beginning of a body without the request's secrets, which the endpoint may echo."""
    text = body.decode(_charset(response) or "utf-8", "backslashreplace")
    return quotable(text, response.request, max_length)


def plain_text(response: httpx.Response, body: bytes) -> str:
    """Return the text of a body for people: of HTML and XML what is between the tags, in one line."""
    text = _body_text(response, body, _MAX_HTML_BYTES).strip("\ufeff \t\r\n")  # a byte order mark, and blanks
    if text.startswith("<"):
        text = re.sub(r"(?is)<!--.*?-->|<(script|style)\b.*?</\1\s*>|<[^>]*>", " ", text)
        text = quotable(" ".join(html.unescape(text).split()), response.request, _MAX_HTML_BYTES)
    return text


_CHARSETS = re.compile(
    r"(?i)utf[-_]?(8|16|32)([-_]?[lb]e)?|iso[-_]?8859[-_]\d{1,2}|latin[-_]?\d|(windows[-_]?|cp)\d{3,4}"
    r"|(us-)?ascii|shift[-_]jis|euc[-_](jp|kr)|gbk|gb2312|gb18030|big5|koi8-[ru]"
)


def _charset(response: httpx.Response) -> str | None:
    """Return the character set that the response states, if it is a usual one."""
    charset = response.charset_encoding or ""
    if not _CHARSETS.fullmatch(charset):
        return None
    try:
        return codecs.lookup(charset).name
    except LookupError:  # there is no ISO-8859-12
        return None


def read_body(response: httpx.Response, max_bytes: int = _MAX_BODY_BYTES) -> bytes:
    """Return up to `max_bytes` of a body, decompressed if the endpoint compressed it without being asked."""
    data = b""
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > max_bytes:
            break
    for wbits in _FORMATS.get(response.extensions.get(CONTENT_ENCODING, "").strip().lower(), ()):
        try:
            return zlib.decompressobj(wbits).decompress(data, max_bytes)
        except zlib.error:  # many servers send "deflate" without the zlib format around it
            continue
    return data[:max_bytes]


_GZIP, _ZLIB, _DEFLATE = zlib.MAX_WBITS | 16, zlib.MAX_WBITS, -zlib.MAX_WBITS
_FORMATS = {"gzip": (_GZIP,), "x-gzip": (_GZIP,), "deflate": (_ZLIB, _DEFLATE)}
"""The formats, in the numbers of zlib, in which a body with a Content-Encoding may be."""


def _stated(source: str, response: httpx.Response, body: bytes) -> object:
    """Return the value at `body:/json/pointer` (RFC 6901) or `header:Name`; None if there is none."""
    kind, _, place = source.partition(":")
    if kind == "header":
        return response.headers.get(place)
    if kind != "body":
        return None
    charset = _charset(response) or json.detect_encoding(body)
    try:
        value: Any = json.loads(body.decode(charset, "replace").removeprefix("\ufeff"))
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


def _as_size(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return min(max(value, -1), _MAX_SIZE)
    if isinstance(value, str):
        numbers = {number.strip() for number in value.split(",")}  # a header field may be given twice
        number = numbers.pop()
        if not numbers and number.isascii() and number.isdigit():
            return int(number[:20])
    return None
