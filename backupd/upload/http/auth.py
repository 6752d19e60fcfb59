"""Sign-in: one `httpx.Auth` for each scheme, with the secrets in files."""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.parse
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from backupd.core.backoff import parse_retry_after
from backupd.core.policy import Reason
from backupd.upload.http.limits import UNBOUNDED_WAIT, AttemptEndedError
from backupd.upload.http.redact import SECRETS, quotable, read_secret, secrets_in_query
from backupd.upload.http.response import plain_text, read_body, reason_from_error

_MAX_RESPONSE_BYTES = 64 * 1024
"""Bytes of a token response; a header field could not hold a longer token."""

_MAX_QUOTED_LENGTH = 300
"""Characters of a response without JSON that an error quotes."""

_MAX_FIELD_LENGTH = 200
"""Characters of a header field that an error quotes."""

_MAX_TEXTS = 5
"""Texts in a list of errors that an error quotes."""

_REPLACE_BEFORE = 30.0
"""Seconds before a token expires at which it is replaced, or a tenth of its lifetime if that is less."""

_DEFAULT_LIFETIME = 300.0
"""Seconds for which a token is used if the response states no lifetime."""

AuthFlow = Generator[httpx.Request, httpx.Response, None]


class SignInError(Exception):
    """The token endpoint returned no token; the message gives the reason and contains no secret.

    `retry_after` is the wait that the endpoint requests, if it does.
    """

    def __init__(self, message: str, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BasicFile(httpx.Auth):
    """Basic authentication (RFC 7617) with the password in a file."""

    def __init__(self, user: str, password_file: Path) -> None:
        self._user = user
        self._password_file = password_file

    def auth_flow(self, request: httpx.Request) -> AuthFlow:
        """Add the credentials to a request; raises SecretError."""
        yield from httpx.BasicAuth(self._user, read_secret(self._password_file)).auth_flow(request)


class BearerFile(httpx.Auth):
    """A bearer token (RFC 6750) in a file that another program renews."""

    def __init__(self, token_file: Path) -> None:
        self._token_file = token_file

    def auth_flow(self, request: httpx.Request) -> AuthFlow:
        """Add the token to a request; after a 401, retry once if the file holds another token now."""
        token = read_secret(self._token_file)
        response = yield _with_bearer(request, token)
        if response.status_code == 401:
            fresh = read_secret(self._token_file)
            if fresh != token:
                yield _with_bearer(request, fresh)


class OAuth2(httpx.Auth):
    """A bearer token from a token endpoint, shared by all workers of a destination."""

    def __init__(self, tokens: TokenSource) -> None:
        self._tokens = tokens

    def prefetch(self) -> None:
        """Fetch a token if there is none, so that no request waits for it; raises as `TokenSource.token`."""
        self._tokens.token()

    def auth_flow(self, request: httpx.Request) -> AuthFlow:
        """Add the token to a request; after a 401, retry once with a new token."""
        token = self._token_for(request)
        # the destination may be the token endpoint, and echo the client secret as well
        request.extensions[SECRETS] = (*request.extensions.get(SECRETS, ()), *self._tokens.secrets)
        response = yield _with_bearer(request, token)
        if response.status_code == 401:
            fresh = self._token_for(request, refused=token)
            if fresh != token:
                yield _with_bearer(request, fresh)

    def _token_for(self, request: httpx.Request, refused: str | None = None) -> str:
        """Return a token; the wait for another worker's fetch reports the thread as idle."""
        with request.extensions.get(UNBOUNDED_WAIT, nullcontext)():
            return self._tokens.token(refused)


def _with_bearer(request: httpx.Request, token: str) -> httpx.Request:
    request.headers["Authorization"] = f"Bearer {token}"
    return request


@dataclass(frozen=True, slots=True)
class Grant:
    """The parameters of a client credentials grant (RFC 6749 section 4.4).

    `secret_in` is where the client secret goes: "basic" for Basic authentication, "post" for the form.
    """

    token_url: str
    client_id: str
    client_secret_file: Path
    scope: str = ""
    audience: str = ""
    resource: str = ""
    secret_in: str = "basic"  # noqa: S105 -- not a secret


@dataclass(frozen=True, slots=True)
class _Token:
    value: str
    replace_at: float


class TokenSource:
    """Caches one token until shortly before it expires; safe to use from several threads.

    The first thread that finds the token expired fetches a new one, and the others wait for it. If the fetch
    fails, the waiting threads fail as well instead of repeating it.
    """

    def __init__(self, grant: Grant, open_client: Callable[[], httpx.Client]) -> None:
        self._grant = grant
        self._open_client = open_client
        self._lock = threading.Lock()
        self._token: _Token | None = None
        self._fetches = 0
        self._failure: SignInError | None = None
        self.secrets: tuple[str, ...] = ()
        """The client secret of the last fetch, and the secrets in the URL of the token endpoint."""

    def token(self, refused: str | None = None) -> str:
        """Return a token, if possible not the one that the destination `refused`.

        Raises SignInError if there is none, SecretError or TlsFilesError for this host's files, and
        AttemptEndedError when aborted.
        """
        fetches_before = self._fetches
        with self._lock:
            token = self._token
            if token is not None and token.value != refused and time.monotonic() < token.replace_at:
                return token.value
            if self._failure is not None and self._fetches != fetches_before:
                raise SignInError(str(self._failure), self._failure.retry_after)
            self._token = self._failure = None
            try:
                self._token = token = self._fetch()
            except SignInError as error:
                self._failure = error
                raise
            finally:
                self._fetches += 1  # counted last: a thread that arrived during the fetch waited for it
            return token.value

    def _fetch(self) -> _Token:
        grant = self._grant
        form = {"grant_type": "client_credentials"}
        optional = {"scope": grant.scope, "audience": grant.audience, "resource": grant.resource}
        form |= {key: value for key, value in optional.items() if value}
        secret = read_secret(grant.client_secret_file)
        auth = httpx.Auth()
        if grant.secret_in == "post":  # noqa: S105
            form |= {"client_id": grant.client_id, "client_secret": secret}
        else:
            auth = httpx.BasicAuth(_form_encoded(grant.client_id), _form_encoded(secret))
        self.secrets = (secret, *secrets_in_query(grant.token_url))
        requested_at = time.monotonic()
        response, body = self._request(form, auth)
        return _parse_token(response, body, requested_at)

    def _request(self, form: dict[str, str], auth: httpx.Auth) -> tuple[httpx.Response, bytes]:
        url, extensions = self._grant.token_url, {SECRETS: self.secrets}
        try:
            with (
                self._open_client() as client,
                client.stream("POST", url, data=form, auth=auth, extensions=extensions) as response,
            ):
                return response, _read_body(response)
        except httpx.TransportError as error:
            _, description = reason_from_error(error)
            description = description.replace("the destination's", "its")
            raise SignInError(f"no response from the token endpoint: {description}") from error
        except AttemptEndedError as error:
            if error.reason is Reason.STOPPED:
                raise
            raise SignInError(f"no response from the token endpoint: {error.error}") from error


def _form_encoded(text: str) -> str:
    """Return text in the encoding that RFC 6749 section 2.3.1 requires for Basic authentication."""
    return urllib.parse.quote_plus(text)


def _read_body(response: httpx.Response) -> bytes:
    data = read_body(response, _MAX_RESPONSE_BYTES + 1)
    if len(data) > _MAX_RESPONSE_BYTES:
        raise SignInError("the response of the token endpoint exceeds 64 KiB")
    return data


def _parse_token(response: httpx.Response, body: bytes, requested_at: float) -> _Token:
    """Return the token in a response (RFC 6749 section 5.1); `requested_at` is monotonic."""
    fields = _parse_fields(body)
    if not response.is_success or fields is None or "access_token" not in fields:
        description = quotable(_describe_error(fields, response, body), response.request, 1000)
        retry_after = response.headers.get("Retry-After")
        raise SignInError(
            f"the token endpoint responded {response.status_code}{description}",
            parse_retry_after(retry_after, datetime.now(UTC)) if retry_after else None,
        )
    value, kind = fields["access_token"], fields.get("token_type")
    if not isinstance(value, str) or not value or not all("!" <= char <= "~" for char in value):
        raise SignInError("the token endpoint returned a token with characters that a header can't hold")
    if kind and not (isinstance(kind, str) and kind.lower().startswith("bearer")):
        raise SignInError(f"the token endpoint returned a token of the type {str(kind)[:50]!r}, not Bearer")
    try:
        lifetime = max(float(fields.get("expires_in", _DEFAULT_LIFETIME)), 0.0)
    except (TypeError, ValueError, OverflowError):
        lifetime = _DEFAULT_LIFETIME
    if not math.isfinite(lifetime):
        lifetime = _DEFAULT_LIFETIME
    return _Token(value, requested_at + lifetime - min(_REPLACE_BEFORE, lifetime / 10))


def _parse_fields(body: bytes) -> dict[str, Any] | None:
    """Return the fields of a response in JSON, or in the form encoding that some endpoints use."""
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError):
        form = dict(urllib.parse.parse_qsl(body.decode("ascii", "replace").strip()))
        return form if form.keys() & {"access_token", "error"} else None
    return fields if isinstance(fields, dict) else None


