"""A TLS context that is made again when its files are renewed.

A renewal that fails must not end a service, so the last context that could be made stays in use.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from backupd.core.errors import BackupdError


class ReloadingContext:
    """The TLS context that `make` returns, shared by several threads; a reload replaces it.

    `make` reads the files `paths` and raises TlsFilesError if one can't be used.
    """

    def __init__(self, make: Callable[[], ssl.SSLContext], paths: Iterable[Path | None]) -> None:
        self._make = make
        self._paths = [path for path in paths if path is not None]
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        with suppress(BackupdError):  # the file checks report it, or the first use
            self._context = make()
        self._file_states = self._stat_files()
        self.reloads = 0
        """How often the context was replaced: connections from before must not be reused."""

    def context(self) -> ssl.SSLContext:
        """Return the active context; raises TlsFilesError if none could be made yet."""
        with self._lock:
            if self._context is None:
                self._context = self._make()
            return self._context

    def files_changed(self) -> bool:
        """Return whether one of the files changed since the last call."""
        before, self._file_states = self._file_states, self._stat_files()
        return self._file_states != before

    def reload(self) -> None:
        """Make a context from the files as they are now; raises TlsFilesError and keeps the active one."""
        context = self._make()
        with self._lock:
            self._context = context
            self.reloads += 1

    def _stat_files(self) -> list[_FileState]:
        return [_file_state(path) for path in self._paths]


_FileState = tuple[int, int, int] | None


def _file_state(path: Path) -> _FileState:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns  # chmod changes the change time, too
