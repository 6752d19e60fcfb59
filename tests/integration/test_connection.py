"""Connections to a destination: proxies, addresses, names, pins, TLS versions, time-outs."""

from __future__ import annotations

import base64
import errno
import hashlib
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from backupd.core.model import Deferred, Delivered, Outcome
from backupd.core.policy import Reason
from backupd.upload.base import Abort, UploadJob
from backupd.upload.http import transport
from backupd.upload.http.dialing import Address, _alternating
from backupd.upload.http.limits import AttemptEndedError, AttemptLimits
from backupd.upload.http.stream import DIRECT, Stream, connect
from tests.endpoints import ScriptedProxy, a_full_listener
from tests.pki import Pki
from tests.scripted import (
    Peer,
    Script,
    ScriptedServer,
    accept_all,
    header_of,
    http_response,
    receipt_for,
    server_context,
)
from tests.stage import TIMEOUT, Stage, until
from tests.uploading import MIB, a_destination, a_sender, an_archive

CONTENT = b"the content of an archive" * 1000
FAST_RETRY = 'retry = { initial = "0.1s", max = "0.3s" }'
UNKNOWN_FAMILY = 99
"""An address family that no kernel supports."""


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def failed(outcome: Outcome) -> tuple[Reason, str]:
    assert isinstance(outcome, Deferred), outcome
    return outcome.reason, outcome.error


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_an_address_of_an_unsupported_family_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    def getaddrinfo(_host: str, port: int, **_keys: Any) -> list[tuple[Any, ...]]:
        unsupported = (UNKNOWN_FAMILY, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        return [unsupported, found] if first else [found, unsupported]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with ScriptedServer(accept_all) as server, a_sender(a_destination(server.url)) as sender:
        accepted = sender.send(an_archive(tmp_path, CONTENT))
        server.refuse()
        with a_sender(a_destination(server.url)) as another:
            refused = another.send(an_archive(tmp_path, CONTENT))

    assert isinstance(accepted, Delivered)
    assert failed(refused) == (Reason.CONNECT, f"Connection refused (127.0.0.1 port {server.port})")


def resolve_to(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    """Have every name resolve to these ports of the loopback address."""

    def getaddrinfo(_host: str, _port: int, **_keys: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_addresses_that_do_not_answer_are_passed_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        a_full_listener() as silent,
        a_full_listener() as other,
        ScriptedServer(accept_all) as server,
        a_sender(a_destination(server.url, timeout={"connect": "1h"})) as sender,
    ):
        resolve_to(monkeypatch, silent, other, server.port)
        assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
        resolve_to(monkeypatch, server.port, silent)
        with a_sender(a_destination(server.url)) as another:
            assert isinstance(another.send(an_archive(tmp_path, CONTENT)), Delivered)
    assert len(server.peers) == 2


def test_an_address_that_refuses_costs_no_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(accept_all) as server, a_sender(a_destination(server.url)) as sender:
        resolve_to(monkeypatch, *[9] * 200, server.port)  # 50 s, were each given its head start
        began = time.monotonic()
        assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
        assert time.monotonic() - began < 25


def test_if_no_address_answers_the_connection_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        a_full_listener() as silent,
        a_full_listener() as other,
        a_sender(a_destination("http://127.0.0.1/", timeout={"connect": "0.5s"})) as sender,
    ):
        resolve_to(monkeypatch, silent, other)
        outcome = sender.send(an_archive(tmp_path, CONTENT))
    assert failed(outcome) == (Reason.CONNECT_TIMEOUT, f"no response from 127.0.0.1 port {silent}")


def test_a_race_between_addresses_can_be_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    abort = Abort()
    with a_full_listener() as silent, closing(abort):
        resolve_to(monkeypatch, silent, silent)
        threading.Timer(0.5, abort.set).start()
        with pytest.raises(AttemptEndedError):
            connect("vault.test", 443, None, AttemptLimits(abort), DIRECT)


def test_families_of_addresses_alternate() -> None:
    def address(family: int, number: int) -> Address:
        return (family, 1, 6, "", number)

    found = [address(socket.AF_INET6, n) for n in range(3)] + [
        address(socket.AF_INET, n) for n in range(3, 5)
    ]
    assert [each[4] for each in _alternating(found)] == [0, 3, 1, 4, 2]


def test_the_log_tells_to_which_address_an_archive_went(stage: Stage) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url, destination=FAST_RETRY)
        daemon = stage.daemon().ready()
        stage.put("a.cfg", CONTENT)
        (verified,) = daemon.wait_for("delivery.verified")
        assert verified["address"] == f"127.0.0.1:{server.port}"
        assert daemon.stop() == 0


