"""The index of archives in `sent_dir`, in SQLite.

It has a connection of its own, so that no worker waits for its queries.
"""

from __future__ import annotations

import socket
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from backupd.core.errors import LedgerError
from backupd.ledger.sent_index import RemovalReason, RestoredArchive, SentArchive, SentIndex
from backupd.ledger.sqlite.connection import (
    ARCHIVE_COLUMNS,
    FILE_NAME,
    Row,
    as_archive,
    as_time,
    fingerprint_columns,
    to_micros,
    transaction,
    translate_errors,
)

_COLUMNS = f"{ARCHIVE_COLUMNS}, moved_to, disposed_at"
_SENT = "state = 'delivered' AND moved_to IS NOT NULL"
_KEPT = f"{_SENT} AND removal IS NULL"
_IN_SERIES = "series IS NOT NULL AND removal IS NULL"


def open_sent_index(state_dir: Path) -> SentIndex:
    """Open a second connection to the ledger that the daemon has opened."""
    path = state_dir / FILE_NAME
    try:
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode=rw", uri=True, timeout=30, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        raise LedgerError(f"{path}: {error}", "check the disk and the owner of `state_dir`") from error
    return SqliteSentIndex(connection)


class SqliteSentIndex(SentIndex):
    """A `SentIndex` on a connection to a ledger with the current schema."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def without_series(self, drop: str, limit: int) -> list[SentArchive]:
        """See `SentIndex.without_series`."""
        return self._archives(
            f"INDEXED BY archive_without_series WHERE drop_name = ? AND {_KEPT} AND series IS NULL"
            " ORDER BY id LIMIT ?",
            (drop, limit),
        )

    def set_series(self, series: Mapping[int, bytes]) -> None:
        """See `SentIndex.set_series`."""
        with transaction(self._db):
            self._db.executemany(
                "UPDATE archive SET series = ? WHERE id = ?",
                [(name, archive_id) for archive_id, name in series.items()],
            )

    def oldest(
        self, drop: str, after: SentArchive | None, until: datetime | None, limit: int
    ) -> list[SentArchive]:
        """See `SentIndex.oldest`."""
        position = (to_micros(after.moved_at), after.archive.id) if after else (-(1 << 62), 0)
        return self._archives(
            f"INDEXED BY archive_kept WHERE drop_name = ? AND {_KEPT}"
            " AND (disposed_at, id) > (?, ?) AND disposed_at <= ? ORDER BY disposed_at, id LIMIT ?",
            (drop, *position, to_micros(until) if until else 1 << 62, limit),
        )

    def count_newer(self, sent: SentArchive, limit: int) -> int:
        """See `SentIndex.count_newer`."""
        series = "(SELECT series FROM archive WHERE id = ?2)"
        moved_after = (
            "SELECT count(*) FROM (SELECT 1 FROM archive INDEXED BY archive_series"  # noqa: S608 -- own clauses
            f" WHERE drop_name = ?1 AND {_IN_SERIES} AND series = {series} AND (disposed_at, id) > (?3, ?2)"
            " LIMIT ?4)"
        )
        queued_after = (
            "SELECT count(*) FROM (SELECT 1 FROM archive INDEXED BY archive_last"  # noqa: S608 -- own clauses
            f" WHERE drop_name = ?1 AND {_IN_SERIES} AND series = {series} AND id > ?2 LIMIT ?4)"
        )
        rows = self._query(
            f"SELECT min(({moved_after}), CASE WHEN ?2 > 0 THEN ({queued_after}) ELSE ?4 END)",
            (sent.archive.drop, sent.archive.id, to_micros(sent.moved_at), limit),
        )
        return int(rows[0][0])

    def beyond_newest(
        self, drop: str, series: bytes, keep: int, until: datetime, limit: int
    ) -> list[SentArchive]:
        """See `SentIndex.beyond_newest`."""
        members = f"WHERE drop_name = ?1 AND series = ?2 AND {_IN_SERIES}"
        return self._archives(
            f"INDEXED BY archive_series {members} AND disposed_at <= ?3 AND (disposed_at, id) < ("  # noqa: S608
            f"  SELECT disposed_at, id FROM archive INDEXED BY archive_series {members}"
            "  ORDER BY disposed_at DESC, id DESC LIMIT 1 OFFSET ?4 - 1"
            " ) AND (id <= 0 OR id < ("
            f"  SELECT id FROM archive INDEXED BY archive_last {members}"
            "  ORDER BY id DESC LIMIT 1 OFFSET ?4 - 1"
            " )) ORDER BY disposed_at DESC, id DESC LIMIT ?5",
            (drop, series, to_micros(until), keep, limit),
        )

    def mark_expiring(self, archive_ids: Sequence[int]) -> None:
        """See `SentIndex.mark_expiring`."""
        with transaction(self._db):
            self._db.executemany(
                "UPDATE archive SET removal = 'expiring' WHERE id = ?", [(i,) for i in archive_ids]
            )

    def list_expiring(self, drop: str, limit: int) -> list[SentArchive]:
        """See `SentIndex.list_expiring`."""
        return self._archives(
            "INDEXED BY archive_expiring WHERE removal = 'expiring' AND drop_name = ? ORDER BY id LIMIT ?",
            (drop, limit),
        )

    def record_removals(self, removals: Mapping[int, RemovalReason], now: datetime) -> None:
        """See `SentIndex.record_removals`."""
        at = to_micros(now)
        with transaction(self._db):
            self._db.executemany(
                "UPDATE archive SET removal = ?, removed_at = ? WHERE id = ?",
                [(removal, at, archive_id) for archive_id, removal in removals.items()],
            )

    def is_restored(self, drop: str, folder: bytes) -> bool:
        """See `SentIndex.is_restored`."""
        query = "SELECT 1 FROM restored WHERE drop_name = ? AND folder IN (?, x'')"
        return bool(self._query(query, (drop, folder)))

    def lowest_id(self) -> int:
        """See `SentIndex.lowest_id`."""
        return int(self._query("SELECT min(coalesce(min(id), 1), 1) - 1 FROM archive", ())[0][0])

    def unknown(self, archives: Sequence[RestoredArchive]) -> list[RestoredArchive]:
        """See `SentIndex.unknown`."""
        with translate_errors("read"):
            return [one for one in archives if not _is_known(self._db, one)]

    def restore(self, archives: Sequence[RestoredArchive]) -> int:
        """See `SentIndex.restore`."""
        with transaction(self._db):
            return sum(_restore(self._db, one) for one in archives)

    def mark_restored(self, drop: str, folder: bytes) -> None:
        """See `SentIndex.mark_restored`."""
        with transaction(self._db):
            self._db.execute(
                "INSERT OR IGNORE INTO restored (drop_name, folder) VALUES (?, ?)", (drop, folder)
            )

    def close(self) -> None:
        """See `SentIndex.close`."""
        self._db.close()

    def _archives(self, clauses: str, values: tuple[object, ...]) -> list[SentArchive]:
        with translate_errors("read"):
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM archive {clauses}", values)  # noqa: S608 -- own clauses
            return [SentArchive(as_archive(row), row[-2], as_time(row[-1])) for row in rows]

    def _query(self, query: str, values: tuple[object, ...]) -> list[Row]:
        with translate_errors("read"):
            return self._db.execute(query, values).fetchall()


def _is_known(db: sqlite3.Connection, one: RestoredArchive) -> bool:
    query = "SELECT 1 FROM delivery WHERE id = ?"
    return any(db.execute(query, (result.delivery_id,)).fetchone() for result in one.completed.results)


def _restore(db: sqlite3.Connection, one: RestoredArchive) -> bool:
    """Insert an archive of which no delivery is known; return whether it was inserted."""
    completed, archive = one.completed, one.completed.archive
    if _is_known(db, one):
        return False
    db.execute(
        "INSERT INTO archive (id, drop_name, relpath, folder_inode, inode, size, mtime_ns, ctime_ns,"
        " queued_at, state, digest, disposition, already_logged, has_entry, moved_to, disposed_at,"
        " host) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'done', 1, 0, ?, ?, ?)",
        (
            one.archive_id,
            archive.drop,
            archive.relpath,
            *fingerprint_columns(archive.folder_inode, archive.fingerprint),
            to_micros(archive.queued_at),
            completed.state,
            completed.digest,
            one.moved_to,
            to_micros(one.moved_at),
            archive.host or socket.gethostname(),
        ),
    )
    db.executemany(
        "INSERT OR IGNORE INTO delivery (id, archive_id, destination, size, state, ended_at, reason, error,"
        " digest, verified, http_status, receipt) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                result.delivery_id,
                one.archive_id,
                result.destination,
                archive.fingerprint.size,
                result.state,
                to_micros(result.ended_at),
                result.reason,
                result.error,
                result.digest,
                result.verified,
                result.http_status,
                result.receipt,
            )
            for result in completed.results
        ],
    )
    if one.device is not None:
        db.execute(
            "INSERT INTO device (drop_name, name, known_at, last_at, archives) VALUES (?1, ?2, ?3, ?3, 1)"
            " ON CONFLICT DO UPDATE SET archives = archives + 1,"
            " last_at = max(coalesce(last_at, 0), excluded.last_at)",
            (archive.drop, one.device, to_micros(archive.queued_at)),
        )
    return True
