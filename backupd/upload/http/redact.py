"""Secrets: reading them from their files, and keeping them out of texts that are logged."""

from __future__ import annotations

import base64
import binascii
import urllib.parse
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import httpx

from backupd.core.errors import ConfigError

SECRETS = "backupd.secrets"
"""Name of the request extension that lists the secrets of a request, other than those in Authorization."""

_MAX_SECRET_FILE_BYTES = 64 * 1024

_MIN_SECRET_LENGTH = 4
"""Shortest secret in characters that is redacted: a shorter one occurs in ordinary words."""

_CONTENT_HINT = "write the bare token or password into the file"


class SecretError(ConfigError):
    """The file of a secret can't be used; the message never contains the content."""


def read_secret(path: Path) -> str:
    """Return the content of a secret's file without white space at the end; raises SecretError."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_SECRET_FILE_BYTES + 1)
    except OSError as error:
        raise SecretError(
            f"{path}: can't be read ({error.strerror})", "let the daemon's user read the file"
        ) from error
    if len(content) > _MAX_SECRET_FILE_BYTES:
        raise SecretError(f"{path}: is larger than 64 KiB", _CONTENT_HINT)
    secret = content.rstrip()
    if not secret or not all(0x20 <= byte < 0x7F for byte in secret):
        raise SecretError(f"{path}: expected one line of printable ASCII", _CONTENT_HINT)
    return secret.decode("ascii")


def redact(text: str, secrets: Iterable[str]) -> str:
    """Return a text with `***` in place of the secrets: as they are, percent-encoded, and in base64."""
    forms = {form for secret in secrets if len(secret) >= _MIN_SECRET_LENGTH for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def quotable(text: str, request: httpx.Request, max_length: int) -> str:
    """Return up to `max_length` characters of a response's text, without the secrets of its request."""
    return redact(text, secrets_of(request))[:max_length]


def secrets_of(request: httpx.Request) -> Iterator[str]:
    """Yield the secrets of a request: those in its extension, and the credentials in Authorization."""
    yield from request.extensions.get(SECRETS, ())
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    yield value
    if scheme == "Basic":
        try:
            pair = base64.b64decode(value).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            return
        yield pair
        yield pair.partition(":")[2]


@lru_cache(maxsize=64)  # the receipt of each archive is searched for the same few secrets
def _forms(secret: str) -> frozenset[str]:
    """Return the forms of a secret in which an endpoint may quote it; base64 without its padding."""
    encoded = base64.b64encode(secret.encode()).decode("ascii").rstrip("=")
    return frozenset(
        (
            secret,
            secret.replace("\\", "\\\\").replace("'", "\\'"),  # as h11 quotes received bytes in its errors
            urllib.parse.quote(secret),
            urllib.parse.quote(secret, safe=""),
            urllib.parse.quote_plus(secret),
            encoded,
            encoded.translate(str.maketrans("+/", "-_")),
        )
    )