_ERRORS = {
    "invalid_client": "it does not know the client ID, or the secret is wrong or has expired",
    "unauthorized_client": "this client may not use the client credentials grant, or its secret is wrong",
    "unsupported_grant_type": "it does not support the client credentials grant",
    "invalid_scope": "it does not know the scope, or this client may not request it",
    "invalid_target": "it does not know the audience or resource",
    "invalid_request": "it needs another parameter, such as `scope` or `audience`, or another `secret_in`",
    "temporarily_unavailable": "it is overloaded or in maintenance",
}
"""The meaning of error codes; source: RFC 6749 section 5.2 and RFC 8707 section 2."""


def _describe_error(fields: dict[str, Any] | None, response: httpx.Response, body: bytes) -> str:
    """Return the error in a response (RFC 6749 section 5.2), or the beginning of another response.

    The body of a success may be the token itself, in another form, and is not quoted.
    """
    if fields is None:
        return f" without JSON fields{_describe_body(response, body)}"
    keys = _ERROR_FIELDS[:2] if response.is_success else _ERROR_FIELDS
    texts = list(dict.fromkeys(text for key in keys for text in _texts_in(fields.get(key))))
    if not texts:
        return " without a token, with the fields " + ", ".join(sorted(map(str, fields))) if fields else ""
    meaning = _ERRORS.get(texts[0])
    return f": {': '.join(texts)}" + (f" ({meaning})" if meaning else "")


