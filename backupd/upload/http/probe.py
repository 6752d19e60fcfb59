"""The probe of an HTTP destination for `backupd check`: OPTIONS and GET, without an archive."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from backupd.config.certificate_facts import CertificateFacts
from backupd.config.models import HttpDestinationConfig
from backupd.core.errors import BackupdError
from backupd.core.names import TextTemplate
from backupd.core.policy import Reason, reason_of_status, rule_of
from backupd.upload.base import Abort, ProbeResult
from backupd.upload.http.auth import OAuth2, SignInError
from backupd.upload.http.limits import AttemptEndedError, AttemptLimits
from backupd.upload.http.request import RequestBuilder
from backupd.upload.http.response import reason_from_error, reason_from_refusal
from backupd.upload.http.stream import PIN_MISMATCH, Stream, connect
from backupd.upload.http.tls import ReloadingTlsContext
from backupd.upload.http.transport import TLS
from backupd.upload.http.uploader import HEADERS, HttpEndpoint, timeouts

_UNCERTAIN = frozenset({401, 403, 431, *range(300, 400)})
"""Statuses that may be for OPTIONS alone, and that an upload gets as well if GET does."""

_PROXY_SIGN_IN = 407
"""Status of the proxy, whatever the method is."""

_UNCERTAIN_ERRORS = frozenset({Reason.CONNECTION_LOST, Reason.PROTOCOL, Reason.READ_TIMEOUT, Reason.DEADLINE})
"""Failures that may be for OPTIONS alone: nginx closes the connection for some methods (its status 444)."""

_MAX_READ_TIMEOUT = 30.0
"""Seconds to wait for the response to a request without a body; `timeout.read` is made for uploads."""

_FAILURES = (BackupdError, SignInError, AttemptEndedError, httpx.TransportError, httpx.InvalidURL)

_SEND_ADVICE = "`backupd check --send` tries a real upload: some endpoints permit no other request"

_ADVICE = {
    # many servers close the connection without an alert when they refuse a certificate
    Reason.CONNECTION_LOST: "check in the endpoint's log whether it trusts the CA that issued `cert`",
}


async def probe(name: str, config: HttpDestinationConfig, abort: Abort) -> ProbeResult:
    """Return whether a destination would accept an upload, by requests of OPTIONS and GET to its URL."""
    started_at = time.monotonic()
    endpoint = HttpEndpoint.open(config, abort)
    try:
        responses = await _responses(endpoint)
        result = _result(name, config, responses)
        if config.cert is not None:
            required = await _is_certificate_required(endpoint, responses.first)
            result = replace(result, certificate_required=required)
    except _FAILURES as error:
        result = _failed(name, error)
        if result.reason is Reason.TLS:
            result = await asyncio.to_thread(_with_untrusted_certificate, result, endpoint)
    return replace(result, took_s=round(time.monotonic() - started_at, 3))


@dataclass(frozen=True, slots=True)
class _ProbeResponse:
    """The parts of a response that a probe evaluates; `text` is the beginning of the body."""

    method: str
    status: int
    http_version: str
    date: str | None
    tls: str | None
    certificate: bytes | None
    text: str
    allow: tuple[str, ...] = ()
    """The methods that the URL supports."""

    def seems_to_allow(self, method: str) -> bool:
        """Return whether the response states that the URL supports a method.

        An error, such as 404 and 503, may come from another server, which knows nothing of the URL.
        """
        return method in self.allow and (200 <= self.status < 300 or self.status == 405)

    @property
    def reason(self) -> Reason | None:
        """Return why the destination would not accept an upload; None if the status shows nothing."""
        reason = reason_from_refusal(self.status, self.text)
        shows_nothing = self.status not in _UNCERTAIN | {_PROXY_SIGN_IN}
        return None if shows_nothing and reason is reason_of_status(self.status) else reason


@dataclass(frozen=True, slots=True)
class _Responses:
    """The first response, and that to GET if it was needed to confirm the one to OPTIONS."""

    first: _ProbeResponse
    confirmation: _ProbeResponse | None = None

    @property
    def reason(self) -> Reason | None:
        """Return why the destination would not accept an upload; None if that is not certain."""
        reason = self.first.reason
        if self.first.status not in _UNCERTAIN:
            return reason
        return reason if self.confirmation is not None and self.confirmation.reason is reason else None

    def is_allowed(self, method: str) -> bool:
        """Return whether the URL certainly accepts a method.

        Some servers state the methods of the whole server, also for a path that does not exist.
        """
        get = self.first if self.first.method == "GET" else self.confirmation
        return self.first.seems_to_allow(method) and get is not None and get.status != 404

    @property
    def description(self) -> str:
        """Return the statuses, and the methods that the URL accepts."""
        first, second = self.first, self.confirmation
        allowed = f", which allows {', '.join(first.allow)[:100]}" if first.allow else ""
        text = f"responded {first.status} to {first.method}{allowed}"
        if second is None or second.status == first.status:
            return text
        return f"{text}, and {second.status} to {second.method}"


async def _responses(endpoint: HttpEndpoint) -> _Responses:
    """Return the response to OPTIONS, and that to GET where the first may be for OPTIONS alone."""
    try:
        first = await _request(endpoint)
    except (AttemptEndedError, httpx.TransportError) as error:
        if _reason_of(error) not in _UNCERTAIN_ERRORS:
            raise
        with suppress(*_FAILURES):
            return _Responses(await _request(endpoint, "GET"))
        raise
    if first.status in _UNCERTAIN or first.seems_to_allow(endpoint.config.method):
        with suppress(*_FAILURES):
            return _Responses(first, await _request(endpoint, "GET"))
    return _Responses(first)


def _reason_of(error: AttemptEndedError | httpx.TransportError) -> Reason:
    return error.reason if isinstance(error, AttemptEndedError) else reason_from_error(error)[0]


async def _request(endpoint: HttpEndpoint, method: str = "OPTIONS") -> _ProbeResponse:
    """Send a request with the URL, headers and sign-in of an upload; raises as an upload does."""
    config = endpoint.config
    connect = config.timeout.connect.total_seconds()
    limits = AttemptLimits(endpoint.abort, deadline=2 * connect + _MAX_READ_TIMEOUT)
    limits.start()
    timeout = timeouts(config)
    timeout.read = min(config.timeout.read.total_seconds(), _MAX_READ_TIMEOUT)
    if isinstance(endpoint.auth, OAuth2):
        await asyncio.to_thread(endpoint.auth.prefetch)
    async with httpx.AsyncClient(
        transport=ThreadedTransport(endpoint.transport(limits)),
        auth=endpoint.auth,
        timeout=timeout,
        headers=HEADERS,
        trust_env=False,
        follow_redirects=False,
    ) as client:
        builder = RequestBuilder(config, limits)
        url, headers = builder.probe_request(_placeholder_values(config))
        extensions = builder.extensions(headers)
        response = await client.request(method, url, headers=headers, extensions=extensions)
    facts = response.extensions["connection_facts"]
    return _ProbeResponse(
        method,
        response.status_code,
        response.http_version,
        response.headers.get("Date"),
        facts.tls_version,
        facts.certificate,
        response.content[:1000].decode("utf-8", "replace"),
        tuple(each.strip().upper() for each in response.headers.get("Allow", "").split(",") if each.strip()),
    )


def _placeholder_values(config: HttpDestinationConfig) -> dict[str, str]:
    """Return a value for each placeholder in the URL and the headers."""
    texts = [config.url, *config.headers.values()]
    return dict.fromkeys((name for text in texts for name in TextTemplate.parse(text).names), "check")


@dataclass(frozen=True, slots=True)
class ConnectionFacts:
    """The TLS version of a connection and the server's certificate in DER; None without TLS."""

    tls_version: str | None = None
    certificate: bytes | None = None


