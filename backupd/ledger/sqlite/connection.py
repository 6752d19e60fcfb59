"""Opening the SQLite file: one daemon at a time, migrated, checked after an unclean end."""

from __future__ import annotations

import contextlib
import fcntl
import os
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

from backupd.core.errors import LedgerDamagedError, LedgerError, LedgerHeldError, LedgerUnreadableError
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

Row = tuple[Any, ...]
P = ParamSpec("P")
T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

ARCHIVE_COLUMNS = "id, drop_name, relpath, device, inode, size, mtime_ns, ctime_ns, admitted_at"


def to_micros(time: datetime) -> int:
    """Return microseconds since the epoch."""
    return (time - _EPOCH) // _MICROSECOND


class UnreadableRowError(sqlite3.DatabaseError):
    """A row holds a value that none of ours can be."""


def convert_row(convert: Callable[P, T]) -> Callable[P, T]:
    """Have a conversion of what was read raise UnreadableRowError for what can't be converted."""

    @wraps(convert)
    def converted(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return convert(*arguments, **named)
        except (ValueError, TypeError, OverflowError, AttributeError) as error:
            raise UnreadableRowError(str(error)) from error

    return converted


@convert_row
def as_time(micros: int) -> datetime:
    """Return the UTC time of microseconds since the epoch."""
    return _EPOCH + micros * _MICROSECOND


def time_if_any(micros: int | None) -> datetime | None:
    """Return the UTC time of microseconds since the epoch, if any."""
    return None if micros is None else as_time(micros)


@convert_row
def path_if_any(path: object) -> bytes | None:
    """Return a path, if any."""
    if not isinstance(path, bytes | None):
        raise TypeError("a path of another type")
    return path


@convert_row
def as_archive(row: Row) -> Archive:
    """Return the archive of a row of `ARCHIVE_COLUMNS`."""
    if not (isinstance(row[1], str) and isinstance(row[2], bytes)):
        raise TypeError("a drop's name or a path of another type")
    return Archive(row[0], row[1], row[2], Fingerprint(*map(int, row[3:8])), as_time(row[8]))


def as_stored(number: int) -> int | bytes:
    """Return a number as it is; one that SQLite's 64 bits don't hold as its digits, in bytes.

    Network filesystems have inodes of 64 bits without a sign, and a time after 2262 more nanoseconds.
    """
    return number if -(1 << 63) <= number < 1 << 63 else b"%d" % number


def fingerprint_columns(f: Fingerprint) -> Row:
    """Return device, inode, size and times, as they are stored."""
    return tuple(map(as_stored, (f.device, f.inode, f.size, f.mtime_ns, f.ctime_ns)))


@convert_row
def as_ending(row: Row) -> DeliveryResult:
    """Return how a delivery ended."""
    ident, destination, state, ended_at, digest, verified, http_status, reason, error, receipt = row
    return DeliveryResult(
        ident,
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


def delivery_row(finished: ClaimResult, now: datetime) -> Row:
    """Return the values of a delivery's update, its id last."""
    delivery, step = finished.delivery, finished.transition
    pending = step.state is DeliveryState.PENDING
    reason, error, http_status = _why(step.outcome)
    digest = verified = receipt = None
    if isinstance(step.outcome, Delivered):
        digest, verified = str(step.outcome.digest), step.outcome.verified
        receipt = storable_text(step.outcome.receipt.body)
    elif isinstance(step.outcome, Deferred) and step.outcome.unconfirmed_digest is not None:
        digest = str(step.outcome.unconfirmed_digest)
    return (
        step.state,
        to_micros(step.due_at or now) if pending else None,
        step.archive_failures,
        step.destination_failures,
        delivery.attempts + len(finished.attempts),
        None if pending else to_micros(now),
        reason,
        error,
        digest,
        verified,
        http_status,
        receipt,
        delivery.id,
    )


def attempt_row(delivery_id: str, number: int, attempt: Attempt) -> Row:
    """Return the row of an attempt."""
    reason, error, http_status = _why(attempt.outcome)
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


def _why(outcome: Outcome) -> tuple[str | None, str | None, int | None]:
    match outcome:
        case Delivered(receipt=receipt):
            return None, None, receipt.http_status
        case Superseded(error=error):
            return None, storable_text(error), None
        case Deferred(reason=reason, error=error, http_status=status):
            return reason, storable_text(error), status
        case Rejected(reason=reason, error=error, http_status=status):
            return reason, storable_text(error), status


def storable_text(text: str) -> str:
    """Return a text as valid Unicode: one that is none must not keep an outcome from being recorded."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


LOCK_TIMEOUT = 5.0
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
    def _transaction(self, *, durable: bool, lock_timeout: float = LOCK_TIMEOUT) -> Iterator[sqlite3.Connection]:
        with failures("written"):
            self._begin(durable=durable, lock_timeout=lock_timeout)
            try:
                with _committed(self._db):
                    yield self._db
            finally:
                self._lock.release()

    def _begin(self, *, durable: bool, lock_timeout: float) -> None:
        """Take the lock and begin; while another process is waited for, the lock is free for readers."""
        until = time.monotonic() + lock_timeout
        while True:
            self._lock.acquire()
            try:
                _undo(self._db)
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE")
            except BaseException as error:
                self._lock.release()
                if not is_locked(error) or time.monotonic() > until:
                    raise
            else:
                return
            time.sleep(_PAUSE)

    def check_storage(self) -> None:
        """See `Ledger.check_storage`."""
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
        if is_locked(error):
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


def is_locked(error: BaseException) -> bool:
    """Tell whether another process holds the ledger."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_BUSY


FILE_NAME = "ledger.sqlite3"
LOCK_NAME = "backupd.lock"

_DAMAGED = b"damaged\n"
_UNREADABLE = b"unreadable\n"
"""What the lock holds after a daemon that found the ledger damaged."""


class StateLock:
    """The hold of one daemon on its state directory, which also tells how the last one ended."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / LOCK_NAME
        try:
            state_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
            self.is_first_start = not self._path.exists()
            """Whether no daemon had a ledger here before."""
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
                "give each instance a `state_dir` of its own, or stop the other one",
            ) from error
        left = os.pread(self._fd, 32, 0)
        self.check = "integrity_check" if left == _DAMAGED else "quick_check" if left else ""
        """The check of SQLite that the ledger needs, by how the last daemon ended."""
        self.must_replace = left == _UNREADABLE
        """Whether the last daemon found in the ledger what can't be read, whatever a check says."""
        self.ended_cleanly = True
        """To be set: whether what it was held for ended as it should."""
        self.damage: LedgerDamagedError | None = None
        """To be set: the damage that the ledger was found to have."""
        holder_now = f"{os.getpid()}\n".encode("ascii")
        try:
            os.pwrite(self._fd, holder_now, 0)  # never empty in between: that would be a clean end
            os.ftruncate(self._fd, len(holder_now))
        except OSError as error:
            os.close(self._fd)
            raise LedgerError(
                f"{state_dir}: can't be written ({error.strerror})", "check the disk of `state_dir`"
            ) from error

    def _lock(self) -> None:
        for _ in range(10):  # `daemon_pid` holds it for a moment
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.1)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self, *, clean: bool) -> None:
        """Let go; a clean end spares the next start the check of the ledger."""
        if clean:
            os.ftruncate(self._fd, 0)
        elif self.damage is not None:
            what = _UNREADABLE if isinstance(self.damage, LedgerUnreadableError) else _DAMAGED
            with contextlib.suppress(OSError):  # the next start checks all the same
                os.pwrite(self._fd, what, 0)
                os.ftruncate(self._fd, len(what))
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, LedgerDamagedError):
            self.damage = error
        self.release(clean=kind is None and self.ended_cleanly)


