"""Verification of a receipt: whether the destination stored the content that was sent."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from backupd.core.model import DIGEST_BYTES, Deferred, Delivered, Digest, Receipt
from backupd.core.policy import Reason

RFC_9530_NAMES = {"sha256": "sha-256", "sha512": "sha-512", "sha1": "sha", "md5": "md5"}
"""Names of the algorithms in Repr-Digest and Content-Digest (RFC 9530, section 5)."""

_OTHER_NAMES = ("crc32", "crc32c", "crc64", "crc64nvme", "adler", "adler32", "unixsum", "unixcksum", "etag")
_ALGORITHMS = {name: name for name in (*DIGEST_BYTES, *_OTHER_NAMES)} | {"sha": "sha1"}
"""The algorithm of each name that may stand before a value, without hyphens and in lower case."""

_NAMED = re.compile(r"([A-Za-z0-9]+(?:-[0-9]+)?)\s*[-=:]\s*(.+)", re.DOTALL)
"""A value after the name of its algorithm: `sha256:…`, `SHA-256=…`, `sha256-…`, `sha-256=:…:`."""

_ETAG_SUFFIX = re.compile(r"(?:--?|;|:)(?:gzip|br|deflate|zstd)$")
"""The suffix of an entity tag for a response that a server may compress."""

_HEX_PAIRS = re.compile(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2})+")


@dataclass(frozen=True, slots=True)
class ReceiptExpectation:
    """How a destination states the digest and the size of the content that it stored.

    `required` is False only for `receipt.digest = "none"`. `encoding` is hex, base64 or base64url. `prefix`
    is the number of leading characters of the value that the destination states, 0 for all. `size_required`
    is whether it has to state the size.
    """

    required: bool = True
    encoding: str = "hex"
    prefix: int = 0
    size_required: bool = False


def verify_receipt(
    sent: Digest, size: int, receipt: Receipt, expected: ReceiptExpectation
) -> Delivered | Deferred:
    """Return `Delivered` if the receipt matches the content that was sent, else `Deferred` with the mismatch.

    `sent` and `size` are the digest and the number of bytes that were sent.
    """
    status = receipt.http_status
    if receipt.size is not None and receipt.size != size:
        return Deferred(Reason.MISMATCH, f"sent {size} bytes, the receipt states {receipt.size}", status)
    if receipt.size is None and expected.size_required:
        return Deferred(Reason.UNVERIFIED, "the response has no number of bytes at `receipt.size`", status)
    if not expected.required:
        return Delivered(sent, receipt, verified=False)
    if receipt.digest is None:
        return Deferred(Reason.UNVERIFIED, "the response has no digest", status)
    stated = stated_digests(sent.algorithm, receipt.digest, expected)
    if not stated:
        form = f"{expected.encoding} {sent.algorithm}"
        if expected.prefix:
            form = f"first {expected.prefix} characters of a {form}"
        error = f"the receipt states {receipt.digest[:200]!r}, which is no {form}: see `receipt.encoding`"
        return Deferred(Reason.UNVERIFIED, error, status)
    if not matches(sent, receipt.digest, expected):
        return Deferred(Reason.MISMATCH, f"sent {sent}, the receipt states {receipt.digest[:200]!r}", status)
    return Delivered(sent, receipt)


def matches(sent: Digest, stated: str, expected: ReceiptExpectation) -> bool:
    """Return whether the value in a receipt is the digest that was sent; see `stated_digests`.

    If it states several values for the algorithm, all have to be this digest.
    """
    found = stated_digests(sent.algorithm, stated, expected)
    length = expected.prefix or None
    spellings = {encoding: _encoded(sent, encoding)[:length] for encoding in ("hex", "base64", "base64url")}
    return bool(found) and all(value == spellings[encoding] for encoding, value in found)


def stated_digests(algorithm: str, stated: str, expected: ReceiptExpectation) -> list[tuple[str, str]]:
    """Return the digests of an algorithm in the value of a receipt, each with its encoding.

    The value is a digest as hex in either case, also with colons, or as base64 with or without padding, or a
    list of them after the names of their algorithms: RFC 9530 `sha-256=:…:`, RFC 3230 `SHA-256=…`,
    `sha256:…`, `sha256=…`, `sha256-…` (Subresource Integrity), `md5=…` (x-goog-hash). It may be an entity
    tag, weak or with the suffix of a compressed response. A digest has the length of its algorithm, or of the
    expected prefix. After a name, its encoding is that which fits. Values of other algorithms are left out;
    none is returned if anything else is among them.
    """
    found = []
    for member in stated.split(","):
        text = _ETAG_SUFFIX.sub("", member.strip().removeprefix("W/").strip('"')).strip('"')
        encodings = [expected.encoding]
        named = _NAMED.fullmatch(text)
        name = _ALGORITHMS.get(named[1].replace("-", "").lower()) if named else None
        if named and name:
            if name != algorithm:
                continue
            text = named[2].partition(";")[0].strip(':" ')  # after it, parameters of RFC 9651
            encodings += () if expected.prefix else ("hex", "base64", "base64url")
        for encoding in encodings:
            value = _normalized(text, encoding)
            if _is_whole(value, encoding, DIGEST_BYTES[algorithm], expected.prefix):
                found.append((encoding, value))
                break
        else:
            return []
    return found


def _normalized(text: str, encoding: str) -> str:
    if encoding != "hex":
        return text.rstrip("=")
    return text.replace(":", "").lower() if _HEX_PAIRS.fullmatch(text) else text.lower()


def _is_whole(value: str, encoding: str, length: int, prefix: int) -> bool:
    """Return whether a text can be a digest of `length` bytes, or its first `prefix` characters."""
    characters = {"hex": r"[0-9a-f]", "base64": r"[A-Za-z0-9+/]", "base64url": r"[A-Za-z0-9_-]"}[encoding]
    whole = 2 * length if encoding == "hex" else -(-4 * length // 3)
    return re.fullmatch(f"{characters}{{{min(prefix, whole) or whole}}}", value) is not None


def _encoded(digest: Digest, encoding: str) -> str:
    """Return a digest in an encoding, base64 without padding."""
    if encoding == "hex":
        return digest.hex
    raw = binascii.unhexlify(digest.hex)
    encode = base64.urlsafe_b64encode if encoding == "base64url" else base64.b64encode
    return encode(raw).decode("ascii").rstrip("=")
