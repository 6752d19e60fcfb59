"""Deliveries continue through clock steps, sleep of the host, lack of descriptors and a broken output."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from backupd.ledger.sqlite.connection import FILE_NAME, LOCK_NAME
from backupd.receiver.serve import RunningReceiver
from tests.faults.disk import a_small_disk, fill
from tests.faults.shim import Shim
from tests.scripted import Peer, ScriptedServer, receipt_for, server_context
from tests.stage import TIMEOUT, Daemon, Stage, until

DAYS = 86400
FAST_RETRY = '[destination.vault.retry]\ninitial = "0.1s"\nmax = "1s"'


@pytest.fixture
def shim(stage: Stage) -> Shim:
    return Shim(stage.base, stage.base / "nothing")


def queue_an_archive(stage: Stage, receiver: RunningReceiver, shim: Shim, ahead: float) -> Daemon:
    """Have an archive wait for a receiver that is down, under a clock that is ahead."""
    stage.configure(receiver.url, drop='stable_for = "0s"', more=FAST_RETRY)
    shim.set_clock(ahead)
    daemon = stage.daemon(shim.environ).ready()
    receiver.__exit__(None, None, None)
    stage.put("waits.tar.gz", b"waits")
    daemon.wait_for("delivery.deferred", archive="waits.tar.gz")
    return daemon


@pytest.mark.long
@pytest.mark.parametrize("days", [3, 400])
def test_a_clock_that_is_set_back_delays_no_archive(
    stage: Stage, receiver: RunningReceiver, shim: Shim, days: int
) -> None:
    daemon = queue_an_archive(stage, receiver, shim, days * DAYS)
    shim.set_clock(0)
    stepped = daemon.wait_for("clock.stepped")
    assert -days * DAYS - 5 < stepped[0]["step_s"] < -days * DAYS + 5
    receiver.__enter__()
    daemon.wait_for("archive.disposed", archive="waits.tar.gz")
    assert len(daemon.events("clock.stepped")) == 1
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_start_with_an_earlier_clock_delays_no_archive(
    stage: Stage, receiver: RunningReceiver, shim: Shim
) -> None:
    queue_an_archive(stage, receiver, shim, 3 * DAYS).kill()
    receiver.__enter__()
    shim.set_clock(-3 * DAYS)
    daemon = stage.daemon(shim.environ)
    daemon.wait_for("archive.disposed", archive="waits.tar.gz")
    assert daemon.stop() == 0


def configure_expiry(stage: Stage, receiver: RunningReceiver) -> None:
    """Configure expiry of archives and history, and a full disk, which logs each run of retention."""
    other = stage.base / "other"
    other.mkdir()
    stage.configure(
        receiver.url,
        top='heartbeat_every = "1s"\nkeep_history_for = "90d"',
        drop='stable_for = "0s"\nkeep_sent_for = "30d"',
        more=f'{FAST_RETRY}\n[drop.other]\npath = "{other}"\nkeep_sent_for = "1s"\nmin_free = "1000000 GiB"',
    )


def send(stage: Stage, daemon: Daemon, *names: str) -> None:
    for name in names:
        stage.put(name, name.encode())
        daemon.wait_for("archive.disposed", archive=name)


def assert_kept(stage: Stage, daemon: Daemon, *names: str, listed: Sequence[str]) -> None:
    """Wait for another run of retention and history, and assert what is kept and what is listed."""
    for event in ("disk.low", "daemon.heartbeat"):
        daemon.wait_for(event, len(daemon.events(event)) + 2)
    output = stage.backupd("list").stdout
    for name in names:
        assert (stage.sent / name).read_bytes() == name.encode()
        assert (name in output) == (name in listed)
    assert not daemon.events("archive.expired")


@pytest.mark.long
def test_a_clock_that_is_set_forward_is_logged_and_expires_nothing(
    stage: Stage, receiver: RunningReceiver, shim: Shim
) -> None:
    configure_expiry(stage, receiver)
    daemon = stage.daemon(shim.environ).ready()
    send(stage, daemon, "sent.tar.gz", "too.tar.gz")
    shim.set_clock(400 * DAYS)
    daemon.wait_for("clock.stepped")
    send(stage, daemon, "later.tar.gz")
    names = ("sent.tar.gz", "too.tar.gz", "later.tar.gz")
    assert_kept(stage, daemon, *names, listed=names)
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("lost", [False, True], ids=["with its ledger", "without the ledger"])
def test_a_start_with_a_later_clock_expires_nothing(
    stage: Stage, receiver: RunningReceiver, shim: Shim, lost: bool
) -> None:
    """Neither does the start after it, although archives were delivered under that clock."""
    configure_expiry(stage, receiver)
    daemon = stage.daemon(shim.environ).ready()
    names = ["sent.tar.gz", "too.tar.gz"]
    before_the_loss = [*names] if lost else []
    send(stage, daemon, *names)
    assert daemon.stop() == 0
    shim.set_clock(400 * DAYS)
    if lost:
        for path in stage.state.glob("ledger.sqlite3*"):
            path.unlink()
    for name in ("later.tar.gz", "latest.tar.gz"):
        again = stage.daemon(shim.environ).ready()
        send(stage, again, name)
        names.append(name)
        assert_kept(stage, again, *names, listed=[name for name in names if name not in before_the_loss])
        assert again.stop() == 0


@pytest.mark.long
def test_a_clock_skew_ends_although_the_daemon_runs_only_for_short_times(
    stage: Stage, receiver: RunningReceiver, shim: Shim
) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1h"')
    assert stage.daemon(shim.environ).ready().stop() == 0
    shim.set_clock(400 * DAYS)

    def remaining_after_a_run() -> float:
        daemon = stage.daemon(shim.environ).ready()
        time.sleep(1.0)  # a second that must be subtracted from the skew
        assert daemon.stop() == 0
        with contextlib.closing(sqlite3.connect(stage.state / FILE_NAME)) as ledger:
            [(ahead, remaining)] = ledger.execute("SELECT ahead, remaining FROM clock").fetchall()
        assert 400 * DAYS * 10**6 - 10**9 < ahead < 400 * DAYS * 10**6 + 10**9
        return float(remaining) / 10**6

    remaining = 24 * 3600.0 + 1
    for _ in range(2):

        def is_subtracted(before: float = remaining) -> bool:
            nonlocal remaining
            remaining = remaining_after_a_run()
            return remaining < before - 1.0

        # a daemon too slow to record it at its end leaves the skew as it is, and the next one subtracts it
        until(is_subtracted, "a run that subtracts a second from the skew")


def test_an_archive_is_delivered_although_the_host_sleeps_during_the_upload(stage: Stage) -> None:
    """After the sleep the connection is lost: the archive is uploaded again."""
    content = os.urandom(3_000_000)

    def script(peer: Peer) -> None:
        peer.read_head()
        if peer.number == 0:
            peer.read(100_000)
            peer.pause()
            return
        peer.read(int(length(peer)))
        peer.send(receipt_for(content))

    def length(peer: Peer) -> str:
        return peer.head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0].decode()

    with ScriptedServer(script, server_context(stage.pki)) as server:
        stage.configure(server.url, drop='stable_for = "0s"', more=FAST_RETRY)
        daemon = stage.daemon().ready()
        stage.put("core.tar.gz", content)
        assert server.paused.wait(TIMEOUT)
        daemon.process.send_signal(signal.SIGSTOP)
        server.resume()
        until(server.peers[0].closed.is_set, "the server to close the connection")
        daemon.process.send_signal(signal.SIGCONT)
        daemon.wait_for("archive.disposed", archive="core.tar.gz")
        assert len(server.peers) == 2
        assert daemon.stop() == 0


@contextlib.contextmanager
def without_descriptors(daemon: Daemon) -> Iterator[None]:
    """Keep a daemon from opening any further file."""
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    yield
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)


def test_a_lack_of_descriptors_is_logged_and_deliveries_continue_after_it(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"\nrescan_every = "1s"', more=FAST_RETRY)
    daemon = stage.daemon().ready()
    stage.put("before.tar.gz", b"before")
    daemon.wait_for("archive.disposed", archive="before.tar.gz")
    with without_descriptors(daemon):
        for number in range(3):
            stage.put(f"waits-{number}.tar.gz", b"waits %d" % number)

        def is_logged() -> bool:
            return any("Too many open files" in str(line.get("error")) for line in daemon.events())

        until(is_logged, f"the error in the log\n{daemon.text()[-2000:]}")
    for number in range(3):
        daemon.wait_for("archive.disposed", archive=f"waits-{number}.tar.gz")
    assert not daemon.events("daemon.failed")
    assert daemon.stop() == 0


def test_a_lack_of_descriptors_during_the_retention_does_not_end_the_daemon(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(
        receiver.url, drop='stable_for = "0s"\nkeep_sent_for = "1s"\nkeep_sent_last = 1', more=FAST_RETRY
    )
    daemon = stage.daemon().ready()
    stage.put("a.tar.gz", b"content")
    daemon.wait_for("archive.disposed")
    with without_descriptors(daemon):
        failed = daemon.wait_for("retention.skipped")[0]
    assert "Too many open files" in failed["error"]
    stage.put("b.tar.gz", b"content")
    daemon.wait_for("archive.expired", archive="a.tar.gz")
    assert not daemon.events("daemon.failed")
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("limit", [5, 8, 12, 16, 20])
def test_too_few_descriptors_at_the_start_are_reported_or_are_enough(
    stage: Stage, receiver: RunningReceiver, limit: int
) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"', more=FAST_RETRY)
    content = stage.put("core.tar.gz", b"core").read_bytes()
    daemon = stage.daemon(before=["prlimit", f"--nofile={limit}:{limit}"])

    def is_reported() -> bool:
        return "Too many open files" in daemon.text() or "unable to open database file" in daemon.text()

    until(
        lambda: is_reported() or (stage.sent / "core.tar.gz").exists(),
        f"an error or a delivery\n{daemon.text()[-3000:]}",
    )
    daemon.kill()
    stage.log.unlink()  # a traceback of Python before the start is no event of the catalogue
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


def assert_delivers_many(stage: Stage, process: subprocess.Popen[bytes]) -> None:
    """Deliver so many archives that their log lines do not fit into a pipe."""
    for number in range(300):
        stage.put(f"sw-{number:03}-{'x' * 150}.tar.gz", b"%d" % number)
    until(lambda: len(stage.archives(stage.sent)) == 300, "all archives")
    assert len(stage.stored()) == 300
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 0


@pytest.mark.root
@pytest.mark.long
def test_a_daemon_that_starts_with_a_full_drop_folder_frees_it(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='on_delivered = "delete"')
    with a_small_disk(stage.drop):
        two_days_ago = time.time() - 2 * DAYS
        for number in range(5):
            path = stage.drop / f"core-{number}.cfg"
            path.write_bytes(os.urandom(30_000))
            os.utime(path, (two_days_ago, two_days_ago))
        fill(stage.drop / "core-5.cfg")
        daemon = stage.daemon().ready()
        daemon.wait_for("archive.disposed", 5)
        daemon.wait_for("archive.delivered", archive="core-5.cfg")
        assert stage.archives(stage.drop) == []
        assert len(stage.stored()) == 6
        daemon.stop()


@pytest.mark.long
def test_a_full_disk_of_the_output_stops_no_delivery(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"')
    with Path("/dev/full").open("wb", buffering=0) as full, writing_to(stage, full) as process:
        assert_delivers_many(stage, process)


@pytest.mark.long
def test_an_output_without_a_reader_stops_no_delivery(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"')
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with writing_to(stage, writer) as process:
            assert_delivers_many(stage, process)
    finally:
        os.close(writer)


@pytest.mark.long
def test_an_output_that_is_never_read_stops_no_delivery(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"')
    reader, writer = os.pipe()
    try:
        with writing_to(stage, writer) as process:
            assert_delivers_many(stage, process)
    finally:
        os.close(writer)
        os.close(reader)


@pytest.mark.long
@pytest.mark.parametrize(
    ("closed", "log_format"), [(">&-", "json"), ("<&- >&- 2>&-", "json"), ("<&- >&- 2>&-", "auto")]
)
def test_a_closed_output_stops_no_delivery_and_writes_into_no_file(
    stage: Stage, receiver: RunningReceiver, closed: str, log_format: str
) -> None:
    """Without care the next opened file would become the output: the lock, the ledger or an archive."""
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
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()
        process.wait()
    assert [path.read_bytes() for path in stage.archives(stage.drop)] == [b"core"]
