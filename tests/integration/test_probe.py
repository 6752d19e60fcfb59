"""The probe of destinations by `backupd check`, which sends no archive."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from email.utils import formatdate
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from backupd.core.policy import Reason
from backupd.upload.base import ProbeResult
from backupd.upload.registry import probe_all
from tests.endpoints import CLIENT_ID, CLIENT_SECRET, Login, a_full_listener, oauth_error
from tests.pki import KeyPair, Pki, in_days
from tests.programs import require
from tests.scripted import (
    Peer,
    Request,
    Script,
    ScriptedServer,
    header_of,
    http_response,
    receipt_for,
    server_context,
)
from tests.stage import TIMEOUT, Stage
from tests.uploading import a_destination


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def respond_with(status: int = 204, body: bytes = b"", *, clock_ahead: float = 0.0, **headers: str) -> Script:
    """Return a script with a fixed response and a clock that is `clock_ahead` seconds ahead."""

    def script(peer: Peer) -> None:
        while True:
            peer.read_request()
            date = formatdate(time.time() + clock_ahead, usegmt=True)
            peer.send(http_response(status, body, Date=date, **headers))

    return script


def require_header(value: str, name: str = "authorization") -> Script:
    """Return a script that responds 401 unless a header field has this value."""

    def script(peer: Peer) -> None:
        while True:
            is_valid = peer.read_request().header(name) == value
            peer.send(http_response(204 if is_valid else 401))

    return script


def probe(url: str, pki: Pki, **keys: Any) -> ProbeResult:
    (result,) = probe_all({"vault": a_destination(url, pki, **keys)})
    return result


def without_client_certificates(pki: Pki) -> ssl.SSLContext:
    context = server_context(pki)
    context.verify_mode = ssl.CERT_NONE
    return context


def test_a_working_destination_is_described(pki: Pki) -> None:
    server_pair = pki.issue_server("ninety", not_after=in_days(90.5))
    with ScriptedServer(respond_with(405), server_context(pki, server_pair)) as server:
        found = probe(server.url, pki)
    assert found.reason is None
    assert found.hint == ""
    assert (found.tls, found.http_version, found.http_status) == ("TLSv1.3", "HTTP/1.1", 405)
    assert found.server_names == ("localhost", "127.0.0.1")
    assert found.server_days_left == 90
    assert "trustme" in (found.server_issuer or "")
    assert found.certificate_required is True
    assert found.signed_in is None
    assert found.clock_ahead_s is not None
    assert not found.clock_is_off
    assert {head.split(b" ")[0] for head in server.heads} == {b"OPTIONS"}
    assert all(header_of(head, "content-length") in (None, "0") for head in server.heads)


def test_an_endpoint_that_requires_no_client_certificate_is_identified(pki: Pki) -> None:
    with ScriptedServer(respond_with(), without_client_certificates(pki)) as server:
        assert probe(server.url, pki).certificate_required is False
        assert probe(server.url, pki, cert=None, key=None).certificate_required is None


def test_a_successful_sign_in_does_not_count_as_a_required_certificate(pki: Pki, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("good")
    with ScriptedServer(require_header("Bearer good"), without_client_certificates(pki)) as server:
        found = probe(server.url, pki, auth={"type": "bearer", "token_file": token})
    assert found.reason is None
    assert found.signed_in is True
    assert found.certificate_required is False


def test_a_certificate_of_another_ca_is_reported_with_its_facts(pki: Pki, tmp_path: Path) -> None:
    other = Pki(tmp_path / "other")
    with ScriptedServer(respond_with(), server_context(pki)) as server:
        found = probe(server.url, pki, ca=other.ca_pem)
    assert found.reason is Reason.TLS
    assert str(other.ca_pem) in found.hint
    assert found.server_names == ("localhost", "127.0.0.1")
    assert not server.heads


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_untrusted_client_certificate_is_reported(
    pki: Pki, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    other = Pki(tmp_path / "other")
    with ScriptedServer(respond_with(), server_context(pki, version=version)) as server:
        found = probe(server.url, pki, cert=other.client_cert, key=other.client_key)
    assert found.reason is Reason.TLS_CLIENT
    assert "`cert`" in found.hint


def test_a_closed_port_is_distinguished_from_one_that_drops_packets(pki: Pki) -> None:
    with ScriptedServer(respond_with()) as server:
        server.refuse()
        refusing = probe(f"https://127.0.0.1:{server.port}/", pki)
    with a_full_listener() as port:
        dropping = probe(f"https://127.0.0.1:{port}/", pki, timeout={"connect": "1s"})
    assert refusing.reason is Reason.CONNECT
    assert dropping.reason is Reason.CONNECT_TIMEOUT
    assert "firewall" in dropping.hint
    assert dropping.took_s >= 1


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, Reason.UNAUTHORIZED),
        (403, Reason.FORBIDDEN),
        (302, Reason.REDIRECT),
        (431, Reason.HEAD_TOO_LARGE),
    ],
)
def test_a_status_that_an_upload_would_get_as_well_is_a_failure(
    pki: Pki, status: int, reason: Reason
) -> None:
    with ScriptedServer(respond_with(status, Location="/x", Allow="POST"), server_context(pki)) as server:
        found = probe(server.url, pki)
    assert found.reason is reason
    assert found.http_status == status
    assert found.hint
    assert found.is_proven


@pytest.mark.parametrize("status", [200, 201, 204, 400, 404, 405, 415, 429, 500, 501, 502, 503])
@pytest.mark.parametrize(
    ("headers", "is_proven"),
    [
        ({}, False),
        ({"Allow": "GET, HEAD"}, False),
        ({"Access_Control_Allow_Methods": "POST"}, False),
        ({"Allow": "OPTIONS, post"}, True),
    ],
)
def test_a_status_for_options_proves_nothing_unless_the_url_allows_the_method(
    pki: Pki, status: int, headers: dict[str, Any], is_proven: bool
) -> None:
    with ScriptedServer(respond_with(status, **headers), server_context(pki)) as server:
        found = probe(server.url, pki)
    assert (found.reason, found.is_proven) == (None, is_proven and status in (200, 201, 204, 405))
    assert ("which allows" in found.detail) == ("Allow" in headers)


@pytest.mark.parametrize("closes_always", [True, False])
def test_a_connection_that_is_closed_for_options_alone_proves_nothing(pki: Pki, closes_always: bool) -> None:
    def script(peer: Peer) -> None:
        if peer.read_request().head.startswith(b"GET") and not closes_always:
            peer.send(http_response(404))

    with ScriptedServer(script, server_context(pki)) as server:
        found = probe(server.url, pki)
    if closes_always:
        assert found.reason is Reason.CONNECTION_LOST
        assert "`cert`" in found.hint
    else:
        assert (found.reason, found.is_proven) == (None, False)
        assert found.detail == "responded 404 to GET"


def respond_by_method(options: bytes, get: bytes, post: bytes = b"") -> Script:
    """Return a script with a response for each method; one without bytes closes the connection."""

    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if request.head.startswith(b"POST") and not post:
                response = receipt_for(request.archive)
            else:
                by_method = {b"OPTIONS": options, b"GET": get, b"POST": post}
                response = by_method[request.head.partition(b" ")[0]]
            if not response:
                return
            peer.send(response)

    return script


@pytest.mark.parametrize("get", [b"", http_response(200), http_response(404), http_response(405)])
@pytest.mark.parametrize(
    "options",
    [
        http_response(401),
        http_response(403),
        http_response(301, Location="/x"),
        http_response(302, Location="/x"),
        http_response(431),
        b"",
        b"junk\r\n\r\n",
    ],
)
def test_a_refusal_of_options_alone_proves_nothing(
    pki: Pki, tmp_path: Path, options: bytes, get: bytes
) -> None:
    token = tmp_path / "token"
    token.write_text("good")
    auth = {"type": "bearer", "token_file": token}
    with ScriptedServer(respond_by_method(options, get), server_context(pki)) as server:
        found = probe(server.url, pki, auth=auth)
    if options.startswith(b"HTTP") or get:
        assert (found.reason, found.is_proven) == (None, False), found
        assert found.signed_in in (None, True)
    else:
        assert found.reason in (Reason.CONNECTION_LOST, Reason.PROTOCOL)


def test_options_that_is_never_answered_proves_nothing(pki: Pki) -> None:
    def script(peer: Peer) -> None:
        if peer.read_request().head.startswith(b"GET"):
            peer.send(http_response(405))
        peer.pause()

    with ScriptedServer(script, server_context(pki)) as server:
        found = probe(server.url, pki, timeout={"read": "1s"})
    assert (found.reason, found.is_proven, found.detail) == (None, False, "responded 405 to GET")


def test_a_path_that_does_not_exist_is_not_proven_by_the_methods_of_the_server(pki: Pki) -> None:
    """Apache states the methods of its handler for static files, whatever the path is."""
    options = http_response(200, Allow="GET,POST,OPTIONS,HEAD")
    with ScriptedServer(respond_by_method(options, http_response(404)), server_context(pki)) as server:
        found = probe(server.url, pki)
    assert (found.reason, found.is_proven) == (None, False)
    assert found.detail == "responded 200 to OPTIONS, which allows GET, POST, OPTIONS, HEAD, and 404 to GET"


@pytest.mark.parametrize("scheme", ["basic", "bearer", "header"])
@pytest.mark.parametrize("is_valid", [True, False])
def test_credentials_are_verified(pki: Pki, tmp_path: Path, scheme: str, is_valid: bool) -> None:
    secret = tmp_path / "secret"
    secret.write_text("right" if is_valid else "wrong")
    all_keys: dict[str, dict[str, Any]] = {
        "basic": {"auth": {"type": "basic", "user": "me", "password_file": secret}},
        "bearer": {"auth": {"type": "bearer", "token_file": secret}},
        "header": {"header_files": {"X-API-Key": secret}},
    }
    script = {
        "basic": require_header("Basic bWU6cmlnaHQ="),
        "bearer": require_header("Bearer right"),
        "header": require_header("right", "x-api-key"),
    }[scheme]
    with ScriptedServer(script, server_context(pki)) as server:
        found = probe(server.url, pki, **all_keys[scheme])
    assert found.reason is (None if is_valid else Reason.UNAUTHORIZED)
    assert found.signed_in is is_valid
    assert "wrong" not in repr(found)


@pytest.mark.parametrize("failure", [None, oauth_error("invalid_client", "no", 401)])
def test_a_token_is_fetched_as_for_an_upload(pki: Pki, tmp_path: Path, failure: bytes | None) -> None:
    secret = tmp_path / "secret"
    secret.write_text(CLIENT_SECRET)
    login = Login()
    login.instead = failure

    def script(peer: Peer) -> None:
        while True:
            peer.send(http_response(204 if login.is_good(peer.read_request()) else 401))

    with (
        ScriptedServer(login, server_context(pki)) as tokens,
        ScriptedServer(script, server_context(pki)) as server,
    ):
        auth = {
            "type": "oauth2",
            "token_url": tokens.url,
            "client_id": CLIENT_ID,
            "client_secret_file": secret,
            "ca": pki.ca_pem,
            "cert": pki.client_cert,
            "key": pki.client_key,
        }
        found = probe(server.url, pki, auth=auth)
    assert found.reason is (None if failure is None else Reason.SIGN_IN)
    assert found.signed_in is (failure is None)
    assert len(login.issued_at) == 1
    if failure:
        assert "invalid_client" in found.detail


@pytest.mark.parametrize(
    ("keys", "is_accepted"),
    [({}, False), ({"server_name": "vault.test"}, True), ({"server_name": "other.test"}, False)],
)
def test_a_certificate_for_another_name_is_reported_with_its_names(
    pki: Pki, keys: dict[str, Any], is_accepted: bool
) -> None:
    with ScriptedServer(
        respond_with(), server_context(pki, pki.issue_server("v", ("vault.test",)))
    ) as server:
        found = probe(server.url, pki, **keys)
    assert found.server_names == ("vault.test",)
    if is_accepted:
        assert found.reason is None
    else:
        assert found.reason is Reason.TLS
        assert "`server_name`" in found.hint


def test_the_probe_connects_as_an_upload_does(pki: Pki) -> None:
    addresses: list[str] = []

    def script(peer: Peer) -> None:
        addresses.append(peer._sock.getpeername()[0])
        respond_with()(peer)

    with ScriptedServer(script, server_context(pki, pki.issue_server("v", ("vault.test",)))) as server:
        found = probe(
            "https://vault.test/v1/{name}?x={digest}",
            pki,
            connect_to=f"127.0.0.1:{server.port}",
            local_address="127.0.0.3",
            headers={"X-Host": "{host}"},
            digest_at="header",
        )
    assert found.reason is None
    assert set(addresses) == {"127.0.0.3"}
    assert Request(server.heads[0], b"").path == "/v1/check?x=check"
    assert header_of(server.heads[0], "host") == "vault.test"
    assert header_of(server.heads[0], "x-host") == "check"


def test_a_proxy_that_is_down_is_reported(pki: Pki) -> None:
    with ScriptedServer(respond_with()) as server:
        server.refuse()
        found = probe("https://vault.example.net/", pki, proxy=f"http://127.0.0.1:{server.port}")
    assert found.reason is Reason.PROXY


def test_an_expired_certificate_is_reported_with_its_date(pki: Pki) -> None:
    with ScriptedServer(respond_with(), server_context(pki, pki.issue_expired_server())) as server:
        found = probe(server.url, pki)
    assert found.reason is Reason.TLS
    assert found.server_days_left is not None
    assert found.server_days_left < -5000
    assert "out of date" in found.hint


def test_a_wrong_pin_is_reported_with_the_real_one_before_any_request(pki: Pki, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret-token")
    wrong = "A" * 43 + "="
    with ScriptedServer(respond_with(), server_context(pki)) as server:
        auth = {"type": "bearer", "token_file": token}
        found = probe(server.url, pki, pin_sha256=[wrong], auth=auth)
        assert not server.heads
        assert found.reason is Reason.TLS
        assert "`pin_sha256`" in found.hint
        real = found.detail.rpartition(" ")[2]
        assert probe(server.url, pki, pin_sha256=[wrong, real], auth=auth).reason is None


def test_an_endpoint_with_an_old_tls_version_is_reported(pki: Pki) -> None:
    with ScriptedServer(respond_with(), server_context(pki, version=ssl.TLSVersion.TLSv1_2)) as server:
        assert probe(server.url, pki).tls == "TLSv1.2"
        found = probe(server.url, pki, tls_min="1.3")
    assert found.reason is Reason.TLS
    assert "`tls_min`" in found.hint


@pytest.mark.parametrize("date", ["nonsense", "Mon, 99 Foo 9999 99:99:99 GMT", "1", ""])
def test_an_invalid_date_is_ignored(pki: Pki, date: str) -> None:
    def script(peer: Peer) -> None:
        while True:
            peer.read_request()
            peer.send(http_response(204, Date=date))

    with ScriptedServer(script, server_context(pki)) as server:
        found = probe(server.url, pki)
    assert found.reason is None
    assert found.clock_ahead_s is None


def test_an_endpoint_that_never_responds_ends_with_the_read_timeout(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.upload.http.probe._MAX_READ_TIMEOUT", 3600.0)

    def silent(peer: Peer) -> None:
        peer.read_head()
        peer.pause()

    with ScriptedServer(silent, server_context(pki)) as server:
        found = probe(server.url, pki, timeout={"read": "1s"})
    assert found.reason is Reason.READ_TIMEOUT


def test_a_missing_secret_is_reported_with_its_file(pki: Pki, tmp_path: Path) -> None:
    with ScriptedServer(respond_with(), server_context(pki)) as server:
        found = probe(server.url, pki, auth={"type": "bearer", "token_file": tmp_path / "missing"})
    assert found.reason is Reason.LOCAL_FILES
    assert str(tmp_path / "missing") in found.detail
    assert "backupd check" not in found.hint  # the user runs it already


def test_all_destinations_are_probed_at_the_same_time(pki: Pki) -> None:
    """None of eight servers responds before all have a request."""
    together = threading.Barrier(8)

    def slow(peer: Peer) -> None:
        peer.read_request()
        together.wait(TIMEOUT)
        peer.send(http_response(204))

    with ExitStack() as stack:
        servers = [stack.enter_context(ScriptedServer(slow, server_context(pki))) for _ in range(8)]
        dropping = stack.enter_context(a_full_listener())
        destinations = {str(number): a_destination(each.url, pki) for number, each in enumerate(servers)}
        destinations["8"] = a_destination(f"https://127.0.0.1:{dropping}/", pki, timeout={"connect": "1s"})
        found = probe_all(destinations)
    assert [each.destination for each in found] == list(destinations)
    assert [each.reason for each in found] == [None] * 8 + [Reason.CONNECT_TIMEOUT]


def test_without_destinations_there_are_no_results() -> None:
    assert probe_all({}) == []


# The command


def table(name: str, url: str, pki: Pki, more: str = "") -> str:
    return f"""
