"""Queries of the ledger file for the commands, which run while the daemon may be running."""

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
    is_damage,
    is_locked,
    optional_path,
    optional_time,
    row_converter,
    storable_text,
    to_micros,
)


@dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """An archive and the disposition of its file; times are UTC.

    `state` is a `DeliveryState` other than claimed. `digest` is that of the content that was sent, as
    `algorithm:hex`. `disposition` is `due` or `done`, None while a delivery is open. `disposed_to` is the new
    path of the file, relative to its drop folder, None if it was not moved. `removal` is None while the file
    is there, then `expiring`, `expired`, `missing` or `changed`, see `RemovalReason`.
    """

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
    """A delivery; times are UTC.

    `due_at` is set while it is pending, `ended_at` after that. The fields from `reason` to `receipt` are as
    in `DeliveryResult`, for a pending delivery of the last attempt. `disposed_to` is as in `ArchiveRecord`.
    """

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
    """One request that was made for a delivery; `outcome` is the lower-case name of its outcome's class."""

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
    """The queue and circuit of a destination.

    `pending` counts its open deliveries, and `oldest` is when the first of their archives was queued.
    `rejected` counts its rejected deliveries with a file in quarantine. `circuit` is the state of its
    circuit, None if the daemon has never saved one; `reason` and `error` are those of its last failure,
    `since` is the time of the first one in a row, and `until` is the end of the pause.
    """

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

    `last_at` is when its last archive was queued, None without one. `every` is how often an archive is
    expected, None if none is.
    """

    drop: str
    device: str
    last_at: datetime | None
    archives: int
    overdue: bool
    every: timedelta | None


@dataclass(frozen=True, slots=True)
class DropRecord:
    """The queue of a drop.

    `pending` counts the archives with an open delivery, and `oldest` is when the first of them was queued.
    `last` is the path of the newest archive, which was queued at `last_at`.
    """

    pending: int
    pending_bytes: int
    oldest: datetime | None
    last: bytes | None
    last_at: datetime | None


@dataclass(frozen=True, slots=True)
class Search:
    """The deliveries to find; None is any. `since` and `until` limit when their archives were queued."""

    state: DeliveryState | None = None
    drop: str | None = None
    destination: str | None = None
    since: datetime | None = None
    until: datetime | None = None


PathFilter = Callable[[str, bytes], bool]
"""Called with the name of a drop and the relative path of an archive in it."""

_CLAUSES = {
    "drop": "a.drop_name = ?",
    "destination": "d.destination = ?",
    "since": "a.queued_at >= ?",
    "until": "a.queued_at < ?",
}

_COLUMNS = ", ".join(f"a.{column}" for column in ARCHIVE_COLUMNS.split(", "))
_SELECT_DELIVERY = f"""
    SELECT d.id, d.destination, d.state, d.due_at, d.ended_at, d.attempts, d.reason, d.error, d.digest,
        d.verified, d.http_status, d.receipt, a.moved_to, {_COLUMNS}
"""
_DELIVERY = f"{_SELECT_DELIVERY} FROM delivery d JOIN archive a ON a.id = d.archive_id"
_ARCHIVE = f"""
    SELECT a.state, a.digest, a.disposition, a.moved_to, a.disposed_at, a.removal, a.removed_at, {_COLUMNS}
    FROM archive a
"""  # noqa: S608 -- own columns
_PENDING = """
    (SELECT archive_id, destination FROM delivery WHERE state = 'pending'
    UNION ALL SELECT archive_id, destination FROM delivery WHERE state = 'claimed')
"""  # one query for each state, as each has its own index

_INDEXED_STATES = (DeliveryState.PENDING, DeliveryState.CLAIMED, DeliveryState.REJECTED)
"""States of few deliveries, which have an index."""

_MIN_ID = -(1 << 63)


@contextmanager
def _query_errors(operation: str) -> Iterator[None]:
    """Raise errors of SQLite in a method as LedgerError; `operation` is `read` or `written`."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if str(error).startswith(("no such column", "no such table")):
            raise LedgerError(
                "the ledger has the schema of an earlier version", "restart the daemon, which migrates it"
            ) from error
        raise LedgerError(f"the ledger can't be {operation}: {error}", _hint(error)) from error


def _hint(error: sqlite3.Error | UnicodeDecodeError) -> str:
    if is_locked(error):
        return "another process holds it: find it with `fuser`, and run this command again once it has ended"
    if is_damage(error):
        return "restart the daemon: it checks the ledger, and renames and recreates a damaged one"
    return "run this command as the daemon's user"