def daemon_pid(state_dir: Path) -> int | None:
    """Return the process id of the daemon that holds a state directory, or None."""
    try:
        fd = os.open(state_dir / LOCK_NAME, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        held_by = os.pread(fd, 32, 0).strip()
        return int(held_by) if held_by.isdigit() else None
    finally:
        os.close(fd)
    return None


@dataclass(frozen=True, slots=True)
class OpenedLedger:
    """A connection to the ledger, where a damaged predecessor was put aside, and whether there was none."""

    connection: sqlite3.Connection
    quarantined_path: Path | None = None
    is_new: bool = False


def open_ledger(state_dir: Path, *, check: str = "", must_replace: bool = False) -> OpenedLedger:
    """Open or create the ledger and bring its schema up to date.

    A file that SQLite can't read, or that has lost its content, is renamed, never deleted, and an empty
    ledger begun: what it knew of pending archives is found again in the drop folders. So is one that is
    `must_replace`; `check` is the PRAGMA that SQLite is to check it by, if any. Raises LedgerError for a schema
    of a newer version, and for what the operator must mend (permissions, disk).
    """
    path = state_dir / FILE_NAME
    try:
        is_new = not path.exists()
        is_lost = _is_emptied(path) or (is_new and _wal_of(path).exists()) or (must_replace and not is_new)
        aside = _quarantine(path) if is_lost else None
        try:
            return OpenedLedger(_connect(path, check=check), aside, is_new)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if not is_damage(error):
                raise
        aside = _quarantine(path)
        return OpenedLedger(_connect(path, check=""), aside)
    except (sqlite3.DatabaseError, OSError) as error:
        raise LedgerError(f"{path}: {error}", "check the disk and the owner of `state_dir`") from error


def open_for_reading(state_dir: Path) -> sqlite3.Connection:
    """Open the ledger beside a running daemon, for queries; raises LedgerError where there is none."""
    path = state_dir / FILE_NAME
    try:
        path.stat()
    except FileNotFoundError as error:
        raise LedgerError(
            f"{path}: no ledger here yet", "has the daemon run with this `state_dir`?"
        ) from error
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}", "run this command as the daemon's user") from error
    try:
        connection = sqlite3.connect(path, timeout=10, isolation_level=None)
        try:
            connection.execute("PRAGMA query_only = ON")
            _refuse_newer(connection, path)
        except BaseException:
            connection.close()
            raise
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{path}: {error}", "run this command as the daemon's user") from error
    return connection