[destination.{name}]
url = "{url}"
ca = "{pki.ca_pem}"
cert = "{pki.client_cert}"
key = "{pki.client_key}"
{more}
"""


def test_the_command_prints_the_facts_in_short_lines(stage: Stage) -> None:
    token = stage.base / "token"
    token.write_text("the-token")
    names = tuple(f"host-{number}.vault.example.net" for number in range(9))
    pair = stage.pki.issue_server("many", ("127.0.0.1", *names), not_after=in_days(7.5))
    with (
        ScriptedServer(respond_with(clock_ahead=3700), server_context(stage.pki, pair)) as server,
        ScriptedServer(respond_with(401, Allow="POST"), server_context(stage.pki)) as wrong,
        ScriptedServer(respond_with(405, Allow="POST"), server_context(stage.pki)) as good,
    ):
        more = f'[destination.vault.auth]\ntype = "bearer"\ntoken_file = "{token}"'
        tables = table("other", wrong.url, stage.pki) + table("good", good.url, stage.pki)
        stage.configure(server.url, more=more + tables)
        done = stage.backupd("check")
    assert done.returncode == 69
    assert done.stderr == ""
    facts = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert all(len(line) <= 100 for line in facts)
    text = " ".join(done.stdout.split())
    for expected in (
        f"connected: destination.vault: {server.url}: TLSv1.3, responded 204 to OPTIONS, in",
        "an upload could not be tried without sending; `backupd check --send` does",
        f"ok: destination.good: {good.url}: TLSv1.3, responded 405 to OPTIONS, which allows POST, in",
        "connection TLSv1.3 HTTP/1.1",
        "server certificate 7 days left, for 127.0.0.1, host-0.vault.example.net",
        "issued by OU=Testing CA",
        "client certificate required",
        "sign-in bearer: not refused",
        "server clock 1 h 1 min ahead of this host's hint: set the clock",
        f"failed: destination.other: {wrong.url}: responded 401 to OPTIONS, which allows POST (unauthorized)",
        "server clock same as this host's",
    ):
        assert expected in text
    assert "the-token" not in done.stdout


@pytest.mark.parametrize(
    ("begins", "ends", "warning"),
    [
        (-90, 7.5, True),
        (-0.9, 0.1, True),
        (-0.2, 0.8, False),
        (-90, 15.5, False),
    ],
)
def test_the_command_warns_of_a_server_certificate_that_expires_soon(
    stage: Stage, begins: float, ends: float, warning: bool
) -> None:
    pair = stage.pki.issue_server("soon", not_before=in_days(begins), not_after=in_days(ends))
    with ScriptedServer(respond_with(405, Allow="POST"), server_context(stage.pki, pair)) as server:
        stage.configure(server.url)
        done = stage.backupd("check")
        as_json = json.loads(stage.backupd("check", "--json").stdout)
    assert done.returncode == 0
    assert ("warning: destination.vault: the destination's certificate expires" in done.stdout) == warning
    assert [problem["where"] for problem in as_json["problems"]] == ["destination.vault"] * warning


def test_the_command_prints_the_facts_as_json(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    with ScriptedServer(respond_with(), server_context(stage.pki)) as server:
        stage.configure(server.url, more=table("down", "https://127.0.0.1:9/", stage.pki))
        done = stage.backupd("check", "--json")
    assert done.returncode == 69
    vault, down = json.loads(done.stdout)["destinations"]
    assert {**vault, "took_s": 0, "server_days_left": 0, "server_issuer": "", "clock_ahead_s": 0} == {
        "destination": "vault",
        "reason": None,
        "detail": "responded 204 to OPTIONS",
        "tls": "TLSv1.3",
        "http_version": "HTTP/1.1",
        "http_status": 204,
        "server_names": ["localhost", "127.0.0.1"],
        "server_issuer": "",
        "server_days_left": 0,
        "certificate_required": True,
        "signed_in": None,
        "is_proven": False,
        "clock_ahead_s": 0,
        "took_s": 0,
        "hint": "",
    }
    assert down["reason"] == "connect_failed"
    assert down["hint"]
    assert down["tls"] is None


@pytest.mark.parametrize("works", [True, False])
def test_a_test_archive_is_delivered_on_request(stage: Stage, works: bool) -> None:
    def script(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            if request.head.startswith(b"OPTIONS"):
                peer.send(http_response(405))
            else:
                peer.send(receipt_for(request.archive) if works else http_response(422, b"no such tenant"))

    with ScriptedServer(script, server_context(stage.pki)) as server:
        stage.configure(server.url)
        done = stage.backupd("check", "--send")
        as_json = stage.backupd("check", "--send", "--json")
    text = " ".join(done.stdout.split())
    assert (done.returncode, as_json.returncode) == ((0, 0) if works else (69, 69)), done
    (sent,) = json.loads(as_json.stdout)["sent"]
    assert (sent["outcome"], sent["verified"]) == (("delivered", True) if works else ("rejected", False))
    if works:
        assert "was sent: the destination responded 201, and its receipt matches" in text
        assert 'response {"id": "1"' in text
    else:
        assert "was not stored: 422 As Scripted: no such tenant (archive_refused)" in text
    uploads = [request for request in server.requests if request.head.startswith(b"POST")]
    assert b"A test archive of `backupd check --send`" in uploads[0].archive


def test_a_test_archive_without_a_receipt_may_have_been_stored(stage: Stage) -> None:
    script = respond_by_method(http_response(405), http_response(405), http_response(201))
    with ScriptedServer(script, server_context(stage.pki)) as server:
        stage.configure(server.url)
        done = stage.backupd("check", "--send")
    assert done.returncode == 69
    assert "may have been stored: " in done.stdout
    assert "(unverified)" in done.stdout
    assert "was not stored" not in done.stdout


def test_a_test_archive_with_a_lost_response_may_have_been_stored(stage: Stage) -> None:
    """Also if the last of the short attempts did not reach the destination."""

    def script(peer: Peer) -> None:
        while not peer.read_request().head.startswith(b"POST"):
            peer.send(http_response(405))
        server.refuse()
        peer.reset()

    with ScriptedServer(script, server_context(stage.pki)) as server:
        stage.configure(server.url)
        done = stage.backupd("check", "--send")
    assert done.returncode == 69
    assert "may have been stored: " in done.stdout
    assert "(connect_failed)" in done.stdout


@pytest.mark.parametrize("accepts", [True, False])
def test_a_status_that_refuses_the_probe_is_outweighed_by_a_test_archive(stage: Stage, accepts: bool) -> None:
    refused = http_response(403)
    script = respond_by_method(refused, refused, b"" if accepts else refused)
    with ScriptedServer(script, server_context(stage.pki)) as server:
        stage.configure(server.url)
        plain = stage.backupd("check")
        done = stage.backupd("check", "--send")
    assert plain.returncode == 69
    assert "`backupd check --send` tries a real upload" in plain.stdout
    assert done.returncode == (0 if accepts else 69)
    assert "check --send" not in done.stdout
    if accepts:
        assert "connected: destination.vault" in done.stdout
        assert "was sent: the destination responded 201" in done.stdout
    else:
        assert "was not stored: 403" in done.stdout


@pytest.mark.root
def test_without_room_for_the_test_archive_the_command_says_so(stage: Stage) -> None:
    full = stage.base / "tmp"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=2", "none", full], check=False).returncode:
        pytest.skip("this root may not mount")
    try:
        with ScriptedServer(respond_with(405), server_context(stage.pki)) as server:
            stage.configure(server.url)
            done = subprocess.run(
                [sys.executable, "-m", "backupd", "check", "--send", "--config", stage.config],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
                env={**os.environ, "TMPDIR": str(full)},
            )
    finally:
        subprocess.run(["umount", full], check=True)
    assert done.returncode == 2
    assert "no test archive can be written" in done.stderr
    assert "No space left on device" in done.stderr


def test_offline_and_send_contradict_each_other(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/")
    assert stage.backupd("check", "--offline", "--send").returncode == 2


@pytest.mark.parametrize(
    ("kind", "words", "remedy"),
    [
        ("a short key", "shorter than OpenSSL accepts", "RSA of 2048 bits"),
        ("another purpose", "not issued for servers", "serverAuth"),
        ("no TLS", "does not speak TLS", "check the port"),
        ("an old digest", "an old digest such as SHA-1", "signed with SHA-256"),
        ("legacy renegotiation", "does not support secure renegotiation", "lacks RFC 5746"),
    ],
)
def test_each_failure_of_tls_has_its_own_words_and_remedy(
    pki: Pki, tmp_path: Path, kind: str, words: str, remedy: str
) -> None:
    plain = {"no TLS": http_response(400), "legacy renegotiation": SERVER_HELLO_OF_2008}
    if kind in plain:
        with ScriptedServer(lambda peer: peer.send(plain[kind])) as server:
            found = probe(f"https://127.0.0.1:{server.port}/", pki)
    else:
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH if kind == "another purpose" else None
        pair = self_signed(tmp_path, 1024 if kind == "a short key" else 2048, purpose)
        ca = pair.cert
        if kind == "an old digest":
            pair, ca = signed_with_sha1(tmp_path), tmp_path / "ca.pem"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.load_cert_chain(pair.cert, pair.key)
        with ScriptedServer(respond_with(), context) as server:
            found = probe(server.url, pki, ca=ca)
    assert found.reason is not None
    assert words in found.detail
    assert remedy in found.hint


@pytest.mark.parametrize(
    ("alert", "keys", "words", "remedy"),
    [
        (40, {}, "no cipher in common", "openssl ciphers DEFAULT"),
        (70, {}, "only other versions of TLS", "update the endpoint to TLS 1.2"),
        (70, {"tls_min": "1.3"}, "only other versions of TLS", "remove `tls_min`"),
        (80, {}, "failed in the handshake", "the endpoint's log"),
        (112, {}, "it serves other host names", "`server_name`"),
        (120, {}, "alert no application protocol (it speaks none", "set `http2 = true`"),
        (120, {"http2": True}, "alert no application protocol (it speaks none", "check the port"),
        (115, {}, "", "the endpoint's log"),
    ],
)
def test_each_alert_in_the_handshake_has_its_own_words_and_remedy(
    pki: Pki, alert: int, keys: dict[str, Any], words: str, remedy: str
) -> None:
    with ScriptedServer(lambda peer: peer.send(bytes([21, 3, 3, 0, 2, 2, alert]))) as server:
        found = probe(f"https://127.0.0.1:{server.port}/", pki, **keys)
    assert found.reason is Reason.TLS
    assert words in found.detail
    assert "ssl.c" not in found.detail
    assert remedy in found.hint


SERVER_HELLO_OF_2008 = bytes.fromhex("160303002a 02000026 0303") + bytes(32) + bytes.fromhex("00 c02f 00")
"""A response to a client that offers TLS 1.2, without an extension, so without RFC 5746."""


def signed_with_sha1(folder: Path) -> KeyPair:
    """Return a certificate for 127.0.0.1 that is signed with SHA-1, below an authority at `ca.pem`."""
    pair, authority = KeyPair(folder / "old.pem", folder / "old.key"), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    authority.private_key_pem.write_to_path(folder / "ca.key")
    request = ["req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=old", "-keyout", str(pair.key)]
    made = subprocess.run([require("openssl"), *request], capture_output=True, check=True)
    (folder / "names.cnf").write_text("subjectAltName = IP:127.0.0.1\n")
    signing = (
        "x509 -req -sha1 -days 9 -CA ca.pem -CAkey ca.key -CAcreateserial -extfile names.cnf -out old.pem"
    )
    command = [require("openssl"), *signing.split()]
    subprocess.run(command, cwd=folder, input=made.stdout, capture_output=True, check=True)
    return pair


def self_signed(folder: Path, bits: int, purpose: x509.ObjectIdentifier | None) -> KeyPair:
    """Return a certificate for 127.0.0.1 with an RSA key of so many bits."""
    key = rsa.generate_private_key(65537, bits)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "weak")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(in_days(-1)).not_valid_after(in_days(1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    builder = builder.add_extension(address, critical=False)
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    pair = KeyPair(folder / "weak.pem", folder / "weak.key")
    pair.cert.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
    return pair
