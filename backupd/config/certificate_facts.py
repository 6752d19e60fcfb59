"""The facts of an X.509 certificate, as far as they can be read.

OpenSSL decides which certificates are usable. It accepts some that `cryptography` does not read: with an
extension given twice, an unknown version or curve, or times in an uncommon form.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cryptography import x509
from cryptography.utils import CryptographyDeprecationWarning

from backupd.core.certificate_life import Validity

T = TypeVar("T")

# of a serial number that is 0 or negative; the operator of this host can't change it
warnings.filterwarnings("ignore", "Parsed a serial number", CryptographyDeprecationWarning)

_SEQUENCE = 0x30
_VERSION = 0xA0
_FIELDS_BEFORE_KEY = 5
"""Serial number, signature, issuer, validity and subject; source: RFC 5280 section 4.1."""


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """The facts of a certificate; each is None, and `names` empty, if it can't be read.

    `names` are the host names and addresses of a server, `purposes` the extended key usage, None without
    one, and `public_key` is the SubjectPublicKeyInfo in DER.
    """

    subject: str | None = None
    issuer: str | None = None
    names: tuple[str, ...] = ()
    validity: Validity | None = None
    purposes: frozenset[x509.ObjectIdentifier] | None = None
    public_key: bytes | None = None

    @classmethod
    def of(cls, der: bytes) -> CertificateFacts:
        """Return the facts of a certificate in DER."""
        public_key = _readable(lambda: public_key_info(der))
        certificate = _readable(lambda: x509.load_der_x509_certificate(der))
        if certificate is None:
            return cls(public_key=public_key)
        return cls(
            _readable(certificate.subject.rfc4514_string),
            _readable(certificate.issuer.rfc4514_string),
            _readable(lambda: _names(certificate)) or (),
            _readable(lambda: Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc)),
            _readable(lambda: _purposes(certificate)),
            public_key,
        )


def _readable(read: Callable[[], T]) -> T | None:
    """Return the result of `read`, or None if it raises any exception."""
    try:
        return read()
    except Exception:  # noqa: BLE001 -- cryptography has many, and none means that OpenSSL refuses it
        return None


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(name.value) for name in extension)


def _purposes(certificate: x509.Certificate) -> frozenset[x509.ObjectIdentifier]:
    return frozenset(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def public_key_info(der: bytes) -> bytes:
    """Return the SubjectPublicKeyInfo of a certificate, both in DER; raises ValueError.

    Unlike `cryptography`, it needs not know the kind of the key.
    """
    _, start, _ = _value(der, 0)
    _, position, _ = _value(der, start)
    tag, _, end = _value(der, position)
    if tag == _VERSION:  # optional
        position = end
    for _ in range(_FIELDS_BEFORE_KEY):
        _, _, position = _value(der, position)
    tag, _, end = _value(der, position)
    if tag != _SEQUENCE:
        raise ValueError("there is no SubjectPublicKeyInfo")
    return der[position:end]


def first_value(der: bytes) -> bytes:
    """Return the first value in DER, without what follows it; raises ValueError if it is cut."""
    return der[: _value(der, 0)[2]]


def _value(der: bytes, position: int) -> tuple[int, int, int]:
    """Return the tag of the value at `position`, where its content begins, and where it ends."""
    if len(der) < position + 2:
        raise ValueError("the value is cut")
    tag, length, start = der[position], der[position + 1], position + 2
    if length & 0x80:
        count = length & 0x7F
        length, start = int.from_bytes(der[start : start + count], "big"), start + count
    if len(der) < start + length:
        raise ValueError("the value is cut")
    return tag, start, start + length
