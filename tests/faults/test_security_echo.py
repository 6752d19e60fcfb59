"""A secret that an endpoint, a token endpoint or a proxy quotes appears in no error.

The forms are those that backupd redacts: plain, percent-encoded, and base64.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backupd.core.model import Deferred, Outcome, Rejected
from backupd.upload.registry import probe_all
from tests.scripted import Peer, ScriptedServer, header_of, http_response
from tests.uploading import a_destination, a_sender, an_archive

SECRET = "s3cr'et/<MARKER>&four+five =~"
MAX_LENGTH = 1500
"""Maximum number of characters of an error with text of an endpoint."""

Response = Callable[[str], bytes]
"""Return the response of an endpoint that quotes a secret."""


def raw(text: str) -> bytes:
    return text.encode("latin-1")


PLACES: dict[str, Response] = {
    "the body": lambda secret: http_response(500, raw(secret)),
    "the reason phrase": lambda secret: raw(f"HTTP/1.1 500 {secret}\r\nContent-Length: 0\r\n\r\n"),
    "a location that is cut": lambda secret: http_response(302, Location="/" + "x" * 180 + secret),
    "a body that is cut": lambda secret: http_response(500, b"x" * 285 + raw(secret)),
    "a header without a colon": lambda secret: raw(f"HTTP/1.1 500 No\r\n{secret}\r\n\r\n"),
    "a header with a control character": lambda secret: raw(f"HTTP/1.1 500 No\r\nX: {secret}\x00\r\n\r\n"),
    "a malformed status line": lambda secret: raw(f"HTTP/1.1 {secret} No\r\n\r\n"),
    "a transfer encoding": lambda secret: raw(f"HTTP/1.1 201 OK\r\nTransfer-Encoding: {secret}\r\n\r\n"),
    "a content length": lambda secret: raw(f"HTTP/1.1 201 OK\r\nContent-Length: {secret}\r\n\r\n"),
    "the digest": lambda secret: http_response(201, json.dumps({"sha256": secret}).encode()),
    "a digest that is cut": lambda secret: http_response(
        201, json.dumps({"sha256": "x" * 185 + secret}).encode()
    ),
    "the size": lambda secret: http_response(201, json.dumps({"size": secret}).encode()),
}

FORMS: dict[str, Callable[[str], str]] = {
    "plain": lambda secret: secret,
    "in a path": urllib.parse.quote,
    "in a URL": lambda secret: urllib.parse.quote(secret, safe=""),
    "in a form": urllib.parse.quote_plus,
    "in base64": lambda secret: base64.b64encode(secret.encode()).decode(),
    "in base64url": lambda secret: base64.urlsafe_b64encode(secret.encode()).decode().rstrip("="),
}


def error_of(outcome: Outcome) -> str:
    assert isinstance(outcome, Deferred | Rejected), outcome
    return outcome.error


def assert_clean(text: str) -> None:
    for form in FORMS.values():
        assert form(SECRET) not in text
    readable = text + urllib.parse.unquote(text)
    for part in ("s3cr", "MARKER", "four", "five"):
        assert part not in readable, text
    assert base64.b64encode(SECRET.encode())[:16].decode() not in text
    assert len(text) < MAX_LENGTH


def always(response: bytes) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer.read_request()
                peer.send(response)

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
def test_an_error_hides_a_secret_in_any_part_of_a_response(
    tmp_path: Path, place: Response, name: str
) -> None:
    with ScriptedServer(always(place(SECRET))) as server:
        keys = scheme(name, tmp_path) | {"receipt": {"size": "body:/size"}}
        with a_sender(a_destination(server.url, **keys)) as sender:
            assert_clean(error_of(sender.send(an_archive(tmp_path, b"content"))))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_error_hides_a_secret_in_each_form(tmp_path: Path, form: Callable[[str], str]) -> None:
    for name in ("bearer", "basic", "header"):
        with ScriptedServer(always(http_response(400, raw(form(SECRET))))) as server:
            with a_sender(a_destination(server.url, **scheme(name, tmp_path))) as sender:
                error = error_of(sender.send(an_archive(tmp_path, b"content")))
        assert_clean(error)
        assert "***" in error


TOKEN = "Tk" + "".join(random.Random(7).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=98))
"""A secret without characters that an encoding escapes."""


@pytest.mark.parametrize("left", [1, 50, 99])
def test_an_error_hides_the_part_of_a_secret_before_the_cut_of_a_digest(tmp_path: Path, left: int) -> None:
    """Hidden secrets before the cut shorten the text, so that more of its end fits into the error."""
    file = tmp_path / "secret"
    file.write_text(TOKEN)
    stated = json.dumps({"sha256": "z" * (1024 - 9 * len(TOKEN) - left) + TOKEN * 10}).encode()
    with ScriptedServer(always(http_response(201, stated))) as server:
        auth = {"type": "bearer", "token_file": file}
        with a_sender(a_destination(server.url, auth=auth)) as sender:
            error = error_of(sender.send(an_archive(tmp_path, b"content")))
    assert TOKEN[:8] not in error
    assert len(error) < MAX_LENGTH


LONG = {**PLACES, "a size": lambda text: http_response(201, raw(f'{{"size": {text}}}'))}


@pytest.mark.parametrize("place", LONG.values(), ids=LONG)
def test_an_error_is_limited_in_length(tmp_path: Path, place: Response) -> None:
    with ScriptedServer(always(place("9" * 4000))) as server:
        with a_sender(a_destination(server.url, receipt={"size": "body:/size"})) as sender:
            assert len(error_of(sender.send(an_archive(tmp_path, b"content")))) < MAX_LENGTH


TOKEN_PLACES: dict[str, Response] = {
    **PLACES,
    "an error": lambda secret: http_response(400, json.dumps({"error": secret}).encode()),
    "a description that is cut": lambda secret: http_response(
        400, json.dumps({"error": "no", "error_description": "x" * 985 + secret}).encode()
    ),
    "a content type that is cut": lambda secret: http_response(200, b"x", Content_Type="x" * 190 + secret),
    "a list of errors": lambda secret: http_response(403, json.dumps({"errors": [secret]}).encode()),
    "an error that is an object": lambda secret: http_response(
        400, json.dumps({"error": {"text": secret}}).encode()
    ),
}


@pytest.mark.parametrize("secret_in", ["basic", "post"])
@pytest.mark.parametrize("place", TOKEN_PLACES.values(), ids=TOKEN_PLACES)
def test_an_error_hides_a_client_secret_in_any_part_of_a_token_response(
    tmp_path: Path, place: Response, secret_in: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    with ScriptedServer(always(place(SECRET))) as server:
        auth = {
            "type": "oauth2",
            "client_id": "backupd",
            "client_secret_file": secret,
            "token_url": server.url,
            "secret_in": secret_in,
        }
        with a_sender(a_destination(server.url, auth=auth)) as sender:
            assert_clean(error_of(sender.send(an_archive(tmp_path, b"content"))))


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_an_error_hides_a_proxy_password_in_any_part_of_a_response(tmp_path: Path, place: Response) -> None:
    password = tmp_path / "secret"
    password.write_text(SECRET)

    def script(peer: Peer) -> None:
        credentials = (header_of(peer.read_head(), "proxy-authorization") or "").partition(" ")[2]
        peer.send(place(SECRET if peer.number else credentials))

    with ScriptedServer(script) as server:
        proxy = f"http://127.0.0.1:{server.port}"
        keys: dict[str, Any] = {"proxy": proxy, "proxy_user": "me", "proxy_password_file": password}
        with a_sender(a_destination("https://vault.example.net/", **keys)) as sender:
            for _ in range(2):  # the first response quotes the header, the second one the password
                error = error_of(sender.send(an_archive(tmp_path, b"content")))
                assert_clean(error)
                assert base64.b64encode(f"me:{SECRET}".encode()).decode() not in error


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_check_hides_a_secret_in_any_part_of_a_response(tmp_path: Path, place: Response) -> None:
    with ScriptedServer(always(place(SECRET))) as server:
        (probe,) = probe_all({"vault": a_destination(server.url, **scheme("bearer", tmp_path))})
        assert_clean(probe.detail)


def test_an_error_hides_values_that_are_named_like_a_secret(tmp_path: Path) -> None:
    """The headers and query values that `config show` hides as well."""
    quoted = http_response(500, b"POST /up?api_key=MARKER-in-url&site=north; X-Auth-Token: MARKER-in-header")
    with ScriptedServer(always(quoted)) as server:
        keys: dict[str, Any] = {"headers": {"X-Auth-Token": "MARKER-in-header"}}
        with a_sender(a_destination(f"{server.url}?api_key=MARKER-in-url&site=north", **keys)) as sender:
            error = error_of(sender.send(an_archive(tmp_path, b"content")))
    assert "MARKER" not in error
    assert "north" in error


def test_an_error_hides_the_constant_text_around_a_placeholder(tmp_path: Path) -> None:
    with ScriptedServer(
        always(http_response(500, b"no user MARKER-a.tar.gz-END, k MARKER-q-a.tar.gz"))
    ) as server:
        keys: dict[str, Any] = {"headers": {"X-Token": "MARKER-{name}-END"}}
        with a_sender(a_destination(f"{server.url}?key=MARKER-q-{{name}}", **keys)) as sender:
            error = error_of(sender.send(an_archive(tmp_path, b"content")))
    assert "no user ***a.tar.gz***, k ***a.tar.gz" in error


def test_a_check_hides_a_secret_in_a_header_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    with ScriptedServer(always(PLACES["a malformed status line"](SECRET))) as server:
        destination = a_destination(server.url, header_files={"X-Site": tmp_path / "secret"})
        (probe,) = probe_all({"vault": destination})
    assert_clean(probe.detail)
    assert "***" in probe.detail


def test_an_upload_error_hides_a_client_secret(tmp_path: Path) -> None:
    """One server may be both the token endpoint and the destination."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET)

    def script(peer: Peer) -> None:
        with contextlib.suppress(OSError):
            while True:
                request = peer.read_request()
                if b"grant_type" in request.body:
                    peer.send(http_response(200, json.dumps({"access_token": "t0ken"}).encode()))
                else:
                    peer.send(http_response(503, raw(f"you signed in with {SECRET}")))

    with ScriptedServer(script) as server:
        auth = {
            "type": "oauth2",
            "client_id": "backupd",
            "client_secret_file": secret,
            "token_url": server.url,
        }
        with a_sender(a_destination(server.url, auth=auth)) as sender:
            error = error_of(sender.send(an_archive(tmp_path, b"content")))
    assert_clean(error)
    assert "you signed in with ***" in error


def test_an_error_hides_a_form_field_that_is_named_like_a_secret(tmp_path: Path) -> None:
    with ScriptedServer(always(http_response(400, b"bad api_key MARKER-core, site north"))) as server:
        fields = {"api_key": "MARKER-core", "site": "north"}
        with a_sender(a_destination(server.url, fields=fields)) as sender:
            error = error_of(sender.send(an_archive(tmp_path, b"content")))
    assert "MARKER" not in error
    assert "north" in error
