"""Questions to the ledger from beside the daemon, for the commands that show it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice

from backupd.core.devices import overdue_by
from backupd.core.errors import LedgerError, UsageError
from backupd.core.model import Archive, DeliveryState
from backupd.ledger.sqlite import device_queries
from backupd.ledger.sqlite.connection import (
    ARCHIVE_COLUMNS,
    Row,
    as_archive,
    as_time,
    convert_row,
    is_damage,
    is_locked,
    path_if_any,
    storable_text,
    time_if_any,
    to_micros,
)


@dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """An archive and what became of its file: `removal` tells how it left `disposed_to`, if it did."""

    archive: Archive
    state: str
    digest: str | None
    disposition: str | None
    disposed_to: bytes | None
    disposed_at: datetime | None
    removal: str | None
    removed_at: datetime | None


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A delivery with all that the ledger knows of it; times are UTC."""

    id: str
    archive: Archive
    destination: str
    state: DeliveryState
    due_at: datetime | None
    ended_at: datetime | None
    attempts: int
    reason: str | None
    error: str | None
    digest: str | None
    verified: bool | None
    http_status: int | None
    receipt: str | None
    disposed_to: bytes | None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """A request that was made for a delivery."""

    number: int
    started_at: datetime
    duration_s: float
    sent_bytes: int
    outcome: str
    reason: str | None
    error: str | None
    http_status: int | None


@dataclass(frozen=True, slots=True)
class DestinationRecord:
    """How things stand with a destination; `gate` None if the daemon has never noted one."""

    name: str
    pending: int
    pending_bytes: int
    oldest: datetime | None
    rejected: int
    last_delivered: datetime | None
    circuit: str | None
    reason: str | None
    error: str | None
    since: datetime | None
    until: datetime | None


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A device that archives come from; `device` is empty for a drop as a whole.

    `last_at` is None if nothing ever came of it, `every` where nothing is expected.
    """

    drop: str
    device: str
    last_at: datetime | None
    archives: int
    overdue: bool
    every: timedelta | None


@dataclass(frozen=True, slots=True)
class DropRecord:
    """How things stand with a drop; `last` is the archive that was admitted last."""

    pending: int
    pending_bytes: int
    oldest: datetime | None
    last: bytes | None
    last_at: datetime | None


@dataclass(frozen=True, slots=True)
class Search:
    """Which deliveries are wanted; times are those of the archive's admission."""

    state: DeliveryState | None = None
    drop: str | None = None
    destination: str | None = None
    since: datetime | None = None
    until: datetime | None = None


Wanted = Callable[[str, bytes], bool]
"""Called with a drop and a path in it."""

_CLAUSES = {
    "drop": "a.drop_name = ?",
    "destination": "d.destination = ?",
    "since": "a.admitted_at >= ?",
    "until": "a.admitted_at < ?",
}

_COLUMNS = ", ".join(f"a.{column}" for column in ARCHIVE_COLUMNS.split(", "))
_WHAT = f"""
    SELECT d.id, d.destination, d.state, d.due_at, d.ended_at, d.attempts, d.reason, d.error, d.digest,
        d.verified, d.http_status, d.receipt, a.disposed_to, {_COLUMNS}
"""
_DELIVERY = f"{_WHAT} FROM delivery d JOIN archive a ON a.id = d.archive_id"
_FEW = (DeliveryState.PENDING, DeliveryState.CLAIMED, DeliveryState.REJECTED)
"""States that few deliveries are in, and that have an index."""
_ARCHIVE = f"""
    SELECT a.state, a.digest, a.disposition, a.disposed_to, a.disposed_at, a.removal, a.removed_at, {_COLUMNS}
    FROM archive a
"""  # noqa: S608 -- own columns
_PENDING = """
    (SELECT archive_id, destination FROM delivery WHERE state = 'pending'
    UNION ALL SELECT archive_id, destination FROM delivery WHERE state = 'claimed')
"""  # apart, as each has an index of its own

_LOWEST = -(1 << 63)


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise LedgerError(f"the ledger can't be {what}: {error}", _hint(error)) from error


def _hint(error: sqlite3.Error | UnicodeDecodeError) -> str:
    if is_locked(error):
        return "another process holds it: try again once that lets go; `fuser` tells which"
    if is_damage(error):
        return "restart the daemon: it checks the ledger, and puts a damaged one aside"
    return "run this as the daemon's user"