class ThreadedTransport(httpx.AsyncBaseTransport):
    """Sends each request in a thread of the event loop's executor.

    The extension `connection_facts` of a response holds `ConnectionFacts`. Only the body of a 400 is read,
    and of that only the first chunk: its text can name the reason.
    """

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises the exceptions of the transport."""
        return await asyncio.to_thread(self._send, request)

    async def aclose(self) -> None:
        """Close the transport."""
        await asyncio.to_thread(self._transport.close)

    def _send(self, request: httpx.Request) -> httpx.Response:
        response = self._transport.handle_request(request)
        try:
            facts = _connection_facts(response)  # before the body: its last byte can end the connection
            assert isinstance(response.stream, httpx.SyncByteStream)  # noqa: S101 -- as HttpTransport returns
            content = next(iter(response.stream), b"") if response.status_code == 400 else b""
        finally:
            response.close()
        return httpx.Response(
            response.status_code,
            headers=[(k, v) for k, v in response.headers.raw if k.lower() not in _BODY_HEADERS],
            content=content,
            extensions={"http_version": response.extensions["http_version"], "connection_facts": facts},
        )


_BODY_HEADERS = (b"content-encoding", b"content-length", b"transfer-encoding")


def _connection_facts(response: httpx.Response) -> ConnectionFacts:
    tls = response.extensions[TLS]
    if tls is None:
        return ConnectionFacts()
    return ConnectionFacts(tls.version(), tls.getpeercert(binary_form=True))


def _result(name: str, config: HttpDestinationConfig, responses: _Responses) -> ProbeResult:
    now, first, reason = datetime.now(UTC), responses.first, responses.reason
    signs_in = config.auth.type != "none" or bool(config.header_files)
    is_refused = first.status in (401, 403)
    result = ProbeResult(
        name,
        reason,
        responses.description,
        first.tls,
        first.http_version,
        first.status,
        # a refusal of OPTIONS alone shows nothing about the sign-in
        signed_in=not is_refused if signs_in and (reason or not is_refused) else None,
        sign_in_scheme=config.auth.type if config.auth.type != "none" else "headers",
        clock_ahead_s=_clock_ahead(first.date, now),
        advice=f"{rule_of(reason).hint}; {_SEND_ADVICE}" if reason is Reason.FORBIDDEN else "",
        is_proven=reason is not None or responses.is_allowed(config.method),
    )
    return _with_certificate(result, first.certificate, now) if first.certificate else result


def _clock_ahead(date: str | None, now: datetime) -> float | None:
    """Return by how many seconds a Date header field is ahead; None if it is missing or invalid."""
    try:
        return round((parsedate_to_datetime(date) - now).total_seconds(), 1) if date else None
    except (ValueError, TypeError, OverflowError):
        return None


def _with_certificate(result: ProbeResult, der: bytes, now: datetime) -> ProbeResult:
    """Return a result with the facts of the server's certificate, as far as they can be read."""
    facts = CertificateFacts.of(der)
    return replace(
        result,
        server_names=facts.names,
        server_issuer=facts.issuer,
        server_days_left=(facts.validity.ends - now).days if facts.validity else None,
        server_validity=facts.validity,
    )


