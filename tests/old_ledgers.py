"""Ledgers of earlier versions, row by row as these wrote them."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from backupd.ledger.sqlite.connection import FILE_NAME, LOCK_NAME
from tests.documents import DOCS

MIGRATIONS = sorted((DOCS.parent / "backupd/ledger/sqlite/migrations").glob("*.sql"))
NEWEST = int(MIGRATIONS[-1].name[:4])

AT = 1_700_000_000_000_000
"""When the first archive was queued, in microseconds since the epoch."""

SECOND = 1_000_000

SHA = "sha256:" + "ab" * 32

FIRST_ROWS = f"""
INSERT INTO archive (id, drop_name, relpath, device, inode, size, mtime_ns, ctime_ns, admitted_at, state,
    digest, disposition, disposed_to, announced, disposed_at, live) VALUES
(1, 'switches', CAST('sent.cfg' AS BLOB), 2049, 11, 3, 1, 1, {AT}, 'delivered', '{SHA}', 'done',
    CAST('sent/sent.cfg' AS BLOB), 0, {AT + SECOND}, 0),
(2, 'switches', CAST('refused.cfg' AS BLOB), 2049, 12, 4, 1, 1, {AT + 1}, 'rejected', NULL, 'done',
    CAST('rejected/refused.cfg' AS BLOB), 0, {AT + SECOND}, 0),
(3, 'switches', CAST('replaced.cfg' AS BLOB), 2049, 13, 5, 1, 1, {AT + 2}, 'superseded', NULL, 'done',
    NULL, 0, NULL, 0),
(4, 'switches', CAST('due.cfg' AS BLOB), 2049, 14, 6, 1, 1, {AT + 3}, 'delivered', '{SHA}', 'due',
    NULL, 1, NULL, 1),
(5, 'switches', CAST('kept.cfg' AS BLOB), 2049, 15, 7, 1, 1, {AT + 4}, 'delivered', '{SHA}', 'done',
    NULL, 0, {AT + SECOND}, 1),
(6, 'switches', x'ff2f0a', 2049, x'{b"18446744073709551615".hex()}', 8, 1, 1, {AT + 5}, 'pending', NULL, NULL,
    NULL, 0, NULL, 1),
(7, 'switches', CAST('uploading.cfg' AS BLOB), 2049, 17, 9, 1, 1, {AT + 6}, 'pending', NULL, NULL,
    NULL, 0, NULL, 1);
INSERT INTO delivery (id, archive_id, destination, size, state, due_at, attempts, charged, faults, ended_at,
    reason, error, digest, verified, http_status, receipt) VALUES
('d-1', 1, 'vault', 3, 'delivered', NULL, 2, 0, 0, {AT + SECOND}, NULL, NULL, '{SHA}', 1, 201, '{{}}'),
('d-2', 2, 'vault', 4, 'rejected', NULL, 1, 1, 0, {AT + SECOND}, 'refused', 'no', NULL, NULL, 422, NULL),
('d-3', 3, 'vault', 5, 'superseded', NULL, 0, 0, 0, {AT + SECOND}, NULL, NULL, NULL, NULL, NULL, NULL),
('d-4', 4, 'vault', 6, 'delivered', NULL, 1, 0, 0, {AT + SECOND}, NULL, NULL, '{SHA}', 1, 201, '{{}}'),
('d-5', 5, 'vault', 7, 'delivered', NULL, 1, 0, 0, {AT + SECOND}, NULL, NULL, '{SHA}', 1, 201, '{{}}'),
('d-6', 6, 'vault', 8, 'pending', {AT + 9 * SECOND}, 3, 1, 2, NULL, 'connect', 'gone', '{SHA}', NULL, NULL,
    NULL),
