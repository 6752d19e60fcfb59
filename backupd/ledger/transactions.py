"""All or nothing in the ledger, what it fails with, and how several threads take turns at one connection."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from backupd.core.errors import LedgerDamagedError, LedgerError, LedgerHeldError, LedgerUnreadableError
from backupd.ledger.rows import UnreadableRowError

_PATIENCE = 5.0
"""Seconds for which another process may hold the ledger before that is said."""

_PAUSE = 0.02
"""Seconds between two attempts to begin, in which other threads may read."""


class Transactions:
    """Transactions on a connection from `open_ledger`, for several threads."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA busy_timeout = 0")  # SQLite would wait with our lock held
        self._db = connection
        self._lock = threading.Lock()
        path = connection.execute("PRAGMA database_list").fetchone()[2]
        files = (path, f"{path}-wal") if path else ()  # one in memory has none
        self._files = {file: os.stat(file) for file in files if os.path.exists(file)}

    @contextmanager
    def _transaction(self, *, durable: bool, patience: float = _PATIENCE) -> Iterator[sqlite3.Connection]:
        with failures("written"):
            self._begin(durable=durable, patience=patience)
            try:
                with _committed(self._db):
                    yield self._db
            finally:
                self._lock.release()

    def _begin(self, *, durable: bool, patience: float) -> None:
        """Take the lock and begin; while another process is waited for, the lock is free for readers."""
        until = time.monotonic() + patience
        while True:
            self._lock.acquire()
            try:
                _undo(self._db)
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE")
            except BaseException as error:
                self._lock.release()
                if not is_held(error) or time.monotonic() > until:
                    raise
            else:
                return
            time.sleep(_PAUSE)

    def check_files(self) -> None:
        """See `Ledger.check_files`."""
        for path, status in self._files.items():
            try:
                if os.path.samestat(os.stat(path), status):
                    continue
            except OSError:
                pass  # it is not there, as far as we may see
            raise LedgerError(
                f"{path} was removed or replaced under the daemon",
                "restart it: it goes on, but what it records now is lost then, and commands see nothing",
            )

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, failures("read"):
            yield self._db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Commit what is done within, all of it or nothing; raises as `failures`."""
    with failures("written"):
        _undo(db)
        db.execute("BEGIN IMMEDIATE")
        with _committed(db):
            yield


@contextmanager
def _committed(db: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        _undo(db)
        raise


def _undo(db: sqlite3.Connection) -> None:
    """Roll back what is open: nothing where SQLite did, the disk being full; again where that failed."""
    if db.in_transaction:
        db.execute("ROLLBACK")


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Raise what goes wrong with a ledger that was open; `what` is what can't be done: read, written."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if is_damage(error):
            kind = LedgerUnreadableError if _is_unreadable(error) else LedgerDamagedError
            raise kind(
                f"the ledger is damaged: {error}",
                "the daemon ends; the next start checks the ledger, puts a damaged one aside and begins"
                " anew from the folders; look at the disk of `state_dir`",
            ) from error
        says = f"the ledger can't be {what}: {error}"
        if is_held(error):
            hint = "another process holds it: `fuser` tells which; it goes on once that lets go"
            raise LedgerHeldError(says, hint) from error
        raise LedgerError(says, "check the disk of `state_dir`") from error


def is_damage(error: sqlite3.Error | UnicodeDecodeError) -> bool:
    """Tell whether it is the file that is at fault, or what it holds."""
    return type(error) is sqlite3.DatabaseError or _is_unreadable(error)


def _is_unreadable(error: sqlite3.Error | UnicodeDecodeError) -> bool:
    """Tell whether a table is lost, a text is no UTF-8, a time none, a rule of the schema broken."""
    if type(error) is sqlite3.OperationalError:  # others of its kind: locked, full, read-only
        return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR
    # UnicodeDecodeError: SQLite's own words name what is damaged
    return isinstance(error, (sqlite3.IntegrityError, UnreadableRowError, UnicodeDecodeError))


def is_held(error: BaseException) -> bool:
    """Tell whether another process holds the ledger."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_BUSY
