"""The ledger in SQLite: one connection, one lock, and one transaction for each call."""

from __future__ import annotations

import socket
import sqlite3
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate, takewhile
from pathlib import Path

from backupd.core.drop_problem import DropProblem, DropState, ProblemCount
from backupd.core.errors import LedgerFullError
from backupd.core.folder_place import FolderPlace
from backupd.core.model import (
    Archive,
    Claim,
    Delivered,
    Delivery,
    DeliveryState,
    Digest,
    Fingerprint,
    Rejected,
    Superseded,
    may_have_content_of,
)
from backupd.core.notifications import NotificationState
from backupd.core.policy import Reason
from backupd.core.snapshot import OperatorPause, Snapshot
from backupd.core.transition import Priority, Transition, archive_state
from backupd.ledger.port import (
    Backlog,
    ClaimResult,
    CompletedArchive,
    Cursor,
    DispositionResult,
    DropBacklog,
    EnqueueResult,
    FileCandidate,
    KnownChanges,
    Ledger,
    OpenedLedger,
    QueueState,
    RecordResult,
    RecreatedLedger,
    UndecidedFile,
    content_key,
)
from backupd.ledger.sqlite import folder_queries, problem_queries, state_queries
from backupd.ledger.sqlite.connection import (
    ARCHIVE_COLUMNS,
    StateLock,
    as_archive,
    as_delivery_result,
    as_time,
    attempt_row,
    delivery_update,
    fingerprint_columns,
    open_ledger,
    row_converter,
    storable_int,
    storable_text,
    to_micros,
)
from backupd.ledger.sqlite.device_queries import SqliteDeviceLedger, record_arrival

_DUE = "WHERE destination = ? AND state = 'pending' AND due_at <= ? {but}"
_CLAIM_ORDER = {
    Priority.OLDEST: f"INDEXED BY delivery_due {_DUE} ORDER BY due_at",
    Priority.SMALLEST: f"INDEXED BY delivery_smallest {_DUE} ORDER BY size",
    Priority.NEWEST: f"INDEXED BY delivery_newest {_DUE} ORDER BY archive_id DESC",
}


def _but(drops: Collection[str]) -> str:
    """Return the condition that leaves out the archives of these drops."""
    if not drops:
        return ""
    return (
        "AND NOT EXISTS (SELECT 1 FROM archive WHERE archive.id = delivery.archive_id"  # noqa: S608 -- own text
        f" AND drop_name IN ({', '.join('?' * len(drops))}))"
    )


_RELEASE = "UPDATE delivery SET state = 'pending', session = NULL, token = token + 1 WHERE state = 'claimed'"
_IS_OVER = "session NOT IN (SELECT id FROM session)"

_BEGIN_CHANGE = "UPDATE change SET number = number + 1"
_CHANGE = "(SELECT number FROM change)"

_REMOVE_ENTRY = (
    f"UPDATE archive SET has_entry = 0, changed = {_CHANGE}"  # noqa: S608 -- own clause
    " WHERE id = ? AND has_entry AND disposition = 'done'"
)

_RESULT = (
    "state = ?, due_at = ?, archive_failures = ?, destination_failures = ?, attempts = ?, ended_at = ?,"
    " reason = ?, error = ?, digest = ?, verified = ?, http_status = ?, receipt = ?"
)

_NEWEST_ENTRY = (
    "(SELECT max(id) FROM archive other WHERE other.drop_name = archive.drop_name"
    " AND other.relpath = archive.relpath AND other.has_entry)"
)

_TERM = 1
"""The term of every steward: only one daemon uses the ledger."""

_OTHER_CONTENT = Transition(
    DeliveryState.SUPERSEDED,
    Superseded("the file was rewritten after it had been delivered to another destination"),
)
"""The result of a delivery with another content than that of an earlier one."""

_MAX_BATCH_BYTES = 4 * 1024 * 1024
"""Bytes of archives that are claimed together; see `Ledger.claim`."""


