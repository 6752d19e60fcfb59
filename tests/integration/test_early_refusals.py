"""A refusal before the body is complete is noticed, and the upload stops."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from backupd.core.model import Deferred, Rejected
from tests.pki import Pki
from tests.scripted import Peer, ScriptedServer, http_response, server_context
from tests.uploading import MIB, a_destination, a_sender, an_archive

RUNS = 20

AfterRefusal = Callable[[Peer], None]


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
    ("status", "after"),
    [
        (413, _half_close),
        (413, _reset),
        (413, _drain),
        (413, _stop_reading),
        (401, _drain),
        (503, _stop_reading),
    ],
)
def test_an_early_refusal_over_tls_1_3_is_noticed_every_time(
    tmp_path: Path, status: int, after: AfterRefusal, record_property: Callable[[str, object], None]
) -> None:
    def refuse(peer: Peer) -> None:
        peer.read_head()
        peer.read(64 * 1024)
        peer.send(http_response(status, b'{"title":"no"}', Retry_After="7"))
        after(peer)

    pki = Pki(tmp_path / "pki")
    archive = an_archive(tmp_path, size=256 * MIB)
    context = server_context(pki, version=ssl.TLSVersion.TLSv1_3)
    noticed, max_sent = 0, 0
    with ScriptedServer(refuse, context) as server:
        for _ in range(RUNS):
            with a_sender(a_destination(server.url, pki)) as sender:
                outcome = sender.send(archive)
                noticed += isinstance(outcome, Rejected | Deferred) and outcome.http_status == status
                max_sent = max(max_sent, sender.sent)
            server.resume()
            server.resumed.clear()

    record_property("noticed", f"{noticed} of {RUNS}")
    record_property("max_sent_kib", max_sent // 1024)
    print(f"{status} then {after.__name__}: noticed {noticed} of {RUNS}, at most {max_sent // 1024} KiB sent")
    assert noticed == RUNS
    assert max_sent < 4 * MIB
