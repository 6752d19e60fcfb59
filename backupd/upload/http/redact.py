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

from backupd.config.types import names_a_credential
from backupd.core.errors import ConfigError

_MOST = 64 * 1024

SECRET_HEADERS = "backupd.secret_headers"  # noqa: S105 -- the name of a list of names
"""The extension of a request that names its header fields which hold secrets, sign-in aside."""

SECRETS = "backupd.secrets"
"""The extension of a request that holds further secrets of it, those in its body for one."""

_NO_SECRETS = frozenset({"authorization", "idempotency-key"})
"""Header fields that are named like secrets: the one is looked at by itself, the other is none."""

_IN_A_PAGE = {"&": ["amp"], "<": ["lt"], ">": ["gt"], '"': ["quot"], "'": ["apos"]}
_IN_A_FORM = {" ": [r"\+"]}

_LEAST = 4
"""Characters of what is kept out of a text: less is no secret, and would take words apart."""


_WIDEST = 24
"""Characters that stand for one of a secret, where it is escaped, at most."""


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


def redact(text: str, secrets: Iterable[str]) -> str:
    """Return a text without secrets, in whatever form an endpoint may echo them."""
    secrets = [secret for secret in secrets if len(secret) >= _LEAST]
    for form in sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True):
        text = text.replace(form, "***")
    for secret in sorted(set(secrets), key=len, reverse=True):
        text = re.sub(_escaped(secret), "***", text)
    return text


def quotable(text: str, request: httpx.Request, most: int, *, is_cut: bool = False) -> str:
    """Return the beginning of what was said to a request, without its secrets: `most` characters.

    Of what `is_cut` the end is left out, which may be the beginning of a secret.
    """
    secrets = [*secrets_of(request)]
    text = redact(text, secrets)
    if is_cut:
        text = text[: max(len(text) - _WIDEST * max(map(len, secrets), default=0), 0)]
    return text[:most]


def secrets_of(request: httpx.Request) -> Iterator[str]:
    """Yield the secrets that a request carries, and what is named like one in its header and address."""
    yield from request.extensions.get(SECRETS, ())
    for name in request.extensions.get(SECRET_HEADERS, ()):
        yield request.headers.get(name, "")
    for name, value in (*request.headers.items(), *request.url.params.multi_items()):
        if names_a_credential(name) and name not in _NO_SECRETS:
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


def _escaped(secret: str) -> str:
    """Return a pattern of a secret of which each character may be escaped in its own way, and repeatedly.

    All that repeats has a limit and no choice is taken back, so that no text takes long to be searched.
    """
    return "".join(map(_escaped_run, re.findall(r"[A-Za-z0-9]+|\\+|.", secret)))


def _escaped_run(run: str) -> str:
    if run.isalnum():
        return run
    code, count = ord(run[0]), len(run)
    in_address = "%(?:25){0,3}" if run == "%" else rf"%(?:25){{0,3}}(?i:{code:02x})"
    if run[0] == "\\":
        return rf"(?>\\{{{count},{16 * count}}}|(?>{in_address}){{{count}}})"
    names = "|".join([f"#0{{0,5}}{code}", f"#[xX]0{{0,5}}(?i:{code:x})", *_IN_A_PAGE.get(run, ())])
    in_page, in_json = rf"&(?:amp;){{0,3}}(?:{names});", rf"\\{{0,16}}(?:u(?i:{code:04x})|{re.escape(run)})"
    return f"(?>{'|'.join([in_address, in_page, in_json, *_IN_A_FORM.get(run, ())])})"
