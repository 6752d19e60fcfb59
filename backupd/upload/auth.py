"""Signing in: each scheme an `httpx.Auth` whose secrets are files."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path

import httpx

from backupd.upload.line import UNWATCHED
from backupd.upload.oauth2 import TokenSource
from backupd.upload.secret import SECRETS, read_secret

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
