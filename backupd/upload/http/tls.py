"""The TLS context of a destination: client certificate, private key and trusted authorities."""

from __future__ import annotations

import ssl
from functools import partial

from backupd.config.models import HttpDestinationConfig, TlsFiles
from backupd.config.reloading_context import ReloadingContext
from backupd.config.tls_loading import load_authorities, load_certificate
from backupd.core.certificate_life import Validity


class ReloadingTlsContext(ReloadingContext):
    """The TLS context of a destination, shared by its uploaders; a reload replaces it."""

    def __init__(self, config: HttpDestinationConfig) -> None:
        http2 = config.http2 and not config.proxy
        tables = (config, config.auth)  # a token endpoint's files are loaded at each use
        super().__init__(
            partial(make_context, config, http2=http2, tls_min=config.tls_min),
            (path for each in tables for path in (each.ca, each.cert, each.key, each.key_password_file)),
        )
        self.server_certificate: Validity | None = None
        """The validity of the destination's own certificate; None until seen."""


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
