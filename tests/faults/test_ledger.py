"""Damage of the ledger loses and touches no archive; the ledger is rebuilt, or an error is logged."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupd.ledger.sqlite.connection import FILE_NAME
from backupd.receiver.serve import RunningReceiver
from tests.scripted import Peer, ScriptedServer, http_response, receipt_for, server_context
from tests.stage import TIMEOUT, Daemon, Stage, until

FAST_RETRY = '[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.5s"'
PAGE = 4096


def overwrite(path: Path, at: int, size: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(os.urandom(size))


def header(ledger: Path) -> None:
    overwrite(ledger, 0, 100)


def inner_pages(ledger: Path) -> None:
    for page in range(1, ledger.stat().st_size // PAGE):
        overwrite(ledger, page * PAGE, 200)


def emptied(ledger: Path) -> None:
    os.truncate(ledger, 0)


def cut(ledger: Path) -> None:
    os.truncate(ledger, ledger.stat().st_size // 2)


def missing(ledger: Path) -> None:
    ledger.unlink()


def all_missing(ledger: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        ledger.with_name(ledger.name + suffix).unlink(missing_ok=True)


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, size and time of each file of a folder, to detect changes."""
    stats = {p.name: p.stat() for p in folder.iterdir() if p.is_file()}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats.items()}


@pytest.fixture
def waiting(stage: Stage, receiver: RunningReceiver) -> Daemon:
    """A daemon that was killed with one archive delivered and one pending."""
    stage.configure(receiver.url, drop='stable_for = "0s"\nrescan_every = "1s"', more=FAST_RETRY)
    daemon = stage.daemon().ready()
    stage.put("sent.tar.gz", b"sent")
    daemon.wait_for("archive.disposed", archive="sent.tar.gz")
    receiver.__exit__(None, None, None)
    stage.put("pending.tar.gz", b"pending")
    daemon.wait_for("delivery.deferred", archive="pending.tar.gz")
    daemon.kill()
    receiver.__enter__()
    return daemon


def assert_delivered(stage: Stage, *names: str) -> None:
    """Assert that the receiver has each archive once, and that each is in `sent`."""
    assert sorted(path.name for path in stage.archives(stage.drop)) == sorted(names)
    assert sorted(path.name for path in stage.archives(stage.sent)) == sorted(names)
    assert sorted(path.name.partition(".")[0] for path in stage.stored()) == sorted(
        name.partition(".")[0] for name in names
    )


