"""The TLS context of a destination: its own CA, our certificate, and nothing that can be turned off."""

from __future__ import annotations

import ssl
from pathlib import Path

from backupd.config.certificates import key_password
from backupd.config.models import DestinationConfig
from backupd.core.errors import ConfigError


class TlsFilesError(ConfigError):
    """The CA, certificate or key can't be used."""


def make_context(config: DestinationConfig) -> ssl.SSLContext:
    """Return a context that trusts the destination's CA and shows our certificate.

    TLS 1.2 at least, host name checked. Without `ca` the system's CAs are trusted. Raises TlsFilesError
    with the file's name.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not create_default_context: it heeds SSLKEYLOGFILE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2", "http/1.1"] if config.http2 else ["http/1.1"])
    _trust(context, config.ca)
    if config.cert is not None and config.key is not None:
        _identify(context, config.cert, config.key, config.key_password_file)
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
        return key_password(password_file)

    try:
        context.load_cert_chain(cert, key, password=password)
    except (OSError, ssl.SSLError) as error:
        raise TlsFilesError(
            f"{cert}, {key}: no usable certificate and key ({_words(error)})",
            "both have to be PEM files and belong together; `backupd check` tells more",
        ) from error


def _words(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or str(error)
