"""The part of the SQLite ledger about devices, the deletion of old history, and the clock."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from backupd.core.clock_skew import ZERO
from backupd.core.devices import KEPT_SIZES, WHOLE_DROP, Device, DeviceExpectation, size_anomaly
from backupd.core.model import Archive
from backupd.ledger.port import ClockReading, DeviceLedger, TrackedDevice, UnusualArchive
from backupd.ledger.sqlite.connection import Row, Transactions, as_time, to_micros

_MICROSECOND = timedelta(microseconds=1)

_DEVICE = """
    SELECT d.drop_name, d.name, d.known_at, d.last_at, d.archives,
        CASE WHEN d.listed OR d.archives THEN e.every END, d.alarmed
    FROM device d LEFT JOIN expectation e ON e.drop_name = d.drop_name
"""
_RESET = "UPDATE device SET known_at = ?, last_at = NULL, archives = 0, sizes = ''"
_DELETE_FORGOTTEN = "DELETE FROM device WHERE NOT (listed OR archives OR alarmed)"
"""A forgotten device keeps its row until its alarm is cleared, so that its recovery is logged."""

_PRUNABLE = "disposition = 'done' AND NOT has_entry AND (state <> 'rejected' OR moved_to IS NULL)"


class SqliteDeviceLedger(Transactions, DeviceLedger):
    """The methods of `DeviceLedger`."""

    def set_expectations(self, expectations: Mapping[str, DeviceExpectation], now: datetime) -> None:
        """See `DeviceLedger.set_expectations`."""
        at = to_micros(now)
        with self._transaction(durable=False) as db:
            before = dict(db.execute("SELECT drop_name, device_by FROM expectation"))
            db.execute("UPDATE expectation SET every = NULL")
            db.execute("UPDATE device SET listed = 0")
            # a time from when the clock was ahead must not keep a device from becoming overdue
            db.execute("UPDATE device SET known_at = min(known_at, ?), last_at = min(last_at, ?)", (at, at))
            for drop, expectation in expectations.items():
                if drop in before and before[drop] != expectation.by:
                    db.execute(f"{_RESET} WHERE drop_name = ?", (at, drop))
                _expect(db, drop, expectation, at)
            db.execute(_DELETE_FORGOTTEN)

    def possibly_overdue(self, now: datetime) -> list[Device]:
        """See `DeviceLedger.possibly_overdue`."""
        with self._reading() as db:
            rows = db.execute(
                f"{_DEVICE} WHERE d.alarmed OR coalesce(d.last_at, d.known_at) + e.every < ?"
                " ORDER BY d.drop_name, d.name",
                (to_micros(now),),
            ).fetchall()
            return [_as_device(row) for row in rows]

    def count_devices(self) -> int:
        """See `DeviceLedger.count_devices`."""
        with self._reading() as db:
            row = db.execute("SELECT count(*) FROM device WHERE listed OR archives").fetchone()
        return int(row[0])

    def record_alarms(self, overdue: Sequence[Device], recovered: Sequence[Device]) -> None:
        """See `DeviceLedger.record_alarms`."""
        changed = [(1, d.drop, d.name) for d in overdue if not d.alarmed]
        changed += [(0, d.drop, d.name) for d in recovered]
        if not changed:
            return
        with self._transaction(durable=False) as db:
            db.executemany("UPDATE device SET alarmed = ? WHERE drop_name = ? AND name = ?", changed)
            db.execute(_DELETE_FORGOTTEN)

    def knows_devices(self, drop: str) -> bool:
        """See `DeviceLedger.knows_devices`."""
        with self._reading() as db:
            return bool(db.execute("SELECT 1 FROM learned_drop WHERE drop_name = ?", (drop,)).fetchone())

    def learn_devices(self, drop: str, devices: Sequence[Device]) -> None:
        """See `DeviceLedger.learn_devices`."""
        with self._transaction(durable=False) as db:
            db.executemany(
                "INSERT INTO device (drop_name, name, known_at, last_at, archives) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET archives = max(archives, excluded.archives),"
                " last_at = max(coalesce(last_at, 0), excluded.last_at)",
                [
                    (drop, d.name, to_micros(d.known_at), to_micros(d.last_at or d.known_at), d.archives)
                    for d in devices
                ],
            )
            db.execute("INSERT OR IGNORE INTO learned_drop (drop_name) VALUES (?)", (drop,))

    def unusual_archives(self) -> list[UnusualArchive]:
        """See `DeviceLedger.unusual_archives`."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT a.id, a.drop_name, a.relpath, u.device, a.size, u.median_size"
                " FROM unusual_size u CROSS JOIN archive a ON a.id = u.archive_id ORDER BY u.archive_id"
            ).fetchall()
        return [UnusualArchive(*row) for row in rows]

    def mark_reported(self, unusual: Sequence[UnusualArchive]) -> None:
        """See `DeviceLedger.mark_reported`."""
        with self._transaction(durable=False) as db:
            db.executemany(
                "DELETE FROM unusual_size WHERE archive_id = ?", [(one.archive_id,) for one in unusual]
            )

    def last_clock_reading(self) -> ClockReading | None:
        """See `DeviceLedger.last_clock_reading`."""
        with self._reading() as db:
            row = db.execute("SELECT seen_at, ahead, remaining FROM clock").fetchone()
            if row is None:
                return None
            return ClockReading(as_time(row[0]), row[1] * _MICROSECOND, row[2] * _MICROSECOND)

    def save_clock_reading(self, reading: ClockReading) -> None:
        """See `DeviceLedger.save_clock_reading`."""
        skew = (reading.ahead // _MICROSECOND, reading.remaining // _MICROSECOND)
        with self._transaction(durable=reading.ahead > ZERO, lock_timeout=0.0) as db:
            db.execute("DELETE FROM clock")
            db.execute(
                "INSERT INTO clock (seen_at, ahead, remaining) VALUES (?, ?, ?)",
                (to_micros(reading.seen_at), *skew),
            )

    def prune(self, before: datetime, limit: int) -> int:
        """See `DeviceLedger.prune`."""
        old = (
            f"SELECT id FROM archive INDEXED BY archive_over WHERE {_PRUNABLE}"  # noqa: S608 -- own clause
            " AND coalesce(disposed_at, queued_at) < ?"
            " AND id < (SELECT max(id) FROM archive)"  # the id of the newest archive must never be used again
            " LIMIT ?"
        )
        with self._reading() as db:  # often nothing is old enough, and no write is needed
            if db.execute(old, (to_micros(before), 1)).fetchone() is None:
                return 0
        with self._transaction(durable=False) as db:
            query = f"DELETE FROM archive WHERE id IN ({old})"  # noqa: S608 -- own clauses
            return db.execute(query, (to_micros(before), limit)).rowcount


def record_arrival(db: sqlite3.Connection, archive: Archive, tracked: TrackedDevice) -> bool:
    """Record the arrival of an archive within the transaction of `enqueue`.

    Returns whether its size is unusual.
    """
    device, size = (archive.drop, tracked.device), archive.fingerprint.size
    at = to_micros(archive.queued_at)
    row = db.execute("SELECT sizes FROM device WHERE drop_name = ? AND name = ?", device).fetchone()
    before = [int(each) for each in row[0].split()] if row else []
    sizes = " ".join(map(str, [*before, size][-KEPT_SIZES:]))
    db.execute(
        "INSERT INTO device (drop_name, name, known_at, last_at, archives, sizes) VALUES (?, ?, ?, ?, 1, ?)"
        " ON CONFLICT DO UPDATE SET last_at = excluded.last_at, archives = archives + 1,"
        " sizes = excluded.sizes",
        (*device, at, at, sizes),
    )
    anomaly = None if tracked.size_alarm is None else size_anomaly(size, before, tracked.size_alarm)
    if anomaly is None:
        return False
    db.execute(
        "INSERT INTO unusual_size (archive_id, device, median_size) VALUES (?, ?, ?)",
        (archive.id, tracked.device, anomaly.median),
    )
    db.execute("UPDATE archive SET median_size = ? WHERE id = ?", (anomaly.median, archive.id))
    return True


def device_records(db: sqlite3.Connection) -> list[Device]:
    """Return all devices in a ledger; none if its schema is older than the table of devices."""
    if not _has_device_table(db):
        return []
    query = f"{_DEVICE} WHERE d.listed OR d.archives ORDER BY d.drop_name, d.name"
    return [_as_device(row) for row in db.execute(query)]


def forget_device(
    db: sqlite3.Connection, name: str, drop: str | None, now: datetime
) -> list[tuple[str, bool]]:
    """Forget a device in one drop, or in all if `drop` is None.

    Returns the drops that had it, each with whether the configuration lists it there. A listed device stays
    known, as if it had been listed only at `now`.
    """
    if not _has_device_table(db):
        return []
    where = "name = ? AND (? IS NULL OR drop_name = ?) AND (listed OR archives)"
    values = (name, drop, drop)
    db.execute("BEGIN IMMEDIATE")
    try:
        query = f"SELECT drop_name, listed FROM device WHERE {where} ORDER BY drop_name"  # noqa: S608 -- own clause
        found = [(row[0], bool(row[1])) for row in db.execute(query, values)]
        db.execute(f"{_RESET} WHERE {where}", (to_micros(now), *values))
        db.execute(_DELETE_FORGOTTEN)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return found


def _has_device_table(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'device'").fetchone()[0])


def _expect(db: sqlite3.Connection, drop: str, expectation: DeviceExpectation, at: int) -> None:
    every = None if expectation.every is None else expectation.every // _MICROSECOND
    db.execute(
        "INSERT OR REPLACE INTO expectation (drop_name, every, device_by) VALUES (?, ?, ?)",
        (drop, every, expectation.by),
    )
    whole = (WHOLE_DROP,) if expectation.by is None and every is not None else ()
    db.executemany(
        "INSERT INTO device (drop_name, name, known_at, listed) VALUES (?, ?, ?, 1)"
        " ON CONFLICT DO UPDATE SET listed = 1",
        [(drop, name, at) for name in (*whole, *expectation.devices)],
    )


def _as_device(row: Row) -> Device:
    drop, name, known_at, last_at, archives, every, alarmed = row
    return Device(
        drop,
        name,
        as_time(known_at),
        None if last_at is None else as_time(last_at),
        archives,
        None if every is None else every * _MICROSECOND,
        bool(alarmed),
    )
