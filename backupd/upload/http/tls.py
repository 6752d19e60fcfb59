"""The TLS context of a destination: client certificate, private key and trusted authorities.

A renewal that fails must not stop deliveries, so the last context that could be made stays in use.
"""

from __future__ import annotations

import os
import ssl
import threading
from contextlib import suppress
from pathlib import Path

from backupd.config.certificate_files import key_password
from backupd.config.models import HttpDestinationConfig, TlsFiles
from backupd.core.certificate_life import Validity
from backupd.core.errors import BackupdError, ConfigError


class TlsFilesError(ConfigError):
    """The CA, the certificate or the private key can't be used."""


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
        config = self._config
        paths = (config.ca, config.cert, config.key, config.key_password_file)
        return tuple(_file_state(path) for path in paths if path is not None)


def make_context(files: TlsFiles, *, http2: bool = False, tls_min: str = "1.2") -> ssl.SSLContext:
    """Return a context that trusts the given CA and presents the client certificate.

    The certificate chain and the host name are always checked. Raises TlsFilesError with the file's name.
    """
    # not create_default_context: it writes the session keys to the file in SSLKEYLOGFILE
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if tls_min == "1.3" else ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2", "http/1.1"] if http2 else ["http/1.1"])
    _load_authorities(context, files.ca)
    if files.cert is not None and files.key is not None:
        context.post_handshake_auth = True  # some servers ask for the certificate once they know the path
        _load_certificate(context, files.cert, files.key, files.key_password_file)
    return context


def _load_authorities(context: ssl.SSLContext, ca: Path | None) -> None:
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return
    # `ca` may be the authority that issued the server's certificate, or that certificate, and not the root
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise TlsFilesError(
            f"{ca}: no usable CA certificate ({_error_text(error)})", "name a PEM file in `ca`"
        ) from error


def _load_certificate(context: ssl.SSLContext, cert: Path, key: Path, password_file: Path | None) -> None:
    def password() -> bytes:
        if password_file is None:  # without this callback OpenSSL would prompt on the terminal
            raise TlsFilesError(f"{key}: is encrypted", "name its password file in `key_password_file`")
        try:
            return key_password(password_file)
        except OSError as error:
            raise TlsFilesError(
                f"{password_file}: the password of {key} can't be read ({error.strerror})",
                "let the daemon's user read the file",
            ) from error

    try:
        context.load_cert_chain(cert, key, password=password)
    except (OSError, ssl.SSLError) as error:
        raise TlsFilesError(
            f"{cert}, {key}: no usable certificate and key ({_error_text(error)})",
            "both must be PEM files of one pair; run `backupd check` for details",
        ) from error


def _error_text(error: OSError) -> str:
    if "KEY_VALUES_MISMATCH" in str(error):
        return "the key is not that of the first certificate"
    if "PEM lib" in str(error) or "PEM_LIB" in str(error):
        return "not in PEM, damaged, or encrypted with another password"
    return getattr(error, "reason", None) or error.strerror or str(error)


_FileState = tuple[int, int, int] | None


def _file_state(path: Path) -> _FileState:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns  # chmod changes the change time, too
