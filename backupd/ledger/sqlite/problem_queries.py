"""The part of the SQLite ledger about the states of drop folders and the problems of their files."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence

from backupd.core.drop_problem import DropProblem, DropState, ProblemCount
from backupd.core.policy import Reason, rule_of
from backupd.ledger.sqlite.connection import as_time, to_micros

_PROBLEMS = """
    (SELECT drop_name, relpath, reason, since, error, hint, size, files FROM problem
    UNION ALL
    SELECT archive.drop_name, archive.relpath, delivery.reason, archive.queued_at,
        delivery.destination || ': ' || coalesce(delivery.error, ''), :hint, delivery.size, 1
    FROM delivery JOIN archive ON archive.id = delivery.archive_id
    WHERE delivery.reason = 'fails_alone' AND delivery.state IN ('pending', 'claimed'))
"""
"""The problems that are stored, and the deliveries that alone fail."""

_HINT = rule_of(Reason.FAILS_ALONE).hint


def find_problems(db: sqlite3.Connection, drop: str | None, limit: int) -> list[DropProblem]:
    """Return up to `limit` problems of a drop, or of all drops if `drop` is None, the oldest first."""
    rows = db.execute(
        f"SELECT drop_name, relpath, reason, since, error, hint, size, files FROM {_PROBLEMS}"  # noqa: S608 -- own
        " WHERE :drop IS NULL OR drop_name = :drop ORDER BY since, drop_name, relpath, reason LIMIT :limit",
        {"drop": drop, "limit": limit, "hint": _HINT},
    )
    return [DropProblem(row[0], row[1], row[2], as_time(row[3]), *row[4:8]) for row in rows]


def count_problems(db: sqlite3.Connection) -> list[ProblemCount]:
    """Return the problems of each drop with each reason, by drop and reason."""
    # a bare column of an aggregate query with min() is from the row with the minimum
    rows = db.execute(
        f"SELECT drop_name, reason, sum(files), min(since), relpath, error, hint FROM {_PROBLEMS}"  # noqa: S608
        " GROUP BY drop_name, reason ORDER BY drop_name, reason",
        {"hint": _HINT},
    )
    return [ProblemCount(row[0], row[1], row[2], as_time(row[3]), *row[4:7]) for row in rows]


def save_problems(
    db: sqlite3.Connection, found: Sequence[DropProblem], solved: Sequence[DropProblem]
) -> None:
    """Add or replace the found problems, and delete the solved ones."""
    db.executemany(
        "DELETE FROM problem WHERE drop_name = ? AND relpath = ? AND reason = ?",
        [(p.drop, p.relpath, p.reason) for p in solved],
    )
    db.executemany(
        "INSERT OR REPLACE INTO problem (drop_name, relpath, reason, since, error, hint, size, files)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (p.drop, p.relpath, p.reason, to_micros(p.since), p.error, p.hint, p.size_bytes, p.files)
            for p in found
        ],
    )


def save_state(db: sqlite3.Connection, state: DropState) -> None:
    """Replace the state of a drop."""
    db.execute(
        "INSERT OR REPLACE INTO drop_state (drop_name, observer, filesystem, fault, blind_spot)"
        " VALUES (?, ?, ?, ?, ?)",
        (state.drop, state.observer, state.filesystem, state.fault, state.blind_spot),
    )


def find_states(db: sqlite3.Connection) -> list[DropState]:
    """Return the states of all drops, by their names."""
    rows = db.execute(
        "SELECT drop_name, observer, filesystem, fault, blind_spot FROM drop_state ORDER BY drop_name"
    )
    return [DropState(*row) for row in rows]


def forget_drops(db: sqlite3.Connection, other_than: Collection[str]) -> None:
    """Delete the states and problems of all drops but these."""
    for table in ("problem", "drop_state"):
        rows = db.execute(f"SELECT DISTINCT drop_name FROM {table}")  # noqa: S608 -- own names
        gone = {row[0] for row in rows} - {*other_than}
        db.executemany(
            f"DELETE FROM {table} WHERE drop_name = ?",  # noqa: S608 -- own names
            [(drop,) for drop in gone],
        )
