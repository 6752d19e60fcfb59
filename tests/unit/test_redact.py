"""Redaction: secrets are removed from a text in three forms, and nothing else is."""

from __future__ import annotations

import base64
import urllib.parse

import httpx
import pytest
from hypothesis import given
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
