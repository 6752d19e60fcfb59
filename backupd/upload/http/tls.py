"""What a destination's connections show and trust: the certificate, its key and the authorities.

The last pair that could be used is kept: a renewal that went wrong must not stop deliveries.
"""

from __future__ import annotations

import os
import ssl
import threading
from contextlib import suppress
from pathlib import Path

from backupd.config.files import key_password
from backupd.config.models import HttpDestinationConfig, TlsFiles
from backupd.core.errors import BackupdError, ConfigError


class TlsFilesError(ConfigError):
    """The CA, certificate or key can't be used."""


def make_context(files: TlsFiles, *, http2: bool = False, tls_min: str = "1.2") -> ssl.SSLContext:
    """Return a context that trusts the given CA and shows our certificate.

    The chain and the host name are always checked. Raises TlsFilesError with the file's name.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not create_default_context: it heeds SSLKEYLOGFILE
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if tls_min == "1.3" else ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2", "http/1.1"] if http2 else ["http/1.1"])
    _trust(context, files.ca)
    if files.cert is not None and files.key is not None:
        _identify(context, files.cert, files.key, files.key_password_file)
    return context


def _trust(context: ssl.SSLContext, ca: Path | None) -> None:
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return
    try:
        context.load_verify_locations(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise TlsFilesError(f"{ca}: no usable CA ({_words(error)})", "it has to be a PEM file") from error


def _identify(context: ssl.SSLContext, cert: Path, key: Path, password_file: Path | None) -> None:
    def password() -> bytes:
        if password_file is None:  # else OpenSSL would ask on the terminal
            raise TlsFilesError(f"{key}: is encrypted", "name its password's file in `key_password_file`")
        try:
            return key_password(password_file)
        except OSError as error:
            raise TlsFilesError(
                f"{password_file}: the password of {key} can't be read ({error.strerror})",
                "check the file and its owner",
            ) from error

    try:
        context.load_cert_chain(cert, key, password=password)
    except (OSError, ssl.SSLError) as error:
        raise TlsFilesError(
            f"{cert}, {key}: no usable certificate and key ({_words(error)})",
            "both have to be PEM files and belong together; `backupd check` tells more",
        ) from error


def _words(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or str(error)


_State = tuple[tuple[int, int, int] | None, ...]


class ReloadingTlsContext:
    """The TLS context of a destination, shared by its uploaders and replaced when its files are."""

    def __init__(self, config: HttpDestinationConfig) -> None:
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

    def files_changed(self) -> bool:
        """Tell whether the files changed since this was last asked."""
        before, self._state = self._state, self._look()
        return self._state != before

    def reload(self) -> None:
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
