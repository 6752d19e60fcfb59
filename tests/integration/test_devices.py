"""Devices, sizes and old history in a ledger file: tracking, commands, migration and pruning."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from backupd.core.devices import DeviceExpectation
from backupd.core.errors import LedgerError
from backupd.core.model import Archive, Outcome
from backupd.daemon.housekeeping import HistoryPruning
from backupd.dropfolder.folder import DropFolder
from backupd.intake.device_tracker import DeviceTracker
from backupd.ledger.history import DeviceRecord, Search
from backupd.ledger.port import ClockReading, DispositionResult, FileCandidate, UnusualArchive
from backupd.ledger.sqlite import connection
from backupd.ledger.sqlite.connection import FILE_NAME, open_for_reading, open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.ledger.sqlite.queries import LedgerQueries
from backupd.telemetry.events import Event
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.factories import (
    NOW,
    SECOND,
    a_candidate,
    a_claim_result,
    a_drop,
    a_fingerprint,
    deferred,
    delivered,
    record_dispositions,
    rejected,
)

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

T = TypeVar("T", bound="Closable")


class Closable(Protocol):
    def close(self) -> None: ...


class Close(Protocol):
    """Closes a ledger or connection when the test ends; returns it."""

    def __call__(self, it: T) -> T: ...


@pytest.fixture
def close_after() -> Iterator[Close]:
    with contextlib.ExitStack() as stack:

        def close(it: Any) -> Any:
            stack.callback(it.close)
            return it

        yield close


class RecordingLog(EventLog):
    """Keeps the events that are logged."""

    def __init__(self) -> None:
        super().__init__(LineWriter(2))
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def emit(self, event: Event, *, exc_info: BaseException | None = None, **keys: object) -> None:
        self.lines.append((event.name, {key: value for key, value in keys.items() if value is not None}))

    def drain(self) -> list[tuple[str, dict[str, Any]]]:
        lines, self.lines = self.lines, []
        return lines


class FailingLedger(SqliteLedger):
    """A ledger with a disk that is full while `full` is set."""

    full = False

    def _transaction(self, *, durable: bool, lock_timeout: float = 5.0) -> Any:
        if self.full:
            raise LedgerError("the ledger can't be written: database or disk is full", "check the disk")
        return super()._transaction(durable=durable, lock_timeout=lock_timeout)


class Scene:
    """A ledger file and the device tracker of a daemon, at times that the test chooses."""

    def __init__(self, state: Path, close: Close, **drop: Any) -> None:
        self.state = state
        self._close = close
        self.log = RecordingLog()
        folder = state.parent / "drop"
        folder.mkdir(exist_ok=True)
        self.drops = {"switches": a_drop(close(DropFolder(str(folder))), **drop)}
        self.start()

    def start(self, now: Any = NOW) -> None:
        """Open the ledger as a new daemon does."""
        self.ledger = self._close(FailingLedger(open_ledger(self.state).connection))
        self.tracker = DeviceTracker(self.ledger, self.log)
        self.tracker.configure(self.drops, now)

    def kill(self, now: Any = NOW) -> None:
        self.ledger.close()
        self.start(now)

    def arrive(self, name: bytes, *, at: Any = NOW, size: int = 100) -> bool:
        candidate = FileCandidate("switches", name, a_fingerprint(size=size))
        return self.ledger.enqueue(self.tracker.with_devices([candidate], at), ["vault"], at).has_unusual_size

    def tick(self, now: Any) -> list[tuple[str, dict[str, Any]]]:
        self.tracker.tick(now)
        return self.log.drain()

    def queries(self) -> LedgerQueries:
        return LedgerQueries(self._close(open_for_reading(self.state)))


BY_DEVICE = {"label_pattern": "(?P<device>[^/]+)/.*", "expect": {"every": "1h", "by": "{device}"}}


def test_an_overdue_device_is_logged_at_each_tick_until_it_recovers(
    tmp_path: Path, close_after: Close
) -> None:
    scene = Scene(tmp_path, close_after, **BY_DEVICE)
    scene.arrive(b"sw1/a.cfg")
    assert scene.tick(NOW + HOUR) == []
    late = NOW + HOUR + 5 * SECOND
    event = ("drop.overdue", {"drop": "switches", "device": "sw1", "last_at": NOW, "overdue_s": 5 * SECOND})
    assert scene.tick(late) == [event]
    scene.kill(late)
    assert scene.tick(late) == [event]
    scene.arrive(b"sw1/b.cfg", at=late)
    scene.kill(late)
    assert scene.tick(late) == [("drop.recovered", {"drop": "switches", "device": "sw1", "last_at": late})]
    assert scene.tick(late) == []


def test_an_overdue_drop_without_devices_is_logged_without_a_device(
    tmp_path: Path, close_after: Close
) -> None:
    scene = Scene(tmp_path, close_after, expect={"every": "1h"})
    assert scene.tick(NOW + 2 * HOUR) == [("drop.overdue", {"drop": "switches", "overdue_s": HOUR})]
    scene.arrive(b"a.cfg", at=NOW + 2 * HOUR)
    assert [name for name, _ in scene.tick(NOW + 2 * HOUR)] == ["drop.recovered"]


def test_an_archive_that_the_label_pattern_does_not_match_has_no_device(
    tmp_path: Path, close_after: Close
) -> None:
    scene = Scene(tmp_path, close_after, size_alarm="50%", **BY_DEVICE)
    for size in (1, 1, 1, 99):
        assert not scene.arrive(b"stray.cfg", size=size)
    assert scene.queries().devices(NOW) == []


def test_an_overdue_device_is_logged_even_if_the_alarm_cannot_be_recorded(
    tmp_path: Path, close_after: Close
) -> None:
    scene = Scene(tmp_path, close_after, **BY_DEVICE)
    scene.arrive(b"sw1/a.cfg")
    scene.ledger.full = True
    for _ in range(2):
        with pytest.raises(LedgerError):
            scene.tracker.tick(NOW + 2 * HOUR)
        assert [name for name, _ in scene.log.drain()] == ["drop.overdue"]


def test_an_unusual_size_is_logged_once_even_after_a_restart(tmp_path: Path, close_after: Close) -> None:
    scene = Scene(
        tmp_path,
        close_after,
        label_pattern="(?P<device>[^/]+)/.*",
        size_alarm="50%",
        expect={"by": "{device}"},
    )
    assert [scene.arrive(b"sw1/%d.cfg" % n) for n in range(3)] == [False] * 3
    assert scene.arrive(b"sw1/small.cfg", size=40)
    scene.kill()
    event = scene.tick(NOW)
    assert event == [
        (
            "archive.unusual_size",
            {
                "drop": "switches",
                "archive": b"sw1/small.cfg",
                "device": "sw1",
                "size_bytes": 40,
                "median_size_bytes": 100,
                "change_ratio": -0.6,
            },
        )
    ]
    scene.kill()
    assert scene.tick(NOW + 999 * DAY) == []  # without `every` no device is overdue


def test_a_rolled_back_enqueue_does_not_change_the_device(
    tmp_path: Path, close_after: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, close_after, size_alarm="50%", **BY_DEVICE)
    for number in range(3):
        scene.arrive(b"sw1/%d.cfg" % number)

    def broken(*_: object) -> bool:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("backupd.ledger.sqlite.deliveries.record_arrival", broken)
        with pytest.raises(LedgerError):
            scene.arrive(b"sw1/odd.cfg", size=9000, at=NOW + HOUR)
    assert scene.ledger.unusual_archives() == []
    assert [(d.last_at, d.archives) for d in scene.queries().devices(NOW)] == [(NOW, 3)]
    assert scene.ledger.backlog()["vault"].pending == 3
    assert scene.arrive(b"sw1/odd.cfg", size=9000, at=NOW + HOUR)
    assert [one.size_bytes for one in scene.ledger.unusual_archives()] == [9000]


# commands


def test_commands_list_and_forget_devices_while_the_daemon_runs(tmp_path: Path, close_after: Close) -> None:
    scene = Scene(tmp_path, close_after, **BY_DEVICE)
    for name in (b"sw1/a.cfg", b"sw2/a.cfg"):
        scene.arrive(name)
    late = NOW + 2 * HOUR
    scene.arrive(b"sw2/b.cfg", at=late)
    queries = scene.queries()
    assert queries.devices(late) == [
        DeviceRecord("switches", "sw1", NOW, 1, True, HOUR),
        DeviceRecord("switches", "sw2", late, 2, False, HOUR),
    ]
    assert [keys["device"] for _, keys in scene.tick(late)] == ["sw1"]
    assert queries.forget_device("sw1", "elsewhere", late) == []
    assert queries.forget_device("sw1", None, late) == [("switches", False)]
    assert [d.device for d in queries.devices(late)] == ["sw2"]
    assert queries.forget_device("sw1", None, late) == []
    assert scene.tick(late) == [("drop.recovered", {"drop": "switches", "device": "sw1"})]
    assert scene.tick(late + HOUR) == []
    scene.arrive(b"sw1/b.cfg", at=late)  # it sends an archive and is expected again
    assert [keys["device"] for _, keys in scene.tick(late + 2 * HOUR)] == ["sw1", "sw2"]


def test_a_forgotten_device_that_is_listed_is_expected_from_then_on(
    tmp_path: Path, close_after: Close
) -> None:
    expect = {"every": "1h", "by": "{stem}", "devices": ["sw1"]}
    scene = Scene(tmp_path, close_after, expect=expect)
    assert [name for name, _ in scene.tick(NOW + 2 * HOUR)] == ["drop.overdue"]
    assert scene.queries().forget_device("sw1", "switches", NOW + 2 * HOUR) == [("switches", True)]
    assert [name for name, _ in scene.tick(NOW + 3 * HOUR)] == ["drop.recovered"]
    assert [keys["overdue_s"] for _, keys in scene.tick(NOW + 4 * HOUR)] == [HOUR]


# schema and pruning


VALUES_OF_EARLIER_COLUMNS = {
    "device": "folder_id",
    "device_number": "folder_id",
    "folder_inode": "folder_id",
    "admitted_at": "queued_at",
    "disposed_to": "moved_to",
    "announced": "already_logged",
    "live": "has_entry",
    "charged": "archive_failures",
    "faults": "destination_failures",
    "series": "NULL",
    "removed_at": "NULL",
}
"""Columns of earlier versions of the schema, and their values by the columns of today."""

COLUMNS = {
    "archive": "id, drop_name, relpath, folder_id, inode, size, mtime_ns, ctime_ns, queued_at, state,"
    " digest, disposition, moved_to, already_logged, disposed_at, has_entry, missing",
    "delivery": "id, archive_id, destination, size, state, due_at, attempts, archive_failures,"
    " destination_failures, ended_at, reason, error, digest, verified, http_status, receipt",
    "attempt": "delivery_id, number, started_at, duration_us, sent, outcome, reason, error, http_status",
}


@pytest.fixture
def version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Archive]:
    """A ledger with the first schema, before devices: one archive delivered and one pending."""
    today = tmp_path / "today"
    today.mkdir()
    ledger = SqliteLedger(open_ledger(today).connection)
    (old,) = ledger.enqueue([a_candidate(b"old.cfg")], ["vault"], NOW).queued
    (delivery,) = ledger.claim("vault", NOW)
    ledger.record([a_claim_result(delivery, deferred(), delivered())], NOW)
    record_dispositions(ledger, [DispositionResult(old.id, b"sent/old.cfg")], [], NOW)
    ledger.enqueue([a_candidate(b"new.cfg")], ["vault"], NOW)
    ledger.close()
    copy_to_earlier_version(1, today, tmp_path, monkeypatch)
    return tmp_path, old


def copy_to_earlier_version(version: int, today: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create a ledger with the schema of an earlier version, with the archives of a ledger of today."""
    with monkeypatch.context() as earlier:
        earlier.setattr(connection, "_MIGRATIONS", connection._MIGRATIONS[:version])
        db = open_ledger(state).connection
    db.execute("ATTACH ? AS today", (str(today / connection.FILE_NAME),))
    for table in ("archive", "delivery", "attempt"):
        names = [row[1] for row in db.execute(f"PRAGMA main.table_info({table})")]
        removal = f"CASE missing WHEN 1 THEN '{'gone' if version < 9 else 'missing'}' END"
        values_of = {**VALUES_OF_EARLIER_COLUMNS, "removal": removal}
        values = ", ".join(values_of.get(name, name) for name in names)
        db.execute(f"INSERT INTO main.{table} ({', '.join(names)}) SELECT {values} FROM today.{table}")
    db.close()


