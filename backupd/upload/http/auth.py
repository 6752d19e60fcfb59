"""Signing in: each scheme an `httpx.Auth` whose secrets are files."""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.parse
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from backupd.core.policy import Reason
from backupd.upload.http.limits import UNWATCHED, AttemptEndedError
from backupd.upload.http.redact import SECRETS, quotable, read_secret
from backupd.upload.http.response import reason_from_error

_MOST = 64 * 1024
"""Bytes of an answer; a header could hold no longer token."""
_EARLY = 30.0
"""Seconds before its end at which a token is replaced, or a tenth of its life if that is less."""
_UNSTATED = 300.0
"""Seconds that a token is kept whose life the endpoint does not state."""


class SignInError(Exception):
    """The token endpoint gave no token; the message says why, and holds no secret."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token is asked for with; `secret_in` is where the secret goes: basic or post."""

    token_url: str
    client_id: str
    client_secret_file: Path
    scope: str = ""
    audience: str = ""
    secret_in: str = "basic"  # noqa: S105 -- a place, no secret


@dataclass(frozen=True, slots=True)
class _Token:
    value: str
    replace_at: float


class TokenSource:
    """Keeps one token until shortly before it expires; safe to use from several threads.

    Whoever finds it stale fetches a new one, once, while the others wait for it; if there is none to be
    had they don't ask again, either.
    """

    def __init__(self, grant: Grant, open_client: Callable[[], httpx.Client]) -> None:
        self._grant = grant
        self._open_client = open_client
        self._lock = threading.Lock()
        self._token: _Token | None = None
        self._fetches = 0
        self._failure: str | None = None
        self.secrets: tuple[str, ...] = ()
        """What the last token was asked for with, in its forms."""

    def token(self, refused: str | None = None) -> str:
        """Return a token, if possible one that is not the refused one.

        Raises SignInError where there is none, SecretError and TlsFilesError for our own files, and
        AttemptEndedError when told to stop.
        """
        seen = self._fetches
        with self._lock:
            known = self._token
            if known is not None and known.value != refused and time.monotonic() < known.replace_at:
                return known.value
            if self._failure is not None and self._fetches != seen:
                raise SignInError(self._failure)
            self._token = self._failure = None
            try:
                self._token = known = self._fetch()
            except SignInError as error:
                self._failure = str(error)
                raise
            finally:
                self._fetches += 1  # counted at its end: whoever came in between waited for this one
            return known.value

    def _fetch(self) -> _Token:
        grant = self._grant
        form = {"grant_type": "client_credentials"}
        if grant.scope:
            form["scope"] = grant.scope
        if grant.audience:
            form["audience"] = grant.audience
        secret = read_secret(grant.client_secret_file)
        sign_in = httpx.Auth()
        if grant.secret_in == "post":  # noqa: S105
            form |= {"client_id": grant.client_id, "client_secret": secret}
        else:
            sign_in = httpx.BasicAuth(_encoded(grant.client_id), _encoded(secret))
        self.secrets = (secret, _encoded(secret))
        asked_at = time.monotonic()
        response, body = self._ask(form, sign_in)
        return _token_in(response, body, asked_at)

    def _ask(self, form: dict[str, str], sign_in: httpx.Auth) -> tuple[httpx.Response, bytes]:
        url, known = self._grant.token_url, {SECRETS: self.secrets}
        try:
            with (
                self._open_client() as client,
                client.stream("POST", url, data=form, auth=sign_in, extensions=known) as response,
            ):
                return response, _read(response)
        except httpx.TransportError as error:
            _, words = reason_from_error(error)
            words = words.replace("the destination's", "its")
            raise SignInError(f"no answer from the token endpoint: {words}") from error
        except AttemptEndedError as error:
            if error.reason is Reason.STOPPED:
                raise
            raise SignInError(f"no answer from the token endpoint: {error.error}") from error


def _encoded(text: str) -> str:
    """Return text as RFC 6749 section 2.3.1 wants it before it goes into Basic authentication."""
    return urllib.parse.quote_plus(text)


def _read(response: httpx.Response) -> bytes:
    data = b""
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > _MOST:
            raise SignInError("the token endpoint answered with more than 64 KiB")
    return data


def _token_in(response: httpx.Response, body: bytes, asked_at: float) -> _Token:
    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if response.status_code != 200 or not isinstance(answer, dict) or "access_token" not in answer:
        complaint = quotable(_complaint(answer), response.request, 1000)
        raise SignInError(f"the token endpoint answered {response.status_code}{complaint}")
    value, kind = answer["access_token"], answer.get("token_type", "bearer")
    if not isinstance(value, str) or not value or not all("!" <= char <= "~" for char in value):
        raise SignInError("the token endpoint gave a token that no header can hold")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise SignInError("the token endpoint gave a token that is no bearer token")
    try:
        life = max(float(answer.get("expires_in", _UNSTATED)), 0.0)
    except (TypeError, ValueError, OverflowError):
        life = _UNSTATED
    if not math.isfinite(life):
        life = _UNSTATED
    return _Token(value, asked_at + life - min(_EARLY, life / 10))


def _complaint(answer: object) -> str:
    """Return the error of RFC 6749 section 5.2 in an answer."""
    if not isinstance(answer, dict):
        return " without JSON"
    words = [str(answer[key]) for key in ("error", "error_description") if key in answer]
    return f": {': '.join(words)}" if words else ""


Flow = Generator[httpx.Request, httpx.Response, None]


class BasicFile(httpx.Auth):
    """Basic authentication (RFC 7617) with the password in a file."""

    def __init__(self, user: str, password_file: Path) -> None:
        self._user = user
        self._password_file = password_file

    def auth_flow(self, request: httpx.Request) -> Flow:
        """Sign a request."""
        yield from httpx.BasicAuth(self._user, read_secret(self._password_file)).auth_flow(request)


class BearerFile(httpx.Auth):
    """A bearer token (RFC 6750) in a file, which somebody else keeps fresh."""

    def __init__(self, token_file: Path) -> None:
        self._token_file = token_file

    def auth_flow(self, request: httpx.Request) -> Flow:
        """Sign a request; after a 401 try once more if the file holds another token by now."""
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
        """Fetch a token if there is none, so that the flow need not wait for it; raises as `token`."""
        self._tokens.token()

    def auth_flow(self, request: httpx.Request) -> Flow:
        """Sign a request; after a 401 try once more with a token that is not the refused one."""
        token = self._token_for(request)
        # whoever gave out the token, and knows that, may answer here, too
        request.extensions[SECRETS] = (*request.extensions.get(SECRETS, ()), *self._tokens.secrets)
        response = yield _with_bearer(request, token)
        if response.status_code == 401:
            fresh = self._token_for(request, refused=token)
            if fresh != token:
                yield _with_bearer(request, fresh)

    def _token_for(self, request: httpx.Request, refused: str | None = None) -> str:
        """Return a token; the wait for one is bounded elsewhere: it is slow, not hung."""
        with request.extensions.get(UNWATCHED, nullcontext)():
            return self._tokens.token(refused)


def _with_bearer(request: httpx.Request, token: str) -> httpx.Request:
    request.headers["Authorization"] = f"Bearer {token}"
    return request