class SqliteLedger(SqliteDeviceLedger, Ledger):
    """A `Ledger` on a connection from `open_ledger`.

    Durable methods commit with `synchronous=FULL`. The others don't sync: new archives that a power loss
    undoes are found again by the scan, and claims are released at the next start by `reap`.

    A new ledger is a new session. The earlier sessions are over: those of the same host if `host` is given,
    otherwise all, because only one daemon has the lock of the state directory. They need no renewal.

    If the disk is full, the session begins before the first claim; its number is 0 until then.
    """

    def __init__(self, connection: sqlite3.Connection, host: str | None = None) -> None:
        super().__init__(connection)
        self._host = host or socket.gethostname()
        self._ended_host = host
        """The host of the earlier sessions that are over; None for all hosts."""
        self._session = 0
        self._session_lock = threading.Lock()
        with suppress(LedgerFullError):
            self.renew()

    @property
    def session(self) -> int:
        """See `Ledger.session`."""
        return self._session

    def now(self) -> datetime:
        """See `Ledger.now`."""
        return datetime.now(UTC)

    def renew(self) -> None:
        """See `Ledger.renew`."""
        with self._session_lock:  # a second session would end the first one, and with it its claims
            if self._session:
                return
            with self._transaction(durable=False) as db:
                db.execute("DELETE FROM session WHERE host = coalesce(?, host)", (self._ended_host,))
                started = db.execute(
                    "INSERT INTO session (host, started_at) VALUES (?, ?)",
                    (self._host, to_micros(self.now())),
                )
            self._session = started.lastrowid or 0

    def reap(self) -> int:
        """See `Ledger.reap`."""
        query = f"SELECT EXISTS (SELECT 1 FROM delivery WHERE state = 'claimed' AND {_IS_OVER})"  # noqa: S608
        with self._reading() as db:  # often there are none, and no write is needed
            if not db.execute(query).fetchone()[0]:
                return 0
        with self._transaction(durable=False) as db:
            return db.execute(f"{_RELEASE} AND {_IS_OVER}").rowcount

    def stewardship(self, drops: Collection[str]) -> Mapping[str, int]:
        """See `Ledger.stewardship`."""
        return dict.fromkeys(drops, _TERM)

    def known_since(self, drop: str, cursor: Cursor = ()) -> KnownChanges:
        """See `Ledger.known_since`."""
        added: dict[int, int] = {}
        removed: set[int] = set()
        with self._reading() as db:
            # first, so that a change by another process in between is returned by the next call
            query = "SELECT number, (SELECT coalesce(max(id), 0) FROM archive) FROM change"
            number, newest = db.execute(query).fetchone()
            if cursor:
                # an archive that was queued since then and has ended is not known to the caller
                clause = "changed > ? AND drop_name = ? AND (has_entry OR id <= ?) AND id <= ?"
                query = f"SELECT {ARCHIVE_COLUMNS}, {_NEWEST_ENTRY} FROM archive"  # noqa: S608 -- own columns
                query += f" INDEXED BY archive_changed WHERE {clause} ORDER BY changed, id"
                rows = db.execute(query, (cursor[0], drop, cursor[1], newest))
            else:
                query = f"SELECT {ARCHIVE_COLUMNS}, id FROM archive"  # noqa: S608 -- own columns
                query += " WHERE drop_name = ? AND has_entry AND id <= ? ORDER BY relpath, id"
                rows = db.execute(query, (drop, newest))
            for row in rows:
                archive, newest_entry = as_archive(row), row[-1]
                if newest_entry is None:
                    removed.add(hash(archive.relpath))
                elif newest_entry == archive.id:
                    added[hash(archive.relpath)] = content_key(archive.relpath, archive.fingerprint)
        return KnownChanges((number, newest), added, removed)

    def enqueue(
        self, candidates: Sequence[FileCandidate], destinations: Sequence[str], now: datetime
    ) -> EnqueueResult:
        """See `Ledger.enqueue`."""
        queued: list[Archive] = []
        superseded: list[Archive] = []
        rejected: list[Archive] = []
        undecided: list[UndecidedFile] = []
        has_unusual_size = reappeared = False
        with self._transaction(durable=any(c.rejected is not None for c in candidates)) as db:
            db.execute(_BEGIN_CHANGE)
            for candidate in candidates:
                known = _known_archives(db, candidate)
                key = content_key(candidate.relpath, candidate.fingerprint)
                if any(content_key(a.relpath, a.fingerprint) == key for a in known):
                    continue
                missing = _missing_archives(db, candidate)
                algorithms = _unknown_digests(db, [*known[-1:], *missing], candidate)
                if algorithms:
                    undecided.append(UndecidedFile(candidate, algorithms))
                    continue
                if known and _is_of_archive(db, known[-1], candidate):
                    _set_fingerprint(db, known[-1].id, candidate.fingerprint, candidate.folder_id)
                    continue
                superseded += [a for a in known if _supersede(db, a, now)]
                if candidate.rejected is None and _adopt(db, candidate):
                    reappeared = True
                    continue
                back = next((a for a in missing if _is_of_archive(db, a, candidate)), None)
                if back is not None:
                    _resume_disposition(db, back, candidate)
                    reappeared = True
                    continue
                archive = _insert(db, candidate, destinations, now, self._host)
                if candidate.rejected is not None:
                    _reject(db, archive, candidate.rejected, now)
                    rejected.append(archive)
                    continue
                queued.append(archive)
                if candidate.tracked is not None:
                    has_unusual_size |= record_arrival(db, archive, candidate.tracked)
        return EnqueueResult(
            tuple(queued), tuple(superseded), has_unusual_size, tuple(rejected), reappeared, tuple(undecided)
        )

    def claim(
        self,
        destination: str,
        now: datetime,
        priority: Priority = Priority.OLDEST,
        limit: int = 1,
        except_drops: Collection[str] = (),
    ) -> list[Delivery]:
        """See `Ledger.claim`."""
        self.renew()
        clauses = _CLAIM_ORDER[priority].format(but=_but(except_drops))
        with self._transaction(durable=False) as db:
            due = db.execute(
                f"SELECT id, size FROM delivery {clauses} LIMIT ?",  # noqa: S608 -- own clauses
                (destination, to_micros(now), *except_drops, limit),
            ).fetchall()
            totals = accumulate(size for _, size in due)
            count = sum(1 for _ in takewhile(lambda total: total <= _MAX_BATCH_BYTES, totals))
            return [_claim(db, delivery_id, self._session) for delivery_id, _ in due[: max(count, 1)]]

    def next_due(self, destination: str, except_drops: Collection[str] = ()) -> datetime | None:
        """See `Ledger.next_due`."""
        with self._reading() as db:
            row = db.execute(
                "SELECT due_at FROM delivery INDEXED BY delivery_due"  # noqa: S608 -- own clause
                f" WHERE destination = ? AND state = 'pending' {_but(except_drops)} ORDER BY due_at LIMIT 1",
                (destination, *except_drops),
            ).fetchone()
            return None if row is None else as_time(row[0])

    def bring_forward(self, destination: str, latest: datetime) -> None:
        """See `Ledger.bring_forward`."""
        with self._transaction(durable=False) as db:
            db.execute(
                "UPDATE delivery SET due_at = :latest"
                " WHERE destination = :destination AND state = 'pending' AND due_at > :latest",
                {"destination": destination, "latest": to_micros(latest)},
            )

    def record(self, results: Sequence[ClaimResult], now: datetime) -> RecordResult:
        """See `Ledger.record`."""
        completed: list[CompletedArchive] = []
        lost: list[ClaimResult] = []
        superseded: list[ClaimResult] = []
        archive_ids: dict[int, None] = {}
        with self._transaction(durable=True) as db:
            db.execute(_BEGIN_CHANGE)
            for result in results:
                has_claim = db.execute(
                    f"UPDATE delivery SET {_RESULT}, session = NULL"  # noqa: S608 -- own columns
                    " WHERE id = ? AND state = 'claimed' AND token = ? AND session = ?",
                    (*delivery_update(result, now), self._session),
                ).rowcount
                if not has_claim:
                    if not _was_recorded(db, result.delivery):
                        lost.append(result)
                    continue
                if not _record_fingerprint(db, result):
                    superseded.append(replace(result, transition=_OTHER_CONTENT))
                    _replace_result(db, superseded[-1], now)
                archive_ids[result.delivery.archive.id] = None
                first = result.delivery.attempts + 1
                db.executemany(
                    "INSERT OR REPLACE INTO attempt (delivery_id, number, started_at, duration_us, sent,"
                    " outcome, reason, error, http_status) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [attempt_row(result.delivery.id, n, a) for n, a in enumerate(result.attempts, first)],
                )
            for archive_id in archive_ids:
                completed += complete_archive(db, archive_id)
        return RecordResult(tuple(completed), tuple(lost), tuple(superseded))

    def pending_dispositions(self, after_id: int = 0, limit: int = 256) -> list[CompletedArchive]:
        """See `Ledger.pending_dispositions`."""
        query = "SELECT id FROM archive WHERE disposition = 'due' AND id > ? ORDER BY id LIMIT ?"
        with self._reading() as db:
            ids = [row[0] for row in db.execute(query, (after_id, limit))]
            return [_load_completed(db, archive_id) for archive_id in ids]

    def count_pending_dispositions(self) -> int:
        """See `Ledger.count_pending_dispositions`."""
        with self._reading() as db:
            return int(db.execute("SELECT count(*) FROM archive WHERE disposition = 'due'").fetchone()[0])

    def record_dispositions(
        self,
        done: Sequence[DispositionResult],
        still_due: Sequence[int],
        terms: Mapping[str, int],
        now: datetime,
    ) -> None:
        """See `Ledger.record_dispositions`."""
        drops = [drop for drop, term in terms.items() if term == _TERM]
        is_own = f"id = ? AND drop_name IN ({', '.join('?' * len(drops))})"
        with self._transaction(durable=False) as db:
            db.execute(_BEGIN_CHANGE)
            db.executemany(
                "UPDATE archive SET disposition = 'done', moved_to = ?, disposed_at = ?, has_entry = ?,"  # noqa: S608
                f" changed = {_CHANGE}, missing = ? WHERE {is_own}",
                [
                    (r.moved_to, to_micros(now), r.kept_in_place, r.missing, r.archive_id, *drops)
                    for r in done
                ],
            )
            db.executemany(  # an archive that was at this path before was removed by hand
                "UPDATE archive SET moved_to = NULL WHERE state = 'rejected' AND moved_to = ? AND id < ?"
                " AND drop_name ="
                " (SELECT drop_name FROM archive WHERE id = ? AND state = 'rejected' AND moved_to = ?)",
                [(r.moved_to, r.archive_id, r.archive_id, r.moved_to) for r in done if r.moved_to],
            )
            db.executemany(
                f"UPDATE archive SET already_logged = 1 WHERE {is_own}",  # noqa: S608 -- own clause
                [(archive_id, *drops) for archive_id in still_due],
            )

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """See `Ledger.release`."""
        claims = [(delivery.id, delivery.claim.token, self._session) for delivery in deliveries]
        with self._transaction(durable=False) as db:
            db.executemany(f"{_RELEASE} AND id = ? AND token = ? AND session = ?", claims)

    def release_own(self) -> None:
        """See `Ledger.release_own`."""
        with self._transaction(durable=False) as db:
            db.execute(f"{_RELEASE} AND session = ?", (self._session,))

    def backlog(self) -> Mapping[str, Backlog]:
        """See `Ledger.backlog`."""
        with self._reading() as db:
            return state_queries.backlogs(db)

    def count_quarantined(self) -> int:
        """See `Ledger.count_quarantined`."""
        with self._reading() as db:
            return state_queries.quarantined(db)

    def queue_state(self, drops: Collection[str], destinations: Collection[str]) -> QueueState:
        """See `Ledger.queue_state`."""
        with self._reading() as db:
            return state_queries.queue_state(db, drops, destinations)

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """See `Ledger.save_snapshot`."""
        with self._transaction(durable=False, lock_timeout=0.0) as db:
            state_queries.save_snapshot(db, snapshot)

    def foreign_version(self) -> int:
        """See `Ledger.foreign_version`."""
        with self._reading() as db:
            return int(db.execute("PRAGMA data_version").fetchone()[0])

    def notification_states(self) -> Mapping[str, NotificationState]:
        """See `Ledger.notification_states`."""
        with self._reading() as db:
            return state_queries.notification_states(db)

    def save_notification_state(self, receiver: str, state: NotificationState | None) -> None:
        """See `Ledger.save_notification_state`."""
        with self._transaction(durable=True, lock_timeout=0.0) as db:
            state_queries.save_notification_state(db, receiver, state)

    def pauses(self) -> list[OperatorPause]:
        """See `Ledger.pauses`."""
        with self._reading() as db:
            return state_queries.find_pauses(db)

    def delete_ended_pauses(self, now: datetime) -> None:
        """See `Ledger.delete_ended_pauses`."""
        with self._transaction(durable=False, lock_timeout=0.0) as db:
            state_queries.delete_ended_pauses(db, now)

    def save_failure(self, destination: str, reason: str | None) -> None:
        """See `Ledger.save_failure`."""
        with self._transaction(durable=False) as db:
            db.execute("DELETE FROM destination_failure WHERE destination = ?", (destination,))
            if reason is not None:
                query = "INSERT INTO destination_failure (destination, reason) VALUES (?, ?)"
                db.execute(query, (destination, reason))

    def saved_failure(self, destination: str) -> str | None:
        """See `Ledger.saved_failure`."""
        query = "SELECT reason FROM destination_failure WHERE destination = ?"
        with self._reading() as db:
            row = db.execute(query, (destination,)).fetchone()
        return row[0] if row else None

    def save_problems(self, found: Sequence[DropProblem], solved: Sequence[DropProblem]) -> None:
        """See `Ledger.save_problems`."""
        with self._transaction(durable=False) as db:
            problem_queries.save_problems(db, found, solved)

    def problems(self, drop: str | None = None) -> list[DropProblem]:
        """See `Ledger.problems`."""
        with self._reading() as db:
            return problem_queries.find_problems(db, drop, -1)

    def problem_counts(self) -> list[ProblemCount]:
        """See `Ledger.problem_counts`."""
        with self._reading() as db:
            return problem_queries.count_problems(db)

    def save_drop_state(self, state: DropState) -> None:
        """See `Ledger.save_drop_state`."""
        with self._transaction(durable=False) as db:
            problem_queries.save_state(db, state)

    def drop_states(self) -> list[DropState]:
        """See `Ledger.drop_states`."""
        with self._reading() as db:
            return problem_queries.find_states(db)

    def forget_drops(self, other_than: Collection[str]) -> None:
        """See `Ledger.forget_drops`."""
        with self._transaction(durable=False) as db:
            problem_queries.forget_drops(db, other_than)

    def assign_folders(self, places: Mapping[str, FolderPlace]) -> Mapping[str, FolderPlace]:
        """See `Ledger.assign_folders`."""
        with self._transaction(durable=True) as db:
            return folder_queries.assign_folders(db, places)

    def pending_drops(self) -> Mapping[str, DropBacklog]:
        """See `Ledger.pending_drops`."""
        with self._reading() as db:
            return folder_queries.pending_drops(db)

    def close(self) -> None:
        """See `Ledger.close`."""
        with self._lock:
            self._db.close()


