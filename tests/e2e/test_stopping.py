"""On SIGTERM the daemon ends in time, starts no new upload, and leaves unfinished deliveries pending."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backupd.core.errors import PENDING
from tests.scripted import (
    Peer,
    Script,
    ScriptedServer,
    accept_all,
    http_response,
    in_turn,
    receipt_for,
    server_context,
)
from tests.stage import TIMEOUT, Daemon, Stage, until
from tests.terminal import CTRL_C, Terminal
from tests.uploading import MIB

GRACE = 0.5
DEFAULT_GRACE = 30.0
LONG_TIMEOUTS = 'timeout = { connect = "1h", read = "1h", write = "1h" }'
"""Have only the stop of the daemon end an upload."""
LARGE = os.urandom(16 * MIB)
"""More bytes than the buffers of a connection hold."""


def stop_in_time(daemon: Daemon, sent: signal.Signals = signal.SIGTERM) -> None:
    """Send a signal, and assert that the daemon ends before the default `shutdown_grace`."""
    began = time.monotonic()
    daemon.process.send_signal(sent)
    assert daemon.process.wait(TIMEOUT) == 0, daemon.text()
    assert time.monotonic() - began < DEFAULT_GRACE


def states(stage: Stage) -> list[str]:
    """Return the states of all deliveries, from the output of `list`."""
    listed = stage.backupd("list", "--json")
    assert listed.returncode == 0, listed.stderr
    return [delivery["state"] for delivery in json.loads(listed.stdout)]


def assert_delivered_by_the_next_start(stage: Stage) -> None:
    again = stage.daemon()
    again.wait_for("archive.disposed", archive="a.tar.gz", disposition="moved")
    assert again.stop() == 0
    assert states(stage) == ["delivered"]


def stops_reading(peer: Peer) -> None:
    peer.read_head()
    peer.read(MIB)
    peer.pause()


def never_responds(peer: Peer) -> None:
    peer.read_request()
    peer.pause()


def sends_half_a_response(peer: Peer) -> None:
    peer.send(receipt_for(peer.read_request().archive)[:-10])
    peer.pause()


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "sent"),
    [
        (stops_reading, signal.SIGTERM),
        (stops_reading, signal.SIGINT),
        (never_responds, signal.SIGTERM),
        (sends_half_a_response, signal.SIGTERM),
    ],
)
def test_a_stalled_upload_is_abandoned(stage: Stage, script: Script, sent: signal.Signals) -> None:
    with ScriptedServer(in_turn(script, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, top=f'shutdown_grace = "{GRACE}s"', destination=LONG_TIMEOUTS)
        daemon = stage.daemon().ready()
        archive = stage.put("a.tar.gz", LARGE)
        assert server.paused.wait(TIMEOUT)

        stop_in_time(daemon, sent)

        assert len(server.peers) == 1
        assert states(stage) == ["pending"]
        assert stage.archives(stage.drop) == [archive]
        assert daemon.events("daemon.stopped")[0]["clean"] is False
        assert not daemon.events("attempt.failed")
        assert_delivered_by_the_next_start(stage)
        assert server.requests[-1].archive == LARGE


@pytest.mark.long
def test_claimed_deliveries_are_pending_again_after_a_stop(stage: Stage) -> None:
    with ScriptedServer(never_responds, server_context(stage.pki)) as server:
        stage.configure(
            server.url,
            top=f'shutdown_grace = "{GRACE}s"',
            drop='stable_for = "0s"\ninspect = "off"',  # so that all are queued at once
            destination=f"{LONG_TIMEOUTS}\nworkers = 1",
        )
        for number in range(10):
            stage.put(f"r{number}.tar.gz", b"content")
        daemon = stage.daemon()
        assert server.paused.wait(TIMEOUT)
        assert states(stage).count("claimed") > 1
        stop_in_time(daemon)
        assert states(stage) == ["pending"] * 10


def test_no_delivery_is_claimed_while_the_destination_is_paused(stage: Stage) -> None:
    stage.configure("https://localhost:1/", destination="workers = 1")
    for number in range(5):
        stage.put(f"r{number}.tar.gz", b"content")
    daemon = stage.daemon().ready()
    daemon.wait_for("destination.paused")
    until(lambda: states(stage) == ["pending"] * 5, "all deliveries to be pending")
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_stalled_tls_handshake_is_abandoned(stage: Stage) -> None:
    context = server_context(stage.pki)

    def stalls(peer: Peer) -> None:
        peer.pause()

    def takes(peer: Peer) -> None:
        peer.do_handshake(context)
        accept_all(peer)

    with ScriptedServer(in_turn(stalls, takes)) as server:
        url = server.url.replace("http:", "https:")
        stage.configure(url, top=f'shutdown_grace = "{GRACE}s"', destination=LONG_TIMEOUTS)
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", b"content")
        assert server.paused.wait(TIMEOUT)

        stop_in_time(daemon)

        assert len(server.peers) == 1
        assert states(stage) == ["pending"]
        assert daemon.events("daemon.stopped")[0]["clean"] is False
        assert_delivered_by_the_next_start(stage)


@contextlib.contextmanager
def a_full_backlog() -> Iterator[int]:
    """Yield the port of a listener with a full backlog: a further connection stalls in connect(2)."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as waiting:
        for _ in range(3):
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def is_connecting(port: int) -> bool:
    """Return whether more than the three connections of the test are open to a port; see proc_net_tcp(5)."""
    with open("/proc/net/tcp", encoding="ascii") as table:
        rows = [line.split() for line in table][1:]
    syn_sent = [row for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "02"]
    established = [row for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "01"]
    return len(syn_sent) + len(established) > 3


