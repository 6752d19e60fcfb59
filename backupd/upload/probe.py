"""Asking all destinations at once whether they would take an archive, without sending one."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from cryptography import x509

from backupd.config.destination import DestinationConfig
from backupd.core.errors import BackupdError
from backupd.core.policy import Reason, reason_of_status, rule_of
from backupd.core.template import Template
from backupd.upload.answer import reason_of_refusal
from backupd.upload.endpoint import HEADERS, open_endpoint, timeouts
from backupd.upload.failures import reason_of
from backupd.upload.line import Abort, AttemptEndedError
from backupd.upload.oauth2 import SignInError
from backupd.upload.wire import PIN_MISMATCH, spki_pin

_TAKEN = frozenset({200, 201, 202, 204, 400, 405, 411, 415, 422, 501})
"""What endpoints that take uploads answer to OPTIONS, or to a GET of their url."""
_CLOCK_TOLERANCE = 60.0
"""Seconds by which two clocks may differ before it is worth a word."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a destination answered; `reason` is None where nothing speaks against an upload.

    `certificate_asked` tells whether it wanted our certificate, None where it can't be told;
    `server_days_left` how many days its own lasts; `clock_ahead_s` by how much its clock is ahead of ours.
    """

    destination: str
    reason: Reason | None
    detail: str
    tls: str | None = None
    http_version: str | None = None
    http_status: int | None = None
    server_names: tuple[str, ...] = ()
    server_issuer: str | None = None
    server_days_left: int | None = None
    certificate_shown: bool | None = None
    signed_in: bool | None = None
    clock_ahead_s: float | None = None
    took_s: float = 0.0
    advice: str = ""

    @property
    def hint(self) -> str:
        """Return what to do about it."""
        return self.advice or (rule_of(self.reason).hint if self.reason else "")

    @property
    def clock_is_off(self) -> bool:
        """Tell whether the clocks differ so much that dates and tokens may fail."""
        return self.clock_ahead_s is not None and abs(self.clock_ahead_s) > _CLOCK_TOLERANCE


def probe_all(destinations: Mapping[str, DestinationConfig]) -> list[Probe]:
    """Return a probe of each destination; all are asked at the same time."""

    async def ask() -> list[Probe]:
        return await asyncio.gather(*(_probe(name, config) for name, config in destinations.items()))

    return asyncio.run(ask())


async def _probe(name: str, config: DestinationConfig) -> Probe:
    began = time.monotonic()
    try:
        answer = await _ask(config, with_certificate=True)
        probe = _described(name, config, answer)
        if config.cert is not None:
            probe = replace(probe, certificate_shown=await _is_certificate_wanted(config, answer.status))
    except (BackupdError, SignInError, AttemptEndedError) as error:
        reason = Reason.SIGN_IN if isinstance(error, SignInError) else Reason.LOCAL_FILES
        probe = Probe(name, reason, str(error).partition("\n")[0])
    except (httpx.TransportError, OSError) as error:  # the async client lets errors of TLS through
        reason, words = reason_of(error)
        probe = Probe(name, reason, words)
        if reason is Reason.TLS:
            probe = await _with_certificate_seen(probe, config)
    return replace(probe, took_s=time.monotonic() - began)


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
        reason = reason_of_refusal(self.status, self.said)
        if self.status in _TAKEN and reason is reason_of_status(self.status):
            return None
        return reason


async def _ask(config: DestinationConfig, *, with_certificate: bool) -> _Answer:
    """Ask for the options of the url as an upload would go there, without its body."""
    endpoint = open_endpoint(config, Abort())
    shown = config if with_certificate else config.model_copy(update={"cert": None, "key": None})
    template = Template.parse(config.url)
    url = httpx.URL(template.render(dict.fromkeys(template.names, "check")))
    async with AsyncExitStack() as stack:
        if with_certificate and endpoint.auth is not None:
            await asyncio.to_thread(endpoint.prefetch)
        client = await stack.enter_async_context(
            httpx.AsyncClient(
                transport=endpoint.async_transport(shown),
                auth=endpoint.auth if with_certificate else None,
                timeout=timeouts(config),
                headers={**HEADERS, "Host": url.netloc.decode("ascii")},
                trust_env=False,
            )
        )
        target = url
        if endpoint.route.connect_to is not None:
            host, port = endpoint.route.connect_to
            target = url.copy_with(host=host, port=port)
        name = endpoint.route.server_name or url.host
        request = client.build_request("OPTIONS", target, extensions={"sni_hostname": name})
        response = await client.send(request, stream=True)
        stack.push_async_callback(response.aclose)
        said = await anext(response.aiter_raw(), b"") if response.status_code == 400 else b""
        return _answer(response, said[:1000].decode("utf-8", "replace"))


def _answer(response: httpx.Response, said: str) -> _Answer:
    stream = response.extensions["network_stream"]
    connection = stream.get_extra_info("ssl_object")
    tls = certificate = None
    if isinstance(connection, ssl.SSLObject | ssl.SSLSocket):
        tls, certificate = connection.version(), connection.getpeercert(binary_form=True)
    return _Answer(
        response.status_code, response.http_version, response.headers.get("Date"), tls, certificate, said
    )


def _described(name: str, config: DestinationConfig, answer: _Answer) -> Probe:
    now = datetime.now(UTC)
    probe = Probe(
        name,
        answer.reason,
        f"answered {answer.status} to OPTIONS",
        answer.tls,
        answer.http_version,
        answer.status,
        signed_in=answer.status not in (401, 403) if config.auth.type != "none" else None,
        clock_ahead_s=_clock_ahead(answer.date, now),
    )
    if answer.certificate is None:
        return probe
    probe = _with_certificate(probe, answer.certificate, now)
    pins = {pin.removeprefix("sha256//") for pin in config.pin_sha256}
    if pins and (seen := spki_pin(answer.certificate)) not in pins:
        return replace(
            probe, reason=Reason.TLS, detail=f"{PIN_MISMATCH}: the endpoint's public key is {seen}"
        )
    return probe


def _clock_ahead(date: str | None, now: datetime) -> float | None:
    try:
        return (parsedate_to_datetime(date) - now).total_seconds() if date else None
    except (ValueError, TypeError, OverflowError):
        return None


def _with_certificate(probe: Probe, der: bytes, now: datetime) -> Probe:
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


async def _is_certificate_wanted(config: DestinationConfig, status: int) -> bool:
    """Tell whether the endpoint treats us differently without our certificate."""
    try:
        answer = await _ask(config, with_certificate=False)
    except (httpx.TransportError, BackupdError):
        return True
    if answer.reason is Reason.TLS_CLIENT:
        return True
    return answer.status in (400, 401, 403, 495, 496) and answer.status != status


async def _with_certificate_seen(probe: Probe, config: DestinationConfig) -> Probe:
    """Look at the certificate that was not trusted, over a connection on which nothing is sent."""
    url = httpx.URL(
        Template.parse(config.url).render(dict.fromkeys(Template.parse(config.url).names, "check"))
    )
    host, port = url.host, url.port or 443
    if config.connect_to:
        host, _, text = config.connect_to.rpartition(":")
        port = int(text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    advice = _advice(probe.detail, config)
    try:
        async with asyncio.timeout(config.timeout.connect.total_seconds()):
            _, writer = await asyncio.open_connection(
                host.strip("[]"), port, ssl=context, server_hostname=config.server_name or url.host
            )
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.transport.abort()
    except (OSError, TimeoutError):
        return replace(probe, advice=advice)
    return replace(_with_certificate(probe, der, datetime.now(UTC)), advice=advice) if der else probe


def _advice(detail: str, config: DestinationConfig) -> str:
    """Return what to do about a certificate that was not trusted."""
    if "issuer" in detail or "self-signed" in detail or "self signed" in detail:
        named = str(config.ca) if config.ca else "the system's store"
        return f"`ca` ({named}) is not the authority that issued the endpoint's certificate; name that one"
    if "mismatch" in detail or "not valid for" in detail:
        return "the certificate is for other names; use one of them in `url`, or set `server_name`"
    if "expired" in detail or "not yet valid" in detail:
        return "the endpoint's certificate is out of date, or this host's clock is wrong"
    return ""