async def _is_certificate_required(endpoint: HttpEndpoint, response: _ProbeResponse) -> bool | None:
    """Return whether the destination refuses a request without the client certificate; None if unknown.

    `response` is that to the request with it.
    """
    bare = endpoint.config.model_copy(update={"cert": None, "key": None, "key_password_file": None})
    try:
        endpoint = replace(endpoint, config=bare, tls_context=ReloadingTlsContext(bare))
        without = await _request(endpoint, response.method)
    except httpx.TransportError as error:
        reason, _ = reason_from_error(error)
        return True if reason in (Reason.TLS, Reason.TLS_CLIENT, Reason.CONNECTION_LOST) else None
    except (BackupdError, SignInError, AttemptEndedError):
        return None
    if without.reason is Reason.TLS_CLIENT:
        return True
    return without.status in (400, 401, 403, 495, 496) and without.status != response.status


def _failed(name: str, error: Exception) -> ProbeResult:
    match error:
        case BackupdError():
            return ProbeResult(name, Reason.LOCAL_FILES, error.message, advice=error.hint)
        case SignInError():
            return ProbeResult(name, Reason.SIGN_IN, str(error), signed_in=False)
        case AttemptEndedError():
            return ProbeResult(name, error.reason, error.error)
        case httpx.TransportError():
            reason, description = reason_from_error(error)
            return ProbeResult(name, reason, description, advice=_ADVICE.get(reason, ""))
        case _:
            return ProbeResult(name, Reason.PROTOCOL, str(error))


