"""Tokens by the client credentials grant (RFC 6749 section 4.4), fetched once for all workers."""

from __future__ import annotations

import json
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from backupd.upload.secret import read_secret

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

    Whoever finds it stale fetches a new one, once, while the others wait for it.
    """

    def __init__(self, grant: Grant, open_client: Callable[[], httpx.Client]) -> None:
        self._grant = grant
        self._open_client = open_client
        self._lock = threading.Lock()
        self._token: _Token | None = None

    def token(self, refused: str | None = None) -> str:
        """Return a token that is not the refused one; raises SignInError, and what the client raises."""
        with self._lock:
            known = self._token
            if known is None or known.value == refused or time.monotonic() >= known.replace_at:
                self._token = known = self._fetch()
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
        asked_at = time.monotonic()
        with self._open_client() as client:
            response = client.post(grant.token_url, data=form, auth=sign_in)
        return _token_in(response, asked_at)


def _encoded(text: str) -> str:
    """Return text as RFC 6749 section 2.3.1 wants it before it goes into Basic authentication."""
    return urllib.parse.quote_plus(text)


def _token_in(response: httpx.Response, asked_at: float) -> _Token:
    try:
        answer: Any = json.loads(response.content)
    except (ValueError, RecursionError):
        answer = None
    if response.status_code != 200 or not isinstance(answer, dict) or "access_token" not in answer:
        raise SignInError(f"the token endpoint answered {response.status_code}{_complaint(answer)}")
    value, kind = answer["access_token"], answer.get("token_type", "bearer")
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not value:
        raise SignInError("the token endpoint gave a token that no header can hold")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise SignInError("the token endpoint gave a token that is no bearer token")
    try:
        life = max(float(answer.get("expires_in", _UNSTATED)), 0.0)
    except (TypeError, ValueError):
        life = _UNSTATED
    return _Token(value, asked_at + life - min(_EARLY, life / 10))


def _complaint(answer: object) -> str:
    """Return the error of RFC 6749 section 5.2 in an answer."""
    if not isinstance(answer, dict):
        return " without JSON"
    words = [str(answer[key])[:200] for key in ("error", "error_description") if key in answer]
    return f": {': '.join(words)}" if words else ""
