"""Archives, deliveries and outcomes for tests; a test names only the values that it is about."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from backupd.config.models import DropConfig
from backupd.core.backoff import Backoff
from backupd.core.model import (
    Archive,
    Attempt,
    Claim,
    Deferred,
    Delivered,
    Delivery,
    DeliveryState,
    Digest,
    Fingerprint,
    Outcome,
    Receipt,
    Rejected,
    Superseded,
)
from backupd.core.policy import Reason
from backupd.core.snapshot import Snapshot
from backupd.core.transition import RetryPolicy, next_step
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.port import ClaimResult, DispositionResult, FileCandidate, Ledger

NOW = datetime(2026, 3, 4, 5, 6, 7, 890123, tzinfo=UTC)
"""The current time in tests with a fixed time."""

SECOND = timedelta(seconds=1)

_inodes = itertools.count(1000)


def a_drop(folder: DropFolder, *, name: str = "switches", **settings: Any) -> Drop:
    """Return the drop of an open folder; `settings` are keys of its table in the configuration."""
    config = DropConfig.model_validate({"path": folder.path, **settings})
    return Drop.of(name, config, folder, ("vault",))


def a_fingerprint(
    *,
    inode: int | None = None,
    size: int = 3,
    mtime_ns: int | None = None,
    ctime_ns: int = 10**18,
) -> Fingerprint:
    """Return a fingerprint; unless `inode` is given, its inode and modification time are new ones."""
    number = next(_inodes) if inode is None else inode
    if mtime_ns is None:
        mtime_ns = 10**18 + (number if inode is None else 0)
    return Fingerprint(number, size, mtime_ns, ctime_ns)


def an_archive(
    relpath: bytes = b"router-1.tar.gz",
    *,
    drop: str = "switches",
    size: int = 3,
    queued_at: datetime = NOW,
    fingerprint: Fingerprint | None = None,
) -> Archive:
    """Return an archive."""
    return Archive(1, drop, relpath, fingerprint or a_fingerprint(size=size), queued_at)


def a_delivery(
    archive: Archive | None = None,
    *,
    destination: str = "vault",
    attempts: int = 0,
    archive_failures: int = 0,
    destination_failures: int = 0,
) -> Delivery:
    """Return a delivery."""
    return Delivery(
        "d-1",
        archive or an_archive(),
        destination,
        Claim(1, 1),
        attempts,
        archive_failures,
        destination_failures,
    )


def a_candidate(
    relpath: bytes = b"router-1.tar.gz",
    *,
    drop: str = "switches",
    fingerprint: Fingerprint | None = None,
    folder_id: int = 0,
) -> FileCandidate:
    """Return a candidate for a new file."""
    return FileCandidate(drop, relpath, fingerprint or a_fingerprint(), folder_id=folder_id)


def a_digest(content: bytes = b"abc", algorithm: str = "sha256") -> Digest:
    """Return the digest of a content."""
    return Digest(algorithm, hashlib.new(algorithm, content).hexdigest())


def delivered(content: bytes = b"abc", *, body: str = '{"id": "1"}') -> Delivered:
    """Return the outcome of a successful upload."""
    digest = a_digest(content)
    return Delivered(digest, Receipt(201, digest.hex, len(content), body))


def deferred(reason: Reason = Reason.CONNECT, *, retry_after: timedelta | None = None) -> Deferred:
    """Return the outcome of an upload that is to be retried."""
    return Deferred(reason, "did not work", None, retry_after)


def rejected(reason: Reason = Reason.REFUSED) -> Rejected:
    """Return the outcome of an upload that is not to be retried."""
    return Rejected(reason, "not wanted", 422)


def superseded() -> Superseded:
    """Return the outcome of an upload of a file that changed meanwhile."""
    return Superseded("the file changed")


def a_retry_policy(
    *, initial: timedelta = SECOND, maximum: timedelta = 300 * SECOND, give_up_after: timedelta | None = None
) -> RetryPolicy:
    """Return the retry policy of a destination."""
    return RetryPolicy(Backoff(initial, maximum), give_up_after)


def record_dispositions(
    ledger: Ledger, done: Sequence[DispositionResult], still_due: Sequence[int], now: datetime
) -> None:
    """Record dispositions as the steward of all drops of the tests."""
    ledger.record_dispositions(done, still_due, ledger.stewardship(("switches", "firewalls")), now)


def a_claim_result(delivery: Delivery, *outcomes: Outcome, now: datetime = NOW) -> ClaimResult:
    """Return the result of a claim with an attempt for each of these outcomes, the last of which counts."""
    attempts = tuple(Attempt(now, SECOND / 4, 3, outcome) for outcome in outcomes)
    return ClaimResult(delivery, attempts, next_step(delivery, outcomes[-1], now, a_retry_policy(), 0.5))


END_STATES = (DeliveryState.DELIVERED, DeliveryState.REJECTED, DeliveryState.SUPERSEDED)


def a_snapshot(**fields: Any) -> Snapshot:
    """Return the state of a daemon in which everything is well."""
    minute = timedelta(minutes=1)
    return replace(Snapshot(NOW, "host-1", "0.2.0", 17, NOW - minute, minute, is_ready=True), **fields)
