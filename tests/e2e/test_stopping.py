"""SIGTERM at bad moments: the daemon is gone in time, begins nothing more, and what is undone is pending."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from tests.scripted import (
    Peer,
    Script,
    ScriptedServer,
    answer,
    in_turn,
    receipt_for,
    server_context,
    take_all,
)
from tests.stage import TIMEOUT, Daemon, Stage, until
from tests.uploading import MIB

GRACE = 0.5
DEFAULT_GRACE = 30.0
FOR_EVER = 'timeout = { connect = "1h", read = "1h", write = "1h" }'
"""So that nothing but the stop ends an upload."""
LARGE = bytes(16 * MIB)
"""More than the buffers of a connection hold."""


def stop_in_time(daemon: Daemon, sent: signal.Signals = signal.SIGTERM) -> None:
    """Tell a daemon to stop, and see that it is gone long before its grace would end by default."""
    told = time.monotonic()
    daemon.process.send_signal(sent)
    assert daemon.process.wait(TIMEOUT) == 0, daemon.text()
    assert time.monotonic() - told < DEFAULT_GRACE


def states(stage: Stage) -> list[str]:
    """Return the states of all deliveries, as another process sees them."""
    listed = stage.backupd("list", "--json")
    assert listed.returncode == 0, listed.stderr
    return [delivery["state"] for delivery in json.loads(listed.stdout)]


def deliver_at_the_next_start(stage: Stage) -> None:
    again = stage.daemon()
    again.wait_for("archive.disposed", archive="a.tar.gz", disposition="moved")
    assert again.stop() == 0
    assert states(stage) == ["delivered"]


def stops_reading(peer: Peer) -> None:
    peer.read_head()
    peer.read(MIB)
    peer.pause()


def never_answers(peer: Peer) -> None:
    peer.read_request()
    peer.pause()


def answers_by_halves(peer: Peer) -> None:
    peer.send(receipt_for(peer.read_request().archive)[:-10])
    peer.pause()


@pytest.mark.parametrize(
    ("script", "sent"),
    [
        (stops_reading, signal.SIGTERM),
        (stops_reading, signal.SIGINT),
        (never_answers, signal.SIGTERM),
        (answers_by_halves, signal.SIGTERM),
    ],
)
def test_an_upload_that_does_not_end_is_abandoned(stage: Stage, script: Script, sent: signal.Signals) -> None:
    with ScriptedServer(in_turn(script, take_all), server_context(stage.pki)) as server:
        stage.configure(server.url, top=f'shutdown_grace = "{GRACE}s"', destination=FOR_EVER)
        daemon = stage.daemon().ready()
        archive = stage.put("a.tar.gz", LARGE)
        assert server.paused.wait(TIMEOUT)

        stop_in_time(daemon, sent)

        assert len(server.peers) == 1
        assert states(stage) == ["pending"]
        assert stage.archives(stage.drop) == [archive]
        assert daemon.events("daemon.stopped")[0]["clean"] is False
        assert not daemon.events("attempt.failed")
        deliver_at_the_next_start(stage)
        assert server.requests[-1].archive == LARGE


def test_what_was_claimed_ahead_is_pending_again_after_a_stop(stage: Stage) -> None:
    with ScriptedServer(never_answers, server_context(stage.pki)) as server:
        stage.configure(
            server.url,
            top=f'shutdown_grace = "{GRACE}s"',
            drop='stable_for = "0s"',
            destination=f"{FOR_EVER}\nworkers = 1",
        )
        for number in range(10):
            stage.put(f"r{number}.tar.gz", b"content")
        daemon = stage.daemon()
        assert server.paused.wait(TIMEOUT)
        assert states(stage).count("claimed") > 1
        stop_in_time(daemon)
        assert states(stage) == ["pending"] * 10


def test_while_a_destination_is_paused_nothing_is_claimed(stage: Stage) -> None:
    stage.configure("https://localhost:1/", destination="workers = 1")
    for number in range(5):
        stage.put(f"r{number}.tar.gz", b"content")
    daemon = stage.daemon().ready()
    daemon.wait_for("destination.paused")
    until(lambda: states(stage) == ["pending"] * 5, "everything to be pending")
    assert daemon.stop() == 0


def test_a_tls_handshake_that_stalls_is_abandoned(stage: Stage) -> None:
    context = server_context(stage.pki)

    def stalls(peer: Peer) -> None:
        peer.pause()

    def takes(peer: Peer) -> None:
        peer.shake_hands(context)
        take_all(peer)

    with ScriptedServer(in_turn(stalls, takes)) as server:
        url = server.url.replace("http:", "https:")
        stage.configure(url, top=f'shutdown_grace = "{GRACE}s"', destination=FOR_EVER)
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", b"content")
        assert server.paused.wait(TIMEOUT)

        stop_in_time(daemon)

        assert len(server.peers) == 1
        assert states(stage) == ["pending"]
        assert daemon.events("daemon.stopped")[0]["clean"] is False
        deliver_at_the_next_start(stage)


@contextlib.contextmanager
def a_full_backlog() -> Iterator[int]:
    """Yield the port of a listener that takes no connection: one more hangs in the middle of connecting."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as waiting:
        for _ in range(3):
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def is_connecting(port: int) -> bool:
    """Tell whether more than our own three connections are on their way to a port; proc_net_tcp(5)."""
    with open("/proc/net/tcp", encoding="ascii") as table:
        rows = [line.split() for line in table][1:]
    syn_sent = [row for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "02"]
    established = [row for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "01"]
    return len(syn_sent) + len(established) > 3


