"""Verification of a receipt: whether the destination stored the content that was sent."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from backupd.core.model import Deferred, Delivered, Digest, Outcome, Receipt
from backupd.core.policy import Reason

RFC_9530_NAMES = {"sha256": "sha-256", "sha512": "sha-512", "sha1": "sha", "md5": "md5"}
"""Names of the algorithms in Repr-Digest and Content-Digest (RFC 9530, section 5)."""

_FIELD_MEMBER = re.compile(r"(?:^|,)\s*([A-Za-z0-9-]+)=:([A-Za-z0-9+/]+=*):")
"""A member of Repr-Digest and Content-Digest (RFC 9530, section 2)."""


@dataclass(frozen=True, slots=True)
class ReceiptExpectation:
    """How a destination states the digest of the content that it stored.

    `required` is False only for `receipt.digest = "none"`. `encoding` is hex, base64 or base64url. `prefix`
    is the number of leading characters of the value that the destination states, 0 for all.
    """

    required: bool = True
    encoding: str = "hex"
    prefix: int = 0


def verify_receipt(sent: Digest, size: int, receipt: Receipt, expected: ReceiptExpectation) -> Outcome:
    """Return `Delivered` if the receipt matches the content that was sent, else `Deferred` with the mismatch.

    `sent` and `size` are the digest and the number of bytes that were sent.
    """
    status = receipt.http_status
    if receipt.size is not None and receipt.size != size:
        return Deferred(Reason.MISMATCH, f"sent {size} bytes, the receipt states {receipt.size}", status)
    if not expected.required:
        return Delivered(sent, receipt, verified=False)
    if receipt.digest is None:
        return Deferred(Reason.UNVERIFIED, "the response has no digest", status)
    if not matches(sent, receipt.digest, expected):
        return Deferred(Reason.MISMATCH, f"sent {sent}, the receipt states {receipt.digest[:200]!r}", status)
    return Delivered(sent, receipt)


def matches(sent: Digest, stated: str, expected: ReceiptExpectation) -> bool:
    """Return whether the value in a receipt is the digest that was sent.

    Accepts hex in either case, base64 and base64url with or without padding, an `algorithm:` before the
    value, a prefix of the configured length, and the digest fields of RFC 9530.
    """
    value = stated.strip().strip('"')  # an ETag is quoted
    fields: dict[str, str] = {_plain(name): digest for name, digest in _FIELD_MEMBER.findall(value)}
    if fields:
        stated = fields.get(_plain(RFC_9530_NAMES.get(sent.algorithm, "")), "")
        return stated.rstrip("=") == _base64(sent, "base64")
    name, colon, rest = value.partition(":")
    if colon and name.isascii() and name.replace("-", "").isalnum():
        if _plain(name) != _plain(sent.algorithm):
            return False
        value = rest.strip()
    if expected.encoding == "hex":
        value, full = value.lower(), sent.hex
    else:
        value, full = value.rstrip("="), _base64(sent, expected.encoding)
    return value == (full[: expected.prefix] if expected.prefix else full)


def _plain(algorithm: str) -> str:
    """Return the name in one spelling, `sha256` for `SHA-256`."""
    return algorithm.lower().replace("-", "")


def _base64(digest: Digest, encoding: str) -> str:
    raw = binascii.unhexlify(digest.hex)
    encode = base64.urlsafe_b64encode if encoding == "base64url" else base64.b64encode
    return encode(raw).decode("ascii").rstrip("=")
