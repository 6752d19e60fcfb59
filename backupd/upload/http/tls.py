"""The TLS context of a destination: client certificate, private key and trusted authorities.

A renewal that fails must not stop deliveries, so the last context that could be made stays in use.
"""

from __future__ import annotations

import os
import ssl
import threading
from contextlib import suppress
from pathlib import Path

from backupd.config.models import HttpDestinationConfig, TlsFiles
from backupd.config.tls_loading import load_authorities, load_certificate
from backupd.core.certificate_life import Validity
from backupd.core.errors import BackupdError


class ReloadingTlsContext:
    """The TLS context of a destination, shared by its uploaders; a reload replaces it."""

    def __init__(self, config: HttpDestinationConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        with suppress(BackupdError):  # the file checks report it, or the first upload
            self._context = self._make_context()
        self._file_states = self._stat_files()
        self.reloads = 0
        """How often the context was replaced: connections from before must not be reused."""
        self.server_certificate: Validity | None = None
        """The validity of the destination's own certificate; None until seen."""

    def context(self) -> ssl.SSLContext:
        """Return the active context; raises TlsFilesError if none could be made yet."""
        with self._lock:
            if self._context is None:
                self._context = self._make_context()
            return self._context

    def files_changed(self) -> bool:
        """Return whether one of the files changed since the last call."""
        before, self._file_states = self._file_states, self._stat_files()
        return self._file_states != before

    def reload(self) -> None:
        """Make a context from the files as they are now; raises TlsFilesError and keeps the active one."""
        context = self._make_context()
        with self._lock:
            self._context = context
            self.reloads += 1

    def _make_context(self) -> ssl.SSLContext:
        config = self._config
        return make_context(config, http2=config.http2 and not config.proxy, tls_min=config.tls_min)

    def _stat_files(self) -> tuple[_FileState, ...]:
        tables = (self._config, self._config.auth)  # a token endpoint's files are loaded at each use
        paths = (path for each in tables for path in (each.ca, each.cert, each.key, each.key_password_file))
        return tuple(_file_state(path) for path in paths if path is not None)


def make_context(files: TlsFiles, *, http2: bool = False, tls_min: str = "1.2") -> ssl.SSLContext:
    """Return a context that trusts the given CA and presents the client certificate.

    The certificate chain and the host name are always checked. Raises TlsFilesError with the file's name.
    """
    # not create_default_context: it writes the session keys to the file in SSLKEYLOGFILE
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if tls_min == "1.3" else ssl.TLSVersion.TLSv1_2
    context.set_ciphers("DEFAULT")  # OpenSSL's, as curl has: Python's own list has fewer for TLS 1.2
    context.set_alpn_protocols(["h2", "http/1.1"] if http2 else ["http/1.1"])
    # some servers ask for the certificate once they know the path
    context.post_handshake_auth = files.cert is not None
    load_authorities(context, files.ca)
    load_certificate(context, files)
    return context


_FileState = tuple[int, int, int] | None


def _file_state(path: Path) -> _FileState:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns  # chmod changes the change time, too
