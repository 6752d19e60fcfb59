"""Uploads by HTTP: one reused client, a streamed request, and the answer judged."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpcore
import httpx

from backupd import __version__
from backupd.config.models import AuthConfig, HttpDestinationConfig
from backupd.core.errors import BackupdError
from backupd.core.failure import failure
from backupd.core.model import Deferred, Delivered, Digest, Outcome, Superseded, is_unchanged
from backupd.core.policy import Reason
from backupd.upload.base import Abort, Endpoint, Uploader, UploadJob
from backupd.upload.http.auth import BasicFile, BearerFile, Grant, OAuth2, SignInError, TokenSource
from backupd.upload.http.body import FileChangedDuringUploadError, ReadFailedError, UploadBody
from backupd.upload.http.limits import AttemptEndedError, AttemptLimits, BandwidthLimit
from backupd.upload.http.redact import read_secret
from backupd.upload.http.request import PreparedRequest, RequestBuilder
from backupd.upload.http.response import ResponseEvaluator, failure_from_response, reason_from_error
from backupd.upload.http.stream import ConnectOptions
from backupd.upload.http.tls import ReloadingTlsContext, make_context
from backupd.upload.http.transport import HttpTransport

HEADERS = {
    "User-Agent": f"backupd/{__version__}",
    "Accept": "application/json, application/problem+json;q=0.9, */*;q=0.1",
    "Accept-Encoding": "identity",
}


_TOKEN_WITHIN = 45.0
"""Seconds for a token, the name service's aside."""


@dataclass(frozen=True, slots=True)
class HttpEndpoint(Endpoint):
    """A destination's sign-in and bandwidth limit, shared by its uploaders."""

    config: HttpDestinationConfig
    abort: Abort
    bandwidth: BandwidthLimit | None
    auth: httpx.Auth | None
    tls_context: ReloadingTlsContext

    @classmethod
    def open(cls, config: HttpDestinationConfig, abort: Abort) -> HttpEndpoint:
        """Return the endpoint of a destination; the first upload reports files that can't be used."""
        bandwidth = BandwidthLimit(config.bandwidth) if config.bandwidth else None
        return cls(
            config, abort, bandwidth, _sign_in(config.auth, config, abort), ReloadingTlsContext(config)
        )

    def make_uploader(self) -> HttpUploader:
        """See `Endpoint.make_uploader`."""
        return HttpUploader(self)

    def files_changed(self) -> bool:
        """See `Endpoint.files_changed`."""
        return self.tls_context.files_changed()

    def reload_files(self) -> None:
        """See `Endpoint.reload_files`."""
        self.tls_context.reload()

    @property
    def server_certificate_expires(self) -> float | None:
        """See `Endpoint.server_certificate_expires`."""
        return self.tls_context.server_expires

    def limits(self) -> AttemptLimits:
        """Return the bounds of one uploader's attempts."""
        config = self.config
        deadline = config.deadline.total_seconds() if config.deadline else None
        # to connect, to sign in, for the answer to come, and for it to end
        patience = (config.timeout.connect + 2 * config.timeout.read).total_seconds()
        patience += 0 if self.auth is None else _TOKEN_WITHIN
        return AttemptLimits(
            self.abort,
            deadline=deadline,
            patience=patience,
            min_rate=config.min_rate,
            bandwidth=self.bandwidth,
        )

    @property
    def connect_options(self) -> ConnectOptions:
        """Return how to get there."""
        return _route(self.config)

    def transport(self, line: AttemptLimits) -> httpx.BaseTransport:
        """Return a transport; raises TlsFilesError or SecretError where a file can't be used."""
        config = self.config
        return HttpTransport(
            self.tls_context.context(),
            line,
            http2=config.http2,
            route=_route(config),
            proxy=_proxy(config),
        )


def timeouts(config: HttpDestinationConfig) -> httpx.Timeout:
    """Return the timeouts of a destination."""
    t = config.timeout
    return httpx.Timeout(
        connect=t.connect.total_seconds(),
        read=t.read.total_seconds(),
        write=t.write.total_seconds(),
        pool=t.pool.total_seconds(),
    )


def _sign_in(auth: AuthConfig, config: HttpDestinationConfig, abort: Abort) -> httpx.Auth | None:
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


def _token_client(auth: AuthConfig, config: HttpDestinationConfig, abort: Abort) -> httpx.Client:
    """Return a client for the token endpoint, which has its own CA and certificate."""
    line = AttemptLimits(abort, deadline=min(2 * config.timeout.connect.total_seconds() + 30, _TOKEN_WITHIN))
    line.start()
    return httpx.Client(
        transport=HttpTransport(make_context(auth), line, proxy=_proxy(config)),
        timeout=timeouts(config),
        headers=HEADERS,
        trust_env=False,
        follow_redirects=False,
    )


