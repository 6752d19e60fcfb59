"""Queries of the ledger file for the commands, which run while the daemon may be running."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path

from backupd.core.device_matrix import CalendarDay
from backupd.core.devices import Device, overdue_by
from backupd.core.drop_problem import DropProblem
from backupd.core.errors import LedgerError, LedgerUnreachableError, UsageError
from backupd.core.model import Archive, DeliveryState
from backupd.core.snapshot import DeviceDay, HourThroughput, OperatorPause, Snapshot
from backupd.ledger.history import (
    ArchiveRecord,
    AttemptRecord,
    DeliveryRecord,
    DeviceRecord,
    History,
    Search,
    Selector,
)
from backupd.ledger.port import DropBacklog
from backupd.ledger.sqlite import device_queries, folder_queries, state_queries
from backupd.ledger.sqlite.connection import (
    ARCHIVE_COLUMNS,
    Row,
    as_archive,
    as_time,
    daemon_pid,
    is_damage,
    is_locked,
    is_outage,
    open_for_reading,
    optional_time,
    row_converter,
    storable_text,
    to_micros,
)
from backupd.ledger.sqlite.deliveries import give_up
from backupd.ledger.sqlite.problem_queries import find_problems

_CLAUSES = {
    "drop": "a.drop_name = ?",
    "destination": "d.destination = ?",
    "since": "a.queued_at >= ?",
    "until": "a.queued_at < ?",
}

_LEFT_QUARANTINE = "(a.disposition = 'done' AND a.moved_to IS NULL AND NOT a.missing)"
"""Of a rejected archive: its file was in quarantine, and is not any more."""

_OF_STATE = {
    DeliveryState.REJECTED: f"d.state = 'rejected' AND NOT coalesce({_LEFT_QUARANTINE}, FALSE)",
    DeliveryState.RETRIED: f"d.state = 'rejected' AND {_LEFT_QUARANTINE}",
}
"""The clauses of the states that depend on the file of an archive."""

_INDEXED_STATES = (
    DeliveryState.PENDING,
    DeliveryState.CLAIMED,
    DeliveryState.REJECTED,
    DeliveryState.RETRIED,
)
"""States of few deliveries, which have an index."""

_COLUMNS = ", ".join(f"a.{column}" for column in ARCHIVE_COLUMNS.split(", "))
_SELECT_DELIVERY = f"""
    SELECT d.id, d.destination,
        CASE WHEN {_OF_STATE[DeliveryState.RETRIED]} THEN 'retried' ELSE d.state END,
        d.due_at, d.ended_at, d.attempts, d.reason, d.error, d.digest, d.verified,
        d.http_status, d.receipt, a.moved_to, {_COLUMNS}
"""
_DELIVERY = f"{_SELECT_DELIVERY} FROM delivery d JOIN archive a ON a.id = d.archive_id"
_ARCHIVE = f"""
    SELECT CASE WHEN a.state = 'rejected' AND {_LEFT_QUARANTINE} THEN 'retried' ELSE a.state END,
        a.digest, a.disposition, a.moved_to, a.disposed_at, a.missing, {_COLUMNS}
    FROM archive a