def test_a_connection_is_not_used_again_from_its_age_on(tmp_path: Path) -> None:
    with ScriptedServer(accept_all) as server:
        with a_sender(a_destination(server.url, connection_max_age="0.000001s")) as sender:
            for _ in range(3):
                assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
        assert len(server.peers) == 3


def test_without_a_free_descriptor_the_connection_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_socket(*_: int) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    with a_sender(a_destination("http://127.0.0.1:9/")) as sender:
        monkeypatch.setattr(socket, "socket", no_socket)
        assert failed(sender.send(an_archive(tmp_path, CONTENT))) == (
            Reason.HOST_LIMIT,
            "Too many open files",
        )


# Proxies


class TestProxy:
    @pytest.mark.parametrize("user", ["", "josé"])
    def test_tls_is_end_to_end_through_a_proxy(self, tmp_path: Path, pki: Pki, user: str) -> None:
        password = tmp_path / "password"
        password.write_text("p:w\n")
        proxy = ScriptedProxy(f"{user}:p:w" if user else "")
        keys = {"proxy_user": user, "proxy_password_file": password} if user else {}
        with (
            ScriptedServer(accept_all, server_context(pki)) as server,
            ScriptedServer(proxy) as proxy_at,
        ):
            destination = a_destination(
                server.url,
                pki,
                proxy=f"http://127.0.0.1:{proxy_at.port}",
                pin_sha256=[pin_of(pki.server_cert)],
                **keys,
            )
            with a_sender(destination) as sender:
                for _ in range(3):
                    assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
            assert server.peers[0].client_certificate
        assert proxy.targets == [f"127.0.0.1:{server.port}"]
        assert proxy.tunnelled[:1] == b"\x16"  # a TLS handshake, from the first byte on
        assert b"archive" not in proxy.tunnelled
        assert all(header_of(head, "proxy-authorization") is None for head in server.heads)

    def test_http_1_1_is_used_through_a_proxy(self, tmp_path: Path, pki: Pki) -> None:
        context = server_context(pki)
        context.set_alpn_protocols(["h2", "http/1.1"])
        with ScriptedServer(accept_all, context) as server, ScriptedServer(ScriptedProxy()) as proxy_at:
            destination = a_destination(
                server.url, pki, proxy=f"http://127.0.0.1:{proxy_at.port}", http2=True
            )
            with a_sender(destination) as sender:
                assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)

    def test_wrong_proxy_credentials_are_reported_and_never_logged(self, stage: Stage) -> None:
        password = stage.base / "password"
        password.write_text("wrong-password")
        proxy = ScriptedProxy("me:right-password")
        with (
            ScriptedServer(accept_all, server_context(stage.pki)) as server,
            ScriptedServer(proxy) as proxy_at,
        ):
            stage.configure(
                server.url,
                top='[log]\nlevel = "debug"',
                destination=f'{FAST_RETRY}\nproxy = "http://127.0.0.1:{proxy_at.port}"\nproxy_user = "me"\n'
                f'proxy_password_file = "{password}"',
            )
            daemon = stage.daemon().ready()
            stage.put("a.tar.gz", CONTENT)
            (paused, *_) = daemon.wait_for("destination.paused")
            assert paused["reason"] == "proxy_failed"
            assert "407" in paused["error"]
            password.write_text("right-password")
            daemon.wait_for("archive.disposed")
            assert daemon.stop() == 0
        for secret in ("wrong-password", "right-password"):
            assert secret not in daemon.text()
            assert base64.b64encode(f"me:{secret}".encode()).decode() not in daemon.text()

    def test_a_proxy_that_cannot_reach_the_endpoint_is_reported(self, tmp_path: Path, pki: Pki) -> None:
        with ScriptedServer(ScriptedProxy(refusal=http_response(502))) as proxy_at:
            destination = a_destination(
                "https://vault.example.net/x", pki, proxy=f"http://127.0.0.1:{proxy_at.port}"
            )
            with a_sender(destination) as sender:
                reason, error = failed(sender.send(an_archive(tmp_path, CONTENT)))
        assert reason is Reason.PROXY
        assert "502" in error

    @pytest.mark.parametrize(
        ("refusal", "words"),
        [
            (b"407 X\r\nProxy-Authenticate: NTLM\r\nProxy-Authenticate: Negotiate", "offers NTLM, Negotiate"),
            (b'407 X\r\nProxy-Authenticate: Digest realm="a, b", nonce="x"', "it offers Digest, and"),
            (b'407 X\r\nProxy-Authenticate: NTLM, Basic realm="a"', "407 X"),
            (b"302 X\r\nLocation: https://login.example.net/?from=x", "302 X to https://login.example.net/"),
        ],
    )
    def test_a_refusal_of_the_proxy_is_explained(self, refusal: bytes, words: str, tmp_path: Path) -> None:
        def script(peer: Peer) -> None:
            peer.read_head()
            peer.send(b"HTTP/1.1 " + refusal + b"\r\nContent-Length: 0\r\n\r\n")

        with ScriptedServer(script) as proxy_at:
            destination = a_destination(
                "https://vault.example.net/x", proxy=f"http://127.0.0.1:{proxy_at.port}"
            )
            with a_sender(destination) as sender:
                outcome = sender.send(an_archive(tmp_path, b"content"))
        assert isinstance(outcome, Deferred)
        assert outcome.reason is Reason.PROXY
        assert words in outcome.error
        assert ("it offers" in outcome.error) == ("offers" in words)
        assert "from=x" not in outcome.error

    @pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH_9.2\r\n\r\n"], ids=["end", "no HTTP"])
    def test_a_failure_of_the_proxy_is_not_one_of_the_destination(self, tmp_path: Path, reply: bytes) -> None:
        def script(peer: Peer) -> None:
            peer.read_head()
            peer.send(reply)

        with ScriptedServer(script) as proxy_at:
            destination = a_destination(
                "https://vault.example.net/x", proxy=f"http://127.0.0.1:{proxy_at.port}"
            )
            with a_sender(destination) as sender:
                reason, error = failed(sender.send(an_archive(tmp_path, CONTENT)))
        assert reason is Reason.PROXY
        assert error.startswith("no tunnel through the proxy: ")

    def test_a_proxy_that_is_down_is_reported(self, tmp_path: Path, pki: Pki) -> None:
        with ScriptedServer(accept_all) as proxy_at:
            proxy_at.refuse()
            destination = a_destination(
                "https://vault.example.net/x", pki, proxy=f"http://127.0.0.1:{proxy_at.port}"
            )
            with a_sender(destination) as sender:
                reason, error = failed(sender.send(an_archive(tmp_path, CONTENT)))
        assert reason is Reason.PROXY
        assert error.startswith("no connection to the proxy")
        assert f"port {proxy_at.port}" in error

    def test_the_proxy_of_the_environment_is_not_used(
        self, tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        with ScriptedServer(accept_all, server_context(pki)) as server:
            with a_sender(a_destination(server.url, pki)) as sender:
                assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)


