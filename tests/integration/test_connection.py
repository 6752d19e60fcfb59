"""How a destination is connected to: proxies, addresses, names, pins, versions, timeouts."""

from __future__ import annotations

import base64
import errno
import hashlib
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from backupd.core.model import Deferred, Delivered, Outcome
from backupd.core.policy import Reason
from tests.endpoints import a_full_listener
from tests.pki import Pki
from tests.scripted import (
    Peer,
    Script,
    ScriptedServer,
    answer,
    header_of,
    receipt_for,
    server_context,
    take_all,
)
from tests.stage import Stage, until
from tests.uploading import MIB, a_destination, a_sender, an_archive

CONTENT = b"the content of an archive" * 1000
QUICK = 'retry = { initial = "0.1s", max = "0.3s" }'
NO_FAMILY = 99
"""An address family of no kernel."""


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def failed(outcome: Outcome) -> tuple[Reason, str]:
    assert isinstance(outcome, Deferred), outcome
    return outcome.reason, outcome.error


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_an_address_of_a_kind_that_the_host_lacks_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    def looked_up(_host: str, port: int, **_keys: Any) -> list[tuple[Any, ...]]:
        lacking = (NO_FAMILY, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        return [lacking, found] if first else [found, lacking]

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    with ScriptedServer(take_all) as server, a_sender(a_destination(server.url)) as sender:
        taken = sender.send(an_archive(tmp_path, CONTENT))
        server.refuse()
        with a_sender(a_destination(server.url)) as another:
            refused = another.send(an_archive(tmp_path, CONTENT))

    assert isinstance(taken, Delivered)
    assert failed(refused) == (Reason.CONNECT, f"Connection refused (127.0.0.1 port {server.port})")


def test_a_host_without_a_descriptor_left_is_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_socket(*_: int) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    with a_sender(a_destination("http://127.0.0.1:9/")) as sender:
        monkeypatch.setattr(socket, "socket", no_socket)
        assert failed(sender.send(an_archive(tmp_path, CONTENT))) == (Reason.CONNECT, "Too many open files")


# Proxies


class Proxy:
    """A script for an HTTP proxy (RFC 9110 section 9.3.6); `tunnelled` is what clients sent through it."""

    def __init__(self, credentials: str = "", refusal: bytes = b"") -> None:
        self.tunnelled = bytearray()
        self.targets: list[str] = []
        self.credentials_seen: list[str | None] = []
        self._expected = f"Basic {base64.b64encode(credentials.encode()).decode()}" if credentials else None
        self._refusal = refusal

    def __call__(self, peer: Peer) -> None:
        head = peer.read_head()
        self.credentials_seen.append(header_of(head, "proxy-authorization"))
        self.targets.append(head.split(b" ")[1].decode())
        if self._refusal or self.credentials_seen[-1] != self._expected:
            peer.send(self._refusal or answer(407, Proxy_Authenticate='Basic realm="proxy"'))
            return
        host, _, port = self.targets[-1].rpartition(":")
        with socket.create_connection((host, int(port))) as far:
            peer.send(answer(200).replace(b"Content-Length: 0\r\n", b""))
            back = threading.Thread(target=self._back, args=(far, peer))
            back.start()
            try:
                while True:
                    piece = peer._piece()
                    self.tunnelled += piece
                    far.sendall(piece)
            finally:
                with suppress(OSError):
                    far.shutdown(socket.SHUT_RDWR)
                back.join()

    @staticmethod
    def _back(far: socket.socket, peer: Peer) -> None:
        with suppress(OSError):
            while piece := far.recv(64 * 1024):
                peer.send(piece)
        peer.hang_up()


class TestProxy:
    @pytest.mark.parametrize("user", ["", "josé"])
    def test_tls_goes_through_it_end_to_end(self, tmp_path: Path, pki: Pki, user: str) -> None:
        password = tmp_path / "password"
        password.write_text("p:w\n")
        proxy = Proxy(f"{user}:p:w" if user else "")
        keys = {"proxy_user": user, "proxy_password_file": password} if user else {}
        with (
            ScriptedServer(take_all, server_context(pki)) as server,
            ScriptedServer(proxy) as through,
        ):
            destination = a_destination(
                server.url,
                pki,
                proxy=f"http://127.0.0.1:{through.port}",
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

    def test_http_1_is_spoken_through_one(self, tmp_path: Path, pki: Pki) -> None:
        context = server_context(pki)
        context.set_alpn_protocols(["h2", "http/1.1"])
        with ScriptedServer(take_all, context) as server, ScriptedServer(Proxy()) as through:
            destination = a_destination(server.url, pki, proxy=f"http://127.0.0.1:{through.port}", http2=True)
            with a_sender(destination) as sender:
                assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)

    def test_wrong_credentials_are_told_and_never_logged(self, stage: Stage) -> None:
        password = stage.base / "password"
        password.write_text("wrong-password")
        proxy = Proxy("me:right-password")
        with (
            ScriptedServer(take_all, server_context(stage.pki)) as server,
            ScriptedServer(proxy) as through,
        ):
            stage.configure(
                server.url,
                top='[log]\nlevel = "debug"',
                destination=f'{QUICK}\nproxy = "http://127.0.0.1:{through.port}"\nproxy_user = "me"\n'
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

    def test_one_that_can_not_reach_the_endpoint_is_told(self, tmp_path: Path, pki: Pki) -> None:
        with ScriptedServer(Proxy(refusal=answer(502))) as through:
            destination = a_destination(
                "https://vault.example.net/x", pki, proxy=f"http://127.0.0.1:{through.port}"
            )
            with a_sender(destination) as sender:
                reason, error = failed(sender.send(an_archive(tmp_path, CONTENT)))
        assert reason is Reason.PROXY
        assert "502" in error

    def test_one_that_is_down_is_told_as_that(self, tmp_path: Path, pki: Pki) -> None:
        with ScriptedServer(take_all) as gone:
            gone.refuse()
            destination = a_destination(
                "https://vault.example.net/x", pki, proxy=f"http://127.0.0.1:{gone.port}"
            )
            with a_sender(destination) as sender:
                reason, error = failed(sender.send(an_archive(tmp_path, CONTENT)))
        assert reason is Reason.PROXY
        assert error.startswith("no connection to the proxy")
        assert f"port {gone.port}" in error

    def test_that_of_the_environment_is_not_used(
        self, tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        with ScriptedServer(take_all, server_context(pki)) as server:
            with a_sender(a_destination(server.url, pki)) as sender:
                assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)


# Addresses and names


def test_the_local_address_is_the_one_that_is_asked_for(tmp_path: Path, pki: Pki) -> None:
    seen: list[str] = []

    def script(peer: Peer) -> None:
        seen.append(peer._sock.getpeername()[0])
        take_all(peer)

    with ScriptedServer(script, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, local_address="127.0.0.2")) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
    assert seen == ["127.0.0.2"]


def test_a_local_address_that_is_not_ours_is_told(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(take_all, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, local_address="192.0.2.1")) as sender:
            reason, error = failed(sender.send(an_archive(tmp_path, CONTENT)))
    assert reason is Reason.CONNECT
    assert "192.0.2.1" in error


@contextmanager
def a_named_server(pki: Pki, *names: str) -> Iterator[tuple[ScriptedServer, list[str | None]]]:
    """Yield a server whose certificate is for these names, and the names that it is asked for."""
    asked: list[str | None] = []
    context = server_context(pki, pki.issue_server("named", names))
    context.sni_callback = lambda _sock, name, _context: asked.append(name)
    with ScriptedServer(take_all, context) as server:
        yield server, asked


def test_connect_to_leads_elsewhere_and_changes_no_name(tmp_path: Path, pki: Pki) -> None:
    with a_named_server(pki, "vault.test") as (server, asked):
        destination = a_destination(
            "https://vault.test/v1/upload", pki, connect_to=f"127.0.0.1:{server.port}"
        )
        with a_sender(destination) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
    assert asked == ["vault.test"]
    assert server.requests[0].header("host") == "vault.test"


def test_a_server_name_is_asked_for_and_expected(tmp_path: Path, pki: Pki) -> None:
    with a_named_server(pki, "vault.test") as (server, asked):
        with a_sender(a_destination(server.url, pki, server_name="vault.test")) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)
    assert asked == ["vault.test"]
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
def test_a_pinned_key_is_accepted_beside_the_next_one(tmp_path: Path, pki: Pki, prefix: str) -> None:
    pins = [prefix + pin_of(pki.client_cert), prefix + pin_of(pki.server_cert)]
    with ScriptedServer(take_all, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, pin_sha256=pins)) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, CONTENT)), Delivered)


