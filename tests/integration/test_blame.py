"""Whether archive or destination is at fault: stray responses, refusals of everything, one that fails."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from backupd.config.models import HttpDestinationConfig
from backupd.core.model import Deferred, Delivered, Rejected
from backupd.core.policy import Reason
from tests.pki import Pki
from tests.scripted import (
    Peer,
    Request,
    ScriptedServer,
    http_response,
    in_turn,
    receipt_for,
    server_context,
)
from tests.stage import Daemon, Stage, until
from tests.uploading import a_destination, a_sender, an_archive

FAST_RETRY = 'retry = { initial = "0.1s", max = "0.3s" }'


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def put(stage: Stage, count: int) -> dict[str, bytes]:
    archives = {f"sw-{number}.cfg": b"content %d" % number for number in range(count)}
    for name, content in archives.items():
        stage.put(name, content)
    return archives


def delivered(stage: Stage, daemon: Daemon, count: int) -> None:
    until(lambda: len(stage.archives(stage.sent)) == count, f"{count} archives in sent\n{daemon.text()}")


# Stray responses


class SendsAnother:
    """Responds to each request, and then once more to the first one of each connection."""

    def __init__(self, stray: bytes, wait: float | None) -> None:
        self.stored: list[bytes] = []
        self._stray = stray
        self._wait = wait

    def __call__(self, peer: Peer) -> None:
        content = peer.read_request().archive
        self.stored.append(content)
        if self._wait is None:
            peer.send(receipt_for(content) + self._stray)
        else:
            peer.send(receipt_for(content))
            threading.Timer(self._wait, lambda: self._send_late(peer)).start()
        while True:
            content = peer.read_request().archive
            self.stored.append(content)
            peer.send(receipt_for(content))

    def _send_late(self, peer: Peer) -> None:
        with suppress(OSError):  # the connection is closed
            peer.send(self._stray)


@pytest.mark.parametrize("digest", ["body:/sha256", "none"])
@pytest.mark.parametrize("stray", [receipt_for(b"another"), http_response(400, b"what?"), http_response(409)])
@pytest.mark.parametrize("wait", [None, 0.0, 0.01, 0.05])
def test_a_stray_response_neither_delivers_nor_rejects_an_archive(
    tmp_path: Path, pki: Pki, digest: str, stray: bytes, wait: float | None
) -> None:
    endpoint = SendsAnother(stray, wait)
    contents = [b"content %d" % number for number in range(12)]
    with ScriptedServer(endpoint, server_context(pki)) as server:
        destination = a_destination(server.url, pki, receipt={"digest": digest})
        with a_sender(destination) as sender:
            outcomes = [sender.send(an_archive(tmp_path, content)) for content in contents]
    assert not [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
    delivered = [c for c, outcome in zip(contents, outcomes, strict=True) if isinstance(outcome, Delivered)]
    assert set(delivered) <= set(endpoint.stored)
    assert len(delivered) >= len(contents) - 3


def test_a_response_that_arrives_just_after_the_request_was_sent_rejects_nothing(
    tmp_path: Path, pki: Pki
) -> None:
    """Nothing but another attempt shows that the 400 responds to the archive before."""

    def script(peer: Peer) -> None:
        peer.send(receipt_for(peer.read_request().archive))
        if peer.number == 0:
            peer.read_request()
            peer.send(http_response(400, b"for the request before"))
            return
        while True:
            peer.send(receipt_for(peer.read_request().archive))

    with ScriptedServer(script, server_context(pki)) as server, a_sender(a_destination(server.url, pki)) as s:
        assert isinstance(s.send(an_archive(tmp_path, b"first")), Delivered)
        assert isinstance(s.send(an_archive(tmp_path, b"second")), Delivered)
    assert len(server.peers) == 2


def test_the_confirmation_of_a_rejection_is_part_of_the_attempt(tmp_path: Path, pki: Pki) -> None:
    """`deadline` is for both requests together."""

    def script(peer: Peer) -> None:
        peer.send(receipt_for(peer.read_request().archive))
        peer.read_request()
        peer.send(http_response(422))
        peer.drain()

    def silent(peer: Peer) -> None:
        peer.read_request()
        peer.drain()

    with ScriptedServer(in_turn(script, silent), server_context(pki)) as server:
        with a_sender(a_destination(server.url, pki, deadline="2s")) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, b"first")), Delivered)
            began = time.monotonic()
            outcome = sender.send(an_archive(tmp_path, b"second"))
            assert time.monotonic() - began >= 2
    assert isinstance(outcome, Deferred)
    assert outcome.reason is Reason.DEADLINE


def test_a_rejection_over_a_new_connection_is_not_repeated(tmp_path: Path, pki: Pki) -> None:
    def script(peer: Peer) -> None:
        while True:
            peer.read_request()
            peer.send(http_response(422))

    with ScriptedServer(script, server_context(pki)) as server, a_sender(a_destination(server.url, pki)) as s:
        assert isinstance(s.send(an_archive(tmp_path, b"first")), Rejected)
        assert len(server.requests) == 1
        assert isinstance(s.send(an_archive(tmp_path, b"second")), Rejected)
    assert len(server.requests) == 3


# Everything is refused


class Refuses:
    """Responds to every archive with the same refusal until `works` is set."""

    def __init__(self, refusal: Callable[[Request], bytes]) -> None:
        self.works = threading.Event()
        self._refusal = refusal

    def __call__(self, peer: Peer) -> None:
        while True:
            request = peer.read_request()
            peer.send(receipt_for(request.archive) if self.works.is_set() else self._refusal(request))


def refusal(status: int, body: str, **headers: str) -> Callable[[Request], bytes]:
    return lambda request: http_response(
        status, body.replace("{key}", request.header("idempotency-key") or "").encode(), **headers
    )


@pytest.mark.parametrize(
    "respond",
    [
        refusal(400, "<!doctype html><html><head><title>Bad Request</title></head></html>"),
        refusal(422, '{"error": "request {key} has no tenant"}', Content_Type="application/json"),
        refusal(400, "<h1>Bad Request (400)</h1>"),  # Django, for a host that is not allowed
        refusal(415, ""),
    ],
)
def test_of_twenty_archives_that_are_refused_in_the_same_words_seventeen_stay(
    stage: Stage, respond: Callable[[Request], bytes]
) -> None:
    endpoint = Refuses(respond)
    with ScriptedServer(endpoint, server_context(stage.pki)) as server:
        stage.configure(server.url, destination=f"{FAST_RETRY}\nworkers = 4")
        daemon = stage.daemon().ready()
        archives = put(stage, 20)
        paused = daemon.wait_for("destination.paused", 3, reason="all_refused")
        assert "backupd retry" in paused[0]["hint"]
        until(lambda: len(stage.archives(stage.rejected)) == 3, "three rejected archives")
        assert len(stage.archives(stage.drop)) - 3 == 17  # `rejected` is in the drop folder
        assert "all_refused" in stage.backupd("status").stdout

        daemon.kill()
        daemon = stage.daemon().ready()
        daemon.wait_for("destination.paused", 3, reason="all_refused")
        for number in range(1, 4):
            stage.configure(server.url, destination=f"{FAST_RETRY}\nworkers = {number}")
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_for("config.reloaded", number)
        requests = len(server.requests)
        until(lambda: len(server.requests) > requests + 3, "further attempts")
        assert len(stage.archives(stage.rejected)) == 3
        assert "all_refused" in stage.backupd("status").stdout

        endpoint.works.set()
        delivered(stage, daemon, 17)
        assert stage.backupd("retry", "--all").returncode == 0
        delivered(stage, daemon, 20)
        assert {path.name: path.read_bytes() for path in stage.archives(stage.sent)} == archives
        assert daemon.stop() == 0


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (400, "<html><title>400 The SSL certificate error</title></html>", Reason.TLS_CLIENT),
        (400, "<title>400 Request Header Or Cookie Too Large</title>", Reason.HEAD_TOO_LARGE),
        (431, "", Reason.HEAD_TOO_LARGE),
        (400, "<?xml version='1.0'?><Error><Code>RequestTimeout</Code></Error>", Reason.SERVER_ERROR),
        (400, "<Error><Code>ExpiredToken</Code><Message>expired</Message></Error>", Reason.UNAUTHORIZED),
        (400, '{"error": "invalid_token"}', Reason.UNAUTHORIZED),
        (400, f"<p>{'x' * 1000}</p><h1>the ssl certificate error</h1>", Reason.TLS_CLIENT),
        (400, "Client sent an HTTP request to an HTTPS server.\n", Reason.PROTOCOL),
        (400, "This combination of host and port requires TLS.\r\n", Reason.PROTOCOL),
        (
            400,
            "<p>Reason: You're speaking plain HTTP to an SSL-enabled server port.</p>",
            Reason.PROTOCOL,
        ),
    ],
)
def test_a_refusal_that_names_a_fault_of_the_destination_rejects_no_archive(
    tmp_path: Path, pki: Pki, status: int, body: str, reason: Reason
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(http_response(status, body.encode()))

    with ScriptedServer(script, server_context(pki)) as server, a_sender(a_destination(server.url, pki)) as s:
        outcome = s.send(an_archive(tmp_path, b"content"))
    assert getattr(outcome, "reason", None) is reason
    assert not isinstance(outcome, Rejected)
    assert "<" not in getattr(outcome, "error", "")


# One archive that fails


def fails_above_1000_bytes(peer: Peer) -> None:
    while True:
        content = peer.read_request().archive
        peer.send(http_response(502) if len(content) > 1000 else receipt_for(content))


def test_small_archives_pass_many_large_ones_that_came_first_and_fail(stage: Stage) -> None:
    with ScriptedServer(fails_above_1000_bytes, server_context(stage.pki)) as server:
        stage.configure(server.url, destination='retry = { initial = "0.1s", max = "1h" }')
        for number in range(40):
            stage.put(f"large-{number}.cfg", b"%d " % number * 1000)
        daemon = stage.daemon().ready()
        daemon.wait_for("archive.queued", 40)
        daemon.wait_for("destination.paused", 3)
        for number in range(20):
            stage.put(f"small-{number}.cfg", b"%d" % number)
        daemon.wait_for("archive.disposed", 20)
        assert daemon.stop() == 0


def test_an_archive_that_fails_while_others_pass_does_not_pause_the_destination_for_long(
    stage: Stage,
) -> None:
    """As behind a proxy that responds 502 if a body is too large."""
    with ScriptedServer(fails_above_1000_bytes, server_context(stage.pki)) as server:
        stage.configure(server.url, destination=FAST_RETRY, top='heartbeat_every = "1s"')
        daemon = stage.daemon().ready()
        stage.put("large.cfg", b"x" * 5000)
        archives = put(stage, 5)
        delivered(stage, daemon, len(archives))
        daemon.wait_for("attempt.failed", archive="large.cfg", reason="fails_alone")
        daemon.wait_for("drop.problem", reason="fails_alone", problems=1)
        (problem,) = json.loads(stage.backupd("list", "--problems", "--json").stdout)
        assert (problem["relpath"], problem["reason"]) == ("large.cfg", "fails_alone")
        assert "502" in problem["error"]
        assert stage.backupd("status", "--check").returncode == 1

        stage.put("later.cfg", b"later")
        daemon.wait_for("archive.disposed", archive="later.cfg")
        pauses = len(daemon.events("destination.paused"))
        daemon.wait_for("attempt.failed", 8, archive="large.cfg")
        assert len(daemon.events("destination.paused")) == pauses
        assert (stage.drop / "large.cfg").exists()
        assert daemon.stop() == 0


# A folder that is missing


def webdav(pki: Pki, url: str, **keys: object) -> HttpDestinationConfig:
    return a_destination(
        f"{url}/a/b/{{name}}", pki, method="PUT", body="raw", receipt={"digest": "none"}, **keys
    )


class WebDav:
    """Stores an archive, or creates a folder, if the folder above it exists."""

    def __init__(self, refusal: int = 409) -> None:
        self.folders = {"/v1/upload"}
        self.requests: list[str] = []
        self._refusal = refusal

    def __call__(self, peer: Peer) -> None:
        while True:
            request = peer.read_request()
            method, path = request.head.decode().split(" ")[:2]
            self.requests.append(f"{method} {path}")
            folder = path.rstrip("/").rpartition("/")[0]
            if folder not in self.folders:
                peer.send(http_response(self._refusal))
            elif method == "MKCOL":
                status = 405 if path.rstrip("/") in self.folders else 201
                self.folders.add(path.rstrip("/"))
                peer.send(http_response(status))
            else:
                peer.send(http_response(201))


@pytest.mark.parametrize("refusal", [404, 409, 500])
def test_missing_folders_are_created_from_the_top_down(tmp_path: Path, pki: Pki, refusal: int) -> None:
    dav = WebDav(refusal)
    with ScriptedServer(dav, server_context(pki)) as server:
        with a_sender(webdav(pki, server.url, create_folders=True)) as sender:
            assert isinstance(sender.send(an_archive(tmp_path, b"x", name="sw.cfg")), Delivered)
            assert isinstance(sender.send(an_archive(tmp_path, b"x", name="sw.cfg")), Delivered)
    put, base = "PUT /v1/upload/a/b/sw.cfg", "MKCOL /v1/upload"
    assert dav.requests == [put, f"{base}/a/b/", f"{base}/a/", f"{base}/a/b/", put, put]


def test_a_409_for_a_missing_folder_is_the_fault_of_the_destination(tmp_path: Path, pki: Pki) -> None:
    dav = WebDav()
    with ScriptedServer(dav, server_context(pki)) as server:
        with a_sender(webdav(pki, server.url)) as sender:
            outcome = sender.send(an_archive(tmp_path, b"x", name="sw.cfg"))
    assert isinstance(outcome, Deferred)
    assert outcome.reason is Reason.NO_FOLDER
    assert len(dav.requests) == 1


@pytest.mark.parametrize("status", [404, 409, 500])
@pytest.mark.parametrize("exists", ["/v1/upload/a/", "/v1/", "/", "none"])
def test_a_folder_that_is_missing_whatever_is_created_ends_the_attempt(
    tmp_path: Path, pki: Pki, status: int, exists: str
) -> None:
    """As with mod_dav and an unusable DavLockDB."""

    def script(peer: Peer) -> None:
        while True:
            is_there = peer.read_request().head.startswith(b"MKCOL %s HTTP" % exists.encode())
            peer.send(http_response(405 if is_there else status))

    with ScriptedServer(script, server_context(pki)) as server:
        with a_sender(webdav(pki, server.url, create_folders=True)) as sender:
            outcome = sender.send(an_archive(tmp_path, b"x", name="sw.cfg"))
    assert isinstance(outcome, Deferred)
    assert outcome.reason is Reason.NO_FOLDER
    assert "MKCOL /" in outcome.error
    assert len(server.requests) <= 8


@pytest.mark.parametrize("body", ["column invalid_token is missing", "the field RequestTimeouts is unknown"])
def test_words_that_contain_those_of_a_fault_of_the_destination_are_of_the_archive(
    tmp_path: Path, pki: Pki, body: str
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(http_response(400, body.encode()))

    with ScriptedServer(script, server_context(pki)) as server, a_sender(a_destination(server.url, pki)) as s:
        assert isinstance(s.send(an_archive(tmp_path, b"content")), Rejected)


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path, pki: Pki) -> None:
    def script(peer: Peer) -> None:
        while True:
            is_upload = peer.read_request().head.startswith(b"PUT")
            peer.send(http_response(409 if is_upload else 403))

    with ScriptedServer(script, server_context(pki)) as server:
        with a_sender(webdav(pki, server.url, create_folders=True)) as sender:
            outcome = sender.send(an_archive(tmp_path, b"x", name="sw.cfg"))
    assert isinstance(outcome, Deferred)
    assert outcome.reason is Reason.FORBIDDEN
    assert "MKCOL /v1/upload/a/b/: 403" in outcome.error
    assert len(server.requests) == 2


def test_a_409_with_the_digest_of_other_content_rejects_the_archive(tmp_path: Path, pki: Pki) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(receipt_for(b"other content", 409))

    with ScriptedServer(script, server_context(pki)) as server:
        destination = a_destination(server.url, pki, method="PUT", body="raw")
        with a_sender(destination) as sender:
            outcome = sender.send(an_archive(tmp_path, b"x"))
    assert isinstance(outcome, Rejected)
    assert outcome.reason is Reason.CONFLICT