@contextmanager
def open_for_daemon(state_dir: Path, on_progress: Callable[[], None]) -> Iterator[OpenedLedger]:
    """Open the ledger in a state directory for its only daemon, until the end of the `with` block."""
    with StateLock(state_dir) as lock:
        file = open_ledger(
            state_dir, check=lock.check, must_replace=lock.must_replace, on_progress=on_progress
        )
        opened = OpenedLedger(SqliteLedger(file.connection))
        if file.quarantined_path is not None:
            opened.recreated = RecreatedLedger(
                str(file.quarantined_path),
                f"the ledger was damaged and has been renamed to {file.quarantined_path.name}",
                "pending archives are found again in the drop folders, but the history is lost; move archives"
                " in `rejected_dir` back to their drop folder to send them again",
            )
        elif file.is_new and not lock.is_first_start:
            opened.recreated = RecreatedLedger(
                str(state_dir),
                "the ledger was missing, so a new one was created",
                "find out who removed it; pending archives are found again in the drop folders",
            )
        yield opened
        lock.ended_cleanly, lock.damage = opened.ended_cleanly, opened.damage


@row_converter
def _claim(db: sqlite3.Connection, delivery_id: str, session: int) -> Delivery:
    archive_id, destination, token, attempts, archive_failures, destination_failures, digest, reason = (
        db.execute(
            "UPDATE delivery SET state = 'claimed', session = ?, token = token + 1 WHERE id = ? RETURNING"
            " archive_id, destination, token, attempts, archive_failures, destination_failures, digest,"
            " reason",
            (session, delivery_id),
        ).fetchone()
    )
    return Delivery(
        delivery_id,
        _load_archive(db, archive_id),
        destination,
        Claim(session, token),
        attempts,
        archive_failures,
        destination_failures,
        # the column holds two digests: while a delivery is open, that of content that was sent completely but
        # not confirmed by the destination; once it is delivered, that of the delivered content
        Digest.parse(digest) if digest else None,
        tuple(_digests(db, archive_id)),
        reason == Reason.MISSING,
    )


