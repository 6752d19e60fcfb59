"""Uploads over HTTP: a reused client, a streamed request, and the evaluation of the response."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from http.cookiejar import CookieJar
from typing import Any

import httpx

from backupd import __version__
from backupd.config.models import AuthConfig, HttpDestinationConfig
from backupd.config.types import NO_PROXY
from backupd.core.certificate_life import Validity
from backupd.core.errors import BackupdError
from backupd.core.failure import failure
from backupd.core.model import Deferred, Delivered, Digest, Outcome, Rejected, Superseded
from backupd.core.policy import Reason
from backupd.upload.base import (
    Abort,
    Endpoint,
    FileChangedDuringUploadError,
    ReadFailedError,
    Uploader,
    UploadJob,
)
from backupd.upload.http.auth import BasicFile, BearerFile, Grant, OAuth2, SignInError, TokenSource
from backupd.upload.http.body import UploadBody
from backupd.upload.http.http_connection import EXPECT_CONTINUE
from backupd.upload.http.limits import AttemptEndedError, AttemptLimits, BandwidthLimit
from backupd.upload.http.redact import read_secret
from backupd.upload.http.request import BODY_HEADERS, ConfirmedDigests, RequestBuilder
from backupd.upload.http.response import ResponseEvaluator, failure_from_response, reason_from_error
from backupd.upload.http.stream import ConnectOptions
from backupd.upload.http.tls import ReloadingTlsContext, make_context
from backupd.upload.http.transport import IS_REUSED, HttpTransport, Proxy

HEADERS = {
    "User-Agent": f"backupd/{__version__}",
    "Accept": "application/json, application/problem+json;q=0.9, */*;q=0.1",
    "Accept-Encoding": "identity",
}
"""The header fields of every request."""

MakeTransport = Callable[[AttemptLimits], httpx.BaseTransport]

_TOKEN_TIMEOUT = 45.0
"""Seconds within which the token endpoint must return a token, name resolution excluded."""


@dataclass(frozen=True, slots=True)
class HttpEndpoint(Endpoint):
    """The sign-in, bandwidth limit and TLS context that the uploaders of a destination share."""

    config: HttpDestinationConfig
    abort: Abort
    bandwidth: BandwidthLimit | None
    auth: httpx.Auth | None
    tls_context: ReloadingTlsContext
    confirmed_digests: ConfirmedDigests = field(default_factory=ConfirmedDigests)

    @classmethod
    def open(cls, config: HttpDestinationConfig, abort: Abort) -> HttpEndpoint:
        """Return the endpoint of a destination; the first upload reports files that can't be used."""
        bandwidth = BandwidthLimit(config.bandwidth) if config.bandwidth else None
        return cls(config, abort, bandwidth, _make_auth(config, abort), ReloadingTlsContext(config))

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
    def server_certificate(self) -> Validity | None:
        """See `Endpoint.server_certificate`."""
        return self.tls_context.server_certificate

    def limits(self) -> AttemptLimits:
        """Return new limits for the attempts of one uploader."""
        config = self.config
        deadline = config.deadline.total_seconds() if config.deadline else None
        # to connect, for the response to begin, and for it to end
        outside_body_timeout = (config.timeout.connect + 2 * config.timeout.read).total_seconds()
        if self.auth is not None:
            outside_body_timeout += _TOKEN_TIMEOUT
        return AttemptLimits(
            self.abort,
            deadline=deadline,
            outside_body_timeout=outside_body_timeout,
            min_rate=config.min_rate,
            bandwidth=self.bandwidth,
        )

    @property
    def connect_options(self) -> ConnectOptions:
        """Return how to connect to the destination."""
        config = self.config
        host, _, port = config.connect_to.rpartition(":")
        return ConnectOptions(
            (host.strip("[]"), int(port)) if host else None,
            config.local_address,
            config.server_name,
            frozenset(pin.removeprefix("sha256//") for pin in config.pin_sha256),
        )

    def transport(self, limits: AttemptLimits) -> httpx.BaseTransport:
        """Return a transport; raises TlsFilesError or SecretError for a file that can't be used."""
        return HttpTransport(
            self.tls_context.context(),
            limits,
            connect_options=self.connect_options,
            proxy=_proxy(self.config),
            # without a digest, nothing in a response shows that it is not that to an earlier request
            is_kept=self.config.has_digest_receipt,
            max_age=self.config.connection_max_age.total_seconds(),
        )