def test_the_inode_of_a_drop_folder_replaces_the_device_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, close_after: Close
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(connection, "_MIGRATIONS", connection._MIGRATIONS[:9])
        db = open_ledger(tmp_path).connection
    db.execute(
        "INSERT INTO folder (drop_name, inode, device_number) VALUES ('switches', 99, 7), ('other', 5, 7)"
    )
    db.executemany(
        "INSERT INTO archive (drop_name, relpath, device_number, inode, size, mtime_ns, ctime_ns, queued_at)"
        " VALUES ('switches', x'61', ?, 1, 1, 1, 1, 1)",
        [(7,), (8,)],
    )
    db.close()
    db = close_after(open_ledger(tmp_path).connection)
    assert db.execute("SELECT folder_id FROM archive ORDER BY id").fetchall() == [(99,), (0,)]


@pytest.mark.parametrize("version", [7, 8])
def test_a_command_on_a_ledger_of_an_earlier_version_asks_for_a_restart_of_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, close_after: Close, version: int
) -> None:
    today = tmp_path / "today"
    today.mkdir()
    close_after(SqliteLedger(open_ledger(today).connection)).enqueue([a_candidate(b"r1")], ["vault"], NOW)
    copy_to_earlier_version(version, today, tmp_path, monkeypatch)
    queries = LedgerQueries(close_after(open_for_reading(tmp_path)))
    with pytest.raises(LedgerError, match="schema of an earlier version") as raised:
        queries.find(Search(), 10)
    assert raised.value.hint == "restart the daemon, which migrates it"


