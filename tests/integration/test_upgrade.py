"""Ledgers of earlier versions, opened by the version of today."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backupd.core.devices import DeviceExpectation
from backupd.core.model import DeliveryState, Digest, Fingerprint
from backupd.ledger.history import Search
from backupd.ledger.port import ClockReading, FileCandidate, Ledger, OpenedLedger, UnusualArchive
from backupd.ledger.sqlite.connection import FILE_NAME
from backupd.ledger.sqlite.deliveries import open_for_daemon
from backupd.ledger.sqlite.queries import open_queries
from tests.factories import a_claim_result, delivered
from tests.old_ledgers import AT, FIRST_ROWS, LATER_ROWS, NEWEST, SECOND, SHA, create, many_rows


def version_of(state: Path) -> int:
    with contextlib.closing(sqlite3.connect(state / FILE_NAME)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def time(micros: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)


@pytest.fixture(params=[1, 7], ids=["first", "seventh"])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def upgraded(tmp_path: Path, version: int) -> Iterator[OpenedLedger]:
    create(tmp_path, version, FIRST_ROWS + (LATER_ROWS if version == 7 else ""))
    with open_for_daemon(tmp_path, lambda: None) as opened:
        assert opened.recreated is None
        yield opened
        opened.ledger.close()
    assert version_of(tmp_path) == NEWEST


@pytest.fixture
def ledger(upgraded: OpenedLedger) -> Ledger:
    return upgraded.ledger


def test_pending_archives_are_delivered_under_their_ids(ledger: Ledger) -> None:
    backlog = ledger.backlog()
    assert {name: (b.pending, b.pending_bytes) for name, b in backlog.items()} == {"vault": (2, 17)}
    assert ledger.reap() == 0
    first, second = ledger.claim("vault", time(AT + 9 * SECOND), limit=9)
    assert (first.id, first.archive.relpath, first.attempts) == ("d-7", b"uploading.cfg", 0)
    assert (second.id, second.archive.relpath, second.attempts) == ("d-6", b"\xff/\n", 3)
    assert (second.archive_failures, second.destination_failures) == (1, 2)
    assert second.unconfirmed_digest == Digest.parse(SHA)
    assert second.archive.fingerprint.inode == (1 << 64) - 1
    assert (second.archive.queued_at, second.archive.host) == (time(AT + 5), socket.gethostname())
    results = [a_claim_result(each, delivered()) for each in (first, second)]
    recorded = ledger.record(results, ledger.now())
    assert [one.archive.id for one in recorded.completed] == [7, 6]
    assert [(r.delivery_id, r.state) for r in recorded.completed[0].results] == [
        ("d-8", DeliveryState.DELIVERED),
        ("d-7", DeliveryState.DELIVERED),
    ]


def test_the_disposition_of_a_delivered_archive_is_still_due(ledger: Ledger, version: int) -> None:
    (due,) = ledger.pending_dispositions()
    assert due.archive.folder_id == (2 if version == 7 else 0)
    assert (due.archive.id, due.state, due.digest, due.already_logged) == (
        4, DeliveryState.DELIVERED, SHA, True
    )  # fmt: skip
    assert ledger.count_pending_dispositions() == 1
    assert ledger.count_quarantined() == 1


def candidate(name: bytes, inode: int, size: int) -> FileCandidate:
    fingerprint = Fingerprint(inode, size, 1, 1)
    return FileCandidate("switches", name, fingerprint)


def test_files_with_an_entry_are_not_queued_again(ledger: Ledger, version: int) -> None:
    known = [
        candidate(b"due.cfg", 14, 6),
        candidate(b"kept.cfg", 15, 7),
        candidate(b"\xff/\n", (1 << 64) - 1, 8),
        candidate(b"uploading.cfg", 17, 9),
    ]
    changes = ledger.known_since("switches")
    assert changes.added.keys() == {hash(each.relpath) for each in known}
    result = ledger.enqueue([*known, candidate(b"sent.cfg", 11, 3)], ["vault"], ledger.now())
    assert [archive.relpath for archive in result.queued] == [b"sent.cfg"]  # a user put it back
    assert ledger.known_since("switches", changes.cursor).added.keys() >= {hash(b"sent.cfg")}
    back = ledger.enqueue([candidate(b"back.cfg", 22, 3)], ["vault"], ledger.now())
    assert (back.reappeared, len(back.queued)) == ((True, 0) if version == 7 else (False, 1))


def test_the_reason_of_a_pause_is_kept(ledger: Ledger) -> None:
    assert (ledger.saved_failure("vault"), ledger.saved_failure("annex")) == ("connect", None)


def test_old_archives_are_pruned(ledger: Ledger, version: int) -> None:
    later = time(AT) + timedelta(days=1)
    assert ledger.prune(later, 99) == (5 if version == 7 else 2)
    assert ledger.backlog()["vault"].pending == 2


def test_the_clock_and_the_devices_are_kept(ledger: Ledger, version: int) -> None:
    if version == 1:  # before both
        assert ledger.last_clock_reading() == ClockReading(time(AT + 6), timedelta(0), timedelta(0))
        ledger.set_expectations({"switches": DeviceExpectation(timedelta(hours=1))}, time(AT))
        assert [d.name for d in ledger.possibly_overdue(time(AT) + timedelta(days=1))] == [""]
        return
    reading = ClockReading(time(AT + 10 * SECOND), timedelta(seconds=1), timedelta(minutes=1))
    assert ledger.last_clock_reading() == reading
    devices = ledger.possibly_overdue(time(AT) + timedelta(days=1))
    assert [(d.name, d.last_at, d.archives, d.alarmed) for d in devices] == [
        ("sw1", time(AT + 9), 4, False),
        ("sw2", None, 0, True),
    ]
    assert ledger.unusual_archives() == [UnusualArchive(10, "switches", b"odd.cfg", "sw1", 900, 100)]


@pytest.mark.usefixtures("upgraded")
def test_commands_show_the_whole_history(tmp_path: Path, version: int) -> None:
    with contextlib.closing(open_queries(tmp_path)) as history:
        states = {r.id: r.state for r in history.find(Search(), 99)}
        assert states | {"d-r": "", "d-9": ""} == {
            "d-1": "delivered", "d-2": "rejected", "d-3": "superseded", "d-4": "delivered",
            "d-5": "delivered", "d-6": "pending", "d-7": "pending", "d-8": "delivered", "d-r": "", "d-9": "",
        }  # fmt: skip
        assert [(a.number, a.duration_s, a.outcome, a.reason) for a in history.attempts("d-1")] == [
            (1, 0.25, "deferred", "connect"),
            (2, 0.5, "delivered", None),
        ]
        (rejected,) = history.find(Search(DeliveryState.REJECTED), 9)
        assert (rejected.disposed_to, rejected.reason, rejected.http_status) == (
            b"rejected/refused.cfg", "refused", 422
        )  # fmt: skip
        with history.mark_retried(rejected.archive.id):
            pass
        assert history.archive(1).disposed_to == b"sent/sent.cfg"
        assert history.snapshots() == []  # until a daemon takes one
        assert history.daemon_pid() == os.getpid()
        if version == 7:
            assert [history.archive(number).missing for number in (1, 8, 9)] == [False, True, False]
            assert [d.device for d in history.devices(time(AT))] == ["sw1", "sw2"]


# a long migration


UPGRADE_UNTIL_KILLED = """
import os, signal, sys
from pathlib import Path
from backupd.ledger.sqlite.deliveries import open_for_daemon
left = [int(sys.argv[2])]
def on_progress():
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
with open_for_daemon(Path(sys.argv[1]), on_progress):
    print(-left[0])