def timeouts(config: HttpDestinationConfig) -> httpx.Timeout:
    """Return the time-outs of a destination for httpx."""
    t = config.timeout
    return httpx.Timeout(
        connect=t.connect.total_seconds(),
        read=t.read.total_seconds(),
        write=t.write.total_seconds(),
        pool=None,  # there is none: each worker has one connection
    )


def _make_auth(config: HttpDestinationConfig, abort: Abort) -> httpx.Auth | None:
    auth = config.auth
    if auth.type == "basic" and auth.password_file:
        return BasicFile(auth.user, auth.password_file)
    if auth.type == "bearer" and auth.token_file:
        return BearerFile(auth.token_file)
    if auth.type == "oauth2" and auth.client_secret_file:
        grant = Grant(
            auth.token_url,
            auth.client_id,
            auth.client_secret_file,
            auth.scope,
            auth.audience,
            auth.resource,
            auth.secret_in,
        )
        return OAuth2(TokenSource(grant, lambda: _token_client(auth, config, abort)))
    return None


def _token_client(auth: AuthConfig, config: HttpDestinationConfig, abort: Abort) -> httpx.Client:
    """Return a client for the token endpoint, which has its own CA and client certificate."""
    deadline = min(2 * config.timeout.connect.total_seconds() + 30, _TOKEN_TIMEOUT)
    limits = AttemptLimits(abort, deadline=deadline)
    limits.start()
    return httpx.Client(
        transport=HttpTransport(make_context(auth), limits, proxy=_proxy(auth if auth.proxy else config)),
        timeout=timeouts(config),
        headers=HEADERS,
        trust_env=False,
        follow_redirects=False,
    )


def _proxy(config: HttpDestinationConfig | AuthConfig) -> Proxy | None:
    if config.proxy in ("", NO_PROXY):
        return None
    split = urllib.parse.urlsplit(config.proxy)
    password = read_secret(config.proxy_password_file) if config.proxy_password_file else ""
    return Proxy(split.hostname or "", split.port or 80, config.proxy_user, password)


_MAY_BE_STORED = frozenset(
    {*range(200, 300), 302, 303, 408, 444, 460, 499, *range(500, 600)} - {501, 505, 506, 507, 508, 510, 511}
)
"""Statuses after which the archive may be stored: success, or a redirect to the page about it, those of a
gateway that got no response from the server behind it, and those of a server that failed at some point."""

_TOO_LARGE = 413

_MAX_BUFFERED_BYTES = 32 * 1024
"""Bytes of a body that each server keeps while it asks for a certificate: Apache 128 KiB, IIS 48."""

_FOLDER_MAY_BE_MISSING = (404, 409, 500)
"""Statuses with which WebDAV servers respond if the folder above is missing: Go's, most, and nginx."""

_CREATED = 201
_FOLDER_EXISTS = (200, _CREATED, 204, 301, 405)
"""Statuses in response to MKCOL for a folder that exists then."""

_NOT_STORED = (404, 410)
"""Statuses in response to a query about a content that the destination does not have."""

_NOT_IMPLEMENTED = 501
"""Status of an endpoint that supports no queries; other server errors can be temporary."""

_IN_PROGRESS = 202
"""Status of an endpoint that has received the content, and is still storing it."""

_RELOAD_AFTER = frozenset({Reason.TLS, Reason.TLS_CLIENT, Reason.PROXY, Reason.LOCAL_FILES})
"""Failures after which the client is made again from its files: one of them may have been renewed."""

_BODY = "backupd.body"
"""Name of the request extension that holds the body."""

