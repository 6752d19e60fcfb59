"""The SQLite file of the ledger: its lock, schema, transactions, errors and row formats."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import wraps
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from backupd.core.errors import (
    LedgerDamagedError,
    LedgerError,
    LedgerFullError,
    LedgerHeldError,
    LedgerUnreachableError,
    LedgerUnreadableError,
)
from backupd.core.model import (
    Archive,
    Attempt,
    Deferred,
    Delivered,
    DeliveryState,
    Fingerprint,
    Outcome,
    Rejected,
    Superseded,
)
from backupd.ledger.port import ClaimResult, DeliveryResult

FILE_NAME = "ledger.sqlite3"
LOCK_NAME = "backupd.lock"

ARCHIVE_COLUMNS = "id, drop_name, relpath, folder_id, inode, size, mtime_ns, ctime_ns, queued_at, host"

TOTAL_SIZE = "CAST(total(archive.size) AS INTEGER)"
"""The total size of archives; `sum` fails if it exceeds 64 bits, as that of a few sparse files may."""

LOCK_TIMEOUT = 5.0
"""Seconds for which a transaction waits for another process that holds the ledger."""

Row = tuple[Any, ...]
P = ParamSpec("P")
T = TypeVar("T")

_FIRST_LOCK_PAUSE, _MAX_LOCK_PAUSE = 0.01, 0.2
"""Seconds between two attempts to begin a transaction, in which other threads may read; each is twice the one
before."""

_PROGRESS_STEPS = 10_000
"""Steps of SQLite's virtual machine between two signs of progress; they take seconds on the slowest disk."""

_DAMAGED = b"damaged\n"
_UNREADABLE = b"unreadable\n"
"""Contents of the lock file after a daemon that found the ledger damaged."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class StateLock:
    """The exclusive lock of one daemon on its state directory, for the length of a `with` block.

    The lock file contains the process id of the daemon. After a clean end it is empty, so that it also shows
    how the last daemon ended.
    """

    def __init__(self, state_dir: Path) -> None:
        """Create the directory and take the lock; raises LedgerError if another daemon has it."""
        self._path = state_dir / LOCK_NAME
        try:
            state_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
            self.is_first_start = not self._path.exists()
            """Whether no daemon used this state directory before."""
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise LedgerError(
                f"{state_dir}: can't be written ({error.strerror})", "check `state_dir` and its owner"
            ) from error
        try:
            self._lock()
        except OSError as error:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise LedgerError(
                f"{state_dir}: another backupd (process {holder}) uses it",
                "give each instance its own `state_dir`, or stop the other one",
            ) from error
        content = os.pread(self._fd, 32, 0)
        self.check = "integrity_check" if content == _DAMAGED else "quick_check" if content else ""
        """The PRAGMA by which the ledger has to be checked after the end of the last daemon; may be empty."""
        self.must_replace = content == _UNREADABLE
        """Whether the last daemon read invalid values from the ledger, which a check may not detect."""
        self.ended_cleanly = True
        """Set by the owner to False if the daemon did not end as it should."""
        self.damage: LedgerDamagedError | None = None
        """Set by the owner if the ledger was found damaged."""
        own_pid = f"{os.getpid()}\n".encode("ascii")
        try:
            os.pwrite(self._fd, own_pid, 0)  # overwritten first, as an empty file would mean a clean end
            os.ftruncate(self._fd, len(own_pid))
        except OSError as error:
            os.close(self._fd)
            raise LedgerError(
                f"{state_dir}: can't be written ({error.strerror})", "check the disk of `state_dir`"
            ) from error

    def release(self, *, clean: bool) -> None:
        """Release the lock; after a clean end, the next start skips the check of the ledger."""
        if clean:
            os.ftruncate(self._fd, 0)
        elif self.damage is not None:
            content = _UNREADABLE if isinstance(self.damage, LedgerUnreadableError) else _DAMAGED
            with contextlib.suppress(OSError):  # the process id that remains requires a check, too
                os.pwrite(self._fd, content, 0)
                os.ftruncate(self._fd, len(content))
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, LedgerDamagedError):
            self.damage = error
        self.release(clean=kind is None and self.ended_cleanly)

    def _lock(self) -> None:
        for _ in range(10):  # `daemon_pid` of another process holds a shared lock for a moment
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.1)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def daemon_pid(state_dir: Path) -> int | None:
    """Return the process id of the daemon that holds a state directory, None if no daemon does."""
    try:
        fd = os.open(state_dir / LOCK_NAME, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        content = os.pread(fd, 32, 0).strip()
        return int(content) if content.isdigit() else None
    finally:
        os.close(fd)
    return None


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """A connection to the ledger.

    `quarantined_path` is the path to which a damaged ledger was renamed, None if none was. `is_new` is
    whether there was no ledger before.
    """

    connection: sqlite3.Connection
    quarantined_path: Path | None = None
    is_new: bool = False


def open_ledger(
    state_dir: Path,
    *,
    check: str = "",
    must_replace: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> OpenedFile:
    """Open or create the ledger and bring its schema up to date.

    A damaged ledger is renamed, never deleted, and replaced by a new one: a ledger that SQLite can't read,
    that has no bytes, or for which `must_replace` is set. Its pending archives are found again in the drop
    folders. `check` is the name of the PRAGMA by which SQLite checks the ledger, empty for none.
    `on_progress` is called during the check and the migration, which may take minutes. Raises LedgerError for
    a schema of a newer version, and if a person has to act: missing permissions, a full disk.
    """
    path = state_dir / FILE_NAME
    try:
        is_new = not path.exists()
        is_lost = _is_empty(path) or (is_new and _wal_of(path).exists()) or (must_replace and not is_new)
        quarantined_path = _rename_damaged(path) if is_lost else None
        try:
            return OpenedFile(_connect(path, check, on_progress), quarantined_path, is_new)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if not is_damage(error):
                raise
        quarantined_path = _rename_damaged(path)
        return OpenedFile(_connect(path, "", on_progress), quarantined_path)
    except (sqlite3.DatabaseError, OSError) as error:
        raise LedgerError(f"{path}: {error}", "check the disk and the owner of `state_dir`") from error


def open_for_reading(state_dir: Path) -> sqlite3.Connection:
    """Open the ledger for queries while a daemon may be running; raises LedgerError if that fails."""
    path = state_dir / FILE_NAME
    try:
        path.stat()
    except FileNotFoundError as error:
        raise LedgerError(
            f"{path}: no ledger here yet",
            "start the daemon with this `state_dir`, or give this command the configuration of the daemon",
        ) from error
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}", "run this command as the daemon's user") from error
    try:
        connection = sqlite3.connect(path, timeout=10, isolation_level=None)
        try:
            connection.execute("PRAGMA query_only = ON")
            _check_version(connection, path)
        except BaseException:
            connection.close()
            raise
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{path}: {error}", "run this command as the daemon's user") from error
    return connection


def _is_empty(path: Path) -> bool:
    """Return whether a ledger has no bytes; SQLite would take it for a new one and delete its WAL."""
    try:
        return path.stat().st_size == 0
    except FileNotFoundError:
        return False


def _wal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _rename_damaged(path: Path) -> Path:
    """Rename a damaged or empty ledger and its WAL; return the new path."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    new_path = path.with_name(f"{path.name}.damaged-{stamp}")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{new_path}{suffix}")
    return new_path