@pytest.mark.long
def test_a_stalled_connection_attempt_is_abandoned(stage: Stage) -> None:
    with a_full_backlog() as port:
        url = f"https://127.0.0.1:{port}/v1/upload"
        stage.configure(url, top=f'shutdown_grace = "{GRACE}s"', destination=LONG_TIMEOUTS)
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", b"content")
        until(lambda: is_connecting(port), "a connection attempt")

        stop_in_time(daemon)

        assert states(stage) == ["pending"]
        assert daemon.events("daemon.stopped")[0]["clean"] is False
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url)
        assert_delivered_by_the_next_start(stage)


def test_a_stop_ends_a_backoff_without_another_attempt(stage: Stage) -> None:
    def is_busy(peer: Peer) -> None:
        peer.read_request()
        peer.send(http_response(503, Retry_After="3600"))
        peer.drain()

    with ScriptedServer(in_turn(is_busy, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, top='shutdown_grace = "1h"')
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", b"content")
        daemon.wait_for("destination.paused")

        stop_in_time(daemon)

        assert len(server.peers) == 1
        assert states(stage) == ["pending"]
        assert daemon.events("daemon.stopped")[0]["clean"] is True


@pytest.mark.long
def test_a_stop_ends_a_series_of_short_attempts(stage: Stage) -> None:
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
        assert len(later) <= 2  # attempts in progress, one of each worker
        assert len(server.peers) <= len(attempts) + 2
        assert states(stage) == ["pending"]


@pytest.mark.long
def test_a_destination_that_is_down_does_not_delay_the_stop(stage: Stage) -> None:
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{not_listening.getsockname()[1]}/v1/upload"
        stage.configure(url, top='shutdown_grace = "1h"')
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", b"content")
        daemon.wait_for("destination.paused", reason="connect_failed")

        stop_in_time(daemon)

        assert states(stage) == ["pending"]
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url)
        assert_delivered_by_the_next_start(stage)