('d-7', 7, 'vault', 9, 'claimed', {AT + 5 * SECOND}, 0, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
('d-8', 7, 'annex', 9, 'delivered', NULL, 1, 0, 0, {AT + SECOND}, NULL, NULL, '{SHA}', 1, 200, 'ok');
INSERT INTO attempt (delivery_id, number, started_at, duration_us, sent, outcome, reason, error,
    http_status) VALUES
('d-1', 1, {AT}, 250000, 3, 'deferred', 'connect', 'refused', NULL),
('d-1', 2, {AT + 1}, 500000, 3, 'delivered', NULL, NULL, 201),
('d-2', 1, {AT}, 250000, 4, 'rejected', 'refused', 'no', 422);
INSERT INTO gate (destination, state, reason, error, since, until) VALUES
('annex', 'open', NULL, NULL, NULL, NULL),
('vault', 'paused', 'connect', 'refused', {AT}, {AT + 60 * SECOND});
"""
"""The rows of a ledger with the first schema: archives in every state."""

LATER_ROWS = f"""
INSERT INTO archive (id, drop_name, relpath, device, inode, size, mtime_ns, ctime_ns, admitted_at, state,
    digest, disposition, disposed_to, announced, disposed_at, live, series, removal, removed_at) VALUES
(-1, 'switches', CAST('restored.cfg' AS BLOB), 2049, 21, 3, 1, 1, {AT}, 'delivered', '{SHA}', 'done',
    CAST('sent/restored.cfg' AS BLOB), 1, {AT}, 0, x'73', NULL, NULL),
(8, 'switches', CAST('back.cfg' AS BLOB), 2049, 22, 3, 1, 1, {AT + 7}, 'delivered', '{SHA}', 'done',
    NULL, 0, {AT + SECOND}, 0, NULL, 'gone', NULL),
(9, 'switches', CAST('expired.cfg' AS BLOB), 2049, 23, 3, 1, 1, {AT + 8}, 'delivered', '{SHA}', 'done',
    CAST('sent/expired.cfg' AS BLOB), 0, {AT + SECOND}, 0, x'73', 'expired', {AT + 2 * SECOND}),
(10, 'switches', CAST('odd.cfg' AS BLOB), 2049, 24, 900, 1, 1, {AT + 9}, 'delivered', '{SHA}', 'done',
    CAST('sent/odd.cfg' AS BLOB), 0, {AT + SECOND}, 0, NULL, 'expiring', NULL);
INSERT INTO delivery (id, archive_id, destination, size, state, ended_at, digest, verified, http_status)
VALUES ('d-r', -1, 'vault', 3, 'delivered', {AT}, '{SHA}', 1, 201),
('d-9', 8, 'vault', 3, 'delivered', {AT}, '{SHA}', 1, 201);
INSERT INTO expectation (drop_name, every, device_by) VALUES ('switches', {3600 * SECOND}, '{{stem}}');
INSERT INTO device (drop_name, name, known_at, last_at, archives, sizes, listed, alarmed) VALUES
('switches', 'sw1', {AT}, {AT + 9}, 4, '100 100 900', 0, 0),
('switches', 'sw2', {AT}, NULL, 0, '', 1, 1);
INSERT INTO unusual_size (archive_id, device, median_size) VALUES (10, 'sw1', 100);
INSERT INTO restored (drop_name, folder) VALUES ('switches', CAST('sent' AS BLOB));
DELETE FROM clock;
INSERT INTO clock (seen_at) VALUES ({AT + 10 * SECOND});
INSERT INTO doubt (id, ahead, remaining) VALUES (1, {SECOND}, {60 * SECOND});
INSERT INTO folder (drop_name, inode, device) VALUES ('switches', 2, 2049);
"""
"""Rows in the tables and columns that versions 2 to 7 of the schema have added."""


def create(state: Path, version: int, rows: str) -> None:
    """Create a ledger with the schema of an earlier version, and these rows."""
    state.mkdir(exist_ok=True)
    with contextlib.closing(sqlite3.connect(state / FILE_NAME, isolation_level=None)) as db:
        for migration in MIGRATIONS[:version]:
            db.executescript(migration.read_text("utf-8"))
        db.executescript(rows)
        db.execute(f"PRAGMA user_version = {version}")
        db.execute("PRAGMA journal_mode = WAL")
    (state / LOCK_NAME).write_text("4711\n")  # as a daemon that was killed leaves it


def many_rows(count: int) -> str:
    """Return SQL for many archives in the first schema, to make a migration long."""
    return f"""
        WITH RECURSIVE number (n) AS (SELECT 100 UNION ALL SELECT n + 1 FROM number WHERE n < {100 + count})
        INSERT INTO archive (id, drop_name, relpath, device, inode, size, mtime_ns, ctime_ns, admitted_at)
        SELECT n, 'switches', CAST(n AS BLOB), 1, n, 3, 1, 1, {AT} + n FROM number;
        INSERT INTO delivery (id, archive_id, destination, size, due_at)
        SELECT 'many-' || id, id, 'many', size, admitted_at FROM archive WHERE id >= 100;
    """