def _is_emptied(path: Path) -> bool:
    """Tell whether a ledger is of no length; SQLite would take it for a new one and delete its WAL."""
    try:
        return path.stat().st_size == 0
    except FileNotFoundError:
        return False


def _wal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _connect(path: Path, *, check: str) -> sqlite3.Connection:
    created = _create(path)
    try:
        return _opened(path, check=check)
    except BaseException:
        if created and _is_emptied(path):
            path.unlink()
        raise


def _create(path: Path) -> bool:
    """Make the file with the mode that SQLite then gives the WAL too; return False where there is one."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
    except FileExistsError:
        return False
    try:
        os.fchmod(fd, 0o640)
    finally:
        os.close(fd)
    return True


def _opened(path: Path, *, check: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA cache_size = -512")  # KiB; it was 2 MiB, of which little was ever used
        connection.execute("PRAGMA synchronous = FULL")
        if check and connection.execute(f"PRAGMA {check}(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("database disk image is malformed")
        _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _quarantine(path: Path) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    return aside


def _load_scripts() -> tuple[tuple[int, str], ...]:
    folder = resources.files("backupd.ledger.sqlite") / "migrations"
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return tuple(
        (int(e.name.split("_")[0]), e.read_text("utf-8")) for e in entries if e.name.endswith(".sql")
    )


_SCRIPTS = _load_scripts()
"""Number and text of each migration; read at once, as an upgrade may replace the files under a daemon."""


def _refuse_newer(connection: sqlite3.Connection, path: Path) -> int:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    newest = _SCRIPTS[-1][0]
    if version > newest:
        raise LedgerError(
            f"{path}: schema version {version}, this backupd knows up to {newest}",
            "install the version of backupd that wrote it, or a newer one",
        )
    return version


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = _refuse_newer(connection, path)
    for number, script in _SCRIPTS:
        if number > version:
            connection.executescript(f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {number};\nCOMMIT;")