# Addresses and names


def test_the_connection_comes_from_the_local_address(tmp_path: Path, pki: Pki) -> None:
    addresses: list[str] = []

    def script(peer: Peer) -> None:
        addresses.append(peer._sock.getpeername()[0])
        accept_all(peer)

    with ScriptedServer(script, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, local_address="127.0.0.2")) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
    assert addresses == ["127.0.0.2"]


def test_a_local_address_of_another_host_is_reported(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(accept_all, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, local_address="192.0.2.1")) as sender:
            reason, error = failed(sender.send(an_archive(tmp_path, CONTENT)))
    assert reason is Reason.CONNECT
    assert "192.0.2.1" in error


@contextmanager
def a_named_server(pki: Pki, *names: str) -> Iterator[tuple[ScriptedServer, list[str | None]]]:
    """Yield a server with a certificate for these names, and the names that clients request by SNI."""
    requested: list[str | None] = []
    context = server_context(pki, pki.issue_server("named", names))
    context.sni_callback = lambda _sock, name, _context: requested.append(name)
    with ScriptedServer(accept_all, context) as server:
        yield server, requested


def test_connect_to_changes_the_address_and_no_name(tmp_path: Path, pki: Pki) -> None:
    with a_named_server(pki, "vault.test") as (server, requested):
        destination = a_destination(
            "https://vault.test/v1/upload", pki, connect_to=f"127.0.0.1:{server.port}"
        )
        with a_sender(destination) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
    assert requested == ["vault.test"]
    assert server.requests[0].header("host") == "vault.test"


