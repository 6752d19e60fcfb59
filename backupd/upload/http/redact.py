"""Secrets: reading them from their files, and keeping them out of texts that are logged."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import urllib.parse
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import httpx

from backupd.config.types import may_be_a_secret, may_hold_a_secret
from backupd.core.errors import ConfigError

SECRETS = "backupd.secrets"
"""Name of the request extension that lists the secrets of a request, other than those in Authorization."""

GAP = "\0"
"""Takes the place of a placeholder's value where only the text around it counts."""

_MAX_SECRET_FILE_BYTES = 64 * 1024

_MIN_SECRET_LENGTH = 4
"""Shortest secret in characters that is redacted: a shorter one occurs in ordinary words."""

_CONTENT_HINT = "write the bare token or password into the file"


class SecretError(ConfigError):
    """The file of a secret can't be used; the message never contains the content."""


def read_secret(path: Path) -> str:
    """Return the content of a secret's file without white space at the end; raises SecretError.

    Only that of a regular file: reading a FIFO or a device may never end.
    """
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise SecretError(f"{path}: is not a regular file", "name a regular file, or a link to one")
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
    """Return a text with `***` in place of the secrets, in every escaping that an endpoint may use."""
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) >= _MIN_SECRET_LENGTH:
            text = _pattern(secret).sub("***", text)
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


def secrets_in_query(url: str) -> Iterator[str]:
    """Yield the values and the bare parameters in a URL's query that may be secrets."""
    for parameter in urllib.parse.urlsplit(url).query.split("&"):
        name, is_pair, value = map(urllib.parse.unquote_plus, parameter.partition("="))
        if is_pair and may_hold_a_secret(name, value.split(GAP)):
            yield from value.split(GAP)
        elif not is_pair:
            yield from filter(may_be_a_secret, name.split(GAP))


@lru_cache(maxsize=64)  # the receipt of each archive is searched for the same few secrets
def _pattern(secret: str) -> re.Pattern[str]:
    """Return a pattern of a secret: with any of its characters escaped, or in base64 without its padding."""
    encoded = base64.b64encode(secret.encode()).decode("ascii").rstrip("=")
    forms = (_SPECIAL.sub(_escaped, secret), re.escape(encoded), re.escape(encoded.translate(_URL_SAFE)))
    return re.compile("|".join(forms))


_URL_SAFE = str.maketrans("+/", "-_")

_SPECIAL = re.compile(r"\\+|[^A-Za-z0-9]")
"""Characters that some encoding escapes; several backslashes count as one, or the search could take long."""

_AMPERSAND = r"(?:&|\\{1,4}u0026|%26)(?:amp;)*"
_ENTITIES = {'"': "quot", "'": "apos", "&": "amp", "<": "lt", ">": "gt"}


def _escaped(found: re.Match[str]) -> str:
    """Return a pattern of a character as it is, and in JSON, PHP, HTML and URLs, also in one another."""
    text = found[0]
    if text.startswith("\\"):
        count = len(text)
        one = rf"%(?:25)*5c|{_AMPERSAND}#(?:92|x5c);|\\{{1,4}}u005c"
        return rf"(?:(?i:{one}){{{count}}}|\\{{{count},{8 * count}}})"
    code = ord(text)
    percent = "".join(f"%(?:25)*{byte:02x}" for byte in text.encode("utf-8", "surrogatepass"))
    # the longer ones first: an escaping may begin with the character itself, or with another one of it
    forms = [f"{_AMPERSAND}{_ENTITIES[text]};"] if text in _ENTITIES else []
    forms.append(rf"{_AMPERSAND}#(?:0*{code}|(?i:x0*{code:x}));")
    forms.append(rf"(?i:\\{{1,4}}(?:u{code:04x}|x{code:02x})|{percent})")
    if text == " ":
        forms.append(r"\+")
    forms.append(rf"\\{{0,7}}{re.escape(text)}")
    return f"(?:{'|'.join(forms)})"