_parse_url = lru_cache(maxsize=64)(httpx.URL)
"""Parses a URL; most destinations have the same for every archive."""

_FAILURES = (BackupdError, SignInError, AttemptEndedError, httpx.InvalidURL, httpx.TransportError)
"""The exceptions that `_outcome_of_error` converts."""


class HttpUploader(Uploader):
    """Uploads to one destination over its own client, which the first upload opens.

    `make_transport` replaces the endpoint's transport in tests.
    """

    def __init__(self, endpoint: HttpEndpoint, make_transport: MakeTransport | None = None) -> None:
        self._endpoint = endpoint
        self._config = endpoint.config
        self._make_transport = make_transport or endpoint.transport
        self._limits = endpoint.limits()
        self._client: httpx.Client | None = None
        self._reloads = 0
        self._reload_first = False
        self._asks_first = False
        """Whether the destination takes a large body only after `Expect: 100-continue`."""
        self._builder = RequestBuilder(self._config, self._limits, endpoint.confirmed_digests)
        self._evaluator = ResponseEvaluator(self._config.receipt)

    def close(self) -> None:
        """See `Uploader.close`."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def upload(self, job: UploadJob) -> Outcome:
        """See `Uploader.upload`."""
        outcome = self._upload(job)
        if not isinstance(outcome, Deferred):
            self._reload_first = False
            return outcome
        if outcome.reason in _RELOAD_AFTER:
            self.close()
        self._reload_first = outcome.reason in (Reason.TLS, Reason.TLS_CLIENT)
        return replace(outcome, unconfirmed_digest=outcome.unconfirmed_digest or job.unconfirmed_digest)

    def query(self, job: UploadJob, digest: Digest) -> Outcome | None:
        """See `Uploader.query`."""
        self._limits.start(job.on_alive, job.on_idle)
        try:
            return self._query(self._open_client(), job, digest)
        except _FAILURES as error:
            return _outcome_of_error(error)

    def _upload(self, job: UploadJob) -> Outcome:
        self._limits.start(job.on_alive, job.on_idle)
        if self._reload_first:
            with suppress(BackupdError):  # the daemon's certificate check reports unusable files
                self._endpoint.tls_context.reload()
        if self._reloads != self._endpoint.tls_context.reloads:
            self.close()
        try:
            client = self._open_client()
            if job.unconfirmed_digest is not None:
                self._builder.confirm_content(job, job.unconfirmed_digest)
                found = self._query_earlier(client, job, job.unconfirmed_digest)
                if found is not None:
                    return found
            return self._send(client, job)
        except FileChangedDuringUploadError as error:
            return Superseded(str(error))
        except ReadFailedError as error:
            return Deferred(Reason.UNREADABLE, str(error))
        except _FAILURES as error:
            return _outcome_of_error(error)
        finally:
            if self._limits.server_certificate is not None:
                self._endpoint.tls_context.server_certificate = self._limits.server_certificate
            job.address, job.tls_version = self._limits.address, self._limits.tls_version

    def _query_earlier(self, client: httpx.Client, job: UploadJob, digest: Digest) -> Outcome | None:
        """Query the content of an earlier upload; return None if the archive is to be sent."""
        try:
            found = self._query_safely(client, job, digest)
        except _FAILURES as error:
            found = _outcome_of_error(error)
        else:
            if isinstance(found, Delivered):
                return found
            if not isinstance(found, Deferred) or not _is_temporary(found):
                return None
        return replace(found, error=f"query_url: {found.error}")

    def _open_client(self) -> httpx.Client:
        """Return the open client, or a new one."""
        if self._client is not None:
            return self._client
        self._reloads = self._endpoint.tls_context.reloads
        self._client = httpx.Client(
            cookies=_NoCookies(),
            transport=self._make_transport(self._limits),
            auth=self._endpoint.auth,
            timeout=timeouts(self._config),
            headers=HEADERS,
            trust_env=False,  # the environment's proxies and .netrc must not divert a backup
            follow_redirects=False,  # a redirect would disclose the archive, or lose its body
            event_hooks={"request": [_reset_body]},
        )
        return self._client

    def _send(self, client: httpx.Client, job: UploadJob) -> Outcome:
        """Send an archive; if the response rejects it but may be a stray one, send it again to be certain."""
        outcome, is_certain = self._send_once(client, job)
        if not is_certain and (isinstance(outcome, Rejected) or _is_mismatch(outcome)):
            outcome = self._send_over_new_connection(job)
        is_large = job.fingerprint.size > _MAX_BUFFERED_BYTES
        if is_large and not self._asks_first and self._config.cert and _status_of(outcome) == _TOO_LARGE:
            # it may ask for the client certificate once it knows the path, and buffer only a small body
            self._asks_first = True
            outcome = self._send_over_new_connection(job)
            self._asks_first = _status_of(outcome) != _TOO_LARGE
        if self._config.create_folders and _status_of(outcome) in _FOLDER_MAY_BE_MISSING:
            client = self._open_client()
            outcome = self._create_folder(client, job, outcome) or self._send_once(client, job)[0]
        return outcome

    def _send_over_new_connection(self, job: UploadJob) -> Outcome:
        self.close()
        self._limits.begin_request()
        return self._send_once(self._open_client(), job)[0]

    def _send_once(self, client: httpx.Client, job: UploadJob) -> tuple[Outcome, bool]:
        """Send an archive; return the outcome, and whether the response certainly is that to this request."""
        prepared = self._builder.build(job)
        body = prepared.body
        request = client.build_request(
            prepared.method,
            _parse_url(prepared.url),
            content=body,
            headers=prepared.headers,
            extensions={
                **self._builder.extensions(prepared.headers),
                _BODY: body,
                EXPECT_CONTINUE: self._asks_first and body.size > _MAX_BUFFERED_BYTES,
            },
        )
        try:
            response = client.send(request, stream=True)
            try:
                outcome = self._evaluate(response, body, job)
                return outcome, not response.extensions.get(IS_REUSED, False)
            finally:
                response.close()
        except (AttemptEndedError, httpx.TransportError) as error:
            if not body.complete:
                raise
            return self._after_lost_response(client, job, body.digest, _outcome_of_error(error)), True

    def _evaluate(self, response: httpx.Response, body: UploadBody, job: UploadJob) -> Outcome:
        status, size = response.status_code, job.fingerprint.size
        if status == 409 and self._config.on_duplicate == "verify":
            digest = body.digest if body.complete else self._builder.digest_of(job)
            is_webdav = (self._config.method, self._config.body) == ("PUT", "raw")
            return self._evaluator.evaluate_duplicate(response, digest, size, is_webdav=is_webdav)
        if status in self._config.success:
            if not body.complete:
                error = f"responded {status} after {job.sent_bytes} of {size} bytes"
                return failure(Reason.EARLY_SUCCESS, error, status)
            outcome = self._evaluator.evaluate_success(response, body.digest, size)
            may_be_stored = isinstance(outcome, Deferred) and outcome.reason is Reason.UNVERIFIED
        else:
            outcome = failure_from_response(response)
            may_be_stored = status in _MAY_BE_STORED and body.complete
        if isinstance(outcome, Deferred) and may_be_stored:
            return replace(outcome, unconfirmed_digest=body.digest)
        return outcome

    def _create_folder(self, client: httpx.Client, job: UploadJob, outcome: Outcome) -> Outcome | None:
        """Create the folder of an archive by WebDAV, and those above it that are missing.

        Returns `outcome` if the folder exists, and the failure if it cannot be created. Source: RFC 4918
        section 9.3.
        """
        prepared = self._builder.build(job)
        headers = {k: v for k, v in prepared.headers.items() if k not in BODY_HEADERS}
        folder, missing, is_created = httpx.URL(prepared.url, query=None).join("./"), [], False
        status, refused = self._make_folder(client, folder, headers)
        while status in _FOLDER_MAY_BE_MISSING and folder.path != "/":
            missing.append(folder)
            folder = folder.join("../")
            status, refused = self._make_folder(client, folder, headers)
        while status in _FOLDER_EXISTS:
            is_created = is_created or status == _CREATED
            if not missing:
                return None if is_created else outcome
            folder = missing.pop()
            status, refused = self._make_folder(client, folder, headers)
        error = f"MKCOL {folder.path}: {refused.error}"
        if isinstance(refused, Deferred) and status not in _FOLDER_MAY_BE_MISSING:
            return replace(refused, error=error)
        return Deferred(Reason.NO_FOLDER, error, status)

    def _make_folder(
        self, client: httpx.Client, folder: httpx.URL, headers: Mapping[str, str]
    ) -> tuple[int, Deferred | Rejected]:
        """Create one folder; return the status, and the failure if there is one."""
        self._limits.begin_request()
        extensions = self._builder.extensions(headers)
        with client.stream("MKCOL", folder, headers=headers, extensions=extensions) as response:
            return response.status_code, failure_from_response(response)

    def _after_lost_response(
        self, client: httpx.Client, job: UploadJob, digest: Digest, lost: Deferred
    ) -> Outcome:
        """Query the destination, which may have stored the archive: every byte was sent."""
        if lost.reason is not Reason.STOPPED:
            try:
                found = self._query_safely(client, job, digest)
            except (BackupdError, SignInError, AttemptEndedError, httpx.TransportError):
                found = None
            if isinstance(found, Delivered):
                return found
        return replace(lost, unconfirmed_digest=digest)

    def _query_safely(self, client: httpx.Client, job: UploadJob, digest: Digest) -> Outcome | None:
        """Query a content; return None as well if the values make no valid URL."""
        with suppress(httpx.InvalidURL):
            return self._query(client, job, digest)
        return None

    def _query(self, client: httpx.Client, job: UploadJob, digest: Digest) -> Outcome | None:
        """Return the destination's state of a content; None if it has none or no query is configured."""
        url = self._builder.query_request(job, digest)
        if url is None or self._config.receipt.digest == "none":  # a response would verify nothing
            return None
        headers = self._builder.own_headers({**job.variables, "digest": digest.hex})
        extensions = self._builder.extensions(headers)
        with client.stream("GET", url, headers=headers, extensions=extensions) as response:
            if response.status_code in _NOT_STORED:
                return None
            if response.status_code != 200:
                return failure_from_response(response)
            return self._evaluator.evaluate_success(response, digest, job.fingerprint.size)