def test_another_key_is_refused_and_named(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(take_all, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, pin_sha256=[pin_of(pki.client_cert)])) as sender:
            reason, error = failed(sender.send(an_archive(tmp_path, CONTENT)))
    assert reason is Reason.TLS
    assert pin_of(pki.server_cert) in error
    assert not server.heads


def test_a_pin_does_not_stand_in_for_the_authority(tmp_path: Path, pki: Pki) -> None:
    other = Pki(tmp_path / "other")
    with ScriptedServer(take_all, server_context(pki)) as server:
        destination = a_destination(server.url, pki, ca=other.ca_pem, pin_sha256=[pin_of(pki.server_cert)])
        with a_sender(destination) as sender:
            reason, _ = failed(sender.send(an_archive(tmp_path, CONTENT)))
    assert reason is Reason.TLS


@pytest.mark.parametrize("least", ["1.2", "1.3"])
def test_the_least_version_of_tls_is_kept_to(tmp_path: Path, pki: Pki, least: str) -> None:
    context = server_context(pki, version=ssl.TLSVersion.TLSv1_2)
    with ScriptedServer(take_all, context) as server:
        with a_sender(a_destination(server.url, pki, tls_min=least)) as sender:
            outcome = sender.send(an_archive(tmp_path, CONTENT))
    if least == "1.2":
        assert isinstance(outcome, Delivered)
    else:
        assert failed(outcome)[0] is Reason.TLS
        assert "version" in failed(outcome)[1]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("size", [10, 8 * MIB])