class LedgerQueries:
    """Reads a ledger; raises LedgerError where it can't be read."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def deliveries(self, state: DeliveryState | None, most: int) -> list[DeliveryRecord]:
        """Return the latest deliveries, newest first, of one state or of all."""
        return self.find(Search(state), lambda _drop, _path: True, most)

    @_told("read")
    def find(self, search: Search, wanted: Wanted, most: int) -> list[DeliveryRecord]:
        """Return the latest deliveries that are searched for and wanted, newest first."""
        asked = {name: value for name in _CLAUSES if (value := getattr(search, name)) is not None}
        clauses = [_CLAUSES[name] for name in asked]
        # which table goes first is ours to say: SQLite knows neither that few are rejected nor the limit
        tables = "archive a CROSS JOIN delivery d"
        if search.state is not None:
            clauses.append(f"d.state = '{search.state.value}'")  # not as a value: it has to choose an index
            if search.state in _FEW:
                tables = "delivery d CROSS JOIN archive a"
        where = " AND ".join(["a.id = d.archive_id", *clauses])
        values = tuple(to_micros(v) if isinstance(v, datetime) else v for v in asked.values())
        query = f"{_WHAT} FROM {tables} WHERE {where} ORDER BY a.id DESC, d.destination"
        rows = (row for row in self._db.execute(query, values) if convert_row(wanted)(row[14], row[15]))
        return [_delivery(row) for row in islice(rows, most)]

    @_told("read")
    def archive(self, ident: int) -> ArchiveRecord:
        """Return an archive; raises UsageError where there is none with that number."""
        rows = self._query(f"{_ARCHIVE} WHERE a.id = ?", (ident,))
        if not rows:
            raise UsageError(
                f"no archive has the number {ident}", "`backupd list` shows the ids of deliveries"
            )
        return _archive(rows[0])

    @_told("read")
    def deliveries_of(self, archive_id: int) -> list[DeliveryRecord]:
        """Return the deliveries of an archive."""
        rows = self._query(f"{_DELIVERY} WHERE d.archive_id = ? ORDER BY d.destination", (archive_id,))
        return [_delivery(row) for row in rows]

    @_told("read")
    def sent_archives(
        self, drop: str, since: datetime | None, after: int | None, most: int
    ) -> list[ArchiveRecord]:
        """Return what has to lie in sent_dir: archives of a drop moved there since a time, by their ids."""
        rows = self._query(
            f"{_ARCHIVE} WHERE a.id > ? AND a.drop_name = ? AND a.state = 'delivered'"
            " AND a.disposed_to IS NOT NULL AND a.disposed_at >= ?"
            " AND (a.removal IS NULL OR a.removal IN ('gone', 'changed')) ORDER BY a.id LIMIT ?",
            (_LOWEST if after is None else after, drop, to_micros(since) if since else 0, most),
        )
        return [_archive(row) for row in rows]

    @_told("read")
    def drop(self, name: str) -> DropRecord:
        """Return how things stand with a drop."""
        pending = self._query(
            "SELECT count(*), coalesce(sum(size), 0), min(admitted_at) FROM archive"  # noqa: S608 -- own clause
            f" WHERE drop_name = ? AND id IN (SELECT archive_id FROM {_PENDING})",
            (name,),
        )[0]
        last = self._query(
            "SELECT relpath, admitted_at FROM archive WHERE drop_name = ? ORDER BY id DESC LIMIT 1", (name,)
        )
        path, at = last[0] if last else (None, None)
        return DropRecord(pending[0], pending[1], time_if_any(pending[2]), path_if_any(path), time_if_any(at))

    @_told("read")
    def destinations_pending(self) -> list[str]:
        """Return the names of the destinations that something is pending for."""
        rows = self._query(
            "SELECT DISTINCT destination FROM delivery INDEXED BY delivery_due WHERE state = 'pending'"
            " UNION SELECT DISTINCT destination FROM delivery WHERE state = 'claimed' ORDER BY 1",
            (),
        )
        return [row[0] for row in rows]

    @_told("read")
    def count_quarantined(self) -> int:
        """Return how many archives lie in rejected_dir."""
        return int(
            self._query(
                "SELECT count(DISTINCT archive_id) FROM delivery JOIN archive ON archive.id = archive_id"
                " WHERE delivery.state = 'rejected' AND disposed_to IS NOT NULL",
                (),
            )[0][0]
        )

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    @_told("read")
    def delivery(self, id_prefix: str) -> DeliveryRecord:
        """Return the delivery whose id begins so; raises UsageError if there is none, or several."""
        begin = storable_text(id_prefix)
        rows = self._query(f"{_DELIVERY} WHERE d.id >= ? AND d.id < ? LIMIT 2", (begin, begin + "\U0010ffff"))
        if not rows:
            raise UsageError(f"no delivery has the id {id_prefix!r}", "`backupd list` shows the ids")
        if len(rows) > 1:
            raise UsageError(
                f"several deliveries have an id that begins with {id_prefix!r}", "give more of it"
            )
        return _delivery(rows[0])

    @_told("read")
    def attempts(self, delivery_id: str) -> list[AttemptRecord]:
        """Return the attempts of a delivery, first one first."""
        rows = self._query(
            "SELECT number, started_at, duration_us, sent, outcome, reason, error, http_status"
            " FROM attempt WHERE delivery_id = ? ORDER BY number",
            (delivery_id,),
        )
        return [_attempt(row) for row in rows]

    @_told("read")
    def destination(self, name: str) -> DestinationRecord:
        """Return how things stand with a destination."""
        pending = self._query(
            "SELECT count(*), coalesce(sum(archive.size), 0), min(admitted_at)"  # noqa: S608 -- own clause
            f" FROM {_PENDING} JOIN archive ON archive.id = archive_id WHERE destination = ?",
            (name,),
        )[0]
        rejected = self._query(
            "SELECT count(*) FROM delivery JOIN archive ON archive.id = archive_id"
            " WHERE delivery.state = 'rejected' AND destination = ? AND disposed_to IS NOT NULL",
            (name,),
        )[0][0]
        last = self._query(
            "SELECT max(ended_at) FROM delivery WHERE state = 'delivered' AND destination = ?", (name,)
        )[0][0]
        gates = self._query(
            "SELECT state, reason, error, since, until FROM circuit WHERE destination = ?", (name,)
        )
        state, reason, error, since, until = gates[0] if gates else (None,) * 5
        return DestinationRecord(
            name,
            pending[0],
            pending[1],
            time_if_any(pending[2]),
            rejected,
            time_if_any(last),
            state,
            reason,
            error,
            time_if_any(since),
            time_if_any(until),
        )

    @_told("read")
    def devices(self, now: datetime) -> list[DeviceRecord]:
        """Return every device, by drop and name, and whether it is overdue."""
        found = device_queries.device_records(self._db)
        return [
            DeviceRecord(d.drop, d.name, d.last_at, d.archives, overdue_by(d, now) is not None, d.every)
            for d in found
        ]

    def forget_device(self, device: str, drop: str | None, now: datetime) -> list[tuple[str, bool]]:
        """Forget a device in one drop or all; return the drops that knew it, and whether they list it."""
        with _told("written"):
            self._db.execute("PRAGMA query_only = OFF")
            return device_queries.forget_device(self._db, device, drop, now)

    def retry_now(self, delivery_id: str, now: datetime) -> bool:
        """Make a pending delivery due at once; return False if it is not pending."""
        query = "UPDATE delivery SET due_at = ? WHERE id = ? AND state = 'pending'"
        with _told("written"):
            self._db.execute("PRAGMA query_only = OFF")
            return self._db.execute(query, (to_micros(now), delivery_id)).rowcount > 0

    @contextmanager
    def mark_retried(self, archive_id: int) -> Iterator[None]:
        """Note that a rejected archive is no longer in quarantine, if what is enclosed succeeds."""
        with _told("written"):
            self._db.execute("PRAGMA query_only = OFF")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.execute("UPDATE archive SET disposed_to = NULL WHERE id = ?", (archive_id,))
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _query(self, query: str, values: tuple[object, ...]) -> list[Row]:
        return self._db.execute(query, values).fetchall()


@convert_row
def _delivery(row: Row) -> DeliveryRecord:
    ident, destination, state, due_at, ended_at, attempts, reason, error, digest, verified = row[:10]
    return DeliveryRecord(
        ident,
        as_archive(row[13:]),
        destination,
        DeliveryState(state),
        time_if_any(due_at),
        time_if_any(ended_at),
        attempts,
        reason,
        error,
        digest,
        None if verified is None else bool(verified),
        *row[10:13],
    )


@convert_row
def _archive(row: Row) -> ArchiveRecord:
    state, digest, disposition, to, at, removal, removed_at = row[:7]
    return ArchiveRecord(
        as_archive(row[7:]), state, digest, disposition, to, time_if_any(at), removal, time_if_any(removed_at)
    )


@convert_row
def _attempt(row: Row) -> AttemptRecord:
    return AttemptRecord(row[0], as_time(row[1]), row[2] / 1e6, *row[3:])