@pytest.mark.parametrize("version", range(1, 11))
def test_a_ledger_of_an_earlier_version_is_migrated_with_its_archives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, close_after: Close, version: int
) -> None:
    today = tmp_path / "today"
    today.mkdir()
    ledger = SqliteLedger(open_ledger(today).connection)
    candidates = [
        a_candidate(b"%s.cfg" % name) for name in (b"sent", b"refused", b"missing", b"failed", b"new")
    ]
    sent, refused, missing, failed, _ = ledger.enqueue(candidates, ["vault"], NOW).queued
    outcomes: tuple[Outcome, ...] = (delivered(), rejected(), delivered(), deferred())
    claims = [claim for _ in outcomes for claim in ledger.claim("vault", NOW)]
    ledger.record([a_claim_result(c, one) for c, one in zip(claims, outcomes, strict=True)], NOW)
    moved = (
        DispositionResult(sent.id, b"sent/sent.cfg"),
        DispositionResult(refused.id, b"rejected/refused.cfg"),
    )
    record_dispositions(ledger, [*moved, DispositionResult(missing.id, None, missing=True)], [failed.id], NOW)
    ledger.close()
    copy_to_earlier_version(version, today, tmp_path, monkeypatch)
    close_after(SqliteLedger(open_ledger(tmp_path).connection))

    def rows(state: Path) -> list[list[tuple[Any, ...]]]:
        """The contents of all tables with archives, except `missing` if the earlier version had none."""
        with contextlib.closing(sqlite3.connect(state / FILE_NAME)) as db:
            if version < 3:
                db.execute("UPDATE archive SET missing = 0")
            return [
                db.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2").fetchall()
                for table, columns in COLUMNS.items()
            ]

    assert rows(tmp_path) == rows(today)
    migrated = close_after(SqliteLedger(open_ledger(tmp_path).connection))
    assert migrated.enqueue([candidates[2]], ["vault"], NOW).reappeared == (version >= 3)
    assert migrated.backlog()["vault"].pending == (2 if version >= 3 else 3)
    assert migrated.count_quarantined() == 1


