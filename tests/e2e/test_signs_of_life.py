"""Notifications to systemd: watchdog messages while no thread hangs, and none while one hangs."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.old_ledgers import create, many_rows
from tests.scripted import Peer, ScriptedServer, accept_all, server_context
from tests.stage import TIMEOUT, Stage, until

HANGS = """
import time
from backupd.upload.http import uploader

def hang(*_):
    while True:
        time.sleep(60)

uploader.HttpUploader._send = hang
"""
"""Code that never returns and does not wait for the network."""


ONLY_OPENS_THE_LEDGER = """
from backupd.daemon.daemon import Daemon

Daemon.run = lambda self: 0
"""


class Systemd:
    """The notification socket, as systemd would read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.received: list[tuple[float, str]] = []

    def environ(self, watchdog: float) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self.path), "WATCHDOG_USEC": str(int(watchdog * 1e6))}

    def notifications(self, state: str = "") -> list[str]:
        """Return the notifications received so far that start with a text."""
        while True:
            try:
                data = self._socket.recv(65536).decode()
            except BlockingIOError:
                return [line for _, line in self.received if line.startswith(state)]
            self.received += [(time.monotonic(), line) for line in data.splitlines()]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path / "notify")
    yield systemd
    systemd.close()


def never_answers(peer: Peer) -> None:
    peer.read_request()
    peer.pause()


@pytest.mark.long
def test_a_slow_upload_is_no_hanging_thread(stage: Stage, systemd: Systemd) -> None:
    with ScriptedServer(never_answers, server_context(stage.pki)) as server:
        stage.configure(server.url, top='shutdown_grace = "0s"')
        stage.put("a.cfg", b"abc")
        daemon = stage.daemon(systemd.environ(4)).ready()
        assert server.paused.wait(TIMEOUT)
        until(lambda: systemd.notifications("READY=1"), "READY=1")
        before = len(systemd.notifications("WATCHDOG=1"))
        until(
            lambda: len(systemd.notifications("WATCHDOG=1")) >= before + 5, "signs of life over ten seconds"
        )
        assert not daemon.events("daemon.hung")
        assert systemd.notifications("STATUS=")[-1].startswith("STATUS=pending 1; oldest ")
        assert daemon.stop() == 0


@pytest.mark.long
def test_a_hanging_worker_is_logged_and_stops_the_watchdog_messages(
    stage: Stage, systemd: Systemd, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url)
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        daemon = stage.daemon({**systemd.environ(2), "PYTHONPATH": path}).ready()
        stage.put("a.cfg", b"abc")
        daemon.wait_for("daemon.hung", thread="worker of vault")
        systemd.notifications()
        count = len(systemd.received)
        until(lambda: time.monotonic() > systemd.received[-1][0] + 5, "five seconds")
        systemd.notifications()
        assert not any(line == "WATCHDOG=1" for _, line in systemd.received[count + 2 :])
        daemon.kill()


def test_time_is_requested_while_the_ledger_is_migrated(
    stage: Stage, systemd: Systemd, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ONLY_OPENS_THE_LEDGER)
    create(stage.state, 1, many_rows(5000))
    stage.configure("https://localhost:1/")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = stage.backupd("run", environ={**systemd.environ(60), "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    assert set(systemd.notifications()) == {"EXTEND_TIMEOUT_USEC=30000000"}


def test_a_reload_is_notified_with_its_time(stage: Stage, systemd: Systemd) -> None:
    stage.configure("https://localhost:1/")
    daemon = stage.daemon(systemd.environ(60)).ready()
    until(lambda: systemd.notifications("READY=1"), "READY=1")
    before = time.monotonic_ns() // 1000
    os.kill(daemon.pid, 1)
    daemon.wait_for("config.reloaded")
    until(lambda: len(systemd.notifications("READY=1")) == 2, "READY=1 again")
    assert systemd.notifications("RELOADING=1")
    (stamp,) = systemd.notifications("MONOTONIC_USEC=")
    assert before <= int(stamp.partition("=")[2]) <= time.monotonic_ns() // 1000
    assert daemon.stop() == 0
    assert systemd.notifications("STOPPING=1")
    assert systemd.notifications("EXTEND_TIMEOUT_USEC=")


@pytest.mark.long
def test_the_status_of_the_unit_names_what_a_person_has_paused(
    stage: Stage, systemd: Systemd, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon(systemd.environ(2)).ready()
    stage.backupd("pause", "vault")
    daemon.wait_for("destination.held")
    held = "; held by a person: vault"
    until(lambda: any(held in line for line in systemd.notifications("STATUS=")), "the status")
    assert daemon.stop() == 0
