"""A server that asks for the client certificate when it has seen the path: by another handshake."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backupd.core.model import Delivered, Rejected
from tests.pki import Pki
from tests.scripted import (
    Peer,
    ScriptedServer,
    header_of,
    http_response,
    receipt_for,
    server_context,
)
from tests.servers.fronts import apache_that_asks_late, running_front
from tests.stage import Stage
from tests.uploading import MIB, a_destination, a_sender, an_archive

pytestmark = pytest.mark.long

KIB = 1024


SIZES = [0, KIB, 63 * KIB, 65 * KIB, 127 * KIB, 200 * KIB, 5 * MIB]
CASES = [*((size, http2) for size in SIZES for http2 in (False, True)), (300 * MIB, False)]


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize(("size", "http2"), CASES)
def test_archives_of_every_size_arrive_over_new_and_used_connections(
    stage: Stage, version: str, size: int, http2: bool
) -> None:
    port = stage.a_free_port()
    with running_front(apache_that_asks_late(version), port, 0, stage.pki) as (_, folder):
        destination = a_destination(
            f"https://localhost:{port}/{{name}}",
            stage.pki,
            method="PUT",
            body="raw",
            receipt={"digest": "none"},
            success=[201, 204],
            http2=http2,
        )
        with a_sender(destination) as sender:
            for number in range(3):
                archive = an_archive(stage.base, os.urandom(min(size, 1000)), size=size, name=f"{number}.bin")
                outcome = sender.send(archive)
                assert isinstance(outcome, Delivered), outcome
                assert (folder / "files" / archive.name).read_bytes() == archive.read_bytes()


def refuses_large_bodies(peer: Peer, *, unless_asked: bool, continues: bytes) -> None:
    """Respond 413 to a body that is sent without a question, and `continues` to a question."""
    while True:
        head = peer.read_head()
        if b"expect: 100-continue" in head.lower():
            peer.send(continues)
        elif not unless_asked or peer.number == 0:
            peer.send(http_response(413))
            peer.drain()
            return
        peer.send(receipt_for(peer.read(int(header_of(head, "content-length") or 0))))


@pytest.mark.parametrize("answer", [b"HTTP/1.1 100 Continue\r\n\r\n", b"", http_response(417)])
def test_a_413_is_confirmed_with_a_question_before_the_body(tmp_path: Path, answer: bytes) -> None:
    def script(peer: Peer) -> None:
        refuses_large_bodies(peer, unless_asked=True, continues=answer)

    pki = Pki(tmp_path / "pki")
    with ScriptedServer(script, server_context(pki)) as server:
        destination = a_destination(server.url, pki, method="PUT", body="raw")
        with a_sender(destination) as sender:
            for _ in range(2):
                assert isinstance(sender.send(an_archive(tmp_path, size=MIB)), Delivered)
    asked = [b"expect: 100-continue" in head.lower() for head in server.heads]
    assert asked == ([False, True, False, False] if b"417" in answer else [False, True, False])


def test_a_refusal_of_the_question_costs_no_further_upload(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.send(http_response(413))
        peer.drain()

    pki = Pki(tmp_path / "pki")
    with ScriptedServer(script, server_context(pki)) as server, a_sender(a_destination(server.url, pki)) as s:
        outcome = s.send(an_archive(tmp_path, size=100 * MIB))
    assert isinstance(outcome, Rejected)
    assert len(server.peers) == 2
    assert server.peers[1].received < 10_000