def _route(config: HttpDestinationConfig) -> ConnectOptions:
    host, _, port = config.connect_to.rpartition(":")
    return ConnectOptions(
        (host.strip("[]"), int(port)) if host else None,
        config.local_address,
        config.server_name,
        frozenset(pin.removeprefix("sha256//") for pin in config.pin_sha256),
    )


def _proxy_auth(config: HttpDestinationConfig) -> tuple[str, str] | None:
    if not config.proxy_user:
        return None
    return config.proxy_user, read_secret(config.proxy_password_file) if config.proxy_password_file else ""


def _proxy(config: HttpDestinationConfig) -> httpcore.Proxy | None:
    if not config.proxy:
        return None
    split, auth = urllib.parse.urlsplit(config.proxy), _proxy_auth(config)
    return httpcore.Proxy(
        httpcore.URL(scheme=split.scheme, host=split.hostname or "", port=split.port, target="/"),
        (auth[0].encode("utf-8"), auth[1].encode("ascii")) if auth else None,
    )


_FROM_A_GATEWAY = (502, 504)
"""Answers of a gateway that lost the one of whoever is behind it, who may have the archive."""

_NOT_THERE = (404, 410)
"""Answers to the question for a content that the destination does not have."""

_NEVER_ANSWERED = 501
"""Answer of an endpoint that knows no questions; any other trouble with one may pass."""

_MENDED_BY_NEW_FILES = frozenset({Reason.TLS, Reason.TLS_CLIENT, Reason.PROXY, Reason.LOCAL_FILES})
"""After these the files are read anew: a certificate or password may have been renewed."""

_BODY = "backupd.body"
"""The extension of a request that is its body."""

TransportMaker = Callable[[AttemptLimits], httpx.BaseTransport]


