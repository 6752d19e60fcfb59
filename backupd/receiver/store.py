"""The folder of stored archives, and the index that knows their receipts and idempotency keys.

    <store>/archives/sw1-2026-05-01.9f86d081884c7d65.tar.gz   the name, and the digest's beginning
    <store>/incoming/                                         uploads that aren't complete yet
    <store>/index.sqlite                                      receipts, fields, idempotency keys

The archive comes first and the index second: data synced, renamed, folder synced, then one SQLite
commit, then the answer. A crash in between leaves an archive that the index doesn't know; its name
follows from its content, so the client's next attempt lands on the same name and not beside it.
SQLite rather than a receipt file beside each archive, because key and receipt must appear together
and one commit costs one sync where files would cost four. What the index says is believed only
while the archive is there, with its size: who removes an archive may send it again.
"""

import fcntl
import hashlib
import json
import os
import re
import sqlite3
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from backupd.core.errors import ConfigError
from backupd.receiver.incoming import Incoming, full_disk_reported

_SCHEMA = """
CREATE TABLE IF NOT EXISTS archive (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, size INTEGER NOT NULL, sha256 TEXT NOT NULL,
    fields TEXT NOT NULL, stored_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT;
CREATE INDEX IF NOT EXISTS archive_by_digest ON archive (sha256, name);
CREATE TABLE IF NOT EXISTS idempotency_key (
    key TEXT PRIMARY KEY, archive TEXT NOT NULL, sha256 TEXT NOT NULL
) STRICT;
"""
_SUFFIX = re.compile(r"(\.tar)?\.[A-Za-z0-9]{1,8}$")
_UNPLEASANT = re.compile(r"[^\w.+@=-]+")
_NAME_MAX = 255
"""Bytes; what Linux filesystems allow for one name."""


class KeyReusedError(Exception):
    """The idempotency key was used for other content."""


class DigestMismatchError(Exception):
    """What arrived isn't what the client says it sent."""


