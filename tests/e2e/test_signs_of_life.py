"""What systemd hears: life while every thread shows some, silence while one hangs."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scripted import Peer, ScriptedServer, server_context, take_all
from tests.stage import PATIENCE, Stage, until

HANGS = """
import time
from backupd.upload.http import uploader

def hang(*_):
    while True:
        time.sleep(60)

uploader.HttpUploader._send = hang
"""
"""A fault that no network shows: code that neither ends nor waits on the wire."""


class Systemd:
    """The end of the notification socket that systemd holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.heard: list[tuple[float, str]] = []

    def environ(self, watchdog: float) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self.path), "WATCHDOG_USEC": str(int(watchdog * 1e6))}

    def listen(self, state: str = "") -> list[str]:
        """Return what was heard so far that begins so."""
        while True:
            try:
                said = self._socket.recv(65536).decode()
            except BlockingIOError:
                return [line for _, line in self.heard if line.startswith(state)]
            self.heard += [(time.monotonic(), line) for line in said.splitlines()]

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


def test_a_slow_upload_shows_life(stage: Stage, systemd: Systemd) -> None:
    with ScriptedServer(never_answers, server_context(stage.pki)) as server:
        stage.configure(server.url, top='shutdown_grace = "0s"')
        stage.put("a.cfg", b"abc")
        daemon = stage.daemon(systemd.environ(4)).ready()
        assert server.paused.wait(PATIENCE)
        until(lambda: systemd.listen("READY=1"), "READY=1")
        before = len(systemd.listen("WATCHDOG=1"))
        until(lambda: len(systemd.listen("WATCHDOG=1")) >= before + 5, "signs of life over ten seconds")
        assert not daemon.events("daemon.hung")
        assert systemd.listen("STATUS=")[-1].startswith("STATUS=pending 1; oldest ")
        assert daemon.stop() == 0


def test_a_worker_that_hangs_is_told_and_systemd_hears_no_more(
    stage: Stage, systemd: Systemd, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    with ScriptedServer(take_all, server_context(stage.pki)) as server:
        stage.configure(server.url)
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        daemon = stage.daemon({**systemd.environ(2), "PYTHONPATH": path}).ready()
        stage.put("a.cfg", b"abc")
        daemon.wait_for("daemon.hung", thread="worker of vault")
        systemd.listen()
        said = len(systemd.heard)
        until(lambda: time.monotonic() > systemd.heard[-1][0] + 5, "five seconds")
        systemd.listen()
        assert not any(line == "WATCHDOG=1" for _, line in systemd.heard[said + 2 :])
        daemon.kill()


def test_a_reload_is_told_with_its_time(stage: Stage, systemd: Systemd) -> None:
    stage.configure("https://localhost:1/")
    daemon = stage.daemon(systemd.environ(60)).ready()
    until(lambda: systemd.listen("READY=1"), "READY=1")
    before = time.monotonic_ns() // 1000
    os.kill(daemon.pid, 1)
    daemon.wait_for("config.reloaded")
    until(lambda: len(systemd.listen("READY=1")) == 2, "READY=1 again")
    assert systemd.listen("RELOADING=1")
    (stamp,) = systemd.listen("MONOTONIC_USEC=")
    assert before <= int(stamp.partition("=")[2]) <= time.monotonic_ns() // 1000
    assert daemon.stop() == 0
    assert systemd.listen("STOPPING=1")
    assert systemd.listen("EXTEND_TIMEOUT_USEC=")
