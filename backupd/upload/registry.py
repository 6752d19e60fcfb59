"""The kinds of destinations: each has a configuration model, an endpoint and a probe.

To add a kind, write a package beside `http/` and register it at the end of this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from backupd.config.models import DESTINATION_MODELS, DestinationConfig, HttpDestinationConfig
from backupd.upload.base import Abort, Endpoint, ProbeResult, Uploader

ConfigT = TypeVar("ConfigT", bound=DestinationConfig)


@dataclass(frozen=True, slots=True)
class DestinationKind(Generic[ConfigT]):
    """One kind of destination; the key `kind` in `[destination.NAME]` selects it by `name`.

    `open_endpoint` returns the state that the workers of a destination share. `probe` finds out whether the
    destination called by the first argument would take an archive, without sending one; it returns every
    failure as a result.
    """

    name: str
    config_model: type[ConfigT]
    open_endpoint: Callable[[ConfigT, Abort], Endpoint]
    probe: Callable[[str, ConfigT, Abort], Coroutine[Any, Any, ProbeResult]]


KINDS: dict[str, DestinationKind[Any]] = {}
"""The registered kinds by name; `register` adds to them."""


def register(kind: DestinationKind[Any]) -> None:
    """Make a kind available to the configuration and to everything that opens a destination."""
    KINDS[kind.name] = kind
    DESTINATION_MODELS[kind.name] = kind.config_model


def open_endpoint(config: DestinationConfig, abort: Abort) -> Endpoint:
    """Return the state that the workers of a destination share."""
    return KINDS[config.kind].open_endpoint(config, abort)


def make_uploader(config: DestinationConfig) -> Uploader:
    """Return an uploader that shares its endpoint with no other and is never aborted."""
    return open_endpoint(config, Abort()).make_uploader()


def probe(name: str, config: DestinationConfig, abort: Abort) -> ProbeResult:
    """Probe one destination; `abort` ends it at once."""
    return asyncio.run(KINDS[config.kind].probe(name, config, abort))


def probe_all(destinations: Mapping[str, DestinationConfig]) -> list[ProbeResult]:
    """Probe every destination at the same time; return the results in the order of `destinations`."""
    with closing(Abort()) as abort:
        return asyncio.run(_probe_all(destinations, abort))


async def _probe_all(destinations: Mapping[str, DestinationConfig], abort: Abort) -> list[ProbeResult]:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(len(destinations) + 1, "probe"))
    probes = (KINDS[config.kind].probe(name, config, abort) for name, config in destinations.items())
    try:
        return await asyncio.gather(*probes)
    except BaseException:  # Ctrl-C ends the other probes, too
        abort.set()
        raise


def _open_http(config: HttpDestinationConfig, abort: Abort) -> Endpoint:
    from backupd.upload.http.uploader import HttpEndpoint  # noqa: PLC0415 -- see below

    return HttpEndpoint.open(config, abort)


async def _probe_http(name: str, config: HttpDestinationConfig, abort: Abort) -> ProbeResult:
    from backupd.upload.http.probe import probe  # noqa: PLC0415 -- see below

    return await probe(name, config, abort)


# every command imports this module for the configuration; only those that upload need an HTTP client
register(DestinationKind("http", HttpDestinationConfig, _open_http, _probe_http))