def test_the_last_version_with_an_index_of_sent_archives_is_migrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, close_after: Close
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(connection, "_MIGRATIONS", connection._MIGRATIONS[:10])
        db = open_ledger(tmp_path).connection
    names = ["kept", "expiring", "expired", "changed", "missing"]
    for number, removal in enumerate(names, 1):
        db.execute(
            "INSERT INTO archive (id, drop_name, relpath, folder_inode, inode, size, mtime_ns, ctime_ns,"
            " queued_at, state, disposition, moved_to, disposed_at, has_entry, series, removal, removed_at)"
            " VALUES (?, 'switches', ?, 1, ?, 3, 0, 0, 5, 'delivered', 'done', ?, 6, 0, x'61', ?, 7)",
            (
                number,
                f"{removal}.cfg".encode(),
                number,
                f"sent/{removal}.cfg".encode(),
                None if removal == "kept" else removal,
            ),
        )
        db.execute(
            "INSERT INTO delivery (id, archive_id, destination, size, state, ended_at)"
            " VALUES (?, ?, 'vault', 3, 'delivered', 6)",
            (removal, number),
        )
    db.executemany(
        "INSERT INTO restored VALUES (?, ?)",
        [("all", b""), ("both", b"sent"), ("both", b"rejected"), ("half", b"rejected")],
    )
    db.execute("INSERT INTO clock VALUES (8)")
    db.executemany("INSERT INTO clock_skew (ahead, remaining) VALUES (?, ?)", [(10, 3), (20, 4)])
    db.close()

    ledger = close_after(SqliteLedger(open_ledger(tmp_path).connection))

    queries = LedgerQueries(close_after(open_for_reading(tmp_path)))
    found = {record.id: record for record in queries.find(Search(), 99)}
    assert {name: found[name].disposed_to for name in names} == {
        name: f"sent/{name}.cfg".encode() for name in names
    }
    assert not any(queries.archive(number).missing for number in range(1, 6))
    known = [drop for drop in ("all", "both", "half", "new") if ledger.knows_devices(drop)]
    assert known == ["all", "both"]
    reading = ledger.last_clock_reading()
    assert reading is not None
    micros = timedelta(microseconds=1)
    assert (reading.ahead, reading.remaining) == (30 * micros, 4 * micros)