_ERROR_FIELDS = ("error", "error_description", "errorSummary", "message", "title", "detail", "errors")
"""Fields with the texts of an error: those of RFC 6749, then of Okta, of many, of RFC 9457, and of Vault."""


def _texts_in(value: object) -> list[str]:
    """Return the texts of an error, which some endpoints give as a list, or as an object with a message."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list):
        inner = (each for each in value[:_MAX_TEXTS] if not isinstance(each, list))
        return [text for each in inner for text in _texts_in(each)]
    if isinstance(value, dict):
        texts = (value.get(key) for key in _ERROR_FIELDS)
        return [text for text in texts if text and isinstance(text, str)]
    return []


def _describe_body(response: httpx.Response, body: bytes) -> str:
    if response.is_success:
        kind = _quoted_field("Content-Type", "no content type", response).partition(";")[0]
        return f", but with {len(body)} bytes of {kind}"
    if response.is_redirect:
        return f": it redirects to {_quoted_field('Location', 'nowhere', response).partition('?')[0]}"
    text = plain_text(response, body)[:_MAX_QUOTED_LENGTH]
    return f": {text}" if text else ""


def _quoted_field(name: str, default: str, response: httpx.Response) -> str:
    return quotable(response.headers.get(name, default), response.request, _MAX_FIELD_LENGTH)