def _with_untrusted_certificate(result: ProbeResult, endpoint: HttpEndpoint) -> ProbeResult:
    """Return a result with advice, and with the certificate that the TLS handshake did not accept.

    Another handshake fetches it, and nothing is sent over that connection.
    """
    config = endpoint.config
    result = replace(result, advice=_tls_advice(result.detail, config))
    if config.proxy:
        return result
    try:
        with _unverified_connection(endpoint) as stream:
            der = stream.tls.getpeercert(binary_form=True) if stream.tls else None
    except (httpx.TransportError, AttemptEndedError):
        return result
    return _with_certificate(result, der, datetime.now(UTC)) if der else result


@contextmanager
def _unverified_connection(endpoint: HttpEndpoint) -> Iterator[Stream]:
    """Yield a TLS connection without verification of the server certificate."""
    config, timeout = endpoint.config, endpoint.config.timeout.connect.total_seconds()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("DEFAULT")
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    limits = AttemptLimits(endpoint.abort, deadline=2 * timeout)
    limits.start()
    url = httpx.URL(TextTemplate.parse(config.url).render(_placeholder_values(config)))
    options = replace(endpoint.connect_options, pins=frozenset())
    with closing(connect(url.host, url.port or 443, timeout, limits, options)) as stream:
        stream.start_tls(context, url.host, timeout, options)
        yield stream


def _tls_advice(detail: str, config: HttpDestinationConfig) -> str:
    """Return how to fix a failed TLS handshake."""
    if detail.startswith(PIN_MISMATCH):
        return "if the operator of the endpoint confirms that this is its key, add it to `pin_sha256`"
    if "protocol version" in detail or "unsupported protocol" in detail:
        if config.tls_min == "1.2":
            return "update the endpoint to TLS 1.2 or later: backupd uses no older version"
        return f"the endpoint does not support TLS {config.tls_min}; update it, or remove `tls_min`"
    if "no application protocol" in detail and not config.http2:
        return "set `http2 = true`: the endpoint may speak no HTTP/1.1"
    if "issuer" in detail or "self-signed" in detail or "self signed" in detail:
        store = str(config.ca) if config.ca else "the system's store"
        return f"set `ca` to the authority that issued the endpoint's certificate; {store} is another one"
    return next((advice for part, advice in _TLS_ADVICE.items() if part in detail), _UNKNOWN_TLS_ADVICE)


_WEAK_CERTIFICATE = "have the endpoint use a certificate with RSA of 2048 bits or EC, signed with SHA-256"
_OTHER_NAMES = "the certificate has other names; use one of them in `url`, or set `server_name`"
_OUT_OF_DATE = "the endpoint's certificate is out of date, or this host's clock is wrong"

_TLS_ADVICE = {
    "mismatch": _OTHER_NAMES,
    "not valid for": _OTHER_NAMES,
    "unrecognized name": "use a host name that the endpoint serves in `url`, or set `server_name`",
    "dh key too small": "have the endpoint use DH parameters of 2048 bits or more, or ECDHE",
    "too weak": _WEAK_CERTIFICATE,
    "too small": _WEAK_CERTIFICATE,
    "legacy renegotiation": "update the endpoint, or the TLS proxy before it: it lacks RFC 5746",
    "purpose": "have the endpoint use a certificate with the extended key usage serverAuth",
    "wrong version number": "check the port in `url`: no TLS server listens there",
    "no application protocol": "check the port in `url`: that server speaks neither HTTP/1.1 nor HTTP/2",
    "expired": _OUT_OF_DATE,
    "not yet valid": _OUT_OF_DATE,
    "subtree violation": "have the certificate issued by an authority with name constraints that permit it",
    "path length": "have the certificate issued by an authority that may have others below it",
    "handshake failure": "set `cert` and `key`, or have it offer a cipher of `openssl ciphers DEFAULT`",
}
"""The advice for a part of the text of OpenSSL."""

_UNKNOWN_TLS_ADVICE = "give this error to the operator of the endpoint; the endpoint's log may have the cause"
