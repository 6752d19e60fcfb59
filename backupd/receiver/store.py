"""The folder of stored archives, and the index of their receipts and idempotency keys.

    <store>/archives/sw1-2026-05-01.9f86d081884c7d65.tar.gz   the name, with the first digits of the digest
    <store>/incoming/                                         uploads that are not complete yet
    <store>/index.sqlite                                      receipts, fields, idempotency keys

An archive is stored before it is indexed: sync the data, rename the file, sync the folder, commit in SQLite,
respond. A crash in between leaves an archive that is not in the index. Its name is derived from its content,
so the client's next attempt replaces it and creates no second copy.

The index is an SQLite database because a key and its receipt must be stored atomically: a commit needs one
sync, files beside the archives would need four. An entry is valid only while the archive exists with the
recorded size, so an archive that an operator removed can be uploaded again.
"""

import fcntl
import hashlib
import json
import os
import re
import sqlite3
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
_UNSAFE = re.compile(r"[^\w.+@=-]+")
_NAME_MAX = 255
"""Bytes in a file name on Linux filesystems."""


class KeyReusedError(Exception):
    """The idempotency key was used for other content."""


class DigestMismatchError(Exception):
    """The digest of the received bytes differs from the one in the form."""


@dataclass(frozen=True, slots=True)
class StoredReceipt:
    """A stored archive: `id` is its name in the `archives` folder, `name` the client's, `size` its bytes."""

    id: str
    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A receipt; `new` is False if an earlier upload stored the archive."""

    receipt: StoredReceipt
    new: bool


class Store:
    """Stores archives, each one once, and finds them by digest; one process at a time has it open."""

    def __init__(self, folder: Path) -> None:
        self.archives = folder / "archives"
        self._incoming = folder / "incoming"
        self._lock = Lock()
        self._folder_fd = _open_locked(folder)
        try:
            self._prepare()
            self._index = _open_index(folder / "index.sqlite")
            os.fsync(self._folder_fd)
        except (OSError, sqlite3.Error) as error:
            os.close(self._folder_fd)
            raise ConfigError(f"{folder}: the store can't be used: {error}") from error

    def incoming(self) -> Incoming:
        """Start a new upload."""
        return Incoming(self._incoming)

    def keep(self, incoming: Incoming, name: str, key: str | None, fields: Mapping[str, str]) -> Stored:
        """Store a complete upload durably, unless it was stored before.

        Raises KeyReusedError, StoreFullError or OSError, and has then changed nothing in the index.
        """
        incoming.sync()
        with self._lock, full_disk_reported(), _transaction(self._index):
            stored = self._store(incoming, name, key, fields)
            if stored.new:
                _sync_folder(self.archives)
        return stored

    def find(self, sha256: str) -> StoredReceipt | None:
        """Return the receipt of a stored archive with this SHA-256, in lower-case hex."""
        with self._lock:
            return self._find("sha256 = ?", sha256)

    def close(self) -> None:
        """Close the index and unlock the folder; a second call has no effect."""
        with self._lock:
            self._index.close()
            if self._folder_fd >= 0:
                os.close(self._folder_fd)
                self._folder_fd = -1

    def _prepare(self) -> None:
        """Create the folders, and remove the incomplete uploads that a crash left."""
        self.archives.mkdir(mode=0o700, exist_ok=True)
        self._incoming.mkdir(mode=0o700, exist_ok=True)
        for leftover in self._incoming.iterdir():
            leftover.unlink(missing_ok=True)

    def _store(self, incoming: Incoming, name: str, key: str | None, fields: Mapping[str, str]) -> Stored:
        sha256 = incoming.sha256
        used = self._index.execute(
            "SELECT archive, sha256 FROM idempotency_key WHERE key = ?", (key,)
        ).fetchone()
        if used and used[1] != sha256:
            raise KeyReusedError(f"the idempotency key was used for content with sha256 {used[1]}")
        receipt = self._find("sha256 = ? AND (id = ? OR name = ?)", sha256, used and used[0], name)
        stored = Stored(receipt or self._add(incoming, name, fields), new=receipt is None)
        if key is not None:
            self._index.execute(
                "INSERT OR REPLACE INTO idempotency_key VALUES (?, ?, ?)", (key, stored.receipt.id, sha256)
            )
        return stored

    def _add(self, incoming: Incoming, name: str, fields: Mapping[str, str]) -> StoredReceipt:
        """Rename the archive to its final name and add it to the index."""
        sha256 = incoming.sha256
        target = self.archives / stored_name(name, sha256[:16])
        if target.exists() and _digest_of(target) != sha256:
            # The stored archive was changed, or its digest has the same first digits: do not overwrite it.
            target = self.archives / stored_name(name, sha256)
        os.rename(incoming.path, target)
        receipt = StoredReceipt(target.name, name, incoming.size, sha256)
        self._index.execute(
            "INSERT OR REPLACE INTO archive (id, name, size, sha256, fields) VALUES (?, ?, ?, ?, ?)",
            (receipt.id, receipt.name, receipt.size, receipt.sha256, json.dumps(dict(fields))),
        )
        return receipt

    def _find(self, condition: str, *parameters: str | None) -> StoredReceipt | None:
        """Return the first receipt that meets an SQL condition and has an existing archive."""
        rows = self._index.execute(
            f"SELECT id, name, size, sha256 FROM archive WHERE {condition}",  # noqa: S608 -- literal clauses
            parameters,
        )
        return next((receipt for row in rows.fetchall() if self._has(receipt := StoredReceipt(*row))), None)

    def _has(self, receipt: StoredReceipt) -> bool:
        try:
            return (self.archives / receipt.id).stat().st_size == receipt.size
        except FileNotFoundError:
            return False


def stored_name(name: str, digest: str) -> str:
    """Return a safe file name that resembles the client's, with `digest` before the suffix.

    Slashes, white space, control characters and characters that are special in a shell become `_`. The result
    does not begin with a dot or a dash and fits in 255 bytes.
    """
    plain = _UNSAFE.sub("_", unicodedata.normalize("NFC", name)).lstrip("._-") or "archive"
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
    """Open the index, which other users cannot read: form fields may hold secrets."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        os.chmod(path, 0o600)  # an earlier version let others read it
    except OSError as error:
        raise ConfigError(f"{path}: the index can't be used: {error}") from error
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
