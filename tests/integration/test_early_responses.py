"""Responses before the body is complete, and invalid responses."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from backupd.core.model import Deferred, Delivered, Outcome, Rejected
from backupd.core.policy import Reason
from backupd.upload.http import transport
from backupd.upload.http.body import CHUNK
from backupd.upload.http.stream import Stream, connect
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

PROTOCOLS = ["tcp", "tls 1.2", "tls 1.3"]
_VERSIONS = {"tls 1.2": ssl.TLSVersion.TLSv1_2, "tls 1.3": ssl.TLSVersion.TLSv1_3}
LARGE = 64 * MIB
"""Bytes: far more than the buffers of a connection hold."""


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def sending_to(
    script: Script, pki: Pki, protocol: str = "tls 1.3", **keys: Any
) -> Iterator[tuple[Sender, ScriptedServer]]:
    """Yield a sender to a scripted server."""
    context = server_context(pki, version=_VERSIONS[protocol]) if protocol in _VERSIONS else None
    with (
        ScriptedServer(script, context) as server,
        a_sender(a_destination(server.url, pki, **keys)) as sender,
    ):
        yield sender, server


def reason_of(outcome: Outcome) -> Reason | None:
    return outcome.reason if isinstance(outcome, Deferred | Rejected) else None


def status(outcome: Outcome) -> int | None:
    return outcome.http_status if isinstance(outcome, Deferred | Rejected) else None


# behaviour of a server after an early response


def half_close(peer: Peer) -> None:
    peer.half_close()
    peer.drain()


def close(_peer: Peer) -> None:
    """Close the connection with unread data."""


def reset(peer: Peer) -> None:
    peer.reset()


def drain(peer: Peer) -> None:
    peer.drain()


def stop_reading(peer: Peer) -> None:
    peer.pause()


def early(response: bytes, then: Script, *, after: int = 0) -> Script:
    """Return a script that responds after the head and `after` bytes of the body."""

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.read(after)
        peer.send(response)
        then(peer)

    return script


@pytest.mark.parametrize("then", [half_close, close, reset, drain, stop_reading])
@pytest.mark.parametrize("after", [0, 1000])
def test_a_success_before_the_body_is_complete_is_not_a_delivery(
    tmp_path: Path, pki: Pki, protocol: str, then: Script, after: int
) -> None:
    script = early(receipt_for(bytes(LARGE)), then, after=after)
    with sending_to(script, pki, protocol) as (sender, server):
        outcome = sender.send(an_archive(tmp_path, size=LARGE))

    assert reason_of(outcome) is Reason.EARLY_SUCCESS
    assert sender.sent < LARGE
    assert len(server.heads) == 1


@pytest.mark.parametrize("protocol", ["tcp", "tls 1.3"])
def test_a_success_before_the_body_is_complete_leaves_the_file_in_its_place(
    stage: Stage, protocol: str
) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(receipt_for(bytes(LARGE)))  # and then close with unread data

    with ScriptedServer(script, server_context(stage.pki) if protocol != "tcp" else None) as server:
        stage.configure(server.url, destination='retry = { initial = "1h", max = "1h" }')
        archive = an_archive(stage.drop, size=LARGE, name="a.cfg")
        daemon = stage.daemon().ready()
        daemon.wait_for("destination.paused", reason="early_success")
        daemon.stop()

    assert len(server.heads) == 1
    assert not daemon.events("archive.delivered")
    assert stage.archives(stage.drop) == [archive]


ENDS_WITH_EMPTY_LINE = b"line\r\nline\r\n\r\n"
UNVERIFIED: dict[str, Any] = {"body": "raw", "receipt": {"digest": "none"}}


def wait_for_a_response_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect_and_wait(*args: Any, **keys: Any) -> Stream:
        opened = connect(*args, **keys)
        until(opened.is_readable, "the response")
        return opened

    monkeypatch.setattr(transport, "connect", connect_and_wait)


def test_a_success_before_the_first_byte_is_not_a_delivery_of_a_body_that_ends_like_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(peer: Peer) -> None:
        peer.send(http_response(200))
        peer.drain()

    wait_for_a_response_before_any_request(monkeypatch)
    with ScriptedServer(script) as server, a_sender(a_destination(server.url, **UNVERIFIED)) as sender:
        outcome = sender.send(an_archive(tmp_path, ENDS_WITH_EMPTY_LINE))

    assert reason_of(outcome) is Reason.PROTOCOL
    assert server.received == 0


def test_a_success_before_the_second_request_is_not_a_delivery_of_the_first_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("old")

    def refuse(peer: Peer) -> None:
        peer.read_request()
        token.write_text("new")
        wait_for_a_response_before_any_request(monkeypatch)
        peer.send(http_response(401, Connection="close"))

    def accept(peer: Peer) -> None:
        peer.send(http_response(200))
        peer.drain()

    with ScriptedServer(in_turn(refuse, accept)) as server:
        destination = a_destination(
            server.url,
            auth={"type": "bearer", "token_file": token},
            headers={"X-Long": "x" * 17_000},  # too long for the head to be held back
            **UNVERIFIED,
        )
        with a_sender(destination) as sender:
            outcome = sender.send(an_archive(tmp_path, b"content"))

    assert reason_of(outcome) is Reason.PROTOCOL
    assert len(server.peers) == 2
    assert sender.sent == 0


def test_a_success_before_a_last_chunk_that_ends_like_a_head_is_not_a_delivery(
    tmp_path: Path, pki: Pki, protocol: str
) -> None:
    responded = threading.Event()

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.read(CHUNK)
        peer.send(http_response(200))
        responded.set()
        peer.drain()

    def wait_once(sent: int) -> None:
        assert sent == CHUNK
        assert responded.wait(TIMEOUT)

    content = bytes(CHUNK) + ENDS_WITH_EMPTY_LINE
    with sending_to(script, pki, protocol, **UNVERIFIED) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, content), wait_once)

    assert reason_of(outcome) is Reason.EARLY_SUCCESS
    assert sender.sent == CHUNK


@pytest.mark.parametrize("size", [0, CHUNK])
def test_a_body_that_ends_like_a_head_is_delivered_repeatedly(
    tmp_path: Path, pki: Pki, protocol: str, size: int
) -> None:
    def script(peer: Peer) -> None:
        while True:
            peer.send(receipt_for(peer.read_request().body))

    content = bytes(size) + ENDS_WITH_EMPTY_LINE
    with sending_to(script, pki, protocol, body="raw") as (sender, server):
        outcomes = [sender.send(an_archive(tmp_path, content)) for _ in range(3)]

    assert [type(outcome) for outcome in outcomes] == [Delivered] * 3
    assert [request.body for request in server.requests] == [content] * 3
    assert len(server.peers) == 1


@pytest.mark.parametrize("then", [half_close, close, reset, drain, stop_reading])
@pytest.mark.parametrize(
    ("response", "expected"),
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
def test_a_refusal_is_noticed_before_the_body_is_sent(
    tmp_path: Path, pki: Pki, protocol: str, then: Script, response: bytes, expected: Outcome
) -> None:
    with sending_to(early(response, then, after=1000), pki, protocol, timeout={"write": "30s"}) as (
        sender,
        _,
    ):
        outcome = sender.send(an_archive(tmp_path, size=LARGE))

    assert outcome == expected
    assert sender.sent < LARGE / 2


def test_a_refusal_is_noticed_while_the_connection_accepts_no_more_bytes(
    tmp_path: Path, pki: Pki, protocol: str
) -> None:
    senders: list[Sender] = []

    def script(peer: Peer) -> None:
        peer.read_head()
        until(senders[0].is_stuck, "a full connection")
        peer.send(http_response(413))
        peer.pause()

    with sending_to(script, pki, protocol) as (sender, _):
        senders.append(sender)
        outcome = sender.send(an_archive(tmp_path, size=LARGE))

    assert reason_of(outcome) is Reason.TOO_LARGE
    assert sender.sent < LARGE / 2


@pytest.mark.parametrize("status_line", [b"HTTP/1.1 302 Found", b"HTTP/1.1 307 Temporary Redirect"])
@pytest.mark.parametrize("is_early", [True, False], ids=["early", "after the body"])
def test_a_redirect_is_not_followed(
    tmp_path: Path, pki: Pki, protocol: str, status_line: bytes, is_early: bool
) -> None:
    with ScriptedServer(accept_all) as elsewhere:
        location = elsewhere.url.encode() + b"?token=secret"
        redirect = status_line + b"\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"

        def script(peer: Peer) -> None:
            if is_early:
                early(redirect, drain)(peer)
            else:
                peer.read_request()
                peer.send(redirect)
                peer.drain()

        with sending_to(script, pki, protocol) as (sender, server):
            outcome = sender.send(an_archive(tmp_path, size=4 * MIB))

    assert isinstance(outcome, Deferred)
    assert outcome.reason is Reason.REDIRECT
    assert elsewhere.url in outcome.error
    assert "secret" not in outcome.error
    assert len(server.heads) == 1
    assert elsewhere.peers == []


INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n"


@pytest.mark.parametrize(
    "pieces", [[INTERIM], [INTERIM[:5], INTERIM[5:40], INTERIM[40:]]], ids=["one piece", "three pieces"]
)
def test_interim_responses_are_skipped(tmp_path: Path, pki: Pki, protocol: str, pieces: list[bytes]) -> None:
    def script(peer: Peer) -> None:
        head = peer.read_head()
        length = int(header_of(head, "Content-Length") or 0)
        for piece in pieces:
            peer.send(piece)
            peer.read(MIB)
        peer.read(length - MIB * len(pieces))
        peer.send(INTERIM + receipt_for(bytes(8 * MIB)))

    with sending_to(script, pki, protocol) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, size=8 * MIB))

    assert isinstance(outcome, Delivered)


def test_a_refusal_after_interim_responses_is_noticed(tmp_path: Path, pki: Pki, protocol: str) -> None:
    with sending_to(early(INTERIM + http_response(413), stop_reading), pki, protocol) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, size=LARGE))

    assert reason_of(outcome) is Reason.TOO_LARGE


@pytest.mark.parametrize("is_complete", [True, False], ids=["after the body", "early"])
def test_endless_interim_responses_end_the_attempt(
    tmp_path: Path, pki: Pki, protocol: str, is_complete: bool
) -> None:
    def script(peer: Peer) -> None:
        if is_complete:
            peer.read_request()
        else:
            peer.read_head()
        while True:
            peer.send(INTERIM * 100)

    with sending_to(script, pki, protocol) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, size=1000 if is_complete else LARGE))

    assert reason_of(outcome) is Reason.PROTOCOL


@pytest.mark.parametrize(
    "garbage",
    [b"\x00", b"SSH-2.0-OpenSSH_9.9\r\n", b"\xff" * 200_000, b"HTTP/1.1 2x0 No\r\n\r\n"],
    ids=["nul", "ssh", "long", "bad_status"],
)
@pytest.mark.parametrize("after_body", [True, False], ids=["after the body", "early"])
def test_a_response_that_is_not_http_is_a_protocol_error(
    tmp_path: Path, pki: Pki, protocol: str, garbage: bytes, after_body: bool
) -> None:
    def script(peer: Peer) -> None:
        if after_body:
            peer.read_request()
        else:
            peer.read_head()
        peer.send(garbage)
        half_close(peer)

    size = 1000 if after_body else LARGE
    with sending_to(script, pki, protocol) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, size=size))

    assert reason_of(outcome) in {Reason.PROTOCOL, Reason.CONNECTION_LOST}


def test_a_response_of_many_megabytes_is_not_read_completely(tmp_path: Path, pki: Pki, protocol: str) -> None:
    sent_bytes = []

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 201 Created\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            peer.send(b"x" * 65536)
            sent_bytes.append(65536)

    with sending_to(script, pki, protocol) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, b"content"))

    assert reason_of(outcome) is Reason.UNVERIFIED
    assert sum(sent_bytes) < 16 * MIB


def test_a_receipt_in_a_header_is_valid_with_a_large_body(tmp_path: Path, pki: Pki, protocol: str) -> None:
    digest = hashlib.sha256(b"content").hexdigest()

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(http_response(201, b"x" * 200_000, X_Digest=digest))
        accept_all(peer)

    with sending_to(script, pki, protocol, receipt={"digest": "header:X-Digest"}) as (sender, _):
        outcomes = [sender.send(an_archive(tmp_path, b"content")) for _ in range(2)]

    assert [type(outcome) for outcome in outcomes] == [Delivered, Delivered]


@pytest.mark.parametrize("cut_at", [5, 30, -5], ids=["status line", "header", "body"])
@pytest.mark.parametrize("end", [half_close, reset])
def test_an_incomplete_response_is_a_lost_connection(
    tmp_path: Path, pki: Pki, protocol: str, cut_at: int, end: Script
) -> None:
    def script(peer: Peer) -> None:
        peer.send(receipt_for(peer.read_request().archive)[:cut_at])
        end(peer)

    with sending_to(in_turn(script, accept_all), pki, protocol) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, b"content"))
        again = sender.send(an_archive(tmp_path, b"content"))

    assert reason_of(outcome) is Reason.CONNECTION_LOST
    assert isinstance(again, Delivered)


def test_a_refusal_with_an_incomplete_body_is_still_that_refusal(
    tmp_path: Path, pki: Pki, protocol: str
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(http_response(422, b"because")[:-3])
        half_close(peer)

    with sending_to(script, pki, protocol) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, b"content"))

    assert reason_of(outcome) is Reason.REFUSED


def test_a_slow_response_is_read_to_its_end(tmp_path: Path, pki: Pki, protocol: str) -> None:
    def script(peer: Peer) -> None:
        peer.drip(receipt_for(peer.read_request().archive), every=0.002)

    with sending_to(script, pki, protocol) as (sender, _):
        outcome = sender.send(an_archive(tmp_path, b"content"))

    assert isinstance(outcome, Delivered)


def test_the_deadline_ends_an_endless_slow_response(tmp_path: Path, pki: Pki, protocol: str) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 201 Created\r\nContent-Length: 1000\r\n\r\n")
        peer.drip(b" " * 1000, every=0.02)

    with sending_to(script, pki, protocol, deadline="0.5s") as (sender, _):
        outcome = sender.send(an_archive(tmp_path, b"content"))

    assert reason_of(outcome) is Reason.DEADLINE


def test_the_outside_body_timeout_ends_an_endless_early_refusal_without_a_min_rate(
    tmp_path: Path, pki: Pki, protocol: str
) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 413 Too Large\r\nX-Why: ")
        while not server.stopping.is_set():
            peer.drip(b"b" * 100, every=0.02)

    with ThreadPoolExecutor(1) as pool, sending_to(script, pki, protocol, min_rate="0B") as (sender, server):
        sender._uploader._limits._outside_body_timeout = 3.0
        outcome = pool.submit(sender.send, an_archive(tmp_path, size=LARGE)).result(timeout=TIMEOUT)

    assert reason_of(outcome) is Reason.READ_TIMEOUT


def test_a_refusal_with_an_endless_body_is_still_that_refusal(
    tmp_path: Path, pki: Pki, protocol: str
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 9000000\r\n\r\n")
        while not server.stopping.is_set():
            peer.drip(b"b" * 100, every=0.02)

    with sending_to(script, pki, protocol) as (sender, server):
        sender._uploader._limits._outside_body_timeout = 3.0
        outcome = sender.send(an_archive(tmp_path, b"content"))

    assert reason_of(outcome) is Reason.TOO_LARGE


def test_an_early_refusal_does_not_delay_the_next_archive(tmp_path: Path, pki: Pki, protocol: str) -> None:
    refuse = early(http_response(413), stop_reading)
    refusals = [refuse] if protocol == "tcp" else [refuse, refuse]  # confirmed if there is a certificate
    with sending_to(in_turn(*refusals, accept_all), pki, protocol) as (sender, _):
        refused = sender.send(an_archive(tmp_path, size=LARGE))
        accepted = sender.send(an_archive(tmp_path, b"small"))

    assert reason_of(refused) is Reason.TOO_LARGE
    assert isinstance(accepted, Delivered)
