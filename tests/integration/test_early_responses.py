"""Answers that come before the whole archive was sent, and answers that are no good."""

from __future__ import annotations

import hashlib
import select
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpcore
import pytest

from backupd.core.model import Deferred, Delivered, Outcome, Rejected
from backupd.core.policy import Reason
from backupd.upload.http.body import CHUNK
from backupd.upload.http.transport import StreamBackend
from tests.pki import Pki
from tests.scripted import (
    Peer,
    Script,
    ScriptedServer,
    accept_all,
    header_of,
    http_response,
    in_turn,
    receipt_for,
    server_context,
)
from tests.stage import TIMEOUT, Stage, until
from tests.uploading import MIB, Sender, a_destination, a_sender, an_archive

LINES = ["tcp", "tls 1.2", "tls 1.3"]
_VERSIONS = {"tls 1.2": ssl.TLSVersion.TLSv1_2, "tls 1.3": ssl.TLSVersion.TLSv1_3}
LARGE = 64 * MIB
"""Far more than the buffers of a connection hold."""


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=LINES)
def line(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def talking(
    script: Script, pki: Pki, line: str = "tls 1.3", **keys: Any
) -> Iterator[tuple[Sender, ScriptedServer]]:
    """Yield a sender to a scripted server."""
    context = server_context(pki, version=_VERSIONS[line]) if line in _VERSIONS else None
    with (
        ScriptedServer(script, context) as server,
        a_sender(a_destination(server.url, pki, **keys)) as sender,
    ):
        yield sender, server


def reason(outcome: Outcome) -> Reason | None:
    return outcome.reason if isinstance(outcome, Deferred | Rejected) else None


def status(outcome: Outcome) -> int | None:
    return outcome.http_status if isinstance(outcome, Deferred | Rejected) else None


# how a server goes on after an early answer


def closes(peer: Peer) -> None:
    peer.half_close()
    peer.drain()


def leaves(_peer: Peer) -> None:
    """End the connection without reading what has come meanwhile."""


def resets(peer: Peer) -> None:
    peer.reset()


def drains(peer: Peer) -> None:
    peer.drain()


def stops_reading(peer: Peer) -> None:
    peer.pause()


def early(said: bytes, then: Script, *, after: int = 0) -> Script:
    """Return a script that answers after the head and so many bytes of the body."""

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.read(after)
        peer.send(said)
        then(peer)

    return script


@pytest.mark.parametrize("then", [closes, leaves, resets, drains, stops_reading])
@pytest.mark.parametrize("after", [0, 1000])
def test_a_success_before_the_body_was_complete_is_no_delivery(
    tmp_path: Path, pki: Pki, line: str, then: Script, after: int
) -> None:
    script = early(receipt_for(bytes(LARGE)), then, after=after)
    with talking(script, pki, line) as (sender, server):
        outcome = sender.send(an_archive(tmp_path, size=LARGE))

    assert reason(outcome) is Reason.EARLY_SUCCESS
    assert sender.sent < LARGE
    assert len(server.heads) == 1


@pytest.mark.parametrize("line", ["tcp", "tls 1.3"])
def test_a_success_before_the_body_leaves_the_file_where_it_is(stage: Stage, line: str) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(receipt_for(bytes(LARGE)))  # and closes, with unread data

    with ScriptedServer(script, server_context(stage.pki) if line != "tcp" else None) as server:
        stage.configure(server.url, destination='retry = { initial = "1h", max = "1h" }')
        archive = an_archive(stage.drop, size=LARGE)
        daemon = stage.daemon().ready()
        daemon.wait_for("destination.paused", reason="early_success")
        daemon.stop()

    assert len(server.heads) == 1
    assert not daemon.events("archive.delivered")
    assert stage.archives(stage.drop) == [archive]


ENDS_LIKE_A_HEAD = b"line\r\nline\r\n\r\n"
UNPROVEN: dict[str, Any] = {"body": "raw", "receipt": {"digest": "none"}}


def wait_for_an_answer_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = StreamBackend.connect_tcp

    def answered_at_once(*args: Any, **keys: Any) -> httpcore.NetworkStream:
        stream = connect(*args, **keys)
        poller = select.poll()
        poller.register(stream.get_extra_info("socket").fileno(), select.POLLIN)
        assert poller.poll(TIMEOUT * 1000)
        return stream

    monkeypatch.setattr(StreamBackend, "connect_tcp", answered_at_once)


def test_a_success_before_the_first_byte_is_no_delivery_of_what_ends_like_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(peer: Peer) -> None:
        peer.send(http_response(200))
        peer.drain()

    wait_for_an_answer_before_any_request(monkeypatch)
    with ScriptedServer(script) as server, a_sender(a_destination(server.url, **UNPROVEN)) as sender:
        outcome = sender.send(an_archive(tmp_path, ENDS_LIKE_A_HEAD))

    assert reason(outcome) is Reason.EARLY_SUCCESS
    assert server.received == 0


def test_a_success_before_a_second_sign_in_is_no_delivery_of_what_the_first_one_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("old")

    def refuse(peer: Peer) -> None:
        peer.read_request()
        token.write_text("new")
        wait_for_an_answer_before_any_request(monkeypatch)
        peer.send(http_response(401, Connection="close"))

    def accept(peer: Peer) -> None:
        peer.send(http_response(200))
        peer.drain()

    with ScriptedServer(in_turn(refuse, accept)) as server:
        destination = a_destination(
            server.url,
            auth={"type": "bearer", "token_file": token},
            headers={"X-Long": "x" * 17_000},  # too long a head to be held back
            **UNPROVEN,
        )
        with a_sender(destination) as sender:
            outcome = sender.send(an_archive(tmp_path, b"content"))

    assert reason(outcome) is Reason.EARLY_SUCCESS
    assert len(server.peers) == 2
    assert sender.sent == 0


def test_a_success_before_a_last_chunk_that_ends_like_a_head_is_no_delivery(
    tmp_path: Path, pki: Pki, line: str
) -> None:
    answered = threading.Event()

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.read(CHUNK)
        peer.send(http_response(200))
        answered.set()
        peer.drain()

    def wait_once(sent: int) -> None:
        assert sent == CHUNK
        assert answered.wait(TIMEOUT)

    content = bytes(CHUNK) + ENDS_LIKE_A_HEAD
    with talking(script, pki, line, **UNPROVEN) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, content), wait_once)

    assert reason(outcome) is Reason.EARLY_SUCCESS
    assert sender.sent == CHUNK


