"""Secrets: reading them from their files, and keeping them out of texts that are logged."""

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

from backupd.config.types import names_a_credential
from backupd.core.errors import ConfigError

SECRET_HEADERS = "backupd.secret_headers"  # noqa: S105 -- the name of a list of names
"""Name of the request extension that lists the header fields with secrets, other than Authorization."""

SECRETS = "backupd.secrets"
"""Name of the request extension that lists further secrets of the request, such as those in its body."""

_MAX_SECRET_FILE_BYTES = 64 * 1024

_NOT_SECRET_BY_NAME = frozenset({"authorization", "idempotency-key"})
"""Header fields named like a credential: the first is parsed separately, the second is public."""

_HTML_ENTITIES = {"&": ["amp"], "<": ["lt"], ">": ["gt"], '"': ["quot"], "'": ["apos"]}
_FORM_ESCAPES = {" ": [r"\+"]}

_MIN_SECRET_LENGTH = 4
"""Shortest secret in characters that is redacted: a shorter one occurs in ordinary words."""

_MAX_ESCAPED_LENGTH = 24
"""Longest escaped form of one character of a secret, in characters."""


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
    """Return a text with `***` in place of the secrets, in every form in which an endpoint may echo them."""
    secrets = [secret for secret in secrets if len(secret) >= _MIN_SECRET_LENGTH]
    for form in sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True):
        text = text.replace(form, "***")
    for secret in sorted(set(secrets), key=len, reverse=True):
        text = re.sub(_escaped_pattern(secret), "***", text)
    return text


def quotable(text: str, request: httpx.Request, max_length: int, *, is_cut: bool = False) -> str:
    """Return up to `max_length` characters of a response's text, without the secrets of its request.

    If the text `is_cut`, its end is left out: it may be the beginning of a secret.
    """
    secrets = [*secrets_of(request)]
    text = redact(text, secrets)
    if is_cut:
        text = text[: max(len(text) - _MAX_ESCAPED_LENGTH * max(map(len, secrets), default=0), 0)]
    return text[:max_length]


def secrets_of(request: httpx.Request) -> Iterator[str]:
    """Yield the secrets of a request, and the values of fields and parameters named like a credential."""
    yield from request.extensions.get(SECRETS, ())
    for name in request.extensions.get(SECRET_HEADERS, ()):
        yield request.headers.get(name, "")
    for name, value in (*request.headers.items(), *request.url.params.multi_items()):
        if names_a_credential(name) and name not in _NOT_SECRET_BY_NAME:
            yield value
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
    """Yield a secret as it is, and in the usual encodings: URL, form, JSON, HTML and base64."""
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
    encoded = base64.b64encode(secret.encode()).decode("ascii")
    yield encoded
    yield encoded.rstrip("=")
    yield encoded.rstrip("=").translate(str.maketrans("+/", "-_"))


def _escaped_pattern(secret: str) -> str:
    """Return a pattern of a secret in which each character may be escaped, in any way and repeatedly.

    Every repetition is bounded and every group is atomic, so that the search takes linear time.
    """
    return "".join(map(_run_pattern, re.findall(r"[A-Za-z0-9]+|\\+|.", secret)))


def _run_pattern(run: str) -> str:
    """Return the pattern of letters and digits, of backslashes, or of one other character."""
    if run.isalnum():
        return run
    code, count = ord(run[0]), len(run)
    in_url = "%(?:25){0,3}" if run == "%" else rf"%(?:25){{0,3}}(?i:{code:02x})"
    if run[0] == "\\":
        return rf"(?>\\{{{count},{16 * count}}}|(?>{in_url}){{{count}}})"
    names = "|".join([f"#0{{0,5}}{code}", f"#[xX]0{{0,5}}(?i:{code:x})", *_HTML_ENTITIES.get(run, ())])
    in_html, in_json = rf"&(?:amp;){{0,3}}(?:{names});", rf"\\{{0,16}}(?:u(?i:{code:04x})|{re.escape(run)})"
    return f"(?>{'|'.join([in_url, in_html, in_json, *_FORM_ESCAPES.get(run, ())])})"
