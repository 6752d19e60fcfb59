"""Asking all destinations at once whether they would take an archive, without sending one."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpcore
import httpx
from cryptography import x509

from backupd.config.models import HttpDestinationConfig
from backupd.core.errors import BackupdError
from backupd.core.names import TextTemplate
from backupd.core.policy import Reason, reason_of_status
from backupd.upload.base import Abort, ProbeResult
from backupd.upload.http.auth import OAuth2, SignInError
from backupd.upload.http.limits import AttemptEndedError, AttemptLimits
from backupd.upload.http.request import RequestBuilder
from backupd.upload.http.response import reason_from_error, reason_from_refusal
from backupd.upload.http.stream import PIN_MISMATCH
from backupd.upload.http.tls import ReloadingTlsContext
from backupd.upload.http.transport import StreamBackend
from backupd.upload.http.uploader import HEADERS, HttpEndpoint, timeouts

_ABOUT_THE_BODY = (b"content-encoding", b"content-length", b"transfer-encoding")


@dataclass(frozen=True, slots=True)
class ConnectionFacts:
    """What was seen of the other side's TLS: its version, and its certificate in DER."""

    version: str | None = None
    certificate: bytes | None = None


class ThreadedTransport(httpx.AsyncBaseTransport):
    """Asks in a thread of the loop's executor; the answer's `seen` extension is a `Seen`.

    Of an answer's body only the first piece is taken, and only of a 400, whose words matter.
    """

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises what the transport raises."""
        return await asyncio.to_thread(self._exchange, request)

    async def aclose(self) -> None:
        """Close the transport."""
        await asyncio.to_thread(self._transport.close)

    def _exchange(self, request: httpx.Request) -> httpx.Response:
        response = self._transport.handle_request(request)
        try:
            seen = _seen(response)  # first: with the body's last byte the connection may be gone
            assert isinstance(response.stream, httpx.SyncByteStream)  # noqa: S101 -- what our transport gives
            said = next(iter(response.stream), b"") if response.status_code == 400 else b""
        finally:
            response.close()
        return httpx.Response(
            response.status_code,
            headers=[(k, v) for k, v in response.headers.raw if k.lower() not in _ABOUT_THE_BODY],
            content=said,
            extensions={"http_version": response.extensions["http_version"], "seen": seen},
        )


def _seen(response: httpx.Response) -> ConnectionFacts:
    connection = response.extensions["network_stream"].get_extra_info("ssl_object")
    if not isinstance(connection, ssl.SSLObject):
        return ConnectionFacts()
    return ConnectionFacts(connection.version(), connection.getpeercert(binary_form=True))


_TAKEN = frozenset({200, 201, 202, 204, 400, 405, 411, 415, 422, 501})
"""What endpoints that take uploads answer to OPTIONS, or to a GET of their url."""
_LONGEST_READ = 30.0
"""Seconds to wait for an answer to a request without a body; uploads may be given far longer."""


async def probe(name: str, config: HttpDestinationConfig, abort: Abort) -> ProbeResult:
    """Find out whether a destination would take an archive, by an OPTIONS request in an upload's manner."""
    began = time.monotonic()
    endpoint = HttpEndpoint.open(config, abort)
    try:
        answer = await _ask(endpoint)
        result = _described(name, config, answer)
        if config.cert is not None:
            required = await _is_certificate_required(endpoint, answer)
            result = replace(result, certificate_required=required)
    except _FAILURES as error:
        result = _failed(name, error)
        if result.reason is Reason.TLS:
            result = await asyncio.to_thread(_with_certificate_seen, result, endpoint)
    return replace(result, took_s=round(time.monotonic() - began, 3))


_FAILURES = (BackupdError, SignInError, AttemptEndedError, httpx.TransportError, httpx.InvalidURL)


def _failed(name: str, error: Exception) -> ProbeResult:
    match error:
        case BackupdError():
            return ProbeResult(name, Reason.LOCAL_FILES, error.message, advice=_LOCAL_FILES)
        case SignInError():
            return ProbeResult(name, Reason.SIGN_IN, str(error), signed_in=False)
        case AttemptEndedError():
            return ProbeResult(name, error.reason, error.error)
        case httpx.TransportError():
            reason, words = reason_from_error(error)
            return ProbeResult(name, reason, words, advice=_ADVICE.get(reason, ""))
        case _:
            return ProbeResult(name, Reason.PROTOCOL, str(error))


_LOCAL_FILES = (
    "mend the files it names: a certificate, key or CA has to be PEM, a secret one line, "
    "each readable for the daemon's user"
)
_ADVICE = {
    # many servers give no reason when they refuse a certificate
    Reason.CONNECTION_LOST: "the endpoint hung up: does it trust the CA of `cert`? its log may say",
}


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    http_version: str
    date: str | None
    tls: str | None
    certificate: bytes | None
    said: str

    @property
    def reason(self) -> Reason | None:
        """Return what speaks against an upload."""
        reason = reason_from_refusal(self.status, self.said)
        if self.status in _TAKEN and reason is reason_of_status(self.status):
            return None
        return reason


