"""A throw-away PKI in a folder, for tests that use real TLS."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)


class KeyPair(NamedTuple):
    """A certificate with its chain, and its key; both PEM files."""

    cert: Path
    key: Path


class Pki:
    """One CA, a server certificate for localhost and 127.0.0.1, a client certificate, and more on demand.

    `ca_pem` verifies both sides. Every certificate and key is a file in `folder`.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._ca = trustme.CA()
        self.ca_pem = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca_pem)
        self.server_cert, self.server_key = self.issue_server()
        self.client_cert, self.client_key = self.issue_client()

    def issue_server(
        self,
        name: str = "server",
        identities: tuple[str, ...] = ("localhost", "127.0.0.1"),
        *,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> KeyPair:
        """Issue `<name>.pem` and `<name>.key` for a server."""
        return self._issue(name, identities, not_before, not_after)

    def issue_client(
        self,
        name: str = "client",
        *,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> KeyPair:
        """Issue `<name>.pem` and `<name>.key` for a client with the common name `name`."""
        return self._issue(name, (f"{name}.test",), not_before, not_after)

    def issue_client_below_intermediate(self, not_after: datetime) -> KeyPair:
        """Issue a client certificate by an intermediate CA that ends at `not_after`; the file holds both."""
        intermediate = self._ca.create_child_ca()
        issued = intermediate.issue_cert("chained.test", common_name="chained")
        endless = x509.load_pem_x509_certificate(intermediate.cert_pem.bytes())
        root_key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(root_key, ec.EllipticCurvePrivateKey)
        expiring = x509.CertificateBuilder(
            endless.issuer,
            endless.subject,
            endless.public_key(),
            x509.random_serial_number(),
            endless.not_valid_before_utc,
            not_after,
            list(endless.extensions),
        ).sign(root_key, hashes.SHA256())
        pair = KeyPair(self.folder / "chained.pem", self.folder / "chained.key")
        leaf = issued.cert_chain_pems[0].bytes()
        pair.cert.write_bytes(leaf + expiring.public_bytes(serialization.Encoding.PEM))
        issued.private_key_pem.write_to_path(pair.key)
        pair.key.chmod(0o600)
        return pair

    def issue_expired_server(self, name: str = "expired-server") -> KeyPair:
        """Issue a server certificate that expired in 2001."""
        return self.issue_server(name, not_after=LONG_AGO)

    def issue_expired_client(self, name: str = "expired-client") -> KeyPair:
        """Issue a client certificate that expired in 2001."""
        return self.issue_client(name, not_after=LONG_AGO)

    def _issue(
        self, name: str, identities: tuple[str, ...], not_before: datetime | None, not_after: datetime | None
    ) -> KeyPair:
        issued = self._ca.issue_cert(
            *identities, common_name=name, not_before=not_before, not_after=not_after
        )
        pair = KeyPair(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        pair.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(pair.key)
        pair.key.chmod(0o600)
        return pair


def in_days(days: float) -> datetime:
    """Return the time in so many days from now, for `not_before` and `not_after`."""
    return datetime.now(UTC) + timedelta(days=days)