def test_a_connection_that_does_not_come_about_is_abandoned(stage: Stage) -> None:
    with a_full_backlog() as port:
        url = f"https://127.0.0.1:{port}/v1/upload"
        stage.configure(url, top=f'shutdown_grace = "{GRACE}s"', destination=FOR_EVER)
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", b"content")
        until(lambda: is_connecting(port), "a connection under way")

        stop_in_time(daemon)

        assert states(stage) == ["pending"]
        assert daemon.events("daemon.stopped")[0]["clean"] is False
    with ScriptedServer(take_all, server_context(stage.pki)) as server:
        stage.configure(server.url)
        deliver_at_the_next_start(stage)


def test_a_back_off_is_ended_and_not_followed_by_an_attempt(stage: Stage) -> None:
    def is_busy(peer: Peer) -> None:
        peer.read_request()
        peer.send(answer(503, Retry_After="3600"))
        peer.drain()

    with ScriptedServer(in_turn(is_busy, take_all), server_context(stage.pki)) as server:
        stage.configure(server.url, top='shutdown_grace = "1h"')
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", b"content")
        daemon.wait_for("destination.paused")

        stop_in_time(daemon)

        assert len(server.peers) == 1
        assert states(stage) == ["pending"]
        assert daemon.events("daemon.stopped")[0]["clean"] is True


def test_short_attempts_are_ended_and_not_followed_by_another(stage: Stage) -> None:
    def hangs_up(_peer: Peer) -> None:
        return

    with ScriptedServer(hangs_up) as server:
        retry = 'retry = { initial = "0.05s", max = "0.1s" }'
        stage.configure(server.url, destination=retry, top='shutdown_grace = "1h"')
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", b"content")
        until(lambda: len(server.peers) > 5, "some attempts")

        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.wait(TIMEOUT)

        attempts = daemon.events("attempt.failed")
        stopping = [event["event"] for event in daemon.events()].index("daemon.stopping")
        later = [event for event in daemon.events()[stopping:] if event["event"] == "attempt.failed"]
        assert len(later) <= 2  # those that were under way, one a worker
        assert len(server.peers) <= len(attempts) + 2
        assert states(stage) == ["pending"]


def test_a_destination_that_is_down_does_not_delay_the_end(stage: Stage) -> None:
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{nobody_listens.getsockname()[1]}/v1/upload"
        stage.configure(url, top='shutdown_grace = "1h"')
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", b"content")
        daemon.wait_for("destination.paused", reason="connect_failed")

        stop_in_time(daemon)

        assert states(stage) == ["pending"]
    with ScriptedServer(take_all, server_context(stage.pki)) as server:
        stage.configure(server.url)
        deliver_at_the_next_start(stage)


def test_an_upload_that_ends_within_the_grace_is_delivered_and_nothing_new_is_begun(stage: Stage) -> None:
    def takes_its_time(peer: Peer) -> None:
        request = peer.read_request()
        peer.pause()
        peer.send(receipt_for(request.archive))
        take_all(peer)

    with ScriptedServer(takes_its_time, server_context(stage.pki)) as server:
        stage.configure(server.url, destination=f"{FOR_EVER}\nworkers = 1", top='shutdown_grace = "1h"')
        for name in ("a", "b", "c"):
            stage.put(f"{name}.tar.gz", name.encode())
        daemon = stage.daemon()
        assert server.paused.wait(TIMEOUT)

        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_for("daemon.stopping")
        server.go_on()

        assert daemon.process.wait(TIMEOUT) == 0
        assert len(server.requests) == 1
        stopped = daemon.events("daemon.stopped")[0]
        assert stopped["clean"] is True
        assert stopped.get("pending", 2) == 2  # not told where the disk is too slow to record all in time

        again = stage.daemon()
        until(lambda: len(stage.archives(stage.sent)) == 3, "the others")
        assert again.stop() == 0
        assert len(server.requests) == 3 or not daemon.events("archive.delivered")
    assert sorted(path.read_bytes() for path in stage.archives(stage.sent)) == [b"a", b"b", b"c"]
    assert states(stage) == ["delivered"] * 3