@pytest.mark.parametrize("size", [0, CHUNK])
def test_what_ends_like_a_head_is_delivered_again_and_again(
    tmp_path: Path, pki: Pki, line: str, size: int
) -> None:
    def script(peer: Peer) -> None:
        while True:
            peer.send(receipt_for(peer.read_request().body))

    content = bytes(size) + ENDS_LIKE_A_HEAD
    with talking(script, pki, line, body="raw") as (sender, server):
        outcomes = [sender.send(an_archive(tmp_path, content)) for _ in range(3)]

    assert [type(outcome) for outcome in outcomes] == [Delivered] * 3
    assert [request.body for request in server.requests] == [content] * 3
    assert len(server.peers) == 1


@pytest.mark.parametrize("then", [closes, leaves, resets, drains, stops_reading])
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (http_response(413, b"too large"), Rejected(Reason.TOO_LARGE, "413 As Scripted: too large", 413)),
        (http_response(401, b""), Deferred(Reason.UNAUTHORIZED, "401 As Scripted", 401)),
        (
            http_response(503, b"busy", Retry_After="120"),
            Deferred(Reason.SERVER_ERROR, "503 As Scripted: busy", 503, timedelta(seconds=120)),
        ),
    ],
    ids=["413", "401", "503"],
)
def test_a_refusal_is_heard_before_the_body_is_sent(
    tmp_path: Path, pki: Pki, line: str, then: Script, said: bytes, expected: Outcome
) -> None:
    with talking(early(said, then, after=1000), pki, line, timeout={"write": "30s"}) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, size=LARGE))

    assert outcome == expected
    assert sender.sent < LARGE / 2