"""


def upgrade_until_killed(state: Path, at: int) -> subprocess.CompletedProcess[str]:
    """Open a ledger in a process that is killed at the given sign of progress; never for 0."""
    return subprocess.run(
        [sys.executable, "-c", UPGRADE_UNTIL_KILLED, str(state), str(at)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_a_migration_that_is_killed_is_done_by_the_next_start(tmp_path: Path) -> None:
    rows = FIRST_ROWS + many_rows(5000)
    create(tmp_path / "whole", 1, rows)
    signs = int(upgrade_until_killed(tmp_path / "whole", 0).stdout)
    assert signs > 20
    versions = set()
    for turn, at in enumerate(range(1, signs, signs // 10)):
        state = tmp_path / str(turn)
        create(state, 1, rows)
        assert upgrade_until_killed(state, at).returncode == -signal.SIGKILL
        versions.add(version_of(state))
        with open_for_daemon(state, lambda: None) as opened:
            assert opened.recreated is None
            backlog = opened.ledger.backlog()
            assert (backlog["many"].pending, backlog["vault"].pending) == (5001, 2)
            assert opened.ledger.count_pending_dispositions() == 1
            opened.ledger.close()
        assert version_of(state) == NEWEST
    assert len(versions) > 2, "it was killed in several migrations"