def _was_recorded(db: sqlite3.Connection, delivery: Delivery) -> bool:
    """Return whether the result of a claim is recorded; each claim and each release changes the token."""
    query = "SELECT 1 FROM delivery WHERE id = ? AND token = ?"
    return db.execute(query, (delivery.id, delivery.claim.token)).fetchone() is not None


def _known_archives(db: sqlite3.Connection, candidate: FileCandidate) -> list[Archive]:
    """Return the archives under a candidate's path that have an entry, the newest last."""
    where = "drop_name = ? AND relpath = ? AND has_entry ORDER BY id"
    query = f"SELECT {ARCHIVE_COLUMNS} FROM archive WHERE {where}"  # noqa: S608 -- own columns
    return [as_archive(row) for row in db.execute(query, (candidate.drop, candidate.relpath))]


def _supersede(db: sqlite3.Connection, archive: Archive, now: datetime) -> bool:
    """End the pending deliveries of an older content; return whether there were any.

    A claimed delivery is left to its worker, which detects the change.
    """
    ended = db.execute(
        "UPDATE delivery SET state = 'superseded', ended_at = ? WHERE archive_id = ? AND state = 'pending'",
        (to_micros(now), archive.id),
    ).rowcount
    complete_archive(db, archive.id)
    db.execute(_REMOVE_ENTRY, (archive.id,))
    return bool(ended)