class HttpUploader(Uploader):
    """Uploads to one destination over a client of its own, made at the first upload.

    `transport` is replaced in tables of statuses only.
    """

    def __init__(self, endpoint: HttpEndpoint, transport: TransportMaker | None = None) -> None:
        self._endpoint = endpoint
        self._config = endpoint.config
        self._make_transport = transport or endpoint.transport
        self._line = endpoint.limits()
        self._client: httpx.Client | None = None
        self._renewals = 0
        self._look_anew = False
        self._maker = RequestBuilder(self._config, self._line)
        self._judge = ResponseEvaluator(self._config.receipt)

    def close(self) -> None:
        """See `Uploader.close`."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def upload(self, cargo: UploadJob) -> Outcome:
        """See `Uploader.upload`."""
        outcome = self._upload(cargo)
        if not isinstance(outcome, Deferred):
            self._look_anew = False
            return outcome
        if outcome.reason in _MENDED_BY_NEW_FILES:
            self.close()
        self._look_anew = outcome.reason in (Reason.TLS, Reason.TLS_CLIENT)
        return replace(outcome, unconfirmed_digest=outcome.unconfirmed_digest or cargo.unconfirmed_digest)

    def query(self, cargo: UploadJob, digest: Digest) -> Outcome | None:
        """See `Uploader.ask`."""
        self._line.start(cargo.on_alive, cargo.on_idle)
        try:
            client = self._client = self._client or self._open_client()
            return self._ask(client, cargo, digest)
        except (
            BackupdError,
            SignInError,
            AttemptEndedError,
            httpx.InvalidURL,
            httpx.TransportError,
        ) as error:
            return _deferred(error)

    def _upload(self, cargo: UploadJob) -> Outcome:
        self._line.start(cargo.on_alive, cargo.on_idle)
        if self._look_anew:
            with suppress(BackupdError):  # what can't be used is told by whoever looks after the files
                self._endpoint.tls_context.reload()
        if self._renewals != self._endpoint.tls_context.renewals:
            self.close()
        try:
            client = self._client = self._client or self._open_client()
            if cargo.unconfirmed_digest is not None and is_unchanged(os.fstat(cargo.fd), cargo.fingerprint):
                found = self._ask_first(client, cargo, cargo.unconfirmed_digest)
                if isinstance(found, Delivered):
                    return found
                if isinstance(found, Deferred) and _may_be_answered_later(found):
                    return replace(found, error=f"asked for what was sent: {found.error}")
            return self._send(client, cargo, self._maker.build(cargo))
        except FileChangedDuringUploadError as error:
            return Superseded(str(error))
        except ReadFailedError as error:
            return Deferred(Reason.UNREADABLE, str(error))
        except (
            BackupdError,
            SignInError,
            AttemptEndedError,
            httpx.InvalidURL,
            httpx.TransportError,
        ) as error:
            return _deferred(error)
        finally:
            if self._line.peer_expires is not None:
                self._endpoint.tls_context.server_expires = self._line.peer_expires

    def _open_client(self) -> httpx.Client:
        self._renewals = self._endpoint.tls_context.renewals
        return httpx.Client(
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # no request depends on another
            transport=self._make_transport(self._line),
            auth=self._endpoint.auth,
            timeout=timeouts(self._config),
            headers=HEADERS,
            trust_env=False,  # the environment's proxies and .netrc must not divert a backup
            follow_redirects=False,  # a redirect would leak the archive, or lose its body
            event_hooks={"request": [_begin]},
        )

    def _send(self, client: httpx.Client, cargo: UploadJob, prepared: PreparedRequest) -> Outcome:
        body = prepared.body
        request = client.build_request(
            prepared.method,
            prepared.url,
            content=body,
            headers=prepared.headers,
            extensions={**self._maker.extensions(cargo), _BODY: body},
        )
        try:
            response = client.send(request, stream=True)
            try:
                return self._judged(response, body, cargo)
            finally:
                response.close()
        except (AttemptEndedError, httpx.TransportError) as error:
            if not body.complete:
                raise
            return self._after_lost_answer(client, cargo, body.digest, _deferred(error))

    def _judged(self, response: httpx.Response, body: UploadBody, cargo: UploadJob) -> Outcome:
        status, size = response.status_code, cargo.fingerprint.size
        if status == 409 and self._config.on_duplicate == "verify":
            digest = body.digest if body.complete else self._maker.digest_of(cargo)
            return self._judge.evaluate_duplicate(response, digest, size)
        if status not in self._config.success:
            refused = failure_from_response(response)
            if status in _FROM_A_GATEWAY and body.complete and isinstance(refused, Deferred):
                return replace(refused, unconfirmed_digest=body.digest)
            return refused
        if not body.complete:
            return failure(
                Reason.EARLY_SUCCESS, f"answered {status} after {cargo.sent_bytes} of {size} bytes", status
            )
        return self._judge.evaluate_success(response, body.digest, size)

    def _after_lost_answer(
        self, client: httpx.Client, cargo: UploadJob, digest: Digest, lost: Deferred
    ) -> Outcome:
        """Every byte went out, so the destination may have the archive: ask before it is sent again."""
        if lost.reason is not Reason.STOPPED:
            try:
                found = self._ask_first(client, cargo, digest)
            except (BackupdError, SignInError, AttemptEndedError, httpx.TransportError):
                found = None
            if isinstance(found, Delivered):
                return found
        return replace(lost, unconfirmed_digest=digest)

    def _ask_first(self, client: httpx.Client, cargo: UploadJob, digest: Digest) -> Outcome | None:
        """Ask before anything is sent again; what no address can be made of, nobody can be asked about."""
        with suppress(httpx.InvalidURL):
            return self._ask(client, cargo, digest)
        return None

    def _ask(self, client: httpx.Client, cargo: UploadJob, digest: Digest) -> Outcome | None:
        """Return what the destination says of a content; None if it does not have it or knows no query."""
        url = self._maker.query_request(cargo, digest)
        if url is None or self._config.receipt.digest == "none":  # an answer would prove nothing
            return None
        headers = self._maker.own_headers({**cargo.variables, "digest": digest.hex})
        known = self._maker.extensions(cargo)
        with client.stream("GET", url, headers=headers, extensions=known) as response:
            if response.status_code in _NOT_THERE:
                return None
            if response.status_code != 200:
                return failure_from_response(response)
            return self._judge.evaluate_success(response, digest, cargo.fingerprint.size)


def _begin(request: httpx.Request) -> None:
    """Note that nothing of a request was sent; with another sign-in a second one has the same body."""
    body = request.extensions.get(_BODY)
    if body is not None:
        body.begin()


def _may_be_answered_later(asked: Deferred) -> bool:
    """Tell whether a question met but a passing trouble: until it has passed, nothing is sent again."""
    passes = asked.reason in (Reason.RATE_LIMITED, Reason.SERVER_ERROR)
    return passes and asked.http_status != _NEVER_ANSWERED


def _deferred(error: Exception) -> Deferred:
    match error:
        case AttemptEndedError():
            return Deferred(error.reason, error.error)
        case SignInError():
            return Deferred(Reason.SIGN_IN, str(error))
        case BackupdError():
            return Deferred(Reason.LOCAL_FILES, error.message)
        case httpx.TransportError():
            return Deferred(*reason_from_error(error))
        case _:
            return Deferred(Reason.PROTOCOL, str(error))
