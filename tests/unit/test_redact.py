"""Redaction: secrets are removed from a text in every form, and nothing else is."""

from __future__ import annotations

import base64
import html
import json
import re
import urllib.parse
from collections.abc import Callable

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.upload.http.redact import SECRET_HEADERS, redact, secrets_of

a_secret = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="*"), min_size=4)


@given(a_secret, st.text(), st.text())
def test_a_secret_is_removed_in_every_form(secret: str, before: str, after: str) -> None:
    for form in (
        secret,
        json.dumps(secret)[1:-1],
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        re.sub("%..", lambda code: code[0].lower(), urllib.parse.quote(secret)),
        urllib.parse.quote_plus(secret),
        html.escape(secret),
        base64.b64encode(secret.encode()).decode(),
    ):
        assert form not in redact(f"<{form}>", [secret])
    assert secret not in redact(before + secret + after, [secret])


ESCAPES = [
    lambda char: char,
    lambda char: f"\\u{ord(char):04x}",
    lambda char: f"\\u{ord(char):04X}",
    lambda char: f"%{ord(char):02x}",
    lambda char: f"%25{ord(char):02X}",
    lambda char: f"&#{ord(char)};",
    lambda char: f"&#x{ord(char):X};",
    lambda char: f"&amp;#{ord(char)};",
    lambda char: html.escape(html.escape(char)),
    lambda char: json.dumps(json.dumps(char))[3:-3],
    urllib.parse.quote_plus,
]


@given(
    st.text("abc019-._~ !#$'()+,/:;<=>?@[]^`{|}\"", min_size=4, max_size=20).filter(lambda s: s.strip()),
    st.lists(st.sampled_from(ESCAPES), min_size=20, max_size=20),
)
def test_a_secret_is_removed_if_each_character_is_escaped_differently(
    secret: str, escapes: list[Callable[[str], str]]
) -> None:
    escaped = [
        char if char.isalnum() else escape(char) for char, escape in zip(secret, escapes, strict=False)
    ]
    assert redact(f"value: {''.join(escaped)}", [secret]) == "value: ***"


@pytest.mark.parametrize("secret", ["%" * 40, "&" * 40, "\\" * 40, '\\"' * 20, "%&" * 20, "# +" * 20])
def test_no_text_takes_long_to_search(secret: str) -> None:
    for filler in ("%25", "&amp;", "\\", "&#0", "%", "&"):
        text = (secret[:-1] + filler * 20) * 300
        assert len(redact(text, [secret])) <= len(text)


def test_other_text_stays_unchanged() -> None:
    assert redact("the disk is full", ["token-1", "", "is"]) == "the disk is full"


@pytest.mark.parametrize(
    ("headers", "named", "secrets"),
    [
        ({}, (), {""}),
        ({"Authorization": "Bearer tok"}, (), {"tok"}),
        ({"Authorization": "Basic YTpiOmM="}, (), {"YTpiOmM=", "a:b:c", "b:c"}),
        ({"Authorization": "Basic %%%"}, (), {"%%%", ""}),
        ({"X-Api-Key": "k1", "X-Other": "o"}, ("x-api-key",), {"k1", ""}),
    ],
)
def test_the_secrets_of_a_request_are_found(
    headers: dict[str, str], named: tuple[str, ...], secrets: set[str]
) -> None:
    request = httpx.Request(
        "POST", "https://vault.test/", headers=headers, extensions={SECRET_HEADERS: named}
    )
    assert set(secrets_of(request)) == secrets