def test_the_server_name_is_requested_and_verified(tmp_path: Path, pki: Pki) -> None:
    with a_named_server(pki, "vault.test") as (server, requested):
        with a_sender(a_destination(server.url, pki, server_name="vault.test")) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
    assert requested == ["vault.test"]
    assert server.requests[0].header("host") == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("keys", [{}, {"server_name": "other.test"}])
def test_a_certificate_for_another_name_is_refused(tmp_path: Path, pki: Pki, keys: dict[str, str]) -> None:
    with a_named_server(pki, "vault.test") as (server, _):
        with a_sender(a_destination(server.url, pki, **keys)) as sender:
            reason, error = failed(sender.send(an_archive(tmp_path, CONTENT)))
    assert reason is Reason.TLS
    assert "mismatch" in error or "not valid for" in error
    assert not server.heads


# Pins and versions


def pin_of(cert: Path) -> str:
    key = x509.load_pem_x509_certificate(cert.read_bytes()).public_key()
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(der).digest()).decode()


@pytest.mark.parametrize("prefix", ["", "sha256//"])
def test_each_of_several_pinned_keys_is_accepted(tmp_path: Path, pki: Pki, prefix: str) -> None:
    pins = [prefix + pin_of(pki.client_cert), prefix + pin_of(pki.server_cert)]
    with ScriptedServer(accept_all, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, pin_sha256=pins)) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)


def test_a_key_that_is_not_pinned_is_refused_and_named(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(accept_all, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, pin_sha256=[pin_of(pki.client_cert)])) as sender:
            reason, error = failed(sender.send(an_archive(tmp_path, CONTENT)))
    assert reason is Reason.TLS
    assert pin_of(pki.server_cert) in error
    assert not server.heads


def test_a_pin_does_not_replace_the_ca(tmp_path: Path, pki: Pki) -> None:
    other = Pki(tmp_path / "other")
    with ScriptedServer(accept_all, server_context(pki)) as server:
        destination = a_destination(server.url, pki, ca=other.ca_pem, pin_sha256=[pin_of(pki.server_cert)])
        with a_sender(destination) as sender:
            reason, _ = failed(sender.send(an_archive(tmp_path, CONTENT)))
    assert reason is Reason.TLS


@pytest.mark.parametrize("tls_min", ["1.2", "1.3"])
def test_an_older_version_than_tls_min_is_refused(tmp_path: Path, pki: Pki, tls_min: str) -> None:
    context = server_context(pki, version=ssl.TLSVersion.TLSv1_2)
    with ScriptedServer(accept_all, context) as server:
        with a_sender(a_destination(server.url, pki, tls_min=tls_min)) as sender:
            outcome = sender.send(an_archive(tmp_path, CONTENT))
    if tls_min == "1.2":
        assert isinstance(outcome, Delivered)
    else:
        assert failed(outcome)[0] is Reason.TLS
        assert "version" in failed(outcome)[1]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("size", [10, 8 * MIB])
def test_a_refused_client_certificate_is_identified_every_time(
    tmp_path: Path, pki: Pki, version: ssl.TLSVersion, size: int
) -> None:
    """In TLS 1.3 the alert comes after the handshake, during the request."""
    other = Pki(tmp_path / "other")
    context = server_context(pki, version=version)
    reasons = []
    with ScriptedServer(accept_all, context) as server:
        for _ in range(10):
            destination = a_destination(server.url, pki, cert=other.client_cert, key=other.client_key)
            with a_sender(destination) as sender:
                reasons.append(failed(sender.send(an_archive(tmp_path, size=size)))[0])
    assert reasons == [Reason.TLS_CLIENT] * 10


def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path, pki: Pki) -> None:
    expired, renewed = pki.issue_expired_client("expired"), pki.issue_client("renewed")
    with ScriptedServer(accept_all, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, cert=expired.cert, key=expired.key)) as sender:
            archive = an_archive(tmp_path, CONTENT)
            assert failed(sender.send(archive))[0] is Reason.TLS_CLIENT
            renewed.key.replace(expired.key)
            assert (
                failed(sender.send(archive))[0] is Reason.TLS_CLIENT
            )  # only half of the new pair: the old one stays active
            renewed.cert.replace(expired.cert)
            assert isinstance(sender.send(archive), Delivered)