def test_a_ledger_with_the_first_schema_is_migrated(
    version_1: tuple[Path, Archive], close_after: Close
) -> None:
    state, _ = version_1
    queries = LedgerQueries(close_after(open_for_reading(state)))  # the command is newer than the daemon
    assert (queries.devices(NOW), queries.forget_device("sw1", None, NOW)) == ([], [])
    ledger = close_after(SqliteLedger(open_ledger(state).connection))
    assert ledger.last_clock_reading() == ClockReading(NOW)
    assert ledger.backlog()["vault"].pending == 1
    ledger.set_expectations({"switches": DeviceExpectation(HOUR)}, NOW)
    assert len(ledger.possibly_overdue(NOW + 2 * HOUR)) == 1
    assert ledger.prune(NOW + DAY, 9) == 1
    assert ledger.backlog()["vault"].pending == 1


def test_deliveries_and_attempts_are_pruned_with_their_archive(
    version_1: tuple[Path, Archive], close_after: Close
) -> None:
    state, _ = version_1
    ledger = close_after(SqliteLedger(open_ledger(state).connection))
    raw = close_after(sqlite3.connect(state / FILE_NAME))

    def counts() -> list[int]:
        return [
            raw.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("archive", "delivery", "attempt")
        ]

    assert counts() == [2, 2, 2]
    HistoryPruning(ledger).tick(NOW)
    assert counts() == [2, 2, 2]
    HistoryPruning(ledger).tick(NOW + SECOND)
    assert counts() == [1, 1, 0]


def test_a_long_history_is_pruned_in_many_small_transactions(tmp_path: Path, close_after: Close) -> None:
    class Counting(SqliteLedger):
        def prune(self, before: Any, most: int) -> int:
            sizes.append(super().prune(before, most))
            return sizes[-1]

    sizes: list[int] = []
    ledger = close_after(Counting(open_ledger(tmp_path).connection))
    queued = ledger.enqueue([a_candidate(b"%d" % n) for n in range(1000)], ["vault"], NOW).queued
    ledger.record([a_claim_result(d, delivered()) for _ in queued for d in ledger.claim("vault", NOW)], NOW)
    record_dispositions(ledger, [DispositionResult(archive.id, b"sent/x") for archive in queued], [], NOW)
    pruning = HistoryPruning(ledger)
    for _ in range(1000):  # the number of transactions in a tick depends on the machine
        pruning.tick(NOW + DAY)
        if sizes[-1] < 200:
            break
    assert sizes == [200, 200, 200, 200, 199]


def test_pruning_reads_only_old_archives_and_writes_nothing_without_them(
    tmp_path: Path, close_after: Close
) -> None:
    ledger = close_after(SqliteLedger(open_ledger(tmp_path).connection))
    statements: list[str] = []
    ledger._db.set_trace_callback(statements.append)
    ledger.prune(NOW, 9)
    ledger._db.set_trace_callback(None)
    assert len(statements) == 1  # no transaction if there is nothing to prune
    plan = [row[3] for row in ledger._db.execute(f"EXPLAIN QUERY PLAN {statements[0]}")]
    assert any("SEARCH archive USING INDEX archive_over (<expr><?)" in step for step in plan), plan
    assert not any("SCAN" in step for step in plan), plan


def test_an_unusual_archive_has_its_size_and_the_median(tmp_path: Path, close_after: Close) -> None:
    scene = Scene(tmp_path, close_after, size_alarm="50%")
    for size in (10, 20, 30):
        scene.arrive(b"%d.cfg" % size, size=size)
    assert scene.arrive(b"odd.cfg", size=99)
    (one,) = scene.ledger.unusual_archives()
    assert one == UnusualArchive(one.archive_id, "switches", b"odd.cfg", "", 99, 20)