def _missing_archives(db: sqlite3.Connection, candidate: FileCandidate) -> list[Archive]:
    """Return the delivered archives under a candidate's path that were missing at their disposition."""
    where = "drop_name = ? AND relpath = ? AND missing AND state = 'delivered'"
    query = f"SELECT {ARCHIVE_COLUMNS} FROM archive WHERE {where}"  # noqa: S608 -- own columns
    return [as_archive(row) for row in db.execute(query, (candidate.drop, candidate.relpath))]


def _digests(db: sqlite3.Connection, archive_id: int) -> set[Digest]:
    """Return the digests of an archive's content that its deliveries have."""
    query = "SELECT digest FROM delivery WHERE archive_id = ? AND digest IS NOT NULL"
    return {Digest.parse(row[0]) for row in db.execute(query, (archive_id,))}


def _unknown_digests(
    db: sqlite3.Connection, archives: Sequence[Archive], candidate: FileCandidate
) -> frozenset[str]:
    """Return the algorithms of the digests that decide whether a candidate is the file of an archive."""
    known = {digest.algorithm for digest in candidate.digests}
    return frozenset(
        digest.algorithm
        for archive in archives
        if archive.fingerprint != candidate.fingerprint
        and may_have_content_of(candidate.fingerprint, archive.fingerprint)
        for digest in _digests(db, archive.id)
        if digest.algorithm not in known
    )


