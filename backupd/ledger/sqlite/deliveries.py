"""The ledger in SQLite: one connection, one lock, one transaction a call."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import accumulate, takewhile

from backupd.core.circuit import Circuit
from backupd.core.model import Archive, Delivery, DeliveryState, Digest, Rejected, identity
from backupd.core.transition import Priority, archive_state
from backupd.ledger.port import (
    Backlog,
    ClaimResult,
    CompletedArchive,
    DispositionResult,
    EnqueueResult,
    FileCandidate,
    KnownFiles,
    Ledger,
    content_key,
)
from backupd.ledger.sqlite.connection import (
    ARCHIVE_COLUMNS,
    as_archive,
    as_ending,
    as_stored,
    as_time,
    attempt_row,
    convert_row,
    delivery_row,
    fingerprint_columns,
    storable_text,
    to_micros,
)
from backupd.ledger.sqlite.device_queries import SqliteDeviceLedger, record_arrival


def archive_of(db: sqlite3.Connection, archive_id: int) -> Archive:
    """Return an archive."""
    query = f"SELECT {ARCHIVE_COLUMNS} FROM archive WHERE id = ?"  # noqa: S608 -- own columns
    return as_archive(db.execute(query, (archive_id,)).fetchone())


def settle(db: sqlite3.Connection, archive_id: int) -> list[CompletedArchive]:
    """Write down what an archive's deliveries make of it; return it if its file is to be disposed of."""
    states = [
        DeliveryState(row[0])
        for row in db.execute("SELECT state FROM delivery WHERE archive_id = ?", (archive_id,))
    ]
    state = archive_state(states)
    if state is DeliveryState.PENDING:
        return []
    gone = state is DeliveryState.SUPERSEDED
    changed = db.execute(
        "UPDATE archive SET state = ?, disposition = ?, live = ?,"
        " digest = (SELECT max(digest) FROM delivery WHERE archive_id = archive.id)"
        " WHERE id = ? AND state = 'pending'",
        (state, "done" if gone else "due", not gone, archive_id),
    ).rowcount
    return [] if gone or not changed else [settled(db, archive_id)]


def settled(db: sqlite3.Connection, archive_id: int) -> CompletedArchive:
    """Return a settled archive."""
    row = db.execute("SELECT state, digest, announced FROM archive WHERE id = ?", (archive_id,)).fetchone()
    endings = db.execute(
        "SELECT id, destination, state, ended_at, digest, verified, http_status, reason, error, receipt"
        " FROM delivery WHERE archive_id = ? ORDER BY destination",
        (archive_id,),
    )
    ends = tuple(map(as_ending, endings))
    return CompletedArchive(archive_of(db, archive_id), DeliveryState(row[0]), row[1], ends, bool(row[2]))


_DUE = "WHERE destination = ? AND state = 'pending' AND due_at <= ?"
_FIRST = {
    Priority.OLDEST: f"INDEXED BY delivery_due {_DUE} ORDER BY due_at",
    Priority.SMALLEST: f"INDEXED BY delivery_smallest {_DUE} ORDER BY size",
    Priority.NEWEST: f"INDEXED BY delivery_newest {_DUE} ORDER BY archive_id DESC",
}

_SMALL = 4 * 1024 * 1024
"""Bytes that are claimed in one go: what is larger must not keep others of higher priority back."""


