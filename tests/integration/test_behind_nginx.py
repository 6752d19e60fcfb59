"""nginx in front of an endpoint: every response of its own leads to the outcome of the failure policy."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from backupd.core.model import Deferred
from backupd.core.policy import Reason
from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.documents import block
from tests.pki import Pki
from tests.programs import require
from tests.scripted import Peer, ScriptedServer, receipt_for
from tests.servers.nginx import Nginx
from tests.servers.process import a_listener
from tests.stage import Daemon, Stage, until
from tests.uploading import MIB, a_destination, a_sender, an_archive

pytestmark = pytest.mark.long

FAST_RETRY = 'retry = { initial = "0.1s", max = "0.4s" }\n'


@pytest.fixture
def nginx(stage: Stage) -> Iterator[Nginx]:
    require("nginx")
    with a_listener() as listener:
        yield Nginx(stage.base / "nginx", stage.pki, listener)


def _pass_to(nginx: Nginx, port: int, more: str = "") -> str:
    return f"""
        {nginx.upstream_tls}
        location / {{ proxy_pass https://127.0.0.1:{port}; {more} }}
    """


def _put(stage: Stage, count: int, size: int = 5000) -> dict[str, bytes]:
    archives = {f"sw-{number}.cfg": os.urandom(size) for number in range(count)}
    for name, content in archives.items():
        stage.put(name, content)
    return archives


def _assert_delivered(stage: Stage, archives: dict[str, bytes]) -> None:
    """Assert that each archive is stored once and moved, and that none is in quarantine."""
    assert {path.name: path.read_bytes() for path in stage.archives(stage.sent)} == archives
    assert sorted(path.read_bytes() for path in stage.stored()) == sorted(archives.values())
    assert stage.archives(stage.rejected) == []


def _assert_paused(stage: Stage, daemon: Daemon, reason: Reason, archives: dict[str, bytes]) -> None:
    """Assert that the destination pauses at least twice for a reason, and that no archive is rejected."""
    daemon.wait_for("destination.paused", 2, reason=reason)
    assert {path.name: path.read_bytes() for path in stage.archives(stage.drop)} == archives
    assert not daemon.events("archive.rejected")


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
def test_many_archives_reach_the_receiver_unchanged_through_nginx(
    stage: Stage, nginx: Nginx, receiver: RunningReceiver, http2: bool
) -> None:
    stage.configure(f"{nginx.url}/v1/upload", destination=f"http2 = {str(http2).lower()}\nworkers = 4")
    with nginx.serving(f"client_max_body_size 0; {_pass_to(nginx, receiver.port)}", http2=True):
        daemon = stage.daemon().ready()
        archives = _put(stage, 100) | {"large.tar.gz": os.urandom(20 * MIB)}
        stage.put("large.tar.gz", archives["large.tar.gz"])
        daemon.wait_for("archive.disposed", len(archives))

    _assert_delivered(stage, archives)
    assert not daemon.events("attempt.failed")
    assert nginx.protocols() == {"HTTP/2.0" if http2 else "HTTP/1.1"}


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
def test_an_archive_above_client_max_body_size_is_rejected_and_can_be_retried(
    stage: Stage, nginx: Nginx, receiver: RunningReceiver, http2: bool
) -> None:
    stage.configure(f"{nginx.url}/v1/upload", destination=f"http2 = {str(http2).lower()}\n{FAST_RETRY}")
    daemon = stage.daemon()
    large = os.urandom(20 * MIB)
    with nginx.serving(f"client_max_body_size 1m; {_pass_to(nginx, receiver.port)}", http2=http2):
        stage.put("large.tar.gz", large)
        archives = _put(stage, 10)
        daemon.wait_for("archive.disposed", 11)

        (rejected,) = daemon.events("archive.rejected")
        assert (rejected["reason"], rejected["archive"]) == (Reason.TOO_LARGE, "large.tar.gz")
        assert [path.read_bytes() for path in stage.archives(stage.rejected)] == [large]
        assert len(daemon.events("archive.delivered")) == 10
        assert not daemon.events("destination.paused")

    with nginx.serving(f"client_max_body_size 0; {_pass_to(nginx, receiver.port)}", http2=http2):
        assert stage.backupd("retry", "--all").stdout.startswith("1 ")
        daemon.wait_for("archive.disposed", 12)

    _assert_delivered(stage, archives | {"large.tar.gz": large})


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
def test_an_early_413_ends_the_upload_of_a_huge_archive_early(
    stage: Stage, nginx: Nginx, http2: bool
) -> None:
    archive = an_archive(stage.base, size=1024 * MIB)
    with (
        nginx.serving("client_max_body_size 1m;", http2=http2),
        a_sender(a_destination(f"{nginx.url}/v1/upload", stage.pki, http2=http2)) as sender,
    ):
        outcome = sender.send(archive)

        assert getattr(outcome, "reason", outcome) is Reason.TOO_LARGE
        assert sender.sent < 4 * MIB


@pytest.mark.parametrize(
    ("status", "reason"), [("429", Reason.RATE_LIMITED), ("503", Reason.SERVER_ERROR)], ids=["429", "503"]
)
def test_a_rate_limit_delays_archives_and_loses_none(
    stage: Stage, nginx: Nginx, receiver: RunningReceiver, status: str, reason: Reason
) -> None:
    stage.configure(f"{nginx.url}/v1/upload", destination=FAST_RETRY)
    limited = f"limit_req zone=slow; limit_req_status {status}; {_pass_to(nginx, receiver.port)}"
    if status == "503":
        limited = limited.replace("limit_req_status 503;", "")  # the default of limit_req_status
    with nginx.serving(limited, http="limit_req_zone $remote_addr zone=slow:1m rate=1r/s;"):
        daemon = stage.daemon().ready()
        archives = _put(stage, 5)
        daemon.wait_for("archive.disposed", len(archives))

    _assert_delivered(stage, archives)
    assert {event["reason"] for event in daemon.events("attempt.failed")} == {reason}
    assert sorted(set(nginx.statuses())) == [201, int(status)]
    assert nginx.statuses().count(201) == len(archives)


def test_a_token_that_is_too_large_for_nginx_rejects_no_archive(
    stage: Stage, nginx: Nginx, receiver: RunningReceiver
) -> None:
    token = stage.base / "token"
    token.write_text("x" * 40_000)
    stage.configure(
        f"{nginx.url}/v1/upload", destination=f'header_files = {{ X-Token = "{token}" }}\n{FAST_RETRY}'
    )
    with nginx.serving(_pass_to(nginx, receiver.port)):
        daemon = stage.daemon().ready()
        archives = _put(stage, 5)
        _assert_paused(stage, daemon, Reason.HEAD_TOO_LARGE, archives)
        token.write_text("short")
        daemon.wait_for("archive.disposed", len(archives))

    _assert_delivered(stage, archives)


def test_check_connects_where_nginx_closes_the_connection_for_options(
    stage: Stage, nginx: Nginx, receiver: RunningReceiver
) -> None:
    stage.configure(f"{nginx.url}/v1/upload")
    with nginx.serving("if ($request_method = OPTIONS) { return 444; }" + _pass_to(nginx, receiver.port)):
        done = stage.backupd("check")
    assert done.returncode == 0, done.stdout
    assert "ok: destination.vault" in done.stdout


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_pauses_the_destination(
    stage: Stage, nginx: Nginx, receiver: RunningReceiver, status: int
) -> None:
    stage.configure(f"{nginx.url}/v1/upload", destination=FAST_RETRY)
    with ScriptedServer(lambda peer: None) as elsewhere:
        with nginx.serving(f"location / {{ return {status} http://127.0.0.1:{elsewhere.port}/; }}"):
            daemon = stage.daemon().ready()
            archives = _put(stage, 3)
            _assert_paused(stage, daemon, Reason.REDIRECT, archives)
        assert elsewhere.peers == []

    with nginx.serving(_pass_to(nginx, receiver.port)):
        daemon.wait_for("archive.disposed", len(archives))

    _assert_delivered(stage, archives)


def test_a_backend_that_is_down_pauses_the_destination_until_it_is_up(stage: Stage, nginx: Nginx) -> None:
    stage.configure(f"{nginx.url}/v1/upload", destination=FAST_RETRY)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # without listen()
        port = reserved.getsockname()[1]
        with nginx.serving(_pass_to(nginx, port)):
            daemon = stage.daemon().ready()
            archives = _put(stage, 5)
            _assert_paused(stage, daemon, Reason.SERVER_ERROR, archives)
            assert set(nginx.statuses()) == {502}
            reserved.close()

            tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
            with RunningReceiver(stage.store, tls, port=port):
                daemon.wait_for("archive.disposed", len(archives))
                daemon.wait_for("destination.resumed")

    _assert_delivered(stage, archives)


def test_a_backend_that_hangs_pauses_the_destination_until_it_responds(stage: Stage, nginx: Nginx) -> None:
    def serve(peer: Peer) -> None:
        request = peer.read_request()
        peer.pause()
        peer.send(receipt_for(request.archive))

    stage.configure(f"{nginx.url}/v1/upload", destination=FAST_RETRY)
    with ScriptedServer(serve) as backend:
        location = f"location / {{ proxy_pass http://127.0.0.1:{backend.port}; proxy_read_timeout 200ms; }}"
        with nginx.serving(location):
            daemon = stage.daemon().ready()
            archives = _put(stage, 3)
            _assert_paused(stage, daemon, Reason.SERVER_ERROR, archives)
            assert set(nginx.statuses()) == {504}

            backend.resume()
            daemon.wait_for("archive.disposed", len(archives))

    assert {path.name: path.read_bytes() for path in stage.archives(stage.sent)} == archives


@pytest.mark.parametrize("status", [502, 504])
def test_a_query_finds_an_archive_that_the_backend_stored_before_a_gateway_error(
    stage: Stage, nginx: Nginx, status: int
) -> None:
    """The archive is uploaded once, although its response is lost."""
    stored: list[bytes] = []

    def serve(peer: Peer) -> None:
        request = peer.read_request()
        if request.head.startswith(b"POST"):
            stored.append(request.archive)
            if status == 504:
                peer.pause()
        else:
            until(lambda: stored, "the archive to be stored")
            peer.send(receipt_for(stored[0], status=200))

    stage.configure(
        f"{nginx.url}/v1/upload", destination=f'query_url = "{nginx.url}/v1/upload/{{digest}}"\n{FAST_RETRY}'
    )
    read_timeout = "200ms" if status == 504 else "60s"
    with ScriptedServer(serve) as backend:
        location = (
            f"location / {{ proxy_pass http://127.0.0.1:{backend.port}; proxy_read_timeout {read_timeout}; }}"
        )
        with nginx.serving(location):
            daemon = stage.daemon().ready()
            stage.put("sw.cfg", b"sent once")
            daemon.wait_for("archive.disposed")
            backend.resume()

    assert stored == [b"sent once"]
    assert nginx.statuses() == [status]
    assert (stage.sent / "sw.cfg").read_bytes() == b"sent once"


def _without_certificate(stage: Stage) -> None:
    text = stage.config.read_text()
    stage.config.write_text("".join(line for line in text.splitlines(True) if "client." not in line))


def _with_a_certificate_of_another_ca(stage: Stage) -> None:
    other = Pki(stage.base / "other")
    text = stage.config.read_text().replace(str(stage.pki.client_cert), str(other.client_cert))
    stage.config.write_text(text.replace(str(stage.pki.client_key), str(other.client_key)))


@pytest.mark.parametrize("change", [_without_certificate, _with_a_certificate_of_another_ca])
def test_a_400_about_the_client_certificate_rejects_no_archive(
    stage: Stage, nginx: Nginx, receiver: RunningReceiver, change: object
) -> None:
    stage.configure(f"{nginx.url}/v1/upload", destination=FAST_RETRY)
    valid = stage.config.read_text()
    assert callable(change)
    change(stage)
    with nginx.serving(_pass_to(nginx, receiver.port)):
        checked = stage.backupd("check")
        assert checked.returncode == 69, checked.stdout
        assert Reason.TLS_CLIENT in checked.stdout
        daemon = stage.daemon().ready()
        archives = _put(stage, 5)
        _assert_paused(stage, daemon, Reason.TLS_CLIENT, archives)
        assert set(nginx.statuses()) == {400}
        daemon.stop()

        stage.config.write_text(valid)
        assert stage.backupd("check").returncode == 0
        stage.daemon().wait_for("archive.disposed", len(archives))

    _assert_delivered(stage, archives)


def test_the_documented_configuration_responds_403_to_an_invalid_certificate(
    stage: Stage, nginx: Nginx, receiver: RunningReceiver
) -> None:
    conf = block("destinations.md", "nginx in front", "nginx")
    pair = stage.pki.issue_expired_client()
    with (
        nginx.serving_documented(conf, f"https://127.0.0.1:{receiver.port}"),
        a_sender(a_destination(f"{nginx.url}/v1/upload", stage.pki, cert=pair.cert, key=pair.key)) as sender,
    ):
        outcome = sender.send(an_archive(stage.base, b"x"))

    assert isinstance(outcome, Deferred)
    assert (outcome.reason, outcome.http_status) == (Reason.FORBIDDEN, 403)


def test_plain_http_to_an_https_port_rejects_no_archive(stage: Stage, nginx: Nginx) -> None:
    with (
        nginx.serving(""),
        a_sender(a_destination(f"http://127.0.0.1:{nginx.port}/v1/upload")) as sender,
    ):
        outcome = sender.send(an_archive(stage.base, b"x"))

    assert isinstance(outcome, Deferred)
    assert (outcome.reason, outcome.http_status) == (Reason.PROTOCOL, 400)


@pytest.mark.parametrize(
    "setting", ["keepalive_requests 1;", "keepalive_requests 3;", "http2_body_preread_size 0;"]
)
def test_no_http2_setting_of_nginx_fails_an_attempt(
    stage: Stage, nginx: Nginx, receiver: RunningReceiver, setting: str
) -> None:
    stage.configure(f"{nginx.url}/v1/upload", destination="http2 = true\nworkers = 2")
    with nginx.serving(f"client_max_body_size 0; {setting} {_pass_to(nginx, receiver.port)}", http2=True):
        daemon = stage.daemon().ready()
        archives = _put(stage, 10, size=MIB)
        daemon.wait_for("archive.disposed", len(archives))

    _assert_delivered(stage, archives)
    assert not daemon.events("attempt.failed")
    assert nginx.protocols() == {"HTTP/2.0"}


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
def test_restarts_of_nginx_lose_no_archive_and_store_none_twice(
    stage: Stage, nginx: Nginx, receiver: RunningReceiver, http2: bool
) -> None:
    destination = f"http2 = {str(http2).lower()}\nworkers = 4\n{FAST_RETRY}"
    stage.configure(f"{nginx.url}/v1/upload", destination=destination)
    daemon = stage.daemon().ready()
    archives = _put(stage, 150)
    for done in (20, 60, 100):
        with nginx.serving(_pass_to(nginx, receiver.port), http2=http2):
            daemon.wait_for("archive.disposed", done)
    with nginx.serving(_pass_to(nginx, receiver.port), http2=http2):
        daemon.wait_for("archive.disposed", len(archives))

    _assert_delivered(stage, archives)
    assert len(daemon.events("archive.delivered")) == len(archives)


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize(
    ("rule", "proves_failure"),
    [
        ("if ($request_method = OPTIONS) { return 444; }", False),
        ("if ($request_method = OPTIONS) { return 403; }", False),
        ("limit_except POST { deny all; }", True),
    ],
)
def test_check_distinguishes_a_rule_for_options_from_one_for_uploads(
    stage: Stage, nginx: Nginx, receiver: RunningReceiver, rule: str, proves_failure: bool, http2: bool
) -> None:
    stage.configure(f"{nginx.url}/v1/upload", destination=f"http2 = {str(http2).lower()}")
    with nginx.serving(_pass_to(nginx, receiver.port, rule), http2=http2):
        plain = stage.backupd("check")
        sent = stage.backupd("check", "--send")
    assert plain.returncode == (69 if proves_failure else 0), plain
    assert ("check --send` tries a real upload" in plain.stdout) == proves_failure
    assert sent.returncode == 0, sent
    assert "its receipt matches" in sent.stdout
