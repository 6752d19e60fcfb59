"""A refusal that comes before the body is complete is heard, and the sending stops."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from backupd.core.model import Deferred, Rejected
from tests.pki import Pki
from tests.scripted import Peer, ScriptedServer, answer, server_context
from tests.uploading import MIB, a_destination, a_sender, an_archive

RUNS = 20

End = Callable[[Peer], None]


def _half_close(peer: Peer) -> None:
    peer.half_close()
    peer.drain()


def _reset(peer: Peer) -> None:
    peer.reset()


def _drain(peer: Peer) -> None:
    peer.drain()


def _stop_reading(peer: Peer) -> None:
    peer.pause()


@pytest.mark.parametrize(
    ("status", "end"),
    [
        (413, _half_close),
        (413, _reset),
        (413, _drain),
        (413, _stop_reading),
        (401, _drain),
        (503, _stop_reading),
    ],
)
def test_an_early_refusal_over_tls_1_3_is_heard_every_time(
    tmp_path: Path, status: int, end: End, record_property: Callable[[str, object], None]
) -> None:
    def refuse(peer: Peer) -> None:
        peer.read_head()
        peer.read(64 * 1024)
        peer.send(answer(status, b'{"title":"no"}', Retry_After="7"))
        end(peer)

    pki = Pki(tmp_path / "pki")
    archive = an_archive(tmp_path, size=256 * MIB)
    context = server_context(pki, version=ssl.TLSVersion.TLSv1_3)
    heard, most_sent = 0, 0
    with ScriptedServer(refuse, context) as server:
        for _ in range(RUNS):
            with a_sender(a_destination(server.url, pki)) as sender:
                outcome = sender.send(archive)
                heard += isinstance(outcome, Rejected | Deferred) and outcome.http_status == status
                most_sent = max(most_sent, sender.sent)
            server.go_on()
            server.resumed.clear()

    record_property("heard", f"{heard} of {RUNS}")
    record_property("most_sent_kib", most_sent // 1024)
    print(f"{status} then {end.__name__}: heard {heard} of {RUNS}, at most {most_sent // 1024} KiB sent")
    assert heard == RUNS
    assert most_sent < 4 * MIB