@dataclass(frozen=True, slots=True)
class StoredReceipt:
    """What is stored: `id` is the name in the `archives` folder, `name` the one the client gave."""

    id: str
    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A receipt, and whether this upload is the one that stored it."""

    receipt: StoredReceipt
    new: bool


@dataclass(slots=True)
class Arrival:
    """A complete upload, waiting to be settled; `outcome` is what became of it."""

    incoming: Incoming
    name: str
    key: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    outcome: Stored | Exception | None = None


class Store:
    """Keeps archives, each once, and answers for them; one process at a time has it open."""

    def __init__(self, folder: Path) -> None:
        self.archives = folder / "archives"
        self._incoming = folder / "incoming"
        self._lock = Lock()
        self._waiting: deque[Arrival] = deque()
        self._folder_fd = _open_locked(folder)
        try:
            self._prepare()
            self._index = _open_index(folder / "index.sqlite")
            os.fsync(self._folder_fd)
        except (OSError, sqlite3.Error) as error:
            os.close(self._folder_fd)
            raise ConfigError(f"{folder}: the store can't be used: {error}") from error

    def incoming(self) -> Incoming:
        """Begin a new upload."""
        return Incoming(self._incoming)

    def keep(self, arrival: Arrival) -> Stored:
        """Store the arrival durably, or find that it was; raise KeyReusedError, StoreFullError.

        Arrivals that come at the same time are settled together, by the thread that gets there first:
        they share one sync of the folder and one commit.
        """
        arrival.incoming.sync()
        arrival.sha256 = arrival.incoming.sha256
        self._waiting.append(arrival)
        with self._lock:
            if arrival.outcome is None:
                self._settle([self._waiting.popleft() for _ in range(len(self._waiting))])
        if isinstance(arrival.outcome, Stored):
            return arrival.outcome
        raise arrival.outcome or AssertionError("settled without an outcome")

    def find(self, sha256: str) -> StoredReceipt | None:
        """Return the receipt of a stored archive with this digest."""
        with self._lock:
            return self._find("sha256 = ?", sha256)

    def close(self) -> None:
        """Close the index and let the next process in; closing twice does no harm."""
        with self._lock:
            self._index.close()
            if self._folder_fd >= 0:
                os.close(self._folder_fd)
                self._folder_fd = -1

    def _prepare(self) -> None:
        """Make the folders, and remove what a crash has left half received."""
        self.archives.mkdir(exist_ok=True)
        self._incoming.mkdir(exist_ok=True)
        for leftover in self._incoming.iterdir():
            leftover.unlink(missing_ok=True)

    def _settle(self, arrivals: list[Arrival]) -> None:
        try:
            with full_disk_reported(), _transaction(self._index):
                for arrival in arrivals:
                    arrival.outcome = self._settled(arrival)
                if any(isinstance(arrival.outcome, Stored) and arrival.outcome.new for arrival in arrivals):
                    _sync_folder(self.archives)
        except Exception as error:  # noqa: BLE001 - each of the waiting threads raises it
            for arrival in arrivals:
                arrival.outcome = error

    def _settled(self, arrival: Arrival) -> Stored | Exception:
        key, sha256 = arrival.key, arrival.sha256
        used = self._index.execute(
            "SELECT archive, sha256 FROM idempotency_key WHERE key = ?", (key,)
        ).fetchone()
        if used and used[1] != sha256:
            return KeyReusedError(f"the idempotency key was used for content with sha256 {used[1]}")
        receipt = self._find("sha256 = ? AND (id = ? OR name = ?)", sha256, used and used[0], arrival.name)
        try:
            stored = Stored(receipt, new=False) if receipt else Stored(self._place(arrival), new=True)
        except OSError as error:
            return error  # of this archive alone; those that came with it are stored
        if key is not None:
            self._index.execute(
                "INSERT OR REPLACE INTO idempotency_key VALUES (?, ?, ?)", (key, stored.receipt.id, sha256)
            )
        return stored

    def _place(self, arrival: Arrival) -> StoredReceipt:
        """Give the archive its final name, and record it."""
        sha256 = arrival.sha256
        target = self.archives / stored_name(arrival.name, sha256[:16])
        if target.exists() and _digest_of(target) != sha256:
            # Two digests with one beginning, or somebody has changed the archive: never overwrite it.
            target = self.archives / stored_name(arrival.name, sha256)
        os.rename(arrival.incoming.path, target)
        receipt = StoredReceipt(target.name, arrival.name, arrival.incoming.size, sha256)
        self._index.execute(
            "INSERT OR REPLACE INTO archive (id, name, size, sha256, fields) VALUES (?, ?, ?, ?, ?)",
            (receipt.id, receipt.name, receipt.size, receipt.sha256, json.dumps(dict(arrival.fields))),
        )
        return receipt

    def _find(self, condition: str, *parameters: str | None) -> StoredReceipt | None:
        """Return the first receipt that meets the condition and whose archive is there."""
        rows = self._index.execute(
            f"SELECT id, name, size, sha256 FROM archive WHERE {condition}",  # noqa: S608 - ours, no input
            parameters,
        )
        return next((receipt for row in rows.fetchall() if self._holds(receipt := StoredReceipt(*row))), None)

    def _holds(self, receipt: StoredReceipt) -> bool:
        try:
            return (self.archives / receipt.id).stat().st_size == receipt.size
        except FileNotFoundError:
            return False


def stored_name(name: str, digest: str) -> str:
    """Return a file name that a person recognises and that can do no harm, whatever the client sent.

    Folders become `_`, and so do blanks, control characters and what a shell would act on; it doesn't
    begin with a dot or a dash and fits in 255 bytes. The digest goes before the suffix.
    """
    plain = _UNPLEASANT.sub("_", unicodedata.normalize("NFC", name)).lstrip("._-") or "archive"
    suffix = match.group() if (match := _SUFFIX.search(plain, 1)) else ""
    stem = plain.removesuffix(suffix).encode()
    room = _NAME_MAX - len(f".{digest}{suffix}")
    return f"{stem[:room].decode(errors='ignore')}.{digest}{suffix}"


def _open_locked(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{folder}: the store can't be used: {error}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"{folder}: another receiver has this store open", "stop it first") from error
    return fd


def _open_index(path: Path) -> sqlite3.Connection:
    index = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        index.execute("PRAGMA journal_mode = WAL")
        index.execute("PRAGMA synchronous = FULL")
        index.executescript(_SCHEMA)
    except sqlite3.Error:
        index.close()
        raise
    return index


@contextmanager
def _transaction(index: sqlite3.Connection) -> Iterator[None]:
    index.execute("BEGIN IMMEDIATE")
    try:
        yield
        index.execute("COMMIT")
    except BaseException:
        if index.in_transaction:
            index.execute("ROLLBACK")
        raise


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