"""  # noqa: S608 -- own columns


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
        error_class = LedgerUnreachableError if is_outage(error) else LedgerError
        raise error_class(f"the ledger can't be {operation}: {error}", _hint(error)) from error


def _hint(error: sqlite3.Error | UnicodeDecodeError) -> str:
    if is_locked(error):
        return "another process holds it: find it with `fuser`, and run this command again once it has ended"
    if is_damage(error):
        return "restart the daemon: it checks the ledger, and renames and recreates a damaged one"
    return "run this command as the daemon's user"


def open_queries(state_dir: Path) -> History:
    """Open the ledger in a state directory for a command; raises LedgerError if that fails."""
    return LedgerQueries(open_for_reading(state_dir))


class LedgerQueries(History):
    """A `History` on a connection from `open_for_reading`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    @_query_errors("read")
    def daemon_pid(self) -> int | None:
        """See `History.daemon_pid`."""
        path = self._db.execute("PRAGMA database_list").fetchone()[2]
        return daemon_pid(Path(path).parent) if path else None  # a ledger in memory has no directory

    @_query_errors("read")
    def snapshots(self) -> list[Snapshot]:
        """See `History.snapshots`."""
        return state_queries.find_snapshots(self._db)

    @_query_errors("read")
    def pauses(self) -> list[OperatorPause]:
        """See `History.pauses`."""
        return state_queries.find_pauses(self._db)

    def pause(self, pause: OperatorPause) -> None:
        """See `History.pause`."""
        with self._writing() as db:
            state_queries.save_pause(db, pause)

    def resume(self, kind: str, name: str) -> bool:
        """See `History.resume`."""
        with self._writing() as db:
            return state_queries.delete_pause(db, kind, name)

    def device_days(self, drops: Collection[str], days: Iterable[CalendarDay]) -> Iterator[DeviceDay]:
        """See `History.device_days`."""
        with _query_errors("read"):
            yield from state_queries.device_days(self._db, drops, days)

    @_query_errors("read")
    def first_queued(self, drops: Collection[str]) -> dict[str, datetime]:
        """See `History.first_queued`."""
        return state_queries.first_queued(self._db, drops)

    @_query_errors("read")
    def throughput(self, destinations: Collection[str], since: datetime) -> list[HourThroughput]:
        """See `History.throughput`."""
        return state_queries.throughput(self._db, destinations, since)

    @_query_errors("read")
    def find(self, search: Search, limit: int) -> list[DeliveryRecord]:
        """See `History.find`."""
        criteria = {name: value for name in _CLAUSES if (value := getattr(search, name)) is not None}
        clauses = [_CLAUSES[name] for name in criteria]
        # CROSS JOIN fixes the order of the tables: SQLite knows neither that few are rejected nor the limit
        tables = "archive a CROSS JOIN delivery d"
        if search.state is not None:
            # no parameter, so that SQLite can choose a partial index
            clauses.append(_OF_STATE.get(search.state, f"d.state = '{search.state.value}'"))
            if search.state in _INDEXED_STATES:
                tables = "delivery d CROSS JOIN archive a"
        values = [to_micros(v) if isinstance(v, datetime) else v for v in criteria.values()]
        if search.selectors:
            tables = "delivery d CROSS JOIN archive a"
            selects = list(chain.from_iterable(map(_selects, search.selectors)))
            clauses.append(f"d.id IN ({' UNION '.join(query for query, _ in selects) or 'NULL'})")
            values += chain.from_iterable(selected for _, selected in selects)
        where = " AND ".join(["a.id = d.archive_id", *clauses])
        query = f"{_SELECT_DELIVERY} FROM {tables} WHERE {where} ORDER BY a.id DESC, d.destination"
        matches = row_converter(search.path_filter())
        rows = (row for row in self._db.execute(query, values) if matches(row[14], row[15]))
        return [_delivery(row) for row in islice(rows, limit)]

    @_query_errors("read")
    def files(self, drop: str) -> list[tuple[Archive, DeliveryState]]:
        """See `History.files`."""
        rows = self._query(f"{_ARCHIVE} WHERE a.drop_name = ? AND a.has_entry ORDER BY a.id", (drop,))
        records = map(_archive, rows)
        return [(record.archive, DeliveryState(record.state)) for record in records]

    @_query_errors("read")
    def deliveries_of(self, archive_id: int) -> list[DeliveryRecord]:
        """See `History.deliveries_of`."""
        rows = self._query(f"{_DELIVERY} WHERE d.archive_id = ? ORDER BY d.destination", (archive_id,))
        return [_delivery(row) for row in rows]

    @_query_errors("read")
    def attempts(self, delivery_id: str) -> list[AttemptRecord]:
        """See `History.attempts`."""
        rows = self._query(
            "SELECT number, started_at, duration_us, sent, outcome, reason, error, http_status"
            " FROM attempt WHERE delivery_id = ? ORDER BY number",
            (delivery_id,),
        )
        return [_attempt(row) for row in rows]

    @_query_errors("read")
    def archive(self, archive_id: int) -> ArchiveRecord:
        """See `History.archive`."""
        rows = self._query(f"{_ARCHIVE} WHERE a.id = ?", (archive_id,))
        if not rows:
            raise UsageError(
                f"no archive has the id {archive_id}", "find the ids of deliveries with `backupd list`"
            )
        return _archive(rows[0])

    @_query_errors("read")
    def destinations_pending(self) -> list[str]:
        """See `History.destinations_pending`."""
        rows = self._query(
            "SELECT DISTINCT destination FROM delivery INDEXED BY delivery_due WHERE state = 'pending'"
            " UNION SELECT DISTINCT destination FROM delivery WHERE state = 'claimed' ORDER BY 1",
            (),
        )
        return [row[0] for row in rows]

    @_query_errors("read")
    def pending_drops(self) -> Mapping[str, DropBacklog]:
        """See `History.pending_drops`."""
        return folder_queries.pending_drops(self._db)

    @_query_errors("read")
    def problems(self, drop: str | None, limit: int) -> list[DropProblem]:
        """See `History.problems`."""
        return find_problems(self._db, drop, limit)

    @_query_errors("read")
    def devices(self, now: datetime) -> list[DeviceRecord]:
        """See `History.devices`."""
        found = device_queries.device_records(self._db)
        return [
            DeviceRecord(d.drop, d.name, d.last_at, d.archives, overdue_by(d, now) is not None, d.every)
            for d in found
        ]

    @_query_errors("read")
    def tracked_devices(self) -> list[Device]:
        """See `History.tracked_devices`."""
        return device_queries.device_records(self._db)

    def retry_now(self, delivery_id: str) -> bool:
        """See `History.retry_now`."""
        query = "UPDATE delivery SET due_at = ? WHERE id = ? AND state = 'pending'"
        with _query_errors("written"):
            self._db.execute("PRAGMA query_only = OFF")
            return self._db.execute(query, (to_micros(datetime.now(UTC)), delivery_id)).rowcount > 0

    @contextmanager
    def mark_retried(self, archive_id: int) -> Iterator[None]:
        """See `History.mark_retried`."""
        with self._writing() as db:
            db.execute("UPDATE archive SET moved_to = NULL WHERE id = ?", (archive_id,))
            yield

    def forget_device(self, device: str, drop: str | None, now: datetime) -> list[tuple[str, bool]]:
        """See `History.forget_device`."""
        with _query_errors("written"):
            self._db.execute("PRAGMA query_only = OFF")
            return device_queries.forget_device(self._db, device, drop, now)

    def give_up_drop(self, drop: str, now: datetime) -> int:
        """See `History.give_up_drop`."""
        with self._writing() as db:
            return give_up(db, now, drop, None)

    def give_up_destination(self, destination: str, now: datetime) -> int:
        """See `History.give_up_destination`."""
        with self._writing() as db:
            return give_up(db, now, None, destination)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with _query_errors("written"):
            self._db.execute("PRAGMA query_only = OFF")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def close(self) -> None:
        """See `History.close`."""
        self._db.close()

    def _query(self, query: str, values: tuple[object, ...]) -> list[Row]:
        return self._db.execute(query, values).fetchall()


