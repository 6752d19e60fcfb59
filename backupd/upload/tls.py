"""The TLS context of a destination: its own CA, our certificate, and nothing that can be turned off."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Protocol

from backupd.config.key_password import key_password
from backupd.core.errors import ConfigError


class TlsFilesError(ConfigError):
    """The CA, certificate or key can't be used."""


class TlsFiles(Protocol):
    """The part of a configuration that names files for TLS."""

    @property
    def ca(self) -> Path | None:
        """Return the PEM file of the authorities to trust; None for the system's."""
        ...

    @property
    def cert(self) -> Path | None:
        """Return the PEM file of our certificate."""
        ...

    @property
    def key(self) -> Path | None:
        """Return the PEM file of its key."""
        ...

    @property
    def key_password_file(self) -> Path | None:
        """Return the file of the key's password."""
        ...


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