class SqliteLedger(SqliteDeviceLedger, Ledger):
    """A `Ledger` on a connection from `open_ledger`.

    What a disposition hangs on is committed with `synchronous=FULL`. Admissions and claims are not worth
    a sync: what a power cut takes of them, the scan and `release_claims` bring back.
    """

    def register_folder(self, drop: str, device: int, inode: int) -> None:
        """See `Ledger.note_folder`."""
        now_on, key = as_stored(device), (drop, as_stored(inode))
        with self._reading() as db:
            before = db.execute("SELECT device FROM folder WHERE (drop_name, inode) = (?, ?)", key).fetchone()
        if before == (now_on,):
            return
        with self._transaction(durable=False) as db:
            if before is not None:
                update = "UPDATE archive SET device = ? WHERE drop_name = ? AND device = ? AND live"
                db.execute(update, (now_on, drop, *before))
            db.execute("INSERT OR REPLACE INTO folder VALUES (?, ?, ?)", (*key, now_on))

    def known_files(self, drop: str, below: bytes = b"") -> KnownFiles:
        """See `Ledger.known`."""
        query = f"SELECT {ARCHIVE_COLUMNS} FROM archive WHERE drop_name = ? AND live"  # noqa: S608 -- own columns
        values: tuple[str | bytes, ...] = (drop,)
        if below:  # a million new directories must not each cost a look at all that waits
            query += " AND relpath > ? AND relpath < ?"
            values = (drop, below + b"/", below + b"0")  # which comes after the slash
        with self._reading() as db:
            pairs = [
                (content_key(a.relpath, a.fingerprint), hash(a.relpath))
                for a in map(as_archive, db.execute(query, values))
            ]
        return KnownFiles(frozenset(m for m, _ in pairs), frozenset(p for _, p in pairs))

    def enqueue(
        self, sightings: Sequence[FileCandidate], destinations: Sequence[str], now: datetime
    ) -> EnqueueResult:
        """See `Ledger.admit`."""
        admitted: list[Archive] = []
        superseded: list[Archive] = []
        rejected: list[Archive] = []
        unusual = found_again = False
        with self._transaction(durable=any(s.rejected is not None for s in sightings)) as db:
            for sighting in sightings:
                live = _live(db, sighting)
                wanted = content_key(sighting.relpath, sighting.fingerprint)
                if any(content_key(a.relpath, a.fingerprint) == wanted for a in live):
                    continue
                superseded += [a for a in live if _supersede(db, a, now)]
                if _is_back(db, sighting):
                    found_again = True
                    continue
                archive = _insert(db, sighting, destinations, now)
                if sighting.rejected is not None:
                    _reject(db, archive, sighting.rejected, now)
                    rejected.append(archive)
                    continue
                admitted.append(archive)
                if sighting.tracked is not None:
                    unusual |= record_arrival(db, archive, sighting.tracked)
        return EnqueueResult(tuple(admitted), tuple(superseded), unusual, tuple(rejected), found_again)

    def claim(
        self, destination: str, now: datetime, priority: Priority = Priority.OLDEST, limit: int = 1
    ) -> list[Delivery]:
        """See `Ledger.claim`."""
        with self._transaction(durable=False) as db:
            first = db.execute(
                f"SELECT id, size FROM delivery {_FIRST[priority]} LIMIT ?",  # noqa: S608 -- own clauses
                (destination, to_micros(now), limit),
            ).fetchall()
            totals = accumulate(size for _, size in first)
            small = sum(1 for _ in takewhile(lambda total: total <= _SMALL, totals))
            return [_claim(db, ident) for ident, _ in first[: max(small, 1)]]

    def next_due(self, destination: str) -> datetime | None:
        """See `Ledger.next_due`."""
        with self._reading() as db:
            row = db.execute(
                "SELECT min(due_at) FROM delivery WHERE destination = ? AND state = 'pending'", (destination,)
            ).fetchone()
            return None if row[0] is None else as_time(row[0])

    def bring_forward(self, destination: str, latest: datetime) -> None:
        """See `Ledger.bring_forward`."""
        with self._transaction(durable=False) as db:
            db.execute(
                "UPDATE delivery SET due_at = ?2"
                " WHERE destination = ?1 AND state = 'pending' AND due_at > ?2",
                (destination, to_micros(latest)),
            )

    def record(self, finished: Sequence[ClaimResult], now: datetime) -> list[CompletedArchive]:
        """See `Ledger.record`."""
        ended: list[CompletedArchive] = []
        with self._transaction(durable=True) as db:
            for one in finished:
                db.execute(
                    "UPDATE delivery SET state = ?, due_at = ?, charged = ?, faults = ?, attempts = ?,"
                    " ended_at = ?, reason = ?, error = ?, digest = ?, verified = ?, http_status = ?,"
                    " receipt = ? WHERE id = ?",
                    delivery_row(one, now),
                )
                first = one.delivery.attempts + 1
                db.executemany(
                    "INSERT OR REPLACE INTO attempt VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [attempt_row(one.delivery.id, n, a) for n, a in enumerate(one.attempts, first)],
                )
            for archive_id in dict.fromkeys(one.delivery.archive.id for one in finished):
                ended += settle(db, archive_id)
        return ended

    def pending_dispositions(self, after_id: int = 0, limit: int = 256) -> list[CompletedArchive]:
        """See `Ledger.undisposed`."""
        query = "SELECT id FROM archive WHERE disposition = 'due' AND id > ? ORDER BY id LIMIT ?"
        with self._reading() as db:
            ids = [row[0] for row in db.execute(query, (after_id, limit))]
            return [settled(db, archive_id) for archive_id in ids]

    def count_pending_dispositions(self) -> int:
        """See `Ledger.count_undisposed`."""
        with self._reading() as db:
            return int(db.execute("SELECT count(*) FROM archive WHERE disposition = 'due'").fetchone()[0])

    def record_dispositions(
        self, done: Sequence[DispositionResult], still_due: Sequence[int], now: datetime
    ) -> None:
        """See `Ledger.disposed`."""
        with self._transaction(durable=False) as db:
            db.executemany(
                "UPDATE archive SET disposition = 'done', disposed_to = ?, disposed_at = ?, live = ?,"
                " removal = ? WHERE id = ?",
                [
                    (o.moved_to, to_micros(now), o.kept_in_place, "gone" if o.missing else None, o.archive_id)
                    for o in done
                ],
            )
            db.executemany("UPDATE archive SET announced = 1 WHERE id = ?", [(i,) for i in still_due])

    def release_claims(self, delivery_ids: Sequence[str] | None = None) -> int:
        """See `Ledger.release_claims`."""
        release = "UPDATE delivery SET state = 'pending' WHERE state = 'claimed'"
        with self._transaction(durable=False) as db:
            if delivery_ids is None:
                return db.execute(release).rowcount
            return db.executemany(f"{release} AND id = ?", [(ident,) for ident in delivery_ids]).rowcount

    def backlog(self) -> Mapping[str, Backlog]:
        """See `Ledger.backlog`."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT destination, count(*), sum(archive.size), min(admitted_at)"
                # apart, as each has an index of its own: what ended long ago must cost nothing
                " FROM (SELECT destination, archive_id FROM delivery WHERE state = 'pending'"
                " UNION ALL SELECT destination, archive_id FROM delivery WHERE state = 'claimed')"
                " JOIN archive ON archive.id = archive_id GROUP BY destination"
            ).fetchall()
            return {name: Backlog(count, size, as_time(oldest)) for name, count, size, oldest in rows}

    def count_quarantined(self) -> int:
        """See `Ledger.quarantined`."""
        with self._reading() as db:
            row = db.execute(
                "SELECT count(DISTINCT archive_id) FROM delivery INDEXED BY delivery_rejected"
                " JOIN archive ON archive.id = archive_id"
                " WHERE delivery.state = 'rejected' AND disposed_to IS NOT NULL"
            ).fetchone()
        return int(row[0])

    def save_circuit(self, destination: str, gate: Circuit, error: str | None) -> None:
        """See `Ledger.note_gate`."""
        times = [None if time is None else to_micros(time) for time in (gate.since, gate.until)]
        words = None if error is None else storable_text(error)
        with self._transaction(durable=False) as db:
            db.execute(
                "INSERT OR REPLACE INTO circuit VALUES (?, ?, ?, ?, ?, ?)",
                (destination, gate.state, gate.reason, words, *times),
            )

    def close(self) -> None:
        """See `Ledger.close`."""
        with self._lock:
            self._db.close()


@convert_row
def _claim(db: sqlite3.Connection, ident: str) -> Delivery:
    row = db.execute(
        "UPDATE delivery SET state = 'claimed' WHERE id = ?"
        " RETURNING id, archive_id, destination, attempts, charged, faults, digest",
        (ident,),
    ).fetchone()
    unknown = Digest.parse(row[6]) if row[6] else None
    return Delivery(row[0], archive_of(db, row[1]), row[2], row[3], row[4], row[5], unknown)


def _live(db: sqlite3.Connection, sighting: FileCandidate) -> list[Archive]:
    query = f"SELECT {ARCHIVE_COLUMNS} FROM archive WHERE drop_name = ? AND relpath = ? AND live"  # noqa: S608
    return [as_archive(row) for row in db.execute(query, (sighting.drop, sighting.relpath))]


def _is_back(db: sqlite3.Connection, sighting: FileCandidate) -> bool:
    """Have a file disposed of that was gone when it should have been, and is there again as it was."""
    query = (
        f"SELECT {ARCHIVE_COLUMNS} FROM archive WHERE drop_name = ? AND relpath = ?"  # noqa: S608 -- own columns
        " AND removal = 'gone' AND disposed_to IS NULL AND state = 'delivered'"
    )
    for archive in map(as_archive, db.execute(query, (sighting.drop, sighting.relpath)).fetchall()):
        if identity(archive.fingerprint) == identity(sighting.fingerprint):
            due = "disposition = 'due', announced = 1, live = 1, removal = NULL"
            db.execute(f"UPDATE archive SET {due} WHERE id = ?", (archive.id,))  # noqa: S608 -- own columns
            return True
    return False


def _supersede(db: sqlite3.Connection, archive: Archive, now: datetime) -> bool:
    """End what is still pending for an old content; a claimed delivery finds the change by itself."""
    ended = db.execute(
        "UPDATE delivery SET state = 'superseded', ended_at = ? WHERE archive_id = ? AND state = 'pending'",
        (to_micros(now), archive.id),
    ).rowcount
    settle(db, archive.id)
    db.execute("UPDATE archive SET live = 0 WHERE id = ? AND disposition = 'done'", (archive.id,))
    return bool(ended)


def _insert(db: sqlite3.Connection, s: FileCandidate, destinations: Sequence[str], now: datetime) -> Archive:
    at = to_micros(now)
    archive_id = db.execute(
        "INSERT INTO archive (drop_name, relpath, device, inode, size, mtime_ns, ctime_ns, admitted_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (s.drop, s.relpath, *fingerprint_columns(s.fingerprint), at),
    ).lastrowid
    db.executemany(
        "INSERT INTO delivery (id, archive_id, destination, size, due_at) VALUES (?, ?, ?, ?, ?)",
        [(str(uuid.uuid4()), archive_id, name, s.fingerprint.size, at) for name in destinations],
    )
    return Archive(archive_id or 0, s.drop, s.relpath, s.fingerprint, as_time(at))


def _reject(db: sqlite3.Connection, archive: Archive, why: Rejected, now: datetime) -> None:
    """End all deliveries of an archive before the first attempt."""
    db.execute(
        "UPDATE delivery SET state = 'rejected', due_at = NULL, ended_at = ?, reason = ?, error = ?"
        " WHERE archive_id = ?",
        (to_micros(now), why.reason, storable_text(why.error), archive.id),
    )
    settle(db, archive.id)