def _is_of_archive(db: sqlite3.Connection, archive: Archive, candidate: FileCandidate) -> bool:
    """Return whether a candidate is the file of an archive; its metadata may have changed."""
    if archive.fingerprint == candidate.fingerprint:
        return True
    if not may_have_content_of(candidate.fingerprint, archive.fingerprint):
        return False
    query = "SELECT state FROM archive WHERE id = ?"
    state = DeliveryState(db.execute(query, (archive.id,)).fetchone()[0])
    if state is DeliveryState.PENDING and candidate.rejected is not None:
        return False  # its content was accepted
    digests = _digests(db, archive.id)
    if not digests:
        return state is DeliveryState.PENDING  # whatever its content is, it is still to be sent
    return digests <= set(candidate.digests)


def _set_fingerprint(
    db: sqlite3.Connection, archive_id: int, fingerprint: Fingerprint, folder_id: int
) -> None:
    values = (*fingerprint_columns(folder_id, fingerprint), archive_id)
    db.execute(
        "UPDATE archive SET folder_id = ?, inode = ?, size = ?, mtime_ns = ?, ctime_ns = ?,"  # noqa: S608
        f" changed = {_CHANGE} WHERE id = ?",
        values,
    )
    db.execute(
        "UPDATE delivery SET reason = NULL WHERE archive_id = ? AND state = 'pending' AND reason = ?",
        (archive_id, Reason.MISSING),
    )


