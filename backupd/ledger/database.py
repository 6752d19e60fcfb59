"""Opening the SQLite file: one daemon at a time, migrated, checked after an unclean end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Self

from backupd.core.errors import LedgerDamagedError, LedgerError, LedgerUnreadableError
from backupd.ledger.transactions import is_damage

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
            self.is_first = not self._path.exists()
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
        self.is_hopeless = left == _UNREADABLE
        """Whether the last daemon found in the ledger what can't be read, whatever a check says."""
        self.ended_well = True
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
        self.release(clean=kind is None and self.ended_well)


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
class Opened:
    """A connection to the ledger, where a damaged predecessor was put aside, and whether there was none."""

    connection: sqlite3.Connection
    set_aside: Path | None = None
    is_new: bool = False


def open_ledger(state_dir: Path, *, check: str = "", hopeless: bool = False) -> Opened:
    """Open or create the ledger and bring its schema up to date.

    A file that SQLite can't read, or that has lost its content, is renamed, never deleted, and an empty
    ledger begun: what it knew of pending archives is found again in the drop folders. So is one that is
    `hopeless`; `check` is the PRAGMA that SQLite is to check it by, if any. Raises LedgerError for a schema
    of a newer version, and for what the operator must mend (permissions, disk).
    """
    path = state_dir / FILE_NAME
    try:
        is_new = not path.exists()
        is_lost = _is_emptied(path) or (is_new and _wal_of(path).exists()) or (hopeless and not is_new)
        aside = _set_aside(path) if is_lost else None
        try:
            return Opened(_connect(path, check=check), aside, is_new)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if not is_damage(error):
                raise
        aside = _set_aside(path)
        return Opened(_connect(path, check=""), aside)
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


def _set_aside(path: Path) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    return aside


def _load_scripts() -> tuple[tuple[int, str], ...]:
    folder = resources.files("backupd.ledger") / "migrations"
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
