"""A ping is one GET request, and the error of a failed one has no part of its URL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backupd.daemon.pinger import ping
from tests.notification_servers import Webhook, a_webhook
from tests.pki import Pki
from tests.scripted import Peer, ScriptedServer, server_context


def close_after_request(peer: Peer) -> None:
    peer.read_request()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with a_webhook() as server:
        yield server


def test_a_ping_is_a_request_for_the_url(webhook: Webhook) -> None:
    assert ping(webhook.url("5f0c", "http")) is None
    assert [path for path, _ in webhook.requests] == ["/5f0c"]


@pytest.mark.parametrize("status", [404, 500])
def test_an_error_status_fails_it(webhook: Webhook, status: int) -> None:
    webhook.status = status
    assert ping(webhook.url("5f0c", "http")) == f"HTTP status {status}"


def test_a_refused_connection_fails_it() -> None:
    with ScriptedServer(lambda _: None) as server:
        server.refuse()
        assert ping(f"http://127.0.0.1:{server.port}/5f0c") == "connection refused"


def test_a_connection_without_a_response_fails_it() -> None:
    with ScriptedServer(close_after_request) as server:
        error = ping(f"http://127.0.0.1:{server.port}/5f0c")

    assert error
    assert "5f0c" not in error


def test_an_unknown_authority_fails_it(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    with ScriptedServer(close_after_request, server_context(pki)) as server:
        error = ping(f"https://127.0.0.1:{server.port}/5f0c")

    assert error
    assert "certificate verify failed" in error
