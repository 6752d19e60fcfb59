"""Asking all destinations at once whether they would take an archive, without sending one."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from backupd import __version__
from backupd.config.models import DestinationConfig
from backupd.core.errors import BackupdError
from backupd.core.policy import Reason, reason_of_status, rule_of
from backupd.core.template import Template
from backupd.upload.failures import reason_of
from backupd.upload.tls import make_context

_TAKEN = frozenset({200, 201, 202, 204, 400, 405, 411, 415, 422, 501})
"""What endpoints that take uploads by POST answer to OPTIONS."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a destination answered; `reason` is None where nothing speaks against an upload."""

    destination: str
    reason: Reason | None
    detail: str
    tls: str | None = None
    http_status: int | None = None
    took_s: float = 0.0

    @property
    def hint(self) -> str:
        """Return what to do about it."""
        return rule_of(self.reason).hint if self.reason else ""


def probe_all(destinations: Mapping[str, DestinationConfig]) -> list[Probe]:
    """Return a probe of each destination; all are asked at the same time."""

    async def ask() -> list[Probe]:
        return await asyncio.gather(*(_probe(name, config) for name, config in destinations.items()))

    return asyncio.run(ask())


async def _probe(name: str, config: DestinationConfig) -> Probe:
    began = time.monotonic()
    try:
        context = make_context(config)
        timeout = httpx.Timeout(config.timeout.connect.total_seconds(), read=30.0)
        async with httpx.AsyncClient(
            verify=context, timeout=timeout, trust_env=False, headers={"User-Agent": f"backupd/{__version__}"}
        ) as client:
            template = Template.parse(config.url)
            url = template.render(dict.fromkeys(template.names, "check"))
            async with client.stream("OPTIONS", url) as response:
                return _judged(name, response, time.monotonic() - began)
    except BackupdError as error:
        return Probe(name, Reason.LOCAL_TLS, error.message)
    except (httpx.TransportError, OSError) as error:  # the async client lets errors of TLS through
        reason, words = reason_of(error)
        return Probe(name, reason, words, took_s=time.monotonic() - began)


def _judged(name: str, response: httpx.Response, took: float) -> Probe:
    status = response.status_code
    stream = response.extensions.get("network_stream")
    connection = stream.get_extra_info("ssl_object") if stream else None
    tls = connection.version() if isinstance(connection, ssl.SSLObject | ssl.SSLSocket) else None
    reason = None if status in _TAKEN else reason_of_status(status)
    return Probe(name, reason, f"answered {status} to OPTIONS", tls, status, took)
