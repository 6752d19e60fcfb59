"""The part of the SQLite ledger about the state of the whole: queues, snapshots, pauses and statistics."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime, timedelta

from backupd.core.device_matrix import CalendarDay
from backupd.core.notifications import NotificationState
from backupd.core.snapshot import DeviceDay, HourThroughput, OperatorPause, Snapshot
from backupd.ledger.notification_json import notifications_from_json, notifications_to_json
from backupd.ledger.port import Backlog, NewestArchive, QueueState
from backupd.ledger.snapshot_json import from_json, to_json
from backupd.ledger.sqlite.connection import TOTAL_SIZE, as_time, optional_time, storable_text, to_micros

_OPEN = """
    (SELECT archive_id, destination FROM delivery WHERE state = 'pending'
    UNION ALL SELECT archive_id, destination FROM delivery WHERE state = 'claimed')
"""
"""The open deliveries; one query for each state, as each has its own index without the ended ones."""

_HOUR_US = 3_600_000_000


def backlogs(db: sqlite3.Connection) -> dict[str, Backlog]:
    """Return the open deliveries by destination."""
    rows = db.execute(
        f"SELECT destination, count(*), {TOTAL_SIZE}, min(queued_at)"  # noqa: S608 -- own clauses
        f" FROM {_OPEN} JOIN archive ON archive.id = archive_id GROUP BY destination"
    )
    return {name: Backlog(count, size, as_time(oldest)) for name, count, size, oldest in rows}


def quarantined(db: sqlite3.Connection) -> int:
    """Return the number of rejected archives with a file in `rejected_dir`."""
    row = db.execute(
        "SELECT count(DISTINCT archive_id) FROM delivery INDEXED BY delivery_rejected"
        " JOIN archive ON archive.id = archive_id"
        " WHERE delivery.state = 'rejected' AND moved_to IS NOT NULL"
    ).fetchone()
    return int(row[0])


def queue_state(db: sqlite3.Connection, drops: Collection[str], destinations: Collection[str]) -> QueueState:
    """Return the state of all queues; see `Ledger.queue_state`."""
    by_destination = backlogs(db)
    return QueueState(
        by_destination,
        _drop_backlogs(db) if by_destination else {},
        dict(
            db.execute(
                "SELECT destination, count(*) FROM delivery INDEXED BY delivery_rejected"
                " JOIN archive ON archive.id = archive_id"
                " WHERE delivery.state = 'rejected' AND moved_to IS NOT NULL GROUP BY destination"
            ).fetchall()
        ),
        quarantined(db),
        {name: at for name in destinations if (at := _last_delivered(db, name)) is not None},
        {name: newest for name in drops if (newest := _newest_archive(db, name)) is not None},
    )


def save_snapshot(db: sqlite3.Connection, snapshot: Snapshot) -> None:
    """Replace the snapshot of the only daemon; one of the same host by another name goes."""
    db.execute("DELETE FROM snapshot WHERE host <> ?", (storable_text(snapshot.host),))
    db.execute(
        "INSERT OR REPLACE INTO snapshot (host, taken_at, state) VALUES (?, ?, ?)",
        (storable_text(snapshot.host), to_micros(snapshot.taken_at), to_json(snapshot)),
    )


def find_snapshots(db: sqlite3.Connection) -> list[Snapshot]:
    """Return the snapshots of all hosts, by their names."""
    rows = db.execute("SELECT state FROM snapshot ORDER BY host")
    return [snapshot for row in rows if (snapshot := from_json(row[0])) is not None]


def notification_states(db: sqlite3.Connection) -> dict[str, NotificationState]:
    """Return what each receiver of notifications knows."""
    rows = db.execute("SELECT receiver, state FROM notification")
    return {row[0]: state for row in rows if (state := notifications_from_json(row[1])) is not None}


def save_notification_state(db: sqlite3.Connection, receiver: str, state: NotificationState | None) -> None:
    """Replace what a receiver of notifications knows; None forgets the receiver."""
    db.execute("DELETE FROM notification WHERE receiver = ?", (receiver,))
    if state is not None:
        db.execute(
            "INSERT INTO notification (receiver, state) VALUES (?, ?)",
            (receiver, storable_text(notifications_to_json(state))),
        )


def find_pauses(db: sqlite3.Connection) -> list[OperatorPause]:
    """Return the pauses that people have requested, by kind and name."""
    rows = db.execute(
        "SELECT kind, name, since, until, user_name, note FROM operator_pause ORDER BY kind, name"
    )
    return [OperatorPause(row[0], row[1], as_time(row[2]), optional_time(row[3]), *row[4:]) for row in rows]


def save_pause(db: sqlite3.Connection, pause: OperatorPause) -> None:
    """Add a pause, or replace that of the same destination or drop."""
    until = None if pause.until is None else to_micros(pause.until)
    db.execute(
        "INSERT OR REPLACE INTO operator_pause (kind, name, since, until, user_name, note)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (
            pause.kind,
            pause.name,
            to_micros(pause.since),
            until,
            storable_text(pause.by),
            storable_text(pause.note),
        ),
    )


def delete_pause(db: sqlite3.Connection, kind: str, name: str) -> bool:
    """Delete a pause; return whether there was one."""
    return db.execute("DELETE FROM operator_pause WHERE kind = ? AND name = ?", (kind, name)).rowcount > 0


def delete_ended_pauses(db: sqlite3.Connection, now: datetime) -> None:
    """Delete the pauses with an end that has passed."""
    db.execute("DELETE FROM operator_pause WHERE until <= ?", (to_micros(now),))


def device_days(
    db: sqlite3.Connection, drops: Collection[str], days: Iterable[CalendarDay]
) -> Iterator[DeviceDay]:
    """Yield the archives of each device on each of these days; see `History.device_days`."""
    # a superseded archive was replaced by a newer content before its delivery, and one that was rejected and
    # retried by a new archive
    query = (
        "SELECT coalesce(device, '') AS name, count(*), sum(state = 'delivered'), sum(state = 'rejected'),"
        " count(median_size), min(queued_at), max(queued_at) FROM archive INDEXED BY archive_queued"
        " WHERE drop_name = ? AND queued_at >= ? AND queued_at < ? AND state <> 'superseded'"
        " AND NOT (state = 'rejected' AND moved_to IS NULL) GROUP BY name"
    )
    for day in days:
        for drop in drops:
            rows = db.execute(query, (drop, to_micros(day.begins), to_micros(day.ends)))
            for device, archives, delivered, rejected, unusual, first, last in rows:
                counts = (archives, delivered, rejected, unusual)
                yield DeviceDay(drop, device, day.name, *counts, as_time(first), as_time(last))


def first_queued(db: sqlite3.Connection, drops: Iterable[str]) -> dict[str, datetime]:
    """Return when the oldest archive of each drop in the ledger was queued; see `History.first_queued`."""
    query = "SELECT min(queued_at) FROM archive INDEXED BY archive_queued WHERE drop_name = ?"
    times = ((drop, db.execute(query, (drop,)).fetchone()[0]) for drop in drops)
    return {drop: as_time(first) for drop, first in times if first is not None}


def throughput(db: sqlite3.Connection, destinations: Iterable[str], since: datetime) -> list[HourThroughput]:
    """Return the deliveries of each destination and hour since a time; see `History.throughput`."""
    query = (
        f"SELECT ended_at / {_HOUR_US}, count(*), CAST(total(size) AS INTEGER)"  # noqa: S608 -- own number
        " FROM delivery INDEXED BY delivery_ended"
        " WHERE state = 'delivered' AND destination = ? AND ended_at >= ? GROUP BY 1 ORDER BY 1"
    )
    return [
        HourThroughput(name, datetime.fromtimestamp(0, UTC) + timedelta(hours=hour), count, size)
        for name in destinations
        for hour, count, size in db.execute(query, (name, to_micros(since)))
    ]


def _drop_backlogs(db: sqlite3.Connection) -> dict[str, Backlog]:
    """Return the archives with an open delivery by drop."""
    rows = db.execute(
        f"SELECT drop_name, count(*), {TOTAL_SIZE}, min(queued_at) FROM archive"  # noqa: S608 -- own clauses
        f" WHERE id IN (SELECT archive_id FROM {_OPEN}) GROUP BY drop_name"
    )
    return {name: Backlog(count, size, as_time(oldest)) for name, count, size, oldest in rows}


def _last_delivered(db: sqlite3.Connection, destination: str) -> datetime | None:
    query = "SELECT max(ended_at) FROM delivery WHERE state = 'delivered' AND destination = ?"
    return optional_time(db.execute(query, (destination,)).fetchone()[0])


def _newest_archive(db: sqlite3.Connection, drop: str) -> NewestArchive | None:
    row = db.execute(
        "SELECT relpath, queued_at FROM archive INDEXED BY archive_queued WHERE drop_name = ?"
        " ORDER BY queued_at DESC LIMIT 1",
        (drop,),
    ).fetchone()
    return NewestArchive(row[0], as_time(row[1])) if row else None