def _connect(path: Path, check: str, on_progress: Callable[[], None]) -> sqlite3.Connection:
    is_created = _create(path)
    try:
        return _prepare(path, check, on_progress)
    except BaseException:
        if is_created and _is_empty(path):
            path.unlink()
        raise


def _create(path: Path) -> bool:
    """Create the file with the mode that SQLite also gives to the WAL; return False if it exists."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
    except FileExistsError:
        return False
    try:
        os.fchmod(fd, 0o640)
    finally:
        os.close(fd)
    return True


def _prepare(path: Path, check: str, on_progress: Callable[[], None]) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    try:
        connection.set_progress_handler(on_progress, _PROGRESS_STEPS)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA cache_size = -512")  # in KiB; the default of 2 MiB is never used up
        connection.execute("PRAGMA synchronous = FULL")
        if check and connection.execute(f"PRAGMA {check}(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("database disk image is malformed")
        _migrate(connection, path)
        connection.set_progress_handler(None, 0)
    except BaseException:
        connection.close()
        raise
    return connection


def _load_migrations() -> tuple[tuple[int, str], ...]:
    folder = resources.files("backupd.ledger.sqlite") / "migrations"
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return tuple(
        (int(e.name.split("_")[0]), e.read_text("utf-8")) for e in entries if e.name.endswith(".sql")
    )


_MIGRATIONS = _load_migrations()
"""Number and script of each migration; loaded early, as an upgrade may replace the files meanwhile."""


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = _check_version(connection, path)
    connection.create_function("host_name", 0, socket.gethostname)
    for number, script in _MIGRATIONS:
        if number > version:
            connection.executescript(f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {number};\nCOMMIT;")


def _check_version(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of the schema; raises LedgerError if it is a newer one."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    newest = _MIGRATIONS[-1][0]
    if version > newest:
        raise LedgerError(
            f"{path}: it has schema version {version}, but this backupd supports only up to {newest}",
            "install the version of backupd that wrote it, or a newer one",
        )
    return version


class Transactions:
    """Transactions for several threads on one connection from `open_ledger`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA busy_timeout = 0")  # SQLite would wait while this object's lock is held
        self._db = connection
        self._lock = threading.Lock()
        self._outage: tuple[str, str] | None = None
        """Message and hint of the first error of an outage, which ends when a change is committed."""
        path = connection.execute("PRAGMA database_list").fetchone()[2]
        files = (path, f"{path}-wal") if path else ()  # a ledger in memory has no files
        self._files = {file: os.stat(file) for file in files if os.path.exists(file)}

    def check_storage(self) -> None:
        """See `Ledger.check_storage`."""
        if self._outage is not None:
            raise LedgerUnreachableError(*self._outage)
        for path, status in self._files.items():
            try:
                if os.path.samestat(os.stat(path), status):
                    continue
            except OSError:
                pass  # a file without access counts as removed
            raise LedgerError(
                f"{path} was removed or replaced while the daemon is running",
                "restart the daemon: its new records go to the removed file, which commands can't read,"
                " and are lost at its end",
            )

    @contextmanager
    def _transaction(
        self, *, durable: bool, lock_timeout: float = LOCK_TIMEOUT
    ) -> Iterator[sqlite3.Connection]:
        with self._mark_outage(), translate_errors("written"):
            self._begin(durable=durable, lock_timeout=lock_timeout)
            try:
                changes = self._db.total_changes
                with _commit_or_roll_back(self._db):
                    yield self._db
                if self._db.total_changes != changes:
                    self._outage = None
            finally:
                self._lock.release()

    def _begin(self, *, durable: bool, lock_timeout: float) -> None:
        """Take the lock and begin a transaction.

        While it waits for another process, the lock is free, so that other threads can read.
        """
        deadline, pause = time.monotonic() + lock_timeout, _FIRST_LOCK_PAUSE
        while True:
            self._lock.acquire()
            try:
                _roll_back(self._db)
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE")
            except BaseException as error:
                self._lock.release()
                if not is_locked(error) or time.monotonic() > deadline:
                    raise
            else:
                return
            time.sleep(pause)
            pause = min(2 * pause, _MAX_LOCK_PAUSE)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._mark_outage(), translate_errors("read"):
            yield self._db

    @contextmanager
    def _mark_outage(self) -> Iterator[None]:
        try:
            yield
        except LedgerUnreachableError as error:
            self._outage = self._outage or (error.message, error.hint)
            raise


