"""The host's clock, its sleep, its descriptors and the other end of our output: deliveries go on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from backupd.ledger.sqlite.connection import FILE_NAME, LOCK_NAME
from backupd.receiver.serve import RunningReceiver
from tests.faults.shim import Shim
from tests.scripted import Peer, ScriptedServer, receipt_for, server_context
from tests.stage import PATIENCE, Daemon, Stage, until

DAYS = 86400
QUICK = '[destination.vault.retry]\ninitial = "0.1s"\nmax = "1s"'


@pytest.fixture
def shim(stage: Stage) -> Shim:
    return Shim(stage.base, stage.base / "nothing")


def an_archive_waits(stage: Stage, receiver: RunningReceiver, shim: Shim, ahead: float) -> Daemon:
    """Have an archive wait for a receiver that is down, by a clock that is wrong."""
    stage.configure(receiver.url, drop='stable_for = "0s"', more=QUICK)
    shim.set_clock(ahead)
    daemon = stage.daemon(shim.environ).ready()
    receiver.__exit__(None, None, None)
    stage.put("waits.tar.gz", b"waits")
    daemon.wait_for("delivery.deferred", archive="waits.tar.gz")
    return daemon


@pytest.mark.parametrize("days", [3, 400])
def test_a_clock_that_is_set_back_makes_no_archive_wait(
    stage: Stage, receiver: RunningReceiver, shim: Shim, days: int
) -> None:
    daemon = an_archive_waits(stage, receiver, shim, days * DAYS)
    shim.set_clock(0)
    told = daemon.wait_for("clock.stepped")
    assert -days * DAYS - 5 < told[0]["step_s"] < -days * DAYS + 5
    receiver.__enter__()
    daemon.wait_for("archive.disposed", archive="waits.tar.gz")
    assert len(daemon.events("clock.stepped")) == 1
    assert daemon.stop() == 0


def test_a_start_by_an_earlier_clock_makes_no_archive_wait(
    stage: Stage, receiver: RunningReceiver, shim: Shim
) -> None:
    an_archive_waits(stage, receiver, shim, 3 * DAYS).kill()
    receiver.__enter__()
    shim.set_clock(-3 * DAYS)
    daemon = stage.daemon(shim.environ)
    daemon.wait_for("archive.disposed", archive="waits.tar.gz")
    assert daemon.stop() == 0


def an_old_archive_would_go(stage: Stage, receiver: RunningReceiver) -> None:
    """Configure an end of archives and of history, and a full disk, which tells of each look for these."""
    other = stage.base / "other"
    other.mkdir()
    stage.configure(
        receiver.url,
        top='heartbeat_every = "1s"\nkeep_history_for = "90d"',
        drop='stable_for = "0s"\nkeep_sent_for = "30d"',
        more=f'{QUICK}\n[drop.other]\npath = "{other}"\nkeep_sent_for = "1s"\nmin_free = "1000000 GiB"',
    )


def send(stage: Stage, daemon: Daemon, *names: str) -> None:
    for name in names:
        stage.put(name, name.encode())
        daemon.wait_for("archive.disposed", archive=name)


def assert_kept_and_known(stage: Stage, daemon: Daemon, *names: str) -> None:
    """Wait until archives and history were looked through once more, and assert that all are there."""
    for tells in ("disk.low", "daemon.heartbeat"):
        daemon.wait_for(tells, len(daemon.events(tells)) + 2)
    listed = stage.backupd("list").stdout
    for name in names:
        assert (stage.sent / name).read_bytes() == name.encode()
        assert name in listed
    assert not daemon.events("archive.expired")


def test_a_clock_that_is_set_forward_is_said_and_removes_nothing(
    stage: Stage, receiver: RunningReceiver, shim: Shim
) -> None:
    an_old_archive_would_go(stage, receiver)
    daemon = stage.daemon(shim.environ).ready()
    send(stage, daemon, "sent.tar.gz", "too.tar.gz")
    shim.set_clock(400 * DAYS)
    daemon.wait_for("clock.stepped")
    send(stage, daemon, "later.tar.gz")
    assert_kept_and_known(stage, daemon, "sent.tar.gz", "too.tar.gz", "later.tar.gz")
    assert daemon.stop() == 0


@pytest.mark.parametrize("lost", [False, True], ids=["with its ledger", "without the ledger"])
def test_a_start_by_a_later_clock_removes_nothing(
    stage: Stage, receiver: RunningReceiver, shim: Shim, lost: bool
) -> None:
    """Nor does the one after it, when archives were sent by that clock."""
    an_old_archive_would_go(stage, receiver)
    daemon = stage.daemon(shim.environ).ready()
    names = ["sent.tar.gz", "too.tar.gz"]
    send(stage, daemon, *names)
    assert daemon.stop() == 0
    shim.set_clock(400 * DAYS)
    if lost:
        for path in stage.state.glob("ledger.sqlite3*"):
            path.unlink()
    for name in ("later.tar.gz", "latest.tar.gz"):
        again = stage.daemon(shim.environ).ready()
        if lost and name == "later.tar.gz":
            again.wait_for("ledger.restored", restored_archives=2)
        send(stage, again, name)
        names.append(name)
        assert_kept_and_known(stage, again, *names)
        assert again.stop() == 0


def test_a_doubt_of_the_clock_has_an_end_however_short_the_daemon_runs(
    stage: Stage, receiver: RunningReceiver, shim: Shim
) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1h"')
    assert stage.daemon(shim.environ).ready().stop() == 0
    shim.set_clock(400 * DAYS)

    def left_after_a_run() -> float:
        daemon = stage.daemon(shim.environ).ready()
        time.sleep(1.0)  # of which a second has to be off the doubt
        assert daemon.stop() == 0
        with contextlib.closing(sqlite3.connect(stage.state / FILE_NAME)) as ledger:
            [(ahead, remaining)] = ledger.execute("SELECT ahead, remaining FROM doubt").fetchall()
        assert 400 * DAYS * 10**6 - 10**9 < ahead < 400 * DAYS * 10**6 + 10**9
        return float(remaining) / 10**6

    first = left_after_a_run()
    assert first < 25 * 3600 - 1.0
    # one that is too slow to note it at its end makes no more of the doubt, and the next takes it off
    until(lambda: left_after_a_run() < first - 1.0, "a run that takes a second off the doubt")


def test_a_host_that_sleeps_in_the_middle_of_an_upload(stage: Stage) -> None:
    """The connection is as good as gone when it wakes: the archive is sent again."""
    content = os.urandom(3_000_000)

    def falls_asleep(peer: Peer) -> None:
        peer.read_head()
        if peer.number == 0:
            peer.read(100_000)
            peer.pause()
            return
        peer.read(int(length(peer)))
        peer.send(receipt_for(content))

    def length(peer: Peer) -> str:
        return peer.head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0].decode()

    with ScriptedServer(falls_asleep, server_context(stage.pki)) as server:
        stage.configure(server.url, drop='stable_for = "0s"', more=QUICK)
        daemon = stage.daemon().ready()
        stage.put("core.tar.gz", content)
        assert server.paused.wait(PATIENCE)
        daemon.process.send_signal(signal.SIGSTOP)
        server.go_on()
        until(server.peers[0].closed.is_set, "the server to have given up")
        daemon.process.send_signal(signal.SIGCONT)
        daemon.wait_for("archive.disposed", archive="core.tar.gz")
        assert len(server.peers) == 2
        assert daemon.stop() == 0


@contextlib.contextmanager
def without_descriptors(daemon: Daemon) -> Iterator[None]:
    """Have a daemon open nothing more for a while."""
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    yield
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)


def test_without_descriptors_it_says_so_and_goes_on_when_there_are_some(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"\nrescan_every = "1s"', more=QUICK)
    daemon = stage.daemon().ready()
    stage.put("before.tar.gz", b"before")
    daemon.wait_for("archive.disposed", archive="before.tar.gz")
    with without_descriptors(daemon):
        for number in range(3):
            stage.put(f"waits-{number}.tar.gz", b"waits %d" % number)

        def is_said() -> bool:
            return any("Too many open files" in str(line.get("error")) for line in daemon.events())

        until(is_said, f"a word of it\n{daemon.text()[-2000:]}")
    for number in range(3):
        daemon.wait_for("archive.disposed", archive=f"waits-{number}.tar.gz")
    assert not daemon.events("daemon.failed")
    assert daemon.stop() == 0


def test_without_descriptors_for_what_is_loaded_late_the_daemon_goes_on(
    stage: Stage, receiver: RunningReceiver
) -> None:
    """The module by which `sent_dir` is looked through is loaded once there is one."""
    stage.configure(receiver.url, drop='stable_for = "0s"', more=QUICK)
    daemon = stage.daemon().ready()
    stage.put("a.tar.gz", b"content")
    daemon.wait_for("archive.disposed")
    with without_descriptors(daemon):
        (said, *_) = daemon.wait_for("ledger.failed")
    assert "Too many open files" in said["error"]
    stage.put("b.tar.gz", b"content")
    daemon.wait_for("archive.disposed", archive="b.tar.gz")
    assert not daemon.events("daemon.failed")
    assert daemon.stop() == 0


@pytest.mark.parametrize("most", [5, 8, 12, 16, 20])
def test_too_few_descriptors_for_a_start_end_in_words_or_in_deliveries(
    stage: Stage, receiver: RunningReceiver, most: int
) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"', more=QUICK)
    content = stage.put("core.tar.gz", b"core").read_bytes()
    daemon = stage.daemon(before=["prlimit", f"--nofile={most}:{most}"])

    def is_said() -> bool:
        return "Too many open files" in daemon.text() or "unable to open database file" in daemon.text()

    until(lambda: is_said() or (stage.sent / "core.tar.gz").exists(), f"either\n{daemon.text()[-3000:]}")
    daemon.kill()
    stage.log.unlink()  # a traceback of Python's own start is no line of the catalogue
    again = stage.daemon()
    until((stage.sent / "core.tar.gz").exists, "the archive")
    assert (stage.sent / "core.tar.gz").read_bytes() == content
    assert again.ready().stop() == 0


@contextlib.contextmanager
def writing_to(stage: Stage, stdout: IO[bytes] | int) -> Iterator[subprocess.Popen[bytes]]:
    """Run the daemon with another standard output."""
    command = [sys.executable, "-m", "backupd", "run", "--config", str(stage.config), "--log-level", "debug"]
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def delivers_many(stage: Stage, process: subprocess.Popen[bytes]) -> None:
    """Have more delivered than a pipe holds lines of."""
    for number in range(300):
        stage.put(f"sw-{number:03}-{'x' * 150}.tar.gz", b"%d" % number)
    until(lambda: len(stage.archives(stage.sent)) == 300, "all archives")
    assert len(stage.stored()) == 300
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == 0


def test_a_full_disk_behind_the_output_stops_no_delivery(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"')
    with Path("/dev/full").open("wb", buffering=0) as full, writing_to(stage, full) as process:
        delivers_many(stage, process)


def test_an_output_that_nobody_reads_any_more_stops_no_delivery(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"')
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with writing_to(stage, writer) as process:
            delivers_many(stage, process)
    finally:
        os.close(writer)


def test_an_output_that_nobody_empties_stops_no_delivery(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"')
    reader, writer = os.pipe()
    try:
        with writing_to(stage, writer) as process:
            delivers_many(stage, process)
    finally:
        os.close(writer)
        os.close(reader)


@pytest.mark.parametrize(
    ("closed", "log_format"), [(">&-", "json"), ("<&- >&- 2>&-", "json"), ("<&- >&- 2>&-", "auto")]
)
def test_a_closed_output_stops_no_delivery_and_leads_into_no_file(
    stage: Stage, receiver: RunningReceiver, closed: str, log_format: str
) -> None:
    """Else the first file that is opened would be the output: the lock, the ledger, an archive."""
    stage.configure(
        receiver.url, top=f'[log]\nformat = "{log_format}"', drop='stable_for = "0s"\ninspect = "off"'
    )
    command = f"exec '{sys.executable}' -m backupd run --config '{stage.config}' {closed}"
    stage.put("core.tar.gz", b"core")
    process = subprocess.Popen(["sh", "-c", command], stderr=subprocess.DEVNULL)
    try:
        until(lambda: process.poll() is not None or (stage.sent / "core.tar.gz").exists(), "the archive")
        assert process.poll() is None
        assert (stage.state / LOCK_NAME).read_text() == f"{process.pid}\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 0
    finally:
        process.kill()
        process.wait()
    assert [path.read_bytes() for path in stage.archives(stage.drop)] == [b"core"]
