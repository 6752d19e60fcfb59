"""What all uploaders of a destination share, and how they connect and sign in."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass

import httpcore
import httpx

from backupd import __version__
from backupd.config.auth import AuthConfig
from backupd.config.destination import DestinationConfig
from backupd.upload.auth import BasicFile, BearerFile, OAuth2
from backupd.upload.bandwidth import Bandwidth
from backupd.upload.identity import Identity
from backupd.upload.line import Abort, Line
from backupd.upload.oauth2 import Grant, TokenSource
from backupd.upload.secret import read_secret
from backupd.upload.tls import make_context
from backupd.upload.transport import Transport
from backupd.upload.wire import Route

HEADERS = {
    "User-Agent": f"backupd/{__version__}",
    "Accept": "application/json, application/problem+json;q=0.9, */*;q=0.1",
    "Accept-Encoding": "identity",
}


_TOKEN_WITHIN = 45.0
"""Seconds for a token, the name service's aside."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A destination's sign-in and bandwidth limit, shared by its uploaders."""

    config: DestinationConfig
    abort: Abort
    bandwidth: Bandwidth | None
    auth: httpx.Auth | None
    identity: Identity

    def line(self) -> Line:
        """Return the bounds of one uploader's attempts."""
        config = self.config
        deadline = config.deadline.total_seconds() if config.deadline else None
        # to connect, to sign in, for the answer to come, and for it to end
        patience = (config.timeout.connect + 2 * config.timeout.read).total_seconds()
        patience += 0 if self.auth is None else _TOKEN_WITHIN
        return Line(
            self.abort,
            deadline=deadline,
            patience=patience,
            min_rate=config.min_rate,
            bandwidth=self.bandwidth,
        )

    @property
    def route(self) -> Route:
        """Return how to get there."""
        return _route(self.config)

    def transport(self, line: Line) -> httpx.BaseTransport:
        """Return a transport; raises TlsFilesError or SecretError where a file can't be used."""
        config = self.config
        return Transport(
            self.identity.context(),
            line,
            http2=config.http2,
            route=_route(config),
            proxy=_proxy(config),
        )


def open_endpoint(config: DestinationConfig, abort: Abort) -> Endpoint:
    """Return what the uploaders of a destination share."""
    bandwidth = Bandwidth(config.bandwidth) if config.bandwidth else None
    return Endpoint(config, abort, bandwidth, _sign_in(config.auth, config, abort), Identity(config))


def timeouts(config: DestinationConfig) -> httpx.Timeout:
    """Return the timeouts of a destination."""
    t = config.timeout
    return httpx.Timeout(
        connect=t.connect.total_seconds(),
        read=t.read.total_seconds(),
        write=t.write.total_seconds(),
        pool=t.pool.total_seconds(),
    )


def _sign_in(auth: AuthConfig, config: DestinationConfig, abort: Abort) -> httpx.Auth | None:
    if auth.type == "basic" and auth.password_file:
        return BasicFile(auth.user, auth.password_file)
    if auth.type == "bearer" and auth.token_file:
        return BearerFile(auth.token_file)
    if auth.type == "oauth2" and auth.client_secret_file:
        grant = Grant(
            auth.token_url, auth.client_id, auth.client_secret_file, auth.scope, auth.audience, auth.secret_in
        )
        return OAuth2(TokenSource(grant, lambda: _token_client(auth, config, abort)))
    return None


def _token_client(auth: AuthConfig, config: DestinationConfig, abort: Abort) -> httpx.Client:
    """Return a client for the token endpoint, which has its own CA and certificate."""
    line = Line(abort, deadline=min(2 * config.timeout.connect.total_seconds() + 30, _TOKEN_WITHIN))
    line.begin()
    return httpx.Client(
        transport=Transport(make_context(auth), line, proxy=_proxy(config)),
        timeout=timeouts(config),
        headers=HEADERS,
        trust_env=False,
        follow_redirects=False,
    )


def _route(config: DestinationConfig) -> Route:
    host, _, port = config.connect_to.rpartition(":")
    return Route(
        (host.strip("[]"), int(port)) if host else None,
        config.local_address,
        config.server_name,
        frozenset(pin.removeprefix("sha256//") for pin in config.pin_sha256),
    )


def _proxy_auth(config: DestinationConfig) -> tuple[str, str] | None:
    if not config.proxy_user:
        return None
    return config.proxy_user, read_secret(config.proxy_password_file) if config.proxy_password_file else ""


def _proxy(config: DestinationConfig) -> httpcore.Proxy | None:
    if not config.proxy:
        return None
    split, auth = urllib.parse.urlsplit(config.proxy), _proxy_auth(config)
    return httpcore.Proxy(
        httpcore.URL(scheme=split.scheme, host=split.hostname or "", port=split.port, target="/"),
        (auth[0].encode("utf-8"), auth[1].encode("ascii")) if auth else None,
    )
