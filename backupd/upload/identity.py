"""What a destination's connections show and trust: the certificate, its key and the authorities.

The last pair that could be used is kept: a renewal that went wrong must not stop deliveries.
"""

from __future__ import annotations

import os
import ssl
import threading
from contextlib import suppress
from pathlib import Path

from backupd.config.destination import DestinationConfig
from backupd.core.errors import BackupdError
from backupd.upload.tls import make_context

_State = tuple[tuple[int, int, int] | None, ...]


class Identity:
    """The TLS context of a destination, shared by its uploaders and replaced when its files are."""

    def __init__(self, config: DestinationConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        with suppress(BackupdError):  # told by the look at the files, or by the first upload
            self._context = self._make()
        self._state = self._look()
        self.renewals = 0
        """How often the context was replaced; connections of another one are to be closed."""
        self.server_expires: float | None = None
        """When the certificate expires that the destination showed last, in seconds since the epoch."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files that it is made of."""
        config = self._config
        named = (config.ca, config.cert, config.key, config.key_password_file)
        return tuple(path for path in named if path is not None)

    def context(self) -> ssl.SSLContext:
        """Return the context in force; raises TlsFilesError where none could be made yet."""
        with self._lock:
            if self._context is None:
                self._context = self._make()
            return self._context

    def has_new_files(self) -> bool:
        """Tell whether the files changed since this was last asked."""
        before, self._state = self._state, self._look()
        return self._state != before

    def renew(self) -> None:
        """Make a context of the files as they are; raises TlsFilesError, and keeps what it has."""
        context = self._make()
        with self._lock:
            self._context = context
            self.renewals += 1

    def _make(self) -> ssl.SSLContext:
        config = self._config
        return make_context(config, http2=config.http2, tls_min=config.tls_min)

    def _look(self) -> _State:
        return tuple(_state_of(path) for path in self.files)


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns  # which a chmod changes, too