def test_an_upload_that_ends_within_the_grace_is_delivered_and_no_other_is_started(stage: Stage) -> None:
    def takes_its_time(peer: Peer) -> None:
        request = peer.read_request()
        peer.pause()
        peer.send(receipt_for(request.archive))
        accept_all(peer)

    with ScriptedServer(takes_its_time, server_context(stage.pki)) as server:
        stage.configure(server.url, destination=f"{LONG_TIMEOUTS}\nworkers = 1", top='shutdown_grace = "1h"')
        for name in ("a", "b", "c"):
            stage.put(f"{name}.tar.gz", name.encode())
        daemon = stage.daemon()
        assert server.paused.wait(TIMEOUT)

        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_for("daemon.stopping")
        server.resume()

        assert daemon.process.wait(TIMEOUT) == 0
        assert len(server.requests) == 1
        stopped = daemon.events("daemon.stopped")[0]
        assert stopped["clean"] is True
        assert stopped.get("pending", 2) == 2  # absent if the disk is too slow to record all results in time

        again = stage.daemon()
        until(lambda: len(stage.archives(stage.sent)) == 3, "the other archives")
        assert again.stop() == 0
        assert len(server.requests) == 3 or not daemon.events("archive.delivered")
    assert sorted(path.read_bytes() for path in stage.archives(stage.sent)) == [b"a", b"b", b"c"]
    assert states(stage) == ["delivered"] * 3


def logged(log: Path, event: str) -> list[dict[str, Any]]:
    """Return the events of a name in a log file."""
    found = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [line for line in found if line["event"] == event]


def test_ctrl_c_names_the_uploads_that_it_waits_for_and_a_second_one_ends_at_once(stage: Stage) -> None:
    with ScriptedServer(in_turn(stops_reading, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, top='shutdown_grace = "1h"', destination=LONG_TIMEOUTS)
        archive = stage.put("a.tar.gz", LARGE)
        log = stage.base / "log"
        with (
            log.open("wb") as stdout,
            Terminal(stage, ["run"], columns=120, stdout=stdout.fileno()) as terminal,
        ):
            assert server.paused.wait(TIMEOUT)
            terminal.press(CTRL_C)
            line = r"waiting up to 1 h for 1 upload \(a\.tar\.gz → vault, \d+ %\); Ctrl-C again ends at once"
            terminal.until(lambda: re.fullmatch(line, terminal.display[0]), "the line")
            terminal.press(CTRL_C)
            assert terminal.wait() == PENDING

        [stopping], [aborting] = logged(log, "daemon.stopping"), logged(log, "daemon.aborting")
        assert (stopping["signal"], stopping["grace_s"], stopping["in_flight"]) == ("SIGINT", 3600, 1)
        assert stopping["uploads"][0].startswith("a.tar.gz → vault, ")
        assert (aborting["signal"], aborting["in_flight"]) == ("SIGINT", 1)
        assert logged(log, "daemon.stopped")[0]["clean"] is False
        assert states(stage) == ["pending"]
        assert stage.archives(stage.drop) == [archive]
        assert_delivered_by_the_next_start(stage)


def test_ctrl_c_without_uploads_prints_nothing_on_the_terminal(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/")
    log = stage.base / "log"
    with log.open("wb") as stdout, Terminal(stage, ["run"], stdout=stdout.fileno()) as terminal:
        until(lambda: logged(log, "daemon.ready"), "the daemon")
        terminal.press(CTRL_C)
        assert terminal.wait() == 0
    assert terminal.text.replace("^C", "").strip() == ""
    assert "grace_s" not in logged(log, "daemon.stopping")[0]


def test_a_second_sigterm_does_not_abort_uploads(stage: Stage) -> None:
    def takes_its_time(peer: Peer) -> None:
        request = peer.read_request()
        peer.pause()
        peer.send(receipt_for(request.archive))

    with ScriptedServer(takes_its_time, server_context(stage.pki)) as server:
        stage.configure(server.url, destination=LONG_TIMEOUTS, top='shutdown_grace = "1h"')
        stage.put("a.tar.gz", b"content")
        daemon = stage.daemon()
        assert server.paused.wait(TIMEOUT)
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_for("daemon.stopping")
        daemon.process.send_signal(signal.SIGTERM)
        until(lambda: is_pending(daemon.pid, signal.SIGTERM), "the second signal")
        server.resume()

        assert daemon.process.wait(TIMEOUT) == 0
        assert not daemon.events("daemon.aborting")
    assert states(stage) == ["delivered"]


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Return whether a blocked signal has arrived at a process; see proc_pid_status(5)."""
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    found = re.search(r"^ShdPnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)