def _selects(selector: Selector) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Yield queries, with their values, for the ids of the deliveries that a selector matches.

    Those for paths and digests read all rows, which takes 0.3 s for a million of them. Indexes would need
    150 MB for these, and slow down the recording of each archive.
    """
    if selector.id_prefix:
        prefix = storable_text(selector.id_prefix)
        yield "SELECT id FROM delivery WHERE id >= ? AND id < ?", (prefix, prefix + "\U0010ffff")
    of_archives = "SELECT id FROM delivery WHERE archive_id IN (SELECT id FROM archive WHERE {})"
    if selector.archive_id is not None:
        yield of_archives.format("id = ?"), (selector.archive_id,)
    if selector.path and selector.drop is not None:
        where = "drop_name = ? AND (relpath = ? OR moved_to = ?)"
        yield of_archives.format(where), (selector.drop, selector.path, selector.path)
    elif selector.path:
        end = b"/" + selector.path
        where = "? IN (relpath, moved_to) OR substr(relpath, ?) = ? OR substr(moved_to, ?) = ?"
        yield of_archives.format(where), (selector.path, -len(end), end, -len(end), end)
    if selector.digest:
        digest = storable_text(selector.digest)
        start = "digest" if ":" in digest else "substr(digest, instr(digest, ':') + 1)"
        yield f"SELECT id FROM delivery WHERE substr({start}, 1, ?) = ?", (len(digest), digest)  # noqa: S608


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
    state, digest, disposition, to, at, missing = row[:6]
    archive, disposed_at = as_archive(row[6:]), optional_time(at)
    return ArchiveRecord(archive, state, digest, disposition, to, disposed_at, bool(missing))


@row_converter
def _attempt(row: Row) -> AttemptRecord:
    return AttemptRecord(row[0], as_time(row[1]), row[2] / 1e6, *row[3:])
