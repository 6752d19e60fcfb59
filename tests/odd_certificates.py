"""Certificates that OpenSSL accepts, and that Python's libraries can't read in full."""

from __future__ import annotations

import base64
from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Value = tuple[int, bytes]
"""A value in DER: its tag and its content."""

_INTEGER, _UTC_TIME, _GENERALIZED_TIME, _SEQUENCE, _VERSION = 0x02, 0x17, 0x18, 0x30, 0xA0
_VERSION_AT, _SERIAL_AT, _VALIDITY_AT = 0, 1, 4


def _encode(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    digits = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(digits)]) + digits + content


def _split(der: bytes) -> list[Value]:
    """Return the values in DER that follow one another."""
    values, position = [], 0
    while position < len(der):
        tag, length, position = der[position], der[position + 1], position + 2
        if length & 0x80:
            end = position + (length & 0x7F)
            length, position = int.from_bytes(der[position:end], "big"), end
        values.append((tag, der[position : position + length]))
        position += length
    return values


def _set(at: int, tag: int, content: bytes) -> Callable[[list[Value]], list[Value]]:
    return lambda fields: [*fields[:at], (tag, content), *fields[at + 1 :]]


def _validity(tag: int, begins: bytes, ends: bytes) -> Callable[[list[Value]], list[Value]]:
    return _set(_VALIDITY_AT, _SEQUENCE, _encode(tag, begins) + _encode(tag, ends))


def _replace(old: bytes, new: bytes) -> Callable[[list[Value]], list[Value]]:
    return lambda fields: [(tag, content.replace(old, new)) for tag, content in fields]


ODDITIES: dict[str, Callable[[list[Value]], list[Value]]] = {
    "an extension given twice": _replace(b"\x06\x03\x2a\x03\x05", b"\x06\x03\x2a\x03\x04"),
    "version 4": _set(_VERSION_AT, _VERSION, _encode(_INTEGER, b"\x03")),
    "serial number 0": _set(_SERIAL_AT, _INTEGER, b"\0"),
    "a negative serial number": _set(_SERIAL_AT, _INTEGER, b"\xfb"),
    "the year 0": _validity(_GENERALIZED_TIME, b"00000101000000Z", b"99991231235959Z"),
    "times without seconds": _validity(_UTC_TIME, b"2001010000Z", b"4001010000Z"),
    "times with an offset": _validity(_UTC_TIME, b"200101000000+0000", b"400101000000+0000"),
    "a name in Latin-1": _replace(b"\x82\x09localhost", b"\x82\x09localhos\xe4"),
}
"""Each changes the fields of a certificate, which `with_private_extensions` has prepared."""


def with_private_extensions(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    """Add two private extensions, which `an extension given twice` makes one and the same."""
    for number in (4, 5):
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.2.3.{number}"), b"\x04\x01x")
        builder = builder.add_extension(extension, critical=False)
    return builder


def altered(certificate: x509.Certificate, signer: ec.EllipticCurvePrivateKey, oddity: str) -> bytes:
    """Return a certificate in PEM with an oddity, signed again by its issuer's key."""
    ((_, content),) = _split(certificate.tbs_certificate_bytes)
    body = b"".join(_encode(*field) for field in ODDITIES[oddity](_split(content)))
    signed = _encode(_SEQUENCE, body)
    ((_, whole),) = _split(certificate.public_bytes(serialization.Encoding.DER))
    algorithm = _encode(*_split(whole)[1])
    signature = signer.sign(signed, ec.ECDSA(hashes.SHA256()))
    der = _encode(_SEQUENCE, signed + algorithm + _encode(0x03, b"\0" + signature))
    text = base64.encodebytes(der)
    return b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n"