async def _ask(endpoint: HttpEndpoint) -> _Answer:
    """Ask for the options of the url as an upload would go there, without its body.

    Raises what an upload would.
    """
    config = endpoint.config
    connect = config.timeout.connect.total_seconds()
    line = AttemptLimits(endpoint.abort, deadline=2 * connect + _LONGEST_READ)
    line.start()
    timeout = timeouts(config)
    timeout.read = min(config.timeout.read.total_seconds(), _LONGEST_READ)
    if isinstance(endpoint.auth, OAuth2):
        await asyncio.to_thread(endpoint.auth.prefetch)
    async with httpx.AsyncClient(
        transport=ThreadedTransport(endpoint.transport(line)),
        auth=endpoint.auth,
        timeout=timeout,
        headers=HEADERS,
        trust_env=False,
        follow_redirects=False,
    ) as client:
        url, headers = RequestBuilder(config, line).probe_request(_values(config))
        return _answer(await client.options(url, headers=headers))


def _values(config: HttpDestinationConfig) -> dict[str, str]:
    """Return a value for every placeholder there is."""
    texts = [config.url, *config.headers.values()]
    return dict.fromkeys((name for text in texts for name in TextTemplate.parse(text).names), "check")


def _answer(response: httpx.Response) -> _Answer:
    seen = response.extensions["seen"]
    return _Answer(
        response.status_code,
        response.http_version,
        response.headers.get("Date"),
        seen.version,
        seen.certificate,
        response.content[:1000].decode("utf-8", "replace"),
    )


def _described(name: str, config: HttpDestinationConfig, answer: _Answer) -> ProbeResult:
    now = datetime.now(UTC)
    signs_in = config.auth.type != "none" or bool(config.header_files)
    probe = ProbeResult(
        name,
        answer.reason,
        f"answered {answer.status} to OPTIONS",
        answer.tls,
        answer.http_version,
        answer.status,
        signed_in=answer.status not in (401, 403) if signs_in else None,
        sign_in_scheme=config.auth.type if config.auth.type != "none" else "headers",
        clock_ahead_s=_clock_ahead(answer.date, now),
    )
    return _with_certificate(probe, answer.certificate, now) if answer.certificate else probe


def _clock_ahead(date: str | None, now: datetime) -> float | None:
    try:
        return round((parsedate_to_datetime(date) - now).total_seconds(), 1) if date else None
    except (ValueError, TypeError, OverflowError):
        return None


def _with_certificate(probe: ProbeResult, der: bytes, now: datetime) -> ProbeResult:
    certificate = x509.load_der_x509_certificate(der)
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = tuple(str(name.value) for name in extension)
    except x509.ExtensionNotFound:
        names = ()
    return replace(
        probe,
        server_names=names,
        server_issuer=certificate.issuer.rfc4514_string(),
        server_days_left=(certificate.not_valid_after_utc - now).days,
    )


async def _is_certificate_required(endpoint: HttpEndpoint, with_it: _Answer) -> bool | None:
    """Tell whether the endpoint treats us differently without our certificate."""
    bare = endpoint.config.model_copy(update={"cert": None, "key": None, "key_password_file": None})
    try:
        without = await _ask(replace(endpoint, config=bare, tls_context=ReloadingTlsContext(bare)))
    except httpx.TransportError as error:
        reason, _ = reason_from_error(error)
        return True if reason in (Reason.TLS, Reason.TLS_CLIENT, Reason.CONNECTION_LOST) else None
    except (BackupdError, SignInError, AttemptEndedError):
        return None
    if without.reason is Reason.TLS_CLIENT:
        return True
    return without.status in (400, 401, 403, 495, 496) and without.status != with_it.status


def _with_certificate_seen(probe: ProbeResult, endpoint: HttpEndpoint) -> ProbeResult:
    """Look at the certificate that was not trusted, over a connection on which nothing is sent."""
    config = endpoint.config
    probe = replace(probe, advice=_advice(probe.detail, config))
    if config.proxy:
        return probe
    try:
        with _untrusted(endpoint) as stream:
            der = stream.get_extra_info("ssl_object").getpeercert(binary_form=True)
    except (httpcore.NetworkError, httpcore.TimeoutException, AttemptEndedError):
        return probe
    return _with_certificate(probe, der, datetime.now(UTC)) if der else probe


@contextmanager
def _untrusted(endpoint: HttpEndpoint) -> Iterator[httpcore.NetworkStream]:
    """Yield a connection to whoever is there, checked in no way."""
    config, timeout = endpoint.config, endpoint.config.timeout.connect.total_seconds()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    line = AttemptLimits(endpoint.abort, deadline=2 * timeout)
    line.start()
    url = httpx.URL(TextTemplate.parse(config.url).render(_values(config)))
    backend = StreamBackend(line, replace(endpoint.connect_options, pins=frozenset()))
    with (
        closing(backend.connect_tcp(url.host, url.port or 443, timeout)) as plain,
        closing(plain.start_tls(context, url.host, timeout)) as stream,
    ):
        yield stream


def _advice(detail: str, config: HttpDestinationConfig) -> str:
    """Return what to do about a certificate that was not trusted."""
    if detail.startswith(PIN_MISMATCH):
        return "if whoever runs the endpoint says that this is its key, put it into `pin_sha256`"
    if "protocol version" in detail or "unsupported protocol" in detail:
        return f"the endpoint does not speak TLS {config.tls_min} or later; update it, or lower `tls_min`"
    if "issuer" in detail or "self-signed" in detail or "self signed" in detail:
        named = str(config.ca) if config.ca else "the system's store"
        return f"`ca` ({named}) is not the authority that issued the endpoint's certificate; name that one"
    if "mismatch" in detail or "not valid for" in detail:
        return "the certificate is for other names; use one of them in `url`, or set `server_name`"
    if "expired" in detail or "not yet valid" in detail:
        return "the endpoint's certificate is out of date, or this host's clock is wrong"
    return ""
