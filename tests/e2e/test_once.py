"""`backupd run --once` delivers what waits, ends, and reports by its exit code how it went."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from backupd.core.errors import BAD_CONFIG, PENDING, REJECTED, UNAVAILABLE
from backupd.receiver.serve import RunningReceiver
from tests.scripted import (
    Peer,
    ScriptedServer,
    accept_all,
    http_response,
    in_turn,
    receipt_for,
    server_context,
)
from tests.stage import TIMEOUT, Stage


def run_once(stage: Stage, *arguments: str) -> int:
    """Run the command and return its exit code; its log goes to that of the stage."""
    with stage.log.open("ab") as log:
        command = [
            sys.executable,
            "-m",
            "backupd",
            "run",
            "--once",
            "--config",
            str(stage.config),
            *arguments,
        ]
        return subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, check=False, timeout=TIMEOUT
        ).returncode


def stalls(peer: Peer) -> None:
    peer.read_head()
    peer.pause()


def test_delivers_what_waits_with_its_disposition_and_exits_with_0(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='stable_for = "1s"')
    for number in range(30):
        stage.put(f"sw-{number}.cfg", b"content %d" % number)

    assert run_once(stage) == 0

    assert len(stage.stored()) == 30
    assert stage.archives(stage.drop) == stage.archives(stage.sent)
    assert len(stage.archives(stage.sent)) == 30
    assert '"event":"daemon.stopping","message":"stopping, 0 uploading"' in stage.log.read_text()


def test_ends_with_0_if_nothing_is_there(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/")
    assert run_once(stage) == 0
    assert run_once(stage) == 0


@pytest.mark.long
def test_a_file_that_is_being_written_stays_for_the_next_run(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url)
    stage.put("done.cfg", b"content")
    (stage.drop / "growing.cfg").write_bytes(b"first")
    (stage.drop / "growing.cfg.part").write_bytes(b"notes of a download")

    assert run_once(stage) == PENDING
    assert [path.name for path in stage.archives(stage.sent)] == ["done.cfg"]
    (stage.drop / "growing.cfg.part").unlink()
    assert run_once(stage) == 0
    assert len(stage.archives(stage.sent)) == 2


@pytest.mark.long
def test_a_destination_that_is_down_ends_the_run_with_69_and_gets_the_archives_from_the_next_one(
    stage: Stage,
) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url, destination='retry = { initial = "1h", max = "1h" }')
        for name in ("a.cfg", "b.cfg"):
            stage.put(name, b"content")
        server.refuse()
        assert run_once(stage) == UNAVAILABLE
        assert len(stage.archives(stage.drop)) == 2
        server.accept_again()
        assert run_once(stage) == 0  # although the retry is due in an hour
    assert len(stage.archives(stage.sent)) == 2


@pytest.mark.long
def test_a_rejected_archive_ends_the_run_with_3_and_the_next_one_with_0(stage: Stage) -> None:
    def refuses_bad_ones(peer: Peer) -> None:
        while True:
            request = peer.read_request()
            is_bad = request.archive.startswith(b"bad")
            peer.send(http_response(422) if is_bad else receipt_for(request.archive))

    with ScriptedServer(refuses_bad_ones, server_context(stage.pki)) as server:
        stage.configure(server.url)
        stage.put("a.cfg", b"bad")
        stage.put("b.cfg", b"good")
        assert run_once(stage) == REJECTED
        assert [path.name for path in stage.archives(stage.rejected)] == ["a.cfg"]
        assert [path.name for path in stage.archives(stage.sent)] == ["b.cfg"]
        assert run_once(stage) == 0


@pytest.mark.long
def test_the_timeout_ends_an_upload_that_stalls(stage: Stage) -> None:
    with ScriptedServer(in_turn(stalls, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, top='shutdown_grace = "0.1s"')
        stage.put("a.cfg", b"content")
        assert run_once(stage, "--timeout", "3s") == PENDING
        assert '"event":"daemon.aborting"' in stage.log.read_text()
        assert run_once(stage) == 0


@pytest.mark.long
def test_a_truncated_archive_is_sent_once_its_grace_is_over_although_each_run_is_shorter(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='inspect_grace = "20s"')
    stage.put("cut.tar.gz", b"\x1f\x8b\x08\x00" + bytes(20))
    codes = []
    started = time.monotonic()
    while 0 not in codes:
        codes.append(run_once(stage))
        assert time.monotonic() < started + TIMEOUT
    assert codes[0] == PENDING
    assert set(codes[:-1]) == {PENDING}
    assert [path.name for path in stage.archives(stage.sent)] == ["cut.tar.gz"]


@pytest.mark.long
def test_a_drop_folder_that_is_missing_does_not_keep_the_others_from_being_delivered(
    stage: Stage, receiver: RunningReceiver
) -> None:
    other = stage.base / "firewalls"
    other.mkdir()
    stage.configure(receiver.url, more=f'[drop.firewalls]\npath = "{other}"\nstable_for = "0.1s"')
    assert run_once(stage) == 0
    other.rmdir()
    stage.put("b.cfg", b"content")
    assert run_once(stage) == PENDING
    assert [path.name for path in stage.archives(stage.sent)] == ["b.cfg"]


def test_refuses_to_run_beside_a_daemon_and_a_time_that_is_none(stage: Stage) -> None:
    stage.configure("https://127.0.0.1:9/")
    daemon = stage.daemon().ready()
    done = stage.backupd("run", "--once")
    assert done.returncode == BAD_CONFIG
    assert "another" in done.stderr
    assert daemon.stop() == 0
    wrong = stage.backupd("run", "--once", "--timeout", "soon")
    assert wrong.returncode == 2
    assert "--timeout: expected" in wrong.stderr


@pytest.mark.long
def test_ctrl_c_ends_a_single_run_with_what_is_pending(stage: Stage) -> None:
    with ScriptedServer(stalls, server_context(stage.pki)) as server:
        stage.configure(server.url, top='shutdown_grace = "0.1s"')
        stage.put("a.cfg", b"content")
        command = [sys.executable, "-m", "backupd", "run", "--once", "--config", str(stage.config)]
        with stage.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log)
        assert server.paused.wait(TIMEOUT)
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == PENDING
