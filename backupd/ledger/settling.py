"""What an archive's deliveries make of it, within a transaction."""

from __future__ import annotations

import sqlite3

from backupd.core.model import Archive, DeliveryState
from backupd.core.step import archive_state
from backupd.ledger.port import Settled
from backupd.ledger.rows import ARCHIVE_COLUMNS, as_archive, as_ending


def archive_of(db: sqlite3.Connection, archive_id: int) -> Archive:
    """Return an archive."""
    query = f"SELECT {ARCHIVE_COLUMNS} FROM archive WHERE id = ?"  # noqa: S608 -- own columns
    return as_archive(db.execute(query, (archive_id,)).fetchone())


def settle(db: sqlite3.Connection, archive_id: int) -> list[Settled]:
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


def settled(db: sqlite3.Connection, archive_id: int) -> Settled:
    """Return a settled archive."""
    row = db.execute("SELECT state, digest, announced FROM archive WHERE id = ?", (archive_id,)).fetchone()
    endings = db.execute(
        "SELECT id, destination, state, ended_at, digest, verified, http_status, reason, error, receipt"
        " FROM delivery WHERE archive_id = ? ORDER BY destination",
        (archive_id,),
    )
    ends = tuple(map(as_ending, endings))
    return Settled(archive_of(db, archive_id), DeliveryState(row[0]), row[1], ends, bool(row[2]))
