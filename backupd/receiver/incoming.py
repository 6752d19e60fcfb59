"""An upload while it is received: a temporary file, hashed as it is written."""

import errno
import hashlib
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock


class StoreFullError(Exception):
    """The disk or a quota has no space left for the archive."""


class Incoming:
    """A temporary file in `folder`, created at the first write.

    The methods block, so they are called in threads. `discard` may be called while another method runs.
    """

    def __init__(self, folder: Path) -> None:
        self.size = 0
        self.path = folder / uuid.uuid4().hex
        self._hash = hashlib.sha256()
        self._fd = -1
        self._lock = Lock()
        self._discarded = False

    @property
    def sha256(self) -> str:
        """The SHA-256 of the bytes received so far, in hex."""
        return self._hash.hexdigest()

    def write(self, data: bytearray) -> None:
        """Append data; raise StoreFullError if the disk is full."""
        with self._lock, full_disk_reported():
            fd = self._open()
            self._hash.update(data)
            self.size += len(data)
            unwritten = memoryview(data)
            while unwritten:
                unwritten = unwritten[os.write(fd, unwritten) :]

    def sync(self) -> None:
        """Sync the file to disk; raise StoreFullError if the disk is full."""
        with self._lock, full_disk_reported():
            os.fsync(self._open())

    def discard(self) -> None:
        """Close the file, and remove it unless the store renamed it; later writes raise FileNotFoundError."""
        with self._lock:
            self._discarded = True
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                self.path.unlink(missing_ok=True)

    def _open(self) -> int:
        if self._discarded:
            raise FileNotFoundError(errno.ENOENT, "the upload was discarded", str(self.path))
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return self._fd


@contextmanager
def full_disk_reported() -> Iterator[None]:
    """Raise StoreFullError in place of the errors of the system and of SQLite for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFullError("there is no space left for the archive") from error
        raise
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise StoreFullError("there is no space left for the index") from error
        raise