def test_a_refusal_is_heard_while_nothing_more_can_be_sent(tmp_path: Path, pki: Pki, line: str) -> None:
    senders: list[Sender] = []

    def script(peer: Peer) -> None:
        peer.read_head()
        until(senders[0].is_stuck, "a full connection")
        peer.send(http_response(413))
        peer.pause()

    with talking(script, pki, line) as (sender, _):
        senders.append(sender)
        outcome = sender.send(an_archive(tmp_path, size=LARGE))

    assert reason(outcome) is Reason.TOO_LARGE
    assert sender.sent < LARGE / 2


@pytest.mark.parametrize("status_line", [b"HTTP/1.1 302 Found", b"HTTP/1.1 307 Temporary Redirect"])
@pytest.mark.parametrize("early_on", [True, False], ids=["early", "after the body"])
def test_a_redirect_is_not_followed(
    tmp_path: Path, pki: Pki, line: str, status_line: bytes, early_on: bool
) -> None:
    with ScriptedServer(accept_all) as elsewhere:
        location = elsewhere.url.encode() + b"?token=secret"
        said = status_line + b"\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"

        def script(peer: Peer) -> None:
            if early_on:
                early(said, drains)(peer)
            else:
                peer.read_request()
                peer.send(said)
                peer.drain()

        with talking(script, pki, line) as (sender, server):
            outcome = sender.send(an_archive(tmp_path, size=4 * MIB))

    assert isinstance(outcome, Deferred)
    assert outcome.reason is Reason.REDIRECT
    assert elsewhere.url in outcome.error
    assert "secret" not in outcome.error
    assert len(server.heads) == 1
    assert elsewhere.peers == []


INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n"


@pytest.mark.parametrize(
    "pieces", [[INTERIM], [INTERIM[:5], INTERIM[5:40], INTERIM[40:]]], ids=["whole", "cut"]
)
def test_interim_answers_are_passed_over(tmp_path: Path, pki: Pki, line: str, pieces: list[bytes]) -> None:
    def script(peer: Peer) -> None:
        head = peer.read_head()
        length = int(header_of(head, "Content-Length") or 0)
        for piece in pieces:
            peer.send(piece)
            peer.read(MIB)
        peer.read(length - MIB * len(pieces))
        peer.send(INTERIM + receipt_for(bytes(8 * MIB)))

    with talking(script, pki, line) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, size=8 * MIB))

    assert isinstance(outcome, Delivered)


def test_a_refusal_behind_interim_answers_is_heard(tmp_path: Path, pki: Pki, line: str) -> None:
    with talking(early(INTERIM + http_response(413), stops_reading), pki, line) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, size=LARGE))

    assert reason(outcome) is Reason.TOO_LARGE


@pytest.mark.parametrize("whole", [True, False], ids=["after the body", "early"])
def test_interim_answers_without_an_end_end_the_attempt(
    tmp_path: Path, pki: Pki, line: str, whole: bool
) -> None:
    def script(peer: Peer) -> None:
        if whole:
            peer.read_request()
        else:
            peer.read_head()
        while True:
            peer.send(INTERIM * 100)

    with talking(script, pki, line) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, size=1000 if whole else LARGE))

    assert reason(outcome) is Reason.PROTOCOL


@pytest.mark.parametrize(
    "garbage", [b"\x00", b"SSH-2.0-OpenSSH_9.9\r\n", b"\xff" * 200_000, b"HTTP/1.1 2x0 No\r\n\r\n"]
)
@pytest.mark.parametrize("after_body", [True, False], ids=["after the body", "early"])
def test_an_answer_that_is_no_http_is_a_protocol_error(
    tmp_path: Path, pki: Pki, line: str, garbage: bytes, after_body: bool
) -> None:
    def script(peer: Peer) -> None:
        if after_body:
            peer.read_request()
        else:
            peer.read_head()
        peer.send(garbage)
        closes(peer)

    size = 1000 if after_body else LARGE
    with talking(script, pki, line) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, size=size))

    assert reason(outcome) in {Reason.PROTOCOL, Reason.CONNECTION_LOST}