@contextmanager
def _commit_or_roll_back(db: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        _roll_back(db)
        raise


def _roll_back(db: sqlite3.Connection) -> None:
    """Roll back an open transaction.

    There is none if SQLite did so itself, as for a full disk. If a rollback fails, the transaction is still
    open when the next one begins.
    """
    if db.in_transaction:
        db.execute("ROLLBACK")


class UnreadableRowError(sqlite3.DatabaseError):
    """A row contains a value that backupd never writes."""


@contextmanager
def translate_errors(operation: str) -> Iterator[None]:
    """Raise errors of SQLite in the block as LedgerError, one of its subclasses, or LedgerDamagedError.

    `operation` is the participle in the message: `read` or `written`.
    """
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if is_damage(error):
            damage = LedgerUnreadableError if _is_unreadable(error) else LedgerDamagedError
            raise damage(
                f"the ledger is damaged: {error}",
                "check the disk of `state_dir`; the daemon stops, and its next start renames a damaged ledger"
                " and recreates it from the drop folders",
            ) from error
        message = f"the ledger can't be {operation}: {error}"
        if is_locked(error):
            hint = "another process holds it: find it with `fuser` and end it; the daemon tries again"
            raise LedgerHeldError(message, hint) from error
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            raise LedgerFullError(
                message, "free space on the disk of `state_dir`: `df -h`, `df -i`"
            ) from error
        error_class = LedgerUnreachableError if is_outage(error) else LedgerError
        raise error_class(message, "check the disk of `state_dir`") from error


def is_damage(error: sqlite3.Error | UnicodeDecodeError) -> bool:
    """Return whether the cause of an error is the content of the file."""
    return type(error) is sqlite3.DatabaseError or _is_unreadable(error)


def is_locked(error: BaseException) -> bool:
    """Return whether the cause of an error is that another process holds the ledger."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_BUSY


def is_outage(error: BaseException) -> bool:
    """Return whether the cause of an error is that the disk fails to read, write or open a file."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


def _is_unreadable(error: sqlite3.Error | UnicodeDecodeError) -> bool:
    """Return whether a table is missing, a value is invalid or a constraint of the schema is broken."""
    if type(error) is sqlite3.OperationalError:  # other codes of this class: locked, full, read-only
        return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR
    # UnicodeDecodeError: SQLite's messages quote names from a damaged schema
    return isinstance(error, (sqlite3.IntegrityError, UnreadableRowError, UnicodeDecodeError))


def row_converter(convert: Callable[P, T]) -> Callable[P, T]:
    """Make a conversion of stored values raise UnreadableRowError for invalid ones."""

    @wraps(convert)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return convert(*args, **kwargs)
        except (ValueError, TypeError, OverflowError, AttributeError) as error:
            raise UnreadableRowError(str(error)) from error

    return checked


def to_micros(time: datetime) -> int:
    """Return microseconds since the epoch."""
    return (time - _EPOCH) // _MICROSECOND


@row_converter
def as_time(micros: int) -> datetime:
    """Return the UTC time of microseconds since the epoch."""
    return _EPOCH + micros * _MICROSECOND


def optional_time(micros: int | None) -> datetime | None:
    """Return the UTC time of microseconds since the epoch, None for NULL."""
    return None if micros is None else as_time(micros)


@row_converter
def optional_path(path: object) -> bytes | None:
    """Return a path, None for NULL."""
    if not isinstance(path, bytes | None):
        raise TypeError("a path is not a BLOB")
    return path


@row_converter
def as_archive(row: Row) -> Archive:
    """Return the archive of a row of `ARCHIVE_COLUMNS`."""
    if not (isinstance(row[1], str) and isinstance(row[2], bytes) and isinstance(row[9], str)):
        raise TypeError("a drop or host is not a TEXT, or a path is not a BLOB")
    folder_id, *fingerprint = map(int, row[3:8])
    return Archive(row[0], row[1], row[2], Fingerprint(*fingerprint), as_time(row[8]), folder_id, row[9])


def storable_int(number: int) -> int | bytes:
    """Return an integer if SQLite's signed 64 bits can hold it, otherwise its digits.

    Network filesystems have unsigned 64-bit inodes, and times after 2262 have more nanoseconds.
    """
    return number if -(1 << 63) <= number < 1 << 63 else b"%d" % number


def storable_text(text: str) -> str:
    """Return a text as valid Unicode without NUL, so that any database can store what a destination sends.

    NUL becomes its symbol (U+2400), which doesn't make the text longer.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\u2400")


def fingerprint_columns(folder_id: int, f: Fingerprint) -> Row:
    """Return the stored values of the drop folder's inode, and of inode, size, mtime_ns and ctime_ns."""
    return tuple(map(storable_int, (folder_id, f.inode, f.size, f.mtime_ns, f.ctime_ns)))


@row_converter
def as_delivery_result(row: Row) -> DeliveryResult:
    """Return the result of a delivery from a row with the fields of `DeliveryResult`."""
    delivery_id, destination, state, ended_at, digest, verified, http_status, reason, error, receipt = row
    return DeliveryResult(
        delivery_id,
        destination,
        DeliveryState(state),
        as_time(ended_at),
        digest,
        None if verified is None else bool(verified),
        http_status,
        reason,
        error,
        receipt,
    )


def delivery_update(result: ClaimResult, now: datetime) -> Row:
    """Return the values for the update of a delivery at the end of a claim, its id and token last."""
    delivery, transition = result.delivery, result.transition
    is_pending = transition.state is DeliveryState.PENDING
    reason, error, http_status = _error_columns(transition.outcome)
    digest = verified = receipt = None
    if isinstance(transition.outcome, Delivered):
        digest, verified = str(transition.outcome.digest), transition.outcome.verified
        receipt = storable_text(transition.outcome.receipt.body)
    elif isinstance(transition.outcome, Deferred) and transition.outcome.unconfirmed_digest is not None:
        digest = str(transition.outcome.unconfirmed_digest)
    return (
        transition.state,
        to_micros(transition.due_at or now) if is_pending else None,
        transition.archive_failures,
        transition.destination_failures,
        delivery.attempts + len(result.attempts),
        None if is_pending else to_micros(now),
        reason,
        error,
        digest,
        verified,
        http_status,
        receipt,
        delivery.id,
        delivery.claim.token,
    )


def attempt_row(delivery_id: str, number: int, attempt: Attempt) -> Row:
    """Return the row of an attempt."""
    reason, error, http_status = _error_columns(attempt.outcome)
    return (
        delivery_id,
        number,
        to_micros(attempt.started_at),
        attempt.duration // _MICROSECOND,
        attempt.sent_bytes,
        type(attempt.outcome).__name__.lower(),
        reason,
        error,
        http_status,
    )


def _error_columns(outcome: Outcome) -> tuple[str | None, str | None, int | None]:
    """Return the reason, error and HTTP status of an outcome."""
    match outcome:
        case Delivered(receipt=receipt):
            return None, None, receipt.http_status
        case Superseded(error=error):
            return None, storable_text(error), None
        case Deferred(reason=reason, error=error, http_status=status):
            return reason, storable_text(error), status
        case Rejected(reason=reason, error=error, http_status=status):
            return reason, storable_text(error), status
