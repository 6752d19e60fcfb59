"""Secrets, which are files: read when they are needed, so that a new one counts at once."""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx

from backupd.core.errors import ConfigError

_MOST = 64 * 1024

SECRET_HEADERS = "backupd.secret_headers"  # noqa: S105 -- the name of a list of names
"""The extension of a request that names its header fields which hold secrets, sign-in aside."""

_LEAST = 4
"""Characters of what is kept out of a text: less is no secret, and would take words apart."""


class SecretError(ConfigError):
    """A secret's file can't be used; its content is never part of the message."""


def read_secret(path: Path) -> str:
    """Return the content of a secret's file less white space at its end."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST + 1)
    except OSError as error:
        raise SecretError(
            f"{path}: can't be read ({error.strerror})", "check the file and its owner"
        ) from error
    if len(content) > _MOST:
        raise SecretError(f"{path}: is larger than 64 KiB", "write the bare token or password")
    secret = content.rstrip()
    if not secret or not all(0x20 <= byte < 0x7F for byte in secret):
        raise SecretError(f"{path}: holds no secret on one line of ASCII", "write the bare token or password")
    return secret.decode("ascii")


def without(text: str, secrets: Iterable[str]) -> str:
    """Return a text without secrets, in whatever form an endpoint may echo them."""
    forms = {form for secret in secrets for form in _forms(secret) if len(form) >= _LEAST}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def secrets_of(request: httpx.Request) -> Iterator[str]:
    """Yield the secrets that a request carries in its header."""
    for name in request.extensions.get(SECRET_HEADERS, ()):
        yield request.headers.get(name, "")
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    yield value
    if scheme == "Basic":
        try:
            pair = base64.b64decode(value).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            return
        yield pair
        yield pair.partition(":")[2]


def _forms(secret: str) -> Iterator[str]:
    in_json = json.dumps(secret)[1:-1]
    yield secret
    for quoted in (
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
    ):
        yield quoted
        yield re.sub("%..", lambda code: code[0].lower(), quoted)
    yield in_json
    yield in_json.replace("/", "\\/")
    yield html.escape(secret)
    yield base64.b64encode(secret.encode()).decode("ascii")