def _record_fingerprint(db: sqlite3.Connection, result: ClaimResult) -> bool:
    """Have an archive get the fingerprint that its file had when the delivered content was read.

    Return False if the archive has another one, and another destination has another content.
    """
    outcome, delivery = result.transition.outcome, result.delivery
    if not isinstance(outcome, Delivered):
        return True
    archive = _load_archive(db, delivery.archive.id)
    fingerprint = outcome.fingerprint or delivery.archive.fingerprint
    if archive.fingerprint == fingerprint:
        return True
    query = "SELECT digest FROM delivery WHERE archive_id = ? AND id <> ? AND state = 'delivered'"
    others = {row[0] for row in db.execute(query, (archive.id, delivery.id))}
    if others and str(outcome.digest) not in others:
        return False
    _set_fingerprint(db, archive.id, fingerprint, archive.folder_id)
    return True


def _replace_result(db: sqlite3.Connection, result: ClaimResult, now: datetime) -> None:
    query = f"UPDATE delivery SET {_RESULT} WHERE id = ? AND token = ?"  # noqa: S608 -- own columns
    db.execute(query, delivery_update(result, now))


def _resume_disposition(db: sqlite3.Connection, archive: Archive, candidate: FileCandidate) -> None:
    """Make the disposition of a delivered file that was missing and is back due again."""
    _set_fingerprint(db, archive.id, candidate.fingerprint, candidate.folder_id)
    db.execute(
        "UPDATE archive SET disposition = 'due', already_logged = 1, has_entry = 1, missing = 0 WHERE id = ?",
        (archive.id,),
    )


def give_up(db: sqlite3.Connection, now: datetime, drop: str | None, destination: str | None) -> int:
    """End what is pending from a drop or for a destination; see `History.give_up_drop`. Return its number."""
    at = to_micros(now)
    db.execute(_BEGIN_CHANGE)
    pending = db.execute(
        "SELECT delivery.id, archive_id FROM delivery JOIN archive ON archive.id = archive_id"
        " WHERE delivery.state = 'pending' AND (drop_name = ? OR destination = ?)",
        (drop, destination),
    ).fetchall()
    for delivery_id, archive_id in pending:
        query = "SELECT 1 FROM delivery WHERE archive_id = ? AND id <> ? AND state <> 'superseded'"
        if destination is not None and db.execute(query, (archive_id, delivery_id)).fetchone():
            db.execute("DELETE FROM attempt WHERE delivery_id = ?", (delivery_id,))
            db.execute("DELETE FROM delivery WHERE id = ?", (delivery_id,))
        else:
            db.execute(
                "UPDATE delivery SET state = 'superseded', ended_at = ?, error = 'given up' WHERE id = ?",
                (at, delivery_id),
            )
        complete_archive(db, archive_id)
    due = db.execute(
        f"UPDATE archive SET disposition = 'done', disposed_at = ?, has_entry = 0, changed = {_CHANGE}"  # noqa: S608
        " WHERE disposition = 'due' AND drop_name = ?",
        (at, drop),
    ).rowcount
    return len(pending) + due


