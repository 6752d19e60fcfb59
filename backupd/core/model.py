"""What the whole program talks about: archives, deliveries, receipts and outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol

from backupd.core.policy import Reason


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Cheap "is it the same file, unchanged?": what `fstat` tells without a read.

    Times are nanoseconds since the epoch. The change time is part of it because a rewrite in place can
    put size and modification time back, but not the change time.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Status(Protocol):
    """What `fstat` returns, as far as it is needed here."""

    @property
    def st_dev(self) -> int:
        """Number of the device."""
        ...

    @property
    def st_ino(self) -> int:
        """Number of the file on it."""
        ...

    @property
    def st_size(self) -> int:
        """Bytes."""
        ...

    @property
    def st_mtime_ns(self) -> int:
        """Time of the last change of the content."""
        ...

    @property
    def st_ctime_ns(self) -> int:
        """Time of the last change of content or status."""
        ...


def fingerprint_of(status: Status) -> Fingerprint:
    """Return what identifies a file and its content in a stat result."""
    return Fingerprint(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def identity(fingerprint: Fingerprint) -> tuple[int, int, int, int]:
    """Return what stays of a fingerprint for as long as the file is the same, unchanged.

    The device does not: its number may be another after a boot or a mount.
    """
    return fingerprint.inode, fingerprint.size, fingerprint.mtime_ns, fingerprint.ctime_ns


def is_unchanged(found: Status, expected: Fingerprint) -> bool:
    """Tell whether a status is of the expected file, as it was."""
    return identity(fingerprint_of(found)) == identity(expected)


def is_same_file(found: Status, expected: Fingerprint) -> bool:
    """Tell whether a status is of the expected content; a rename may have set the change time."""
    return identity(fingerprint_of(found))[:3] == identity(expected)[:3]


DIGEST_BYTES = {"sha256": 32, "sha512": 64, "sha384": 48, "sha224": 28, "sha1": 20, "md5": 16, "blake2b": 64}
"""How long the value of each algorithm is that is known."""


@dataclass(frozen=True, slots=True)
class Digest:
    """An algorithm's name and its value over a content, in lower-case hex."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest that `str` wrote."""
        algorithm, _, value = text.partition(":")
        return cls(algorithm, value)


@dataclass(frozen=True, slots=True)
class Archive:
    """One finished backup file, as the ledger knows it; `relpath` is relative to its drop folder."""

    id: int
    drop: str
    relpath: bytes
    fingerprint: Fingerprint
    queued_at: datetime


class DeliveryState(StrEnum):
    """Where a delivery stands."""

    PENDING = "pending"
    CLAIMED = "claimed"
    DELIVERED = "delivered"
    REJECTED = "rejected"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class Delivery:
    """The duty to bring one archive to one destination.

    `attempts` counts every request made for it; `charged` those whose failure was the archive's own
    fault; `faults` those in a row that failed by the destination's. `unknown` is the digest of a content
    that went out whole, but whose answer was lost.
    """

    id: str
    archive: Archive
    destination: str
    attempts: int = 0
    archive_failures: int = 0
    destination_failures: int = 0
    unconfirmed_digest: Digest | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the destination says it stored.

    `digest` and `size` are None where it did not say; `body` is its answer, cut to a bound, for the record.
    """

    http_status: int
    digest: str | None = None
    size: int | None = None
    body: str = ""


@dataclass(frozen=True, slots=True)
class Delivered:
    """The destination has it: digest sent = digest in the receipt, and every byte was sent.

    `verified` is False only where the configuration says that the destination gives no receipt.
    """

    digest: Digest
    receipt: Receipt
    verified: bool = True


@dataclass(frozen=True, slots=True)
class Deferred:
    """Not now: try again later.

    `unknown` is the digest of what went out whole while the answer was lost: the destination may have it.
    """

    reason: Reason
    error: str
    http_status: int | None = None
    retry_after: timedelta | None = None
    unconfirmed_digest: Digest | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """Never: the archive itself is at fault."""

    reason: Reason
    error: str
    http_status: int | None = None


@dataclass(frozen=True, slots=True)
class Superseded:
    """The file changed, or is `gone`; its new content, if there is one, starts over."""

    error: str
    missing: bool = False


Outcome = Delivered | Deferred | Rejected | Superseded


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request made for a delivery, and how it ended."""

    started_at: datetime
    duration: timedelta
    sent_bytes: int
    outcome: Outcome