class _NoCookies(CookieJar):
    """Keeps no cookies: requests are independent of each other."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        """Do nothing."""


def _reset_body(request: httpx.Request) -> None:
    """Reset the progress of the body: after a 401 a second request sends the same body."""
    body = request.extensions.get(_BODY)
    if body is not None:
        body.begin()


def _status_of(outcome: Outcome) -> int | None:
    return outcome.http_status if isinstance(outcome, Deferred | Rejected) else None


def _is_mismatch(outcome: Outcome) -> bool:
    return isinstance(outcome, Deferred) and outcome.reason is Reason.MISMATCH


def _is_temporary(failed_query: Deferred) -> bool:
    """Return whether a query failed temporarily: the archive is not sent again before it succeeds."""
    is_server_error = failed_query.reason in (Reason.RATE_LIMITED, Reason.SERVER_ERROR)
    if failed_query.http_status == _NOT_IMPLEMENTED:
        return False
    return is_server_error or failed_query.http_status == _IN_PROGRESS


def _outcome_of_error(error: Exception) -> Deferred:
    match error:
        case AttemptEndedError():
            return Deferred(error.reason, error.error)
        case SignInError():
            return Deferred(Reason.SIGN_IN, str(error), retry_after=error.retry_after)
        case BackupdError():
            return Deferred(Reason.LOCAL_FILES, error.message)
        case httpx.TransportError():
            return Deferred(*reason_from_error(error))
        case _:
            return Deferred(Reason.PROTOCOL, str(error))
