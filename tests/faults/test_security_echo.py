"""Wherever and however an endpoint, a token endpoint or a proxy quotes a secret, nobody is told it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
import random
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backupd.core.model import Deferred, Delivered, Outcome, Rejected
from backupd.upload.registry import probe_all
from tests.scripted import Peer, ScriptedServer, answer, header_of
from tests.uploading import a_destination, a_sender, an_archive

SECRET = "s3cr'et/<MARKER>&\"four\\five +=~"
LONGEST = 1500
"""Characters of an error that an endpoint can fill with its own words."""

Answering = Callable[[str], bytes]
"""What is answered by one who knows a secret."""


def raw(text: str) -> bytes:
    return text.encode("latin-1")


PLACES: dict[str, Answering] = {
    "the body": lambda secret: answer(500, raw(secret)),
    "the reason phrase": lambda secret: raw(f"HTTP/1.1 500 {secret}\r\nContent-Length: 0\r\n\r\n"),
    "a location that is cut": lambda secret: answer(302, Location="/" + "x" * 180 + secret),
    "a body that is cut": lambda secret: answer(500, b"x" * 285 + raw(secret)),
    "a header without a colon": lambda secret: raw(f"HTTP/1.1 500 No\r\n{secret}\r\n\r\n"),
    "a header with a control character": lambda secret: raw(f"HTTP/1.1 500 No\r\nX: {secret}\x00\r\n\r\n"),
    "a status line that is none": lambda secret: raw(f"HTTP/1.1 {secret} No\r\n\r\n"),
    "a transfer encoding": lambda secret: raw(f"HTTP/1.1 201 OK\r\nTransfer-Encoding: {secret}\r\n\r\n"),
    "a content length": lambda secret: raw(f"HTTP/1.1 201 OK\r\nContent-Length: {secret}\r\n\r\n"),
    "the digest": lambda secret: answer(201, json.dumps({"sha256": secret}).encode()),
    "a digest that is cut": lambda secret: answer(201, json.dumps({"sha256": "x" * 185 + secret}).encode()),
    "the size": lambda secret: answer(201, json.dumps({"size": secret}).encode()),
}

FORMS: dict[str, Callable[[str], str]] = {
    "plain": lambda secret: secret,
    "as JSON": json.dumps,
    "as JSON for a page": lambda secret: re.sub(
        "[<>&'+]", lambda c: f"\\u{ord(c[0]):04x}", json.dumps(secret)
    ),
    "as JSON twice": lambda secret: json.dumps(json.dumps({"said": secret})),
    "in an address": lambda secret: urllib.parse.quote(secret, safe=""),
    "in an address, twice": lambda secret: urllib.parse.quote(urllib.parse.quote(secret, safe="")),
    "in a form": urllib.parse.quote_plus,
    "in a page": html.escape,
    "in a page, by numbers": lambda secret: (
        html.escape(secret).replace("&quot;", "&#34;").replace("&#x27;", "&#39;").replace("+", "&#43;")
    ),
    "of Python": lambda secret: repr(secret.encode()),
    "in base64": lambda secret: base64.b64encode(secret.encode()).decode(),
    "in base64url": lambda secret: base64.urlsafe_b64encode(secret.encode()).decode().rstrip("="),
}


def told(outcome: Outcome) -> str:
    assert isinstance(outcome, Deferred | Rejected), outcome
    return outcome.error


def assert_clean(text: str) -> None:
    for form in FORMS.values():
        assert form(SECRET) not in text
    readable = text + urllib.parse.unquote(text) + html.unescape(text)
    for part in ("s3cr", "MARKER", "four", "five"):
        assert part not in readable, text
    assert base64.b64encode(SECRET.encode())[:16].decode() not in text
    assert len(text) < LONGEST


def answering(said: bytes) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer.read_request()
                peer.send(said)

    return script


def scheme(name: str, folder: Path) -> dict[str, Any]:
    file = folder / "secret"
    file.write_text(SECRET)
    schemes: dict[str, dict[str, Any]] = {
        "bearer": {"auth": {"type": "bearer", "token_file": file}},
        "basic": {"auth": {"type": "basic", "user": "ers-admin", "password_file": file}},
        "header": {"header_files": {"X-API-Key": file}},
    }
    return schemes[name]


@pytest.mark.parametrize("name", ["bearer", "basic", "header"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_secret_is_not_told_wherever_an_endpoint_quotes_it(
    tmp_path: Path, place: Answering, name: str
) -> None:
    with ScriptedServer(answering(place(SECRET))) as server:
        keys = scheme(name, tmp_path) | {"receipt": {"size": "body:/size"}}
        with a_sender(a_destination(server.url, **keys)) as sender:
            assert_clean(told(sender.send(an_archive(tmp_path, b"content"))))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_secret_is_not_told_in_whatever_form_it_is_quoted(
    tmp_path: Path, form: Callable[[str], str]
) -> None:
    for name in ("bearer", "basic", "header"):
        with ScriptedServer(answering(answer(400, raw(form(SECRET))))) as server:
            with a_sender(a_destination(server.url, **scheme(name, tmp_path))) as sender:
                said = told(sender.send(an_archive(tmp_path, b"content")))
        assert_clean(said)
        assert "***" in said


TOKEN = "Tk" + "".join(random.Random(7).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=98))
"""One that no escape makes longer."""

CUTS: dict[str, Callable[[int], bytes]] = {
    "a digest": lambda left: answer(
        201, json.dumps({"sha256": "z" * (1024 - 9 * len(TOKEN) - left) + TOKEN * 10}).encode()
    ),
    "a refusal": lambda left: answer(503, b"z" * ((65536 - left) % len(TOKEN)) + TOKEN.encode() * 700),
}


@pytest.mark.parametrize("left", [1, 50, 99])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_secret_that_lies_across_a_cut_is_not_told_as_far_as_it_goes(
    tmp_path: Path, cut: Callable[[int], bytes], left: int
) -> None:
    """What is hidden before it is shorter than it was, so that the end comes into sight."""
    file = tmp_path / "secret"
    file.write_text(TOKEN)
    with ScriptedServer(answering(cut(left))) as server:
        auth = {"type": "bearer", "token_file": file}
        with a_sender(a_destination(server.url, auth=auth)) as sender:
            said = told(sender.send(an_archive(tmp_path, b"content")))
    assert TOKEN[:8] not in said
    assert len(said) < LONGEST


def test_a_receipt_keeps_no_secret_that_lies_across_its_end(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(TOKEN)
    digest = hashlib.sha256(b"content").hexdigest()
    body = b"z" * ((65536 - 99) % len(TOKEN)) + TOKEN.encode() * 700
    with ScriptedServer(answering(answer(201, body, X_Digest=digest))) as server:
        keys: dict[str, Any] = {"auth": {"type": "bearer", "token_file": file}}
        keys["receipt"] = {"digest": "header:X-Digest"}
        with a_sender(a_destination(server.url, **keys)) as sender:
            outcome = sender.send(an_archive(tmp_path, b"content"))
    assert isinstance(outcome, Delivered)
    assert TOKEN[:8] not in outcome.receipt.body


LONG = {**PLACES, "a size": lambda text: answer(201, raw(f'{{"size": {text}}}'))}


@pytest.mark.parametrize("place", LONG.values(), ids=LONG)
def test_words_without_an_end_are_cut(tmp_path: Path, place: Answering) -> None:
    with ScriptedServer(answering(place("9" * 4000))) as server:
        with a_sender(a_destination(server.url, receipt={"size": "body:/size"})) as sender:
            assert len(told(sender.send(an_archive(tmp_path, b"content")))) < LONGEST


TOKEN_PLACES: dict[str, Answering] = {
    **PLACES,
    "an error": lambda secret: answer(400, json.dumps({"error": secret}).encode()),
    "a description that is cut": lambda secret: answer(
        400, json.dumps({"error": "no", "error_description": "x" * 985 + secret}).encode()
    ),
    "an error that is no text": lambda secret: answer(400, json.dumps({"error": {"said": secret}}).encode()),
}


@pytest.mark.parametrize("secret_in", ["basic", "post"])
@pytest.mark.parametrize("place", TOKEN_PLACES.values(), ids=TOKEN_PLACES)
def test_a_client_secret_is_not_told_wherever_a_token_endpoint_quotes_it(
    tmp_path: Path, place: Answering, secret_in: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    with ScriptedServer(answering(place(SECRET))) as server:
        auth = {
            "type": "oauth2",
            "client_id": "backupd",
            "client_secret_file": secret,
            "token_url": server.url,
            "secret_in": secret_in,
        }
        with a_sender(a_destination(server.url, auth=auth)) as sender:
            assert_clean(told(sender.send(an_archive(tmp_path, b"content"))))


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_password_is_not_told_wherever_a_proxy_quotes_it(tmp_path: Path, place: Answering) -> None:
    password = tmp_path / "secret"
    password.write_text(SECRET)

    def script(peer: Peer) -> None:
        signed = (header_of(peer.read_head(), "proxy-authorization") or "").partition(" ")[2]
        peer.send(place(SECRET if peer.number else signed))

    with ScriptedServer(script) as server:
        proxy = f"http://127.0.0.1:{server.port}"
        keys: dict[str, Any] = {"proxy": proxy, "proxy_user": "me", "proxy_password_file": password}
        with a_sender(a_destination("https://vault.example.net/", **keys)) as sender:
            for _ in range(2):  # at first the header as it was sent, then the password
                said = told(sender.send(an_archive(tmp_path, b"content")))
                assert_clean(said)
                assert base64.b64encode(f"me:{SECRET}".encode()).decode() not in said


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_check_tells_no_secret_either(tmp_path: Path, place: Answering) -> None:
    with ScriptedServer(answering(place(SECRET))) as server:
        (probe,) = probe_all({"vault": a_destination(server.url, **scheme("bearer", tmp_path))})
        assert_clean(probe.detail)


def test_what_is_named_like_a_secret_is_none_to_be_told(tmp_path: Path) -> None:
    """A header, or a value in the query of an address, that `config show` hides, too."""
    quoted = answer(500, b"POST /up?api_key=MARKER-in-url&site=north; X-Auth-Token: MARKER-in-header")
    with ScriptedServer(answering(quoted)) as server:
        keys: dict[str, Any] = {"headers": {"X-Auth-Token": "MARKER-in-header"}}
        with a_sender(a_destination(f"{server.url}?api_key=MARKER-in-url&site=north", **keys)) as sender:
            said = told(sender.send(an_archive(tmp_path, b"content")))
    assert "MARKER" not in said
    assert "north" in said


def test_a_client_secret_is_not_told_where_an_archive_is_taken_either(tmp_path: Path) -> None:
    """The server of the token endpoint may be that of the archives."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET)

    def script(peer: Peer) -> None:
        with contextlib.suppress(OSError):
            while True:
                request = peer.read_request()
                if b"grant_type" in request.body:
                    peer.send(answer(200, json.dumps({"access_token": "t0ken"}).encode()))
                else:
                    peer.send(answer(503, raw(f"you signed in with {SECRET}")))

    with ScriptedServer(script) as server:
        auth = {
            "type": "oauth2",
            "client_id": "backupd",
            "client_secret_file": secret,
            "token_url": server.url,
        }
        with a_sender(a_destination(server.url, auth=auth)) as sender:
            said = told(sender.send(an_archive(tmp_path, b"content")))
    assert_clean(said)
    assert "you signed in with ***" in said


def test_a_field_that_is_named_like_a_secret_is_none_to_be_told(tmp_path: Path) -> None:
    with ScriptedServer(answering(answer(400, b"bad api_key MARKER-core, site north"))) as server:
        fields = {"api_key": "MARKER-core", "site": "north"}
        with a_sender(a_destination(server.url, fields=fields)) as sender:
            said = told(sender.send(an_archive(tmp_path, b"content")))
    assert "MARKER" not in said
    assert "north" in said