def test_a_refused_client_certificate_is_told_as_that_every_time(
    tmp_path: Path, pki: Pki, version: ssl.TLSVersion, size: int
) -> None:
    """Under TLS 1.3 the alert comes after the handshake, in the middle of the request."""
    stranger = Pki(tmp_path / "stranger")
    context = server_context(pki, version=version)
    reasons = []
    with ScriptedServer(take_all, context) as server:
        for _ in range(10):
            destination = a_destination(server.url, pki, cert=stranger.client_cert, key=stranger.client_key)
            with a_sender(destination) as sender:
                reasons.append(failed(sender.send(an_archive(tmp_path, size=size)))[0])
    assert reasons == [Reason.TLS_CLIENT] * 10


def test_a_certificate_that_is_renewed_counts_without_a_restart(tmp_path: Path, pki: Pki) -> None:
    expired, renewed = pki.issue_expired_client("ours"), pki.issue_client("renewed")
    with ScriptedServer(take_all, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, cert=expired.cert, key=expired.key)) as sender:
            archive = an_archive(tmp_path, CONTENT)
            assert failed(sender.send(archive))[0] is Reason.TLS_CLIENT
            renewed.key.replace(expired.key)
            assert (
                failed(sender.send(archive))[0] is Reason.TLS_CLIENT
            )  # half of a new pair: the old one stays
            renewed.cert.replace(expired.cert)
            assert isinstance(sender.send(archive), Delivered)


# Time


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
def test_each_phase_has_a_timeout_of_its_own(
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


def test_a_connection_that_nobody_answers_times_out(tmp_path: Path, pki: Pki) -> None:
    with a_full_listener() as port:
        destination = a_destination(f"https://127.0.0.1:{port}/x", pki, timeout={"connect": "0.3s"})
        with a_sender(destination) as sender:
            assert failed(sender.send(an_archive(tmp_path, CONTENT)))[0] is Reason.CONNECT_TIMEOUT


def test_a_handshake_that_nobody_answers_times_out(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(silent) as server:  # it listens, and speaks no TLS
        url = server.url.replace("http:", "https:")
        with a_sender(a_destination(url, pki, timeout={"connect": "0.3s"})) as sender:
            assert failed(sender.send(an_archive(tmp_path, CONTENT)))[0] is Reason.CONNECT_TIMEOUT


# Connections that are kept


def one_each(peer: Peer) -> None:
    """Serve one request on a connection, and end it without a word about it."""
    peer.send(receipt_for(peer.read_request().archive))


def test_a_connection_that_ended_between_two_archives_is_not_used_again(tmp_path: Path, pki: Pki) -> None:
    with ScriptedServer(one_each, server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki)) as sender:
            for number in range(5):
                assert isinstance(sender.send(an_archive(tmp_path, b"%d" % number)), Delivered)
                until(server.peers[-1].closed.is_set, "the end of the connection")
    assert [request.archive for request in server.requests] == [b"0", b"1", b"2", b"3", b"4"]
    assert len(server.peers) == 5


def test_connections_are_kept_again_once_tls_has_succeeded_after_a_failure(tmp_path: Path, pki: Pki) -> None:
    """New certificate files are looked for after a failure of TLS, and not before each archive ever after."""

    def script(peer: Peer) -> None:
        if peer.number == 0:
            peer.send(b"\x15\x03\x03\x00\x02\x02\x28")  # an alert in place of the handshake
            peer.drain()
            return
        peer.shake_hands(server_context(pki))
        take_all(peer)

    with ScriptedServer(script) as server:
        with a_sender(a_destination(server.url.replace("http:", "https:"), pki)) as sender:
            assert failed(sender.send(an_archive(tmp_path, CONTENT)))[0] in (Reason.TLS, Reason.TLS_CLIENT)
            for number in range(5):
                assert isinstance(sender.send(an_archive(tmp_path, b"%d" % number)), Delivered)
    assert len(server.requests) == 5
    assert len(server.peers) == 2


def test_one_that_ends_as_the_next_archive_comes_is_made_anew_at_once(stage: Stage) -> None:
    def script(peer: Peer) -> None:
        peer.send(receipt_for(peer.read_request().archive))
        peer.read_head()  # what follows was for a connection that is gone

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
