"""Redaction: secrets are removed from a text in every escaping, and nothing else is."""

from __future__ import annotations

import base64
import html
import json
import re
import urllib.parse
from collections.abc import Callable

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backupd.upload.http.redact import SECRETS, redact, secrets_of

a_secret = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="*"), min_size=4)


@given(a_secret, st.text(), st.text())
def test_a_secret_is_removed_plain_percent_encoded_and_in_base64(
    secret: str, before: str, after: str
) -> None:
    for form in (
        secret,
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
        base64.b64encode(secret.encode()).decode(),
        base64.urlsafe_b64encode(secret.encode()).decode(),
    ):
        assert form not in redact(f"<{form}>", [secret])
    assert secret not in redact(before + secret + after, [secret])


def json_text(text: str) -> str:
    return json.dumps(text)[1:-1]


def go_text(text: str) -> str:
    return json_text(text).translate({ord(char): f"\\u{ord(char):04x}" for char in "<>&"})


def php_text(text: str) -> str:
    return json_text(text).replace("/", "\\/")


def lower_case_percent(text: str) -> str:
    return re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), urllib.parse.quote(text, safe=""))


def decimal_entities(text: str) -> str:
    return "".join(char if char.isalnum() else f"&#{ord(char)};" for char in text)


ENCODINGS = (
    json_text, go_text, php_text, lower_case_percent, decimal_entities, html.escape, urllib.parse.quote_plus,
    lambda text: html.escape(text).replace("&#x27;", "&apos;"),
    lambda text: json_text(text).replace("'", "\\u0027").replace('\\"', "\\u0022"),
    lambda text: repr(text)[1:-1],
)  # fmt: skip
IN_JSON = (json_text, go_text, php_text)
encodings = st.one_of(
    st.tuples(st.sampled_from(ENCODINGS)),
    st.tuples(st.sampled_from((html.escape, decimal_entities, *IN_JSON)), st.sampled_from(IN_JSON)),
)


@given(a_secret, encodings)
@example("000&", (decimal_entities,))
@example("000&", (html.escape, go_text))
@example("000\\", (decimal_entities, go_text))
@example("100%", (lower_case_percent,))
@example("""p"w&<x\\y'z/q""", (html.escape, json_text))
@example("""p"w&<x\\y'z/q""", (go_text, json_text))
def test_a_secret_is_removed_in_every_escaping(secret: str, chosen: tuple[Callable[[str], str], ...]) -> None:
    text = secret
    for encode in chosen:
        text = encode(text)
    assert redact(f"<{text}>", [secret]) == "<***>"


def test_a_long_run_of_backslashes_is_searched_in_time() -> None:
    assert "***" not in redact("\\" * 8000 + "x", ["\\" * 40 + '"' + "\\" * 40])


def test_other_text_stays_unchanged() -> None:
    assert redact("the disk is full", ["token-1", "", "is"]) == "the disk is full"


def test_a_secret_that_contains_another_one_is_removed_whole() -> None:
    assert redact("user admin:pass-1, pass-1", ["pass-1", "admin:pass-1"]) == "user ***, ***"


@pytest.mark.parametrize(
    ("headers", "listed", "secrets"),
    [
        ({}, (), {""}),
        ({"Authorization": "Bearer tok"}, (), {"tok"}),
        ({"Authorization": "Basic YTpiOmM="}, (), {"YTpiOmM=", "a:b:c", "b:c"}),
        ({"Authorization": "Basic %%%"}, (), {"%%%", ""}),
        ({"X-Api-Key": "k1"}, ("from-a-file",), {"from-a-file", ""}),
    ],
)
def test_the_secrets_of_a_request_are_found(
    headers: dict[str, str], listed: tuple[str, ...], secrets: set[str]
) -> None:
    request = httpx.Request("POST", "https://vault.test/", headers=headers, extensions={SECRETS: listed})
    assert set(secrets_of(request)) == secrets