def _adopt(db: sqlite3.Connection, candidate: FileCandidate) -> bool:
    """Make the archive that waits in an earlier folder of the drop that of the candidate, a copy of it."""
    names = folder_queries.earlier_names(db, candidate.drop)
    fingerprint = candidate.fingerprint
    copy = (candidate.relpath, storable_int(fingerprint.size), storable_int(fingerprint.mtime_ns))
    query = (
        "SELECT id FROM archive WHERE drop_name = ? AND relpath = ? AND has_entry"
        " AND size = ? AND mtime_ns = ? AND (state = 'pending' OR disposition = 'due') ORDER BY id DESC"
    )
    found = next((row[0] for name in names for row in db.execute(query, (name, *copy))), None)
    if found is None:
        return False
    db.execute(
        "UPDATE archive SET drop_name = ?, folder_id = ?, inode = ?, size = ?, mtime_ns = ?, ctime_ns = ?,"  # noqa: S608
        f" changed = {_CHANGE} WHERE id = ?",
        (candidate.drop, *fingerprint_columns(candidate.folder_id, fingerprint), found),
    )
    db.execute(f"{_RELEASE} AND archive_id = ?", (found,))
    return True


def _insert(
    db: sqlite3.Connection, candidate: FileCandidate, destinations: Sequence[str], now: datetime, host: str
) -> Archive:
    at, fingerprint, folder_id = to_micros(now), candidate.fingerprint, candidate.folder_id
    device = candidate.tracked.device if candidate.tracked else None
    archive_id = db.execute(
        "INSERT INTO archive (drop_name, relpath, folder_id, inode, size, mtime_ns, ctime_ns, queued_at,"  # noqa: S608
        f" host, device, changed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {_CHANGE})",
        (candidate.drop, candidate.relpath, *fingerprint_columns(folder_id, fingerprint), at, host, device),
    ).lastrowid
    db.executemany(
        "INSERT INTO delivery (id, archive_id, destination, size, due_at) VALUES (?, ?, ?, ?, ?)",
        [(str(uuid.uuid4()), archive_id, name, fingerprint.size, at) for name in destinations],
    )
    return Archive(
        archive_id or 0, candidate.drop, candidate.relpath, fingerprint, as_time(at), folder_id, host
    )


def _reject(db: sqlite3.Connection, archive: Archive, outcome: Rejected, now: datetime) -> None:
    """End all deliveries of an archive before the first attempt."""
    db.execute(
        "UPDATE delivery SET state = 'rejected', due_at = NULL, ended_at = ?, reason = ?, error = ?"
        " WHERE archive_id = ?",
        (to_micros(now), outcome.reason, storable_text(outcome.error), archive.id),
    )
    complete_archive(db, archive.id)


def complete_archive(db: sqlite3.Connection, archive_id: int) -> list[CompletedArchive]:
    """Set the state of an archive that has no open delivery; return it if its disposition is due now."""
    states = [
        DeliveryState(row[0])
        for row in db.execute("SELECT state FROM delivery WHERE archive_id = ?", (archive_id,))
    ]
    state = archive_state(states)
    if state is DeliveryState.PENDING:
        return []
    is_superseded = state is DeliveryState.SUPERSEDED
    changed = db.execute(
        "UPDATE archive SET state = ?, disposition = ?,"
        " digest = (SELECT max(digest) FROM delivery WHERE archive_id = archive.id)"
        " WHERE id = ? AND state = 'pending'",
        (state, "done" if is_superseded else "due", archive_id),
    ).rowcount
    if changed and is_superseded:
        db.execute(_REMOVE_ENTRY, (archive_id,))
    return [] if is_superseded or not changed else [_load_completed(db, archive_id)]


def _load_completed(db: sqlite3.Connection, archive_id: int) -> CompletedArchive:
    query = f"SELECT {ARCHIVE_COLUMNS}, state, digest, already_logged FROM archive WHERE id = ?"  # noqa: S608
    row = db.execute(query, (archive_id,)).fetchone()
    results = db.execute(
        "SELECT id, destination, state, ended_at, digest, verified, http_status, reason, error, receipt"
        " FROM delivery WHERE archive_id = ? ORDER BY destination",
        (archive_id,),
    )
    return CompletedArchive(
        as_archive(row),
        DeliveryState(row[-3]),
        row[-2],
        tuple(map(as_delivery_result, results)),
        bool(row[-1]),
    )


def _load_archive(db: sqlite3.Connection, archive_id: int) -> Archive:
    query = f"SELECT {ARCHIVE_COLUMNS} FROM archive WHERE id = ?"  # noqa: S608 -- own columns
    return as_archive(db.execute(query, (archive_id,)).fetchone())
