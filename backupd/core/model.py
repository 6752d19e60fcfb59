"""The values that all packages share: archives, deliveries, receipts and outcomes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol

from backupd.core.policy import Reason


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The identity, size and times of a file, by which a change is detected without reading the content.

    Times are nanoseconds since the epoch. The same fingerprint means the same content; another size or
    modification time means another content. Otherwise the content decides, see `may_have_content_of`. The
    change time is included because a program that rewrites a file can restore its size and modification
    time, but not its change time. The number of the device is not, because a boot or a mount may change it.
    """

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class StatResult(Protocol):
    """The fields of an `os.stat_result` that make a fingerprint."""

    @property
    def st_ino(self) -> int:
        """Return the inode number."""
        ...

    @property
    def st_size(self) -> int:
        """Return the size in bytes."""
        ...

    @property
    def st_mtime_ns(self) -> int:
        """Return the time of the last change of the content, in nanoseconds since the epoch."""
        ...

    @property
    def st_ctime_ns(self) -> int:
        """Return the time of the last change of content or metadata, in nanoseconds since the epoch."""
        ...


_MAX_TIME_NS = 10**20 - 1
"""A time of a file in 5138, and 20 digits: databases store no number of any size."""


def fingerprint_of(status: StatResult) -> Fingerprint:
    """Return the fingerprint of the file with this stat result; each number has at most 20 digits."""
    return Fingerprint(
        status.st_ino, status.st_size, _bounded(status.st_mtime_ns), _bounded(status.st_ctime_ns)
    )


def _bounded(time_ns: int) -> int:
    return max(-_MAX_TIME_NS, min(time_ns, _MAX_TIME_NS))


def is_unchanged(found: StatResult, expected: Fingerprint) -> bool:
    """Return whether a stat result shows the expected file, unchanged in content and metadata."""
    return fingerprint_of(found) == expected


def may_have_content_of(found: Fingerprint, expected: Fingerprint) -> bool:
    """Return whether a file may still have the expected content: its size and modification time are the same.

    If the change time or the inode differs, only the content shows it. It may be new, because a program can
    restore the modification time. Or metadata alone has changed: a mode, an owner, a hard link or a name, or
    the inode number on a network filesystem.
    """
    return (found.size, found.mtime_ns) == (expected.size, expected.mtime_ns)


def is_same_file(found: StatResult, expected: Fingerprint) -> bool:
    """Return whether a stat result shows the expected file and content, right after it was renamed.

    The change time is not compared, because a rename sets it on some filesystems.
    """
    return replace(fingerprint_of(found), ctime_ns=expected.ctime_ns) == expected


DIGEST_BYTES = {"sha256": 32, "sha512": 64, "sha384": 48, "sha224": 28, "sha1": 20, "md5": 16, "blake2b": 64}
"""The known digest algorithms, and the length of their values in bytes."""


@dataclass(frozen=True, slots=True)
class Digest:
    """The digest of a content: the name of the algorithm, and the value in lower-case hex."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest from the text that `str` makes of one."""
        algorithm, _, value = text.partition(":")
        return cls(algorithm, value)


@dataclass(frozen=True, slots=True)
class Archive:
    """A finished backup file in the ledger; `relpath` is relative to its drop folder.

    `folder_id` is the number of the drop folder that it was found in, see `DropFolder.id`, 0 if unknown: it
    shows whether the same directory is there when the file is missing. `host` is the name of the host that
    queued it, empty if unknown.
    """

    id: int
    drop: str
    relpath: bytes
    fingerprint: Fingerprint
    queued_at: datetime
    folder_id: int = 0
    host: str = ""


class DeliveryState(StrEnum):
    """The state of a delivery, or of an archive with all its deliveries.

    `RETRIED` is shown for a rejected one with a file that is no longer in quarantine: `backupd retry` put it
    back into the drop folder, or it was removed by hand.
    """

    PENDING = "pending"
    CLAIMED = "claimed"
    DELIVERED = "delivered"
    REJECTED = "rejected"
    SUPERSEDED = "superseded"
    RETRIED = "retried"


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to make the attempts of a delivery, and to record their result.

    `session` is the run of a daemon that has it. `token` changes with each claim and each release of the
    delivery.
    """

    session: int
    token: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """The delivery of one archive to one destination, as it was claimed.

    `attempts` counts all upload attempts, `archive_failures` those that failed because of the archive, and
    `destination_failures` the latest ones in a row that failed because of the destination.
    `unconfirmed_digest` is the digest of a content that was sent completely, but without a response.
    `known_digests` are those of the archive's content that its deliveries have, to any destination.
    `was_missing` is whether the last attempt did not find the file, and it has not been found since.
    """

    id: str
    archive: Archive
    destination: str
    claim: Claim
    attempts: int = 0
    archive_failures: int = 0
    destination_failures: int = 0
    unconfirmed_digest: Digest | None = None
    known_digests: tuple[Digest, ...] = ()
    was_missing: bool = False


@dataclass(frozen=True, slots=True)
class Receipt:
    """The destination's statement about the content that it stored.

    `digest` and `size` (in bytes) are None if the response does not state them. `body` is the start of the
    response body, for the receipt file.
    """

    http_status: int | None
    digest: str | None = None
    size: int | None = None
    body: str = ""


@dataclass(frozen=True, slots=True)
class Delivered:
    """The destination stored the archive: all bytes were sent, and the receipt has their digest.

    `verified` is False only for a destination that is configured to send no receipt. `fingerprint` is that of
    the file when this content was read last; None if it is that of the archive.
    """

    digest: Digest
    receipt: Receipt
    verified: bool = True
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True, slots=True)
class Deferred:
    """The attempt failed, and the delivery is retried later.

    `unconfirmed_digest` is the digest of a content that was sent completely, but without a response: the
    destination may have stored it.
    """

    reason: Reason
    error: str
    http_status: int | None = None
    retry_after: timedelta | None = None
    unconfirmed_digest: Digest | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """The archive is rejected: it, and not the destination, caused the failure."""

    reason: Reason
    error: str
    http_status: int | None = None


@dataclass(frozen=True, slots=True)
class Superseded:
    """The file changed during the delivery, or is `missing`; new content gets a new delivery."""

    error: str
    missing: bool = False


Outcome = Delivered | Deferred | Rejected | Superseded


@dataclass(frozen=True, slots=True)
class Attempt:
    """One upload attempt of a delivery, and its outcome.

    `address` is that of the destination or its proxy, empty if unknown; the ledger does not keep it.
    """

    started_at: datetime
    duration: timedelta
    sent_bytes: int
    outcome: Outcome
    address: str = ""
