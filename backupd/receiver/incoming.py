"""An archive on its way in: hashed as it comes, under a temporary name."""

import errno
import hashlib
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock


class StoreFullError(Exception):
    """There is no space left for the archive."""


class Incoming:
    """A temporary file in `folder`, made at the first write.

    Its methods block, so they are called in threads; `discard` may come while another one is at work.
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
        """The digest of what has come so far, in hex."""
        return self._hash.hexdigest()

    def write(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Append the pieces; raise StoreFullError."""
        with self._lock, full_disk_reported():
            fd = self._opened()
            for piece in pieces:
                self._hash.update(piece)
                self.size += len(piece)
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(fd, rest) :]

    def sync(self) -> None:
        """Bring everything to the disk; raise StoreFullError."""
        with self._lock, full_disk_reported():
            os.fsync(self._opened())

    def discard(self) -> None:
        """Close the file, and remove it unless it was stored meanwhile."""
        with self._lock:
            self._discarded = True
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                self.path.unlink(missing_ok=True)

    def _opened(self) -> int:
        if self._discarded:
            raise FileNotFoundError(errno.ENOENT, "the upload was given up", str(self.path))
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return self._fd


@contextmanager
def full_disk_reported() -> Iterator[None]:
    """Raise StoreFullError for what the system and SQLite say when there is no space."""
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