def test_an_answer_of_many_megabytes_is_cut(tmp_path: Path, pki: Pki, line: str) -> None:
    sent = []

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 201 Created\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            peer.send(b"x" * 65536)
            sent.append(65536)

    with talking(script, pki, line) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, b"content"))

    assert reason(outcome) is Reason.UNVERIFIED
    assert sum(sent) < 16 * MIB


def test_a_receipt_in_a_header_counts_whatever_the_size_of_the_body(
    tmp_path: Path, pki: Pki, line: str
) -> None:
    digest = hashlib.sha256(b"content").hexdigest()

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(http_response(201, b"x" * 200_000, X_Digest=digest))
        accept_all(peer)

    with talking(script, pki, line, receipt={"digest": "header:X-Digest"}) as (sender, _):
        outcomes = [sender.send(an_archive(tmp_path, b"content")) for _ in range(2)]

    assert [type(outcome) for outcome in outcomes] == [Delivered, Delivered]


@pytest.mark.parametrize("cut_at", [5, 30, -5], ids=["status line", "header", "body"])
@pytest.mark.parametrize("end", [closes, resets])
def test_an_answer_cut_in_the_middle_is_a_lost_connection(
    tmp_path: Path, pki: Pki, line: str, cut_at: int, end: Script
) -> None:
    def script(peer: Peer) -> None:
        peer.send(receipt_for(peer.read_request().archive)[:cut_at])
        end(peer)

    with talking(in_turn(script, accept_all), pki, line) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, b"content"))
        again = sender.send(an_archive(tmp_path, b"content"))

    assert reason(outcome) is Reason.CONNECTION_LOST
    assert isinstance(again, Delivered)


def test_a_refusal_whose_explanation_is_cut_is_still_that_refusal(
    tmp_path: Path, pki: Pki, line: str
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(http_response(422, b"because")[:-3])
        closes(peer)

    with talking(script, pki, line) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, b"content"))

    assert reason(outcome) is Reason.REFUSED


def test_an_answer_that_drips_in_is_waited_for(tmp_path: Path, pki: Pki, line: str) -> None:
    def script(peer: Peer) -> None:
        peer.drip(receipt_for(peer.read_request().archive), every=0.002)

    with talking(script, pki, line) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, b"content"))

    assert isinstance(outcome, Delivered)


def test_an_answer_that_drips_for_ever_ends_with_the_deadline(tmp_path: Path, pki: Pki, line: str) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 201 Created\r\nContent-Length: 1000\r\n\r\n")
        peer.drip(b" " * 1000, every=0.02)

    with talking(script, pki, line, deadline="0.5s") as (sender, _):
        outcome = sender.send(an_archive(tmp_path, b"content"))

    assert reason(outcome) is Reason.DEADLINE


def test_an_early_refusal_that_drips_for_ever_is_not_waited_for_where_no_rate_is_asked(
    tmp_path: Path, pki: Pki, line: str
) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 413 Too Large\r\nX-Why: ")
        while not server.stopping.is_set():
            peer.drip(b"b" * 100, every=0.02)

    with ThreadPoolExecutor(1) as pool, talking(script, pki, line, min_rate="0B") as (sender, server):
        sender._uploader._limits._idle_timeout = 3.0
        outcome = pool.submit(sender.send, an_archive(tmp_path, size=LARGE)).result(timeout=TIMEOUT)

    assert reason(outcome) is Reason.READ_TIMEOUT


def test_one_refused_early_holds_up_no_other(tmp_path: Path, pki: Pki, line: str) -> None:
    with talking(in_turn(early(http_response(413), stops_reading), accept_all), pki, line) as (sender, _):
        refused = sender.send(an_archive(tmp_path, size=LARGE))
        taken = sender.send(an_archive(tmp_path, b"small"))

    assert reason(refused) is Reason.TOO_LARGE
    assert isinstance(taken, Delivered)