@pytest.mark.long
@pytest.mark.parametrize("damage", [header, inner_pages, emptied, cut, missing, all_missing])
def test_a_lost_ledger_is_recreated_from_the_folders(
    stage: Stage, waiting: Daemon, damage: Callable[[Path], None]
) -> None:
    ledger = stage.state / FILE_NAME
    with contextlib.closing(sqlite3.connect(ledger, timeout=TIMEOUT)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = stamps(stage.sent)
    kept = ledger.read_bytes()
    damage(ledger)

    daemon = stage.daemon()
    daemon.wait_for("archive.disposed", archive="pending.tar.gz")

    assert [line["level"] for line in daemon.events("ledger.recreated")] == ["error"]
    assert {name: found for name, found in stamps(stage.sent).items() if name in before} == before
    assert_delivered(stage, "pending.tar.gz", "sent.tar.gz")
    assert not [line for line in daemon.events("archive.delivered") if line["archive"] == "sent.tar.gz"]
    if damage not in (missing, all_missing):
        damaged = [p for p in stage.state.iterdir() if ".damaged-" in p.name]
        assert damaged
        assert damage is not header or damaged[0].read_bytes()[100:] == kept[100:]
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_new_ledger_knows_the_devices_and_audit_all_archives_that_were_sent(stage: Stage) -> None:
    def script(peer: Peer) -> None:
        while True:
            content = peer.read_request().archive
            peer.send(http_response(422) if content == b"bad" else receipt_for(content))

    with ScriptedServer(script, server_context(stage.pki)) as server:
        expected = """label_pattern = '(?P<device>[^-]+)-.*'\nexpect = { every = "1s", by = "{device}" }"""
        stage.configure(
            server.url, top='heartbeat_every = "0.5s"', drop=f'stable_for = "0s"\n{expected}', more=FAST_RETRY
        )
        daemon = stage.daemon().ready()
        stage.put("r1-good.tar.gz", b"good")
        stage.put("r1-bad.tar.gz", b"bad")
        daemon.wait_for("archive.disposed", count=2)
        assert daemon.stop() == 0
        all_missing(stage.state / FILE_NAME)

        again = stage.daemon()
        again.wait_for("drop.overdue", device="r1")  # expected since its archive before the loss
        assert stage.backupd("audit").returncode == 0
        assert json.loads(stage.backupd("list", "--json").stdout) == []
        for name in ("r1-bad.tar.gz", "r1-bad.tar.gz.reason.json"):
            path = stage.rejected / name
            path.rename(stage.drop / name) if name.endswith("gz") else path.unlink()
        again.wait_for("archive.rejected", archive="r1-bad.tar.gz")
        again.wait_for("archive.disposed", archive="r1-bad.tar.gz")
        assert again.stop() == 0
        assert len(server.requests) == 3
        assert [p.name for p in stage.archives(stage.rejected)] == ["r1-bad.tar.gz"]


def test_the_first_ledger_is_not_logged_as_recreated(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    assert not daemon.events("ledger.recreated")
    assert daemon.stop() == 0


@pytest.mark.long
def test_pages_damaged_under_the_daemon_end_it_and_the_next_start_recreates_the_ledger(
    stage: Stage, receiver: RunningReceiver
) -> None:
    """The daemon does not retry on a corrupt ledger while archives pile up."""
    stage.configure(receiver.url, top='heartbeat_every = "1s"', drop='stable_for = "0s"', more=FAST_RETRY)
    daemon = stage.daemon().ready()
    stage.put("sent.tar.gz", b"sent")
    daemon.wait_for("archive.disposed", archive="sent.tar.gz")
    with contextlib.closing(sqlite3.connect(stage.state / FILE_NAME, timeout=TIMEOUT)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    inner_pages(stage.state / FILE_NAME)
    stage.put("after.tar.gz", b"after")

    def has_ended() -> bool:
        with contextlib.suppress(OSError):  # the cache of SQLite hides the damage
            stage.put(f"more-{len(os.listdir(stage.drop))}.tar.gz", b"more")
        return daemon.process.poll() is not None

    until(has_ended, f"the daemon to end\n{daemon.text()[-2000:]}")
    assert daemon.process.returncode == 1  # after which systemd restarts it, other than after 78
    assert "the ledger is damaged" in daemon.text()

    again = stage.daemon()
    again.wait_for("ledger.recreated")
    until(lambda: len(stage.archives(stage.drop)) == len(stage.archives(stage.sent)), "all archives")
    again.wait_for("archive.disposed", archive="after.tar.gz")
    assert len(stage.stored()) == len(stage.archives(stage.sent))
    assert again.stop() == 0


def checkpoint(ledger: Path) -> None:
    """Move all pages from the write-ahead log into the database file."""
    with contextlib.closing(sqlite3.connect(ledger, timeout=TIMEOUT)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def a_page(ledger: Path, name: str) -> None:
    """Overwrite the first page of a table or index."""
    checkpoint(ledger)
    with contextlib.closing(sqlite3.connect(ledger)) as db:
        [page] = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (name,)).fetchone()
    overwrite(ledger, (page - 1) * PAGE, PAGE)


def a_table(ledger: Path) -> None:
    a_page(ledger, "archive")


def an_index(ledger: Path) -> None:
    a_page(ledger, "delivery_due")


def half(ledger: Path) -> None:
    checkpoint(ledger)
    cut(ledger)


def the_log(ledger: Path) -> None:
    """Overwrite the pages in the write-ahead log, but not the headers of its frames."""
    log = ledger.with_name(f"{ledger.name}-wal")
    for frame in range((log.stat().st_size - 32) // (24 + PAGE)):
        overwrite(log, 32 + frame * (24 + PAGE) + 32, PAGE - 8)


@pytest.mark.long
@pytest.mark.parametrize("damage", [a_table, an_index, half, the_log])
def test_damage_under_the_daemon_is_logged_and_loses_no_archive(
    stage: Stage, damage: Callable[[Path], None]
) -> None:
    """Any thread may find the damage, the thread of the heartbeat included."""
    ledger, down = stage.state / FILE_NAME, threading.Event()

    def script(peer: Peer) -> None:
        while True:
            content = peer.read_request().archive
            peer.send(http_response(503) if down.is_set() else receipt_for(content))

    with ScriptedServer(script, server_context(stage.pki)) as server:
        stage.configure(
            server.url, top='heartbeat_every = "0.2s"', drop='rescan_every = "0.2s"', more=FAST_RETRY
        )
        names = {f"sw-{number}.tar.gz" for number in range(40)}
        for name in names:
            stage.put(name, name.encode())
        daemon = stage.daemon().ready()
        daemon.wait_for("archive.disposed", count=len(names))
        down.set()
        stage.put("later.tar.gz", b"later")
        daemon.wait_for("destination.paused")
        before = stamps(stage.sent)

        with contextlib.closing(sqlite3.connect(ledger, isolation_level=None)) as other:
            version = other.execute("PRAGMA user_version").fetchone()[0]
            other.execute(f"PRAGMA user_version = {version}")
            damage(ledger)
            with contextlib.suppress(sqlite3.DatabaseError):  # have the daemon read the file again
                other.execute(f"PRAGMA user_version = {version}")

        until(lambda: daemon.process.poll() is not None, "the daemon to end")
        assert daemon.process.returncode == 1
        assert all("damaged" in line["error"] for line in daemon.events("daemon.failed"))
        assert daemon.events("daemon.failed")
        assert daemon.events("daemon.stopped")
        assert stamps(stage.sent) == before
        assert len(daemon.events("archive.delivered")) == len(names)
        down.clear()
        again = stage.daemon()
        again.wait_for("archive.disposed", archive="later.tar.gz")
        assert again.events("ledger.recreated")
        assert {path.name for path in stage.archives(stage.sent)} == {*names, "later.tar.gz"}
        assert again.stop() == 0


def no_text(db: sqlite3.Connection) -> None:
    db.execute("UPDATE archive SET drop_name = CAST(x'ff' AS TEXT)")


def no_column(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA writable_schema = ON")
    db.execute("UPDATE sqlite_schema SET sql = replace(sql, 'archive_failures', 'archive_futures')")


def no_version(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA user_version = 0")


@pytest.mark.long
@pytest.mark.parametrize("damage", [no_text, no_column, no_version])
def test_damage_that_no_integrity_check_finds_costs_at_most_one_start(
    stage: Stage, waiting: Daemon, damage: Callable[[sqlite3.Connection], None]
) -> None:
    """SQLite accepts any bytes as text, and any number as a time."""
    assert waiting.process.returncode
    with contextlib.closing(sqlite3.connect(stage.state / FILE_NAME, isolation_level=None)) as db:
        damage(db)
        assert damage is no_column or db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    daemon = stage.daemon()
    until(
        lambda: daemon.process.poll() is not None or daemon.events("ledger.recreated"),
        "an exit or a new ledger",
    )
    if not daemon.events("ledger.recreated"):
        assert daemon.process.returncode == 1  # after which systemd restarts it
        assert "the ledger is damaged" in daemon.text()
        daemon = stage.daemon()
        daemon.wait_for("ledger.recreated")
    daemon.wait_for("archive.disposed", archive="pending.tar.gz")
    assert_delivered(stage, "sent.tar.gz", "pending.tar.gz")
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_ledger_removed_under_the_daemon_loses_no_archive(stage: Stage, waiting: Daemon) -> None:
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.disposed", archive="pending.tar.gz")
    all_missing(stage.state / FILE_NAME)
    stage.put("after.tar.gz", b"after")
    daemon.wait_for("archive.disposed", archive="after.tar.gz")
    assert daemon.stop() == 0

    again = stage.daemon().ready()
    assert again.events("ledger.recreated")
    stage.put("later.tar.gz", b"later")
    again.wait_for("archive.disposed", archive="later.tar.gz")
    assert_delivered(stage, "after.tar.gz", "later.tar.gz", "pending.tar.gz", "sent.tar.gz")
    assert again.stop() == 0


def log_missing(ledger: Path) -> None:
    ledger.with_name(f"{ledger.name}-wal").unlink()


def replaced(ledger: Path) -> None:
    """Replace the ledger by a copy, as an operator may do."""
    copy = ledger.with_name("copy")
    shutil.copy(ledger, copy)
    copy.rename(ledger)


@pytest.mark.long
@pytest.mark.parametrize("remove", [missing, log_missing, all_missing, replaced])
def test_a_ledger_removed_under_the_daemon_is_logged_at_each_heartbeat(
    stage: Stage, receiver: RunningReceiver, remove: Callable[[Path], None]
) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "0.2s"', drop='stable_for = "0s"')
    daemon = stage.daemon().ready()
    daemon.wait_for("daemon.heartbeat", count=3)
    assert not daemon.events("ledger.failed")
    remove(stage.state / FILE_NAME)
    for line in daemon.wait_for("ledger.failed", count=2):
        assert "was removed or replaced while the daemon is running" in line["error"]
    stage.put("after.tar.gz", b"after")
    daemon.wait_for("archive.disposed", archive="after.tar.gz")
    assert daemon.stop() == 0
    again = stage.daemon().ready()
    again.wait_for("daemon.heartbeat", count=2)
    assert not again.events("ledger.failed")
    assert_delivered(stage, "after.tar.gz")
    assert again.stop() == 0


def test_a_ledger_of_a_newer_version_is_refused_unchanged(stage: Stage, waiting: Daemon) -> None:
    ledger = stage.state / FILE_NAME
    with contextlib.closing(sqlite3.connect(ledger)) as db:
        db.execute("PRAGMA user_version = 99")
    before = stamps(stage.drop), stamps(stage.sent), ledger.read_bytes()
    daemon = stage.daemon()
    assert daemon.process.wait(TIMEOUT) == 78
    assert "schema version 99" in daemon.text()
    assert (stamps(stage.drop), stamps(stage.sent), ledger.read_bytes()) == before


@contextlib.contextmanager
def locked(ledger: Path) -> Iterator[None]:
    """Lock the ledger from another process."""
    with contextlib.closing(sqlite3.connect(ledger, timeout=TIMEOUT, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        yield
        db.execute("ROLLBACK")


def test_the_daemon_waits_for_a_ledger_locked_by_another_process(
    stage: Stage, receiver: RunningReceiver
) -> None:
    """A waiting thread does not block the heartbeat: systemd would treat the daemon as hung."""
    stage.configure(
        receiver.url, top='heartbeat_every = "0.2s"', drop='stable_for = "0s"\nrescan_every = "0.5s"'
    )
    daemon = stage.daemon().ready()
    with locked(stage.state / FILE_NAME):
        before = len(daemon.events("daemon.heartbeat"))
        stage.put("after.tar.gz", b"after")
        failed = daemon.wait_for("ledger.failed")  # after the lock time-out of the daemon
        assert len(daemon.events("daemon.heartbeat")) > before + 3
        assert "locked" in failed[0]["error"]
        assert "another process holds it" in failed[0]["hint"]
        assert (stage.drop / "after.tar.gz").exists()
    daemon.wait_for("archive.disposed", archive="after.tar.gz")
    assert_delivered(stage, "after.tar.gz")
    assert daemon.stop() == 0


@pytest.mark.long
def test_the_daemon_does_not_start_while_another_process_locks_the_ledger(
    stage: Stage, waiting: Daemon
) -> None:
    before = stamps(stage.drop), stamps(stage.sent)
    with locked(stage.state / FILE_NAME):
        refused = stage.daemon()
        assert refused.process.wait(TIMEOUT) == 78
        assert "locked" in refused.text()
        assert (stamps(stage.drop), stamps(stage.sent)) == before
    stage.daemon().wait_for("archive.disposed", archive="pending.tar.gz")


@pytest.fixture
def own_disk(stage: Stage) -> Iterator[Path]:
    """A small filesystem for the ledger alone."""
    stage.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "backupd-test", str(stage.state)], check=True)
    try:
        yield stage.state
    finally:
        subprocess.run(["umount", "--lazy", stage.state], check=True)


@pytest.mark.long
@pytest.mark.root
def test_a_full_disk_of_the_ledger_is_logged_and_archives_wait(
    stage: Stage, receiver: RunningReceiver, own_disk: Path
) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"\nrescan_every = "1s"', more=FAST_RETRY)
    daemon = stage.daemon().ready()
    stage.put("sent.tar.gz", b"sent")
    daemon.wait_for("archive.disposed", archive="sent.tar.gz")
    fill(own_disk)
    stage.put("waits.tar.gz", b"waits")
    daemon.wait_for("ledger.failed")
    assert (stage.drop / "waits.tar.gz").exists()
    assert len(stage.stored()) == 1
    (own_disk / "full").unlink()
    daemon.wait_for("archive.disposed", archive="waits.tar.gz")
    assert_delivered(stage, "sent.tar.gz", "waits.tar.gz")
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.root
def test_the_daemon_starts_on_a_full_disk_and_delivers_once_there_is_room(
    stage: Stage, receiver: RunningReceiver, own_disk: Path
) -> None:
    drop = 'stable_for = "0s"\nrescan_every = "1s"\nexpect.every = "1d"'
    stage.configure(receiver.url, drop=drop, more=FAST_RETRY)
    daemon = stage.daemon().ready()
    stage.put("sent.tar.gz", b"sent")
    daemon.wait_for("archive.disposed", archive="sent.tar.gz")
    daemon.kill()
    fill(own_disk)
    stage.put("waits.tar.gz", b"waits")
    daemon = stage.daemon().ready()
    daemon.wait_for("ledger.failed")
    (own_disk / "full").unlink()
    daemon.wait_for("archive.disposed", archive="waits.tar.gz")
    assert_delivered(stage, "sent.tar.gz", "waits.tar.gz")
    assert daemon.stop() == 0


def fill(disk: Path) -> None:
    """Fill a filesystem up to the last byte."""
    with (disk / "full").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(PAGE))


@pytest.mark.long
@pytest.mark.root
def test_a_read_only_state_folder_keeps_the_daemon_from_starting_and_changes_no_file(
    stage: Stage, waiting: Daemon
) -> None:
    subprocess.run(["mount", "--bind", stage.state, stage.state], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", stage.state], check=True)
        before = stamps(stage.drop), stamps(stage.sent)
        daemon = stage.daemon()
        assert daemon.process.wait(TIMEOUT) == 78
        assert str(stage.state) in daemon.text()
        assert (stamps(stage.drop), stamps(stage.sent)) == before
    finally:
        subprocess.run(["umount", "--lazy", stage.state], check=True)
    daemon = stage.daemon()
    daemon.wait_for("archive.disposed", archive="pending.tar.gz")
    assert daemon.stop() == 0


@pytest.mark.long
def test_rejected_archives_stay_in_quarantine_when_the_ledger_is_lost(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"\ninspect_grace = "0s"\non_suspicious = "reject"')
    daemon = stage.daemon().ready()
    stage.put("bad.tar.gz", b"\x1f\x8b\x08 cut")
    daemon.wait_for("archive.disposed", archive="bad.tar.gz")
    assert daemon.stop() == 0
    before = stamps(stage.rejected)
    shutil.rmtree(stage.state)

    again = stage.daemon().ready()
    stage.put("after.tar.gz", (b"\x1f\x8b\x08" + bytes(7)) + b"\x03\x00" + bytes(8))
    again.wait_for("archive.disposed", archive="after.tar.gz")
    assert stamps(stage.rejected) == before
    assert again.stop() == 0