class LedgerQueries:
    """Queries on a connection from `open_for_reading`; every method raises LedgerError if one fails."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def deliveries(self, state: DeliveryState | None, limit: int) -> list[DeliveryRecord]:
        """Return up to `limit` deliveries of a state, or of all states, the newest archives first."""
        return self.find(Search(state), lambda _drop, _path: True, limit)

    @_query_errors("read")
    def find(self, search: Search, matches: PathFilter, limit: int) -> list[DeliveryRecord]:
        """Return up to `limit` deliveries of a search that `matches` accepts, the newest archives first."""
        criteria = {name: value for name in _CLAUSES if (value := getattr(search, name)) is not None}
        clauses = [_CLAUSES[name] for name in criteria]
        # CROSS JOIN fixes the order of the tables: SQLite knows neither that few are rejected nor the limit
        tables = "archive a CROSS JOIN delivery d"
        if search.state is not None:
            # no parameter, so that SQLite can choose a partial index
            clauses.append(f"d.state = '{search.state.value}'")
            if search.state in _INDEXED_STATES:
                tables = "delivery d CROSS JOIN archive a"
        where = " AND ".join(["a.id = d.archive_id", *clauses])
        values = tuple(to_micros(v) if isinstance(v, datetime) else v for v in criteria.values())
        query = f"{_SELECT_DELIVERY} FROM {tables} WHERE {where} ORDER BY a.id DESC, d.destination"
        rows = (row for row in self._db.execute(query, values) if row_converter(matches)(row[14], row[15]))
        return [_delivery(row) for row in islice(rows, limit)]

    @_query_errors("read")
    def delivery(self, id_prefix: str) -> DeliveryRecord:
        """Return the delivery with an id that begins with this prefix; raises UsageError unless it is one."""
        prefix = storable_text(id_prefix)
        rows = self._query(
            f"{_DELIVERY} WHERE d.id >= ? AND d.id < ? LIMIT 2", (prefix, prefix + "\U0010ffff")
        )
        if not rows:
            raise UsageError(f"no delivery has the id {id_prefix!r}", "find the ids with `backupd list`")
        if len(rows) > 1:
            raise UsageError(
                f"several deliveries have an id that begins with {id_prefix!r}",
                "give more characters of the id",
            )
        return _delivery(rows[0])

    @_query_errors("read")
    def deliveries_of(self, archive_id: int) -> list[DeliveryRecord]:
        """Return the deliveries of an archive, by destination."""
        rows = self._query(f"{_DELIVERY} WHERE d.archive_id = ? ORDER BY d.destination", (archive_id,))
        return [_delivery(row) for row in rows]

    @_query_errors("read")
    def attempts(self, delivery_id: str) -> list[AttemptRecord]:
        """Return the attempts of a delivery, in their order."""
        rows = self._query(
            "SELECT number, started_at, duration_us, sent, outcome, reason, error, http_status"
            " FROM attempt WHERE delivery_id = ? ORDER BY number",
            (delivery_id,),
        )
        return [_attempt(row) for row in rows]

    @_query_errors("read")
    def archive(self, archive_id: int) -> ArchiveRecord:
        """Return an archive; raises UsageError if there is none with this id."""
        rows = self._query(f"{_ARCHIVE} WHERE a.id = ?", (archive_id,))
        if not rows:
            raise UsageError(
                f"no archive has the id {archive_id}", "find the ids of deliveries with `backupd list`"
            )
        return _archive(rows[0])

    @_query_errors("read")
    def sent_archives(
        self, drop: str, since: datetime | None, after: int | None, limit: int
    ) -> list[ArchiveRecord]:
        """Return up to `limit` archives of a drop that were moved to `sent_dir` and not expired, by id.

        Only those that were moved since a time and have an id greater than `after`, if these are given.
        """
        rows = self._query(
            f"{_ARCHIVE} WHERE a.id > ? AND a.drop_name = ? AND a.state = 'delivered'"
            " AND a.moved_to IS NOT NULL AND a.disposed_at >= ?"
            " AND (a.removal IS NULL OR a.removal IN ('missing', 'changed')) ORDER BY a.id LIMIT ?",
            (_MIN_ID if after is None else after, drop, to_micros(since) if since else 0, limit),
        )
        return [_archive(row) for row in rows]

    @_query_errors("read")
    def drop(self, name: str) -> DropRecord:
        """Return the queue and the last archive of a drop."""
        pending = self._query(
            "SELECT count(*), coalesce(sum(size), 0), min(queued_at) FROM archive"  # noqa: S608 -- own clause
            f" WHERE drop_name = ? AND id IN (SELECT archive_id FROM {_PENDING})",
            (name,),
        )[0]
        last = self._query(
            "SELECT relpath, queued_at FROM archive WHERE drop_name = ? ORDER BY id DESC LIMIT 1", (name,)
        )
        path, at = last[0] if last else (None, None)
        return DropRecord(
            pending[0], pending[1], optional_time(pending[2]), optional_path(path), optional_time(at)
        )

    @_query_errors("read")
    def destination(self, name: str) -> DestinationRecord:
        """Return the queue and the circuit of a destination."""
        pending = self._query(
            "SELECT count(*), coalesce(sum(archive.size), 0), min(queued_at)"  # noqa: S608 -- own clause
            f" FROM {_PENDING} JOIN archive ON archive.id = archive_id WHERE destination = ?",
            (name,),
        )[0]
        rejected = self._query(
            "SELECT count(*) FROM delivery JOIN archive ON archive.id = archive_id"
            " WHERE delivery.state = 'rejected' AND destination = ? AND moved_to IS NOT NULL",
            (name,),
        )[0][0]
        last = self._query(
            "SELECT max(ended_at) FROM delivery WHERE state = 'delivered' AND destination = ?", (name,)
        )[0][0]
        circuits = self._query(
            "SELECT state, reason, error, since, until FROM circuit WHERE destination = ?", (name,)
        )
        state, reason, error, since, until = circuits[0] if circuits else (None,) * 5
        return DestinationRecord(
            name,
            pending[0],
            pending[1],
            optional_time(pending[2]),
            rejected,
            optional_time(last),
            state,
            reason,
            error,
            optional_time(since),
            optional_time(until),
        )

    @_query_errors("read")
    def destinations_pending(self) -> list[str]:
        """Return the names of the destinations with open deliveries, in alphabetical order."""
        rows = self._query(
            "SELECT DISTINCT destination FROM delivery INDEXED BY delivery_due WHERE state = 'pending'"
            " UNION SELECT DISTINCT destination FROM delivery WHERE state = 'claimed' ORDER BY 1",
            (),
        )
        return [row[0] for row in rows]

    @_query_errors("read")
    def count_quarantined(self) -> int:
        """Return the number of rejected archives with a file in `rejected_dir`."""
        return int(
            self._query(
                "SELECT count(DISTINCT archive_id) FROM delivery JOIN archive ON archive.id = archive_id"
                " WHERE delivery.state = 'rejected' AND moved_to IS NOT NULL",
                (),
            )[0][0]
        )

    @_query_errors("read")
    def devices(self, now: datetime) -> list[DeviceRecord]:
        """Return all devices by drop and name, each with whether it is overdue at `now`."""
        found = device_queries.device_records(self._db)
        return [
            DeviceRecord(d.drop, d.name, d.last_at, d.archives, overdue_by(d, now) is not None, d.every)
            for d in found
        ]

    def retry_now(self, delivery_id: str, now: datetime) -> bool:
        """Make a pending delivery due at `now`; return False if it is not pending."""
        query = "UPDATE delivery SET due_at = ? WHERE id = ? AND state = 'pending'"
        with _query_errors("written"):
            self._db.execute("PRAGMA query_only = OFF")
            return self._db.execute(query, (to_micros(now), delivery_id)).rowcount > 0

    @contextmanager
    def mark_retried(self, archive_id: int) -> Iterator[None]:
        """Record that a rejected archive is no longer in quarantine, if the block succeeds.

        An error in the block undoes it. Until its end, the daemon can't write to the ledger.
        """
        with _query_errors("written"):
            self._db.execute("PRAGMA query_only = OFF")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.execute("UPDATE archive SET moved_to = NULL WHERE id = ?", (archive_id,))
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def forget_device(self, device: str, drop: str | None, now: datetime) -> list[tuple[str, bool]]:
        """Forget a device in one drop, or in all if `drop` is None.

        Returns the drops that had it, each with whether the configuration lists it there.
        """
        with _query_errors("written"):
            self._db.execute("PRAGMA query_only = OFF")
            return device_queries.forget_device(self._db, device, drop, now)

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def _query(self, query: str, values: tuple[object, ...]) -> list[Row]:
        return self._db.execute(query, values).fetchall()


@row_converter
def _delivery(row: Row) -> DeliveryRecord:
    delivery_id, destination, state, due_at, ended_at, attempts, reason, error, digest, verified = row[:10]
    return DeliveryRecord(
        delivery_id,
        as_archive(row[13:]),
        destination,
        DeliveryState(state),
        optional_time(due_at),
        optional_time(ended_at),
        attempts,
        reason,
        error,
        digest,
        None if verified is None else bool(verified),
        *row[10:13],
    )


@row_converter
def _archive(row: Row) -> ArchiveRecord:
    state, digest, disposition, to, at, removal, removed_at = row[:7]
    return ArchiveRecord(
        as_archive(row[7:]),
        state,
        digest,
        disposition,
        to,
        optional_time(at),
        removal,
        optional_time(removed_at),
    )


@row_converter
def _attempt(row: Row) -> AttemptRecord:
    return AttemptRecord(row[0], as_time(row[1]), row[2] / 1e6, *row[3:])