# Time-outs


def silent(peer: Peer) -> None:
    peer.pause()


def silent_after_the_body(peer: Peer) -> None:
    peer.read_request()
    peer.pause()


def silent_after_the_head(peer: Peer) -> None:
    peer.read_head()
    peer.pause()


@pytest.mark.parametrize(
    ("phase", "script", "reason"),
    [
        ("read", silent_after_the_body, Reason.READ_TIMEOUT),
        ("write", silent_after_the_head, Reason.WRITE_TIMEOUT),
    ],
)
def test_each_phase_has_its_own_timeout(
    tmp_path: Path, pki: Pki, phase: str, script: Script, reason: Reason
) -> None:
    with ScriptedServer(script, server_context(pki)) as server:
        destination = a_destination(server.url, pki, timeout={phase: "0.4s"})
        with a_sender(destination) as sender:
            size = 64 * MIB if phase == "write" else 1000
            outcome = sender.send(an_archive(tmp_path, size=size))
    assert failed(outcome)[0] is reason
    assert isinstance(outcome, Deferred)
    assert (outcome.unconfirmed_digest is not None) == (phase == "read")


def test_a_connection_without_a_response_times_out(tmp_path: Path, pki: Pki) -> None:
    with a_full_listener() as port:
        destination = a_destination(f"https://127.0.0.1:{port}/x", pki, timeout={"connect": "0.3s"})
        with a_sender(destination) as sender:
            assert failed(sender.send(an_archive(tmp_path, CONTENT)))[0] is Reason.CONNECT_TIMEOUT


def test_a_tls_handshake_without_a_response_times_out(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(silent) as server:  # it listens, but does not respond
        url = server.url.replace("http:", "https:")
        with a_sender(a_destination(url, pki, timeout={"connect": "0.3s"})) as sender:
            assert failed(sender.send(an_archive(tmp_path, CONTENT)))[0] is Reason.CONNECT_TIMEOUT


# Reused connections


def serve_one(peer: Peer) -> None:
    """Serve one request on a connection, and close it without an announcement."""
    peer.send(receipt_for(peer.read_request().archive))


def test_a_connection_that_ended_between_two_archives_is_not_reused(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(serve_one, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki)) as sender:
            for number in range(5):
                assert isinstance(sender.send(an_archive(tmp_path, b"%d" % number)), Delivered)
                until(server.peers[-1].closed.is_set, "the end of the connection")
    assert [request.archive for request in server.requests] == [b"0", b"1", b"2", b"3", b"4"]
    assert len(server.peers) == 5


def test_connections_are_reused_again_after_a_failed_tls_handshake(tmp_path: Path, pki: Pki) -> None:
    """The certificate files are read after a failed TLS handshake, and not before every later archive."""

    def script(peer: Peer) -> None:
        if peer.number == 0:
            peer.send(b"\x15\x03\x03\x00\x02\x02\x28")  # an alert in place of the handshake
            peer.drain()
            return
        peer.do_handshake(server_context(pki))
        accept_all(peer)

    with ScriptedServer(script) as server:
        with a_sender(a_destination(server.url.replace("http:", "https:"), pki)) as sender:
            assert failed(sender.send(an_archive(tmp_path, CONTENT)))[0] in (Reason.TLS, Reason.TLS_CLIENT)
            for number in range(5):
                assert isinstance(sender.send(an_archive(tmp_path, b"%d" % number)), Delivered)
    assert len(server.requests) == 5
    assert len(server.peers) == 2


def test_a_connection_that_ends_as_the_next_upload_starts_is_replaced_immediately(stage: Stage) -> None:
    def script(peer: Peer) -> None:
        peer.send(receipt_for(peer.read_request().archive))
        peer.read_head()  # the next request arrives on a connection that ends

    with ScriptedServer(script, server_context(stage.pki)) as server:
        stage.configure(server.url, destination="workers = 1")
        daemon = stage.daemon().ready()
        for number in range(10):
            stage.put(f"{number}.tar.gz", b"content %d" % number)
        daemon.wait_for("archive.disposed", count=10)
        assert not daemon.events("destination.paused")
        assert daemon.stop() == 0
    stored = sorted(request.archive for request in server.requests)
    assert stored == [b"content %d" % number for number in range(10)]


FORGED = http_response(201, b'{"sha256": "' + b"0" * 64 + b'"}', **{"Content-Type": "application/json"})


@pytest.mark.parametrize("surplus", [b"\n", b"HTTP/1.1 ", FORGED], ids=["line end", "begin", "response"])
@pytest.mark.parametrize("is_delayed", [False, True], ids=["in one piece", "later"])
def test_a_connection_with_bytes_after_a_response_is_not_reused(
    tmp_path: Path, pki: Pki, surplus: bytes, is_delayed: bool
) -> None:
    """Else the next archive would be given the response to another request."""
    may_send = threading.Event()
    sent = threading.Event()

    def script(peer: Peer) -> None:
        while True:
            receipt = receipt_for(peer.read_request().archive)
            if is_delayed:
                peer.send(receipt)
                may_send.wait()
                peer.send(surplus)
            else:
                peer.send(receipt + surplus)
            sent.set()

    with ScriptedServer(script, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki)) as sender:
            for number in range(3):
                sent.clear()
                assert isinstance(sender.send(an_archive(tmp_path, b"%d" % number)), Delivered)
                may_send.set()
                assert sent.wait(TIMEOUT)
                may_send.clear()
        may_send.set()
    assert [request.archive for request in server.requests] == [b"0", b"1", b"2"]
    assert len(server.peers) == 3


REFUSAL = http_response(400)


@pytest.mark.parametrize("surplus", [REFUSAL, FORGED, b""], ids=["refusal", "success", "end"])
@pytest.mark.parametrize("is_encrypted", [False, True], ids=["tcp", "tls"])
def test_what_arrives_before_the_first_byte_of_a_request_is_no_response_to_it(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch, surplus: bytes, is_encrypted: bool
) -> None:
    """The server sends it on a reused connection while the archive is read, or waits for bandwidth."""
    is_read, is_sent = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        while True:
            peer.send(receipt_for(peer.read_request().archive))
            assert is_read.wait(TIMEOUT)
            is_read.clear()
            peer.send(surplus)
            if not surplus:
                peer.half_close()
            is_sent.set()

    def read_at(job: UploadJob, offset: int, count: int) -> bytes:
        if server.requests and not is_sent.is_set():
            is_read.set()
            assert is_sent.wait(TIMEOUT)
        return original(job, offset, count)

    original = UploadJob.read_at
    monkeypatch.setattr(UploadJob, "read_at", read_at)
    context = server_context(pki) if is_encrypted else None
    with ScriptedServer(script, context) as server:
        with a_sender(a_destination(server.url, pki if is_encrypted else None)) as sender:
            outcomes = [sender.send(an_archive(tmp_path, b"%d" % number)) for number in range(2)]
        is_read.set()
    assert [type(outcome) for outcome in outcomes] == [Delivered, Delivered]
    assert [request.archive for request in server.requests] == [b"0", b"1"]
    assert len(server.peers) == 2


def test_a_server_that_sends_before_the_request_rejects_no_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(peer: Peer) -> None:
        peer.send(REFUSAL)
        peer.drain()

    def connect_and_wait(*args: Any, **keys: Any) -> Stream:
        opened = connect(*args, **keys)
        until(opened.is_readable, "the refusal")
        return opened

    monkeypatch.setattr(transport, "connect", connect_and_wait)
    with ScriptedServer(script) as server, a_sender(a_destination(server.url)) as sender:
        outcome = sender.send(an_archive(tmp_path, CONTENT))
    assert failed(outcome) == (
        Reason.PROTOCOL,
        "the destination sent b'HTTP/1.1 400 As Scripted' before the request",
    )
    assert server.received == 0


def test_a_silent_connection_is_kept_alive_from_45_seconds_on() -> None:
    abort = Abort()
    with ScriptedServer(accept_all) as server:
        port = urllib.parse.urlsplit(server.url).port or 0
        stream = connect("127.0.0.1", port, TIMEOUT, AttemptLimits(abort), DIRECT)
        sock = stream._sock
        assert isinstance(sock, socket.socket)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 45
        stream.close()
    abort.close()
