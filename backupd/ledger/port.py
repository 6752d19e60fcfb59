"""What the rest of the program asks of a ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from backupd.core.circuit import Circuit
from backupd.core.clock_skew import ClockSkew
from backupd.core.devices import Device, DeviceExpectation
from backupd.core.model import Archive, Attempt, Delivery, DeliveryState, Fingerprint, Rejected, identity
from backupd.core.transition import Priority, Transition


@dataclass(frozen=True, slots=True)
class TrackedDevice:
    """The device that an archive comes from, and by what fraction its size may differ from the usual."""

    device: str
    size_alarm: float | None = None


@dataclass(frozen=True, slots=True)
class ClockReading:
    """What the clock said, and what was doubted of that, the latest doubt last."""

    seen_at: datetime
    skews: Sequence[ClockSkew] = ()


@dataclass(frozen=True, slots=True)
class UnusualArchive:
    """An archive whose size differs from the median of its device's last ones."""

    archive_id: int
    drop: str
    relpath: bytes
    device: str
    size_bytes: int
    median_size_bytes: int


class DeviceLedger(Protocol):
    """The part of a ledger that remembers devices; safe to use from several threads.

    Every method raises `LedgerError` where the record can't be read or written; nothing is half done then.
    """

    def set_expectations(self, expectations: Mapping[str, DeviceExpectation], now: datetime) -> None:
        """Take over what the configuration expects of each drop, before anything is admitted.

        Listed devices are known from now on. Those that were told apart in another way are forgotten, and so
        are those that were listed, are not any more, and never came.
        """
        ...

    def possibly_overdue(self, now: datetime) -> list[Device]:
        """Return the devices that are overdue, or that were said to be."""
        ...

    def record_alarms(self, overdue: Sequence[Device], recovered: Sequence[Device]) -> None:
        """Note which devices were said to be overdue, and which to have recovered."""
        ...

    def unusual_archives(self) -> list[UnusualArchive]:
        """Return the archives of unusual size of which that is still to be said, the oldest first."""
        ...

    def mark_reported(self, unusual: Sequence[UnusualArchive]) -> None:
        """Note that the unusual size of these archives was said."""
        ...

    def last_clock_reading(self) -> ClockReading | None:
        """Return what was noted of the clock last; None where nothing was."""
        ...

    def save_clock_reading(self, reading: ClockReading, *, lock_timeout: float = 0.0) -> None:
        """Note what the clock says, and what is doubted of it.

        Raises LedgerHeldError where another process holds the ledger for longer than `patience`, in seconds.
        """
        ...

    def prune(self, before: Callable[[], datetime], limit: int) -> int:
        """Forget at most so many archives that ended before a time; return how many there were.

        The time is asked for once nobody else can write: a clock is doubted before old history comes back.

        Deliveries and attempts go with them. What is pending, still to be disposed of, in its drop folder or
        in quarantine stays, however old.
        """
        ...


@dataclass(frozen=True, slots=True)
class FileCandidate:
    """A stable, eligible file in a drop folder.

    `tracked` where its device is of interest, `rejected` if it is not worth to be sent.
    """

    drop: str
    relpath: bytes
    fingerprint: Fingerprint
    tracked: TrackedDevice | None = None
    rejected: Rejected | None = None


@dataclass(frozen=True, slots=True)
class KnownFiles:
    """The files of a drop that are accounted for: the `mark` of each, and the `hash` of each path."""

    content_keys: frozenset[int]
    paths: frozenset[int]


@dataclass(frozen=True, slots=True)
class EnqueueResult:
    """What became of some sightings: new archives, and ones whose content they replace.

    `unusual` tells whether `Ledger.unusual` has something to say of a new one.
    The `rejected` are not among the admitted; `Ledger.undisposed` returns them. With `found_again` it returns
    some that were delivered, gone when they should have been disposed of, and are there again.
    """

    queued: tuple[Archive, ...] = ()
    superseded: tuple[Archive, ...] = ()
    has_unusual_size: bool = False
    rejected: tuple[Archive, ...] = ()
    reappeared: bool = False


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """A claim that has ended: the attempts made, and what the delivery becomes."""

    delivery: Delivery
    attempts: tuple[Attempt, ...]
    transition: Transition


@dataclass(frozen=True, slots=True)
class DeliveryResult:
    """How one delivery of a settled archive ended."""

    delivery_id: str
    destination: str
    state: DeliveryState
    ended_at: datetime
    digest: str | None
    verified: bool | None
    http_status: int | None
    reason: str | None
    error: str | None
    receipt: str | None


@dataclass(frozen=True, slots=True)
class CompletedArchive:
    """An archive all of whose deliveries have ended, so that its file is to be disposed of.

    `announced` tells whether its end was logged before.
    """

    archive: Archive
    state: DeliveryState
    digest: str | None
    results: tuple[DeliveryResult, ...]
    already_logged: bool = False


@dataclass(frozen=True, slots=True)
class DispositionResult:
    """Where an archive's file went, relative to its drop folder; `left` for one that stays in place.

    `gone` for one that was not there any more.
    """

    archive_id: int
    moved_to: bytes | None
    kept_in_place: bool = False
    missing: bool = False


@dataclass(frozen=True, slots=True)
class Backlog:
    """A destination's pending deliveries."""

    pending: int
    pending_bytes: int
    oldest: datetime | None


class Ledger(DeviceLedger, Protocol):
    """The durable record; safe to use from several threads.

    Every method raises `LedgerError` where the record can't be read or written; nothing is half done then.
    """

    def register_folder(self, drop: str, device: int, inode: int) -> None:
        """Note which directory a drop folder is, by the numbers that stat(2) gives.

        One that has another device number than before, as after a boot, has it for what lies in it, too.
        """
        ...

    def known_files(self, drop: str, below: bytes = b"") -> KnownFiles:
        """Return which files of a drop are accounted for: all, or those below a directory of it."""
        ...

    def enqueue(
        self, sightings: Sequence[FileCandidate], destinations: Sequence[str], now: datetime
    ) -> EnqueueResult:
        """Make a pending delivery to each destination for each file not accounted for yet.

        What was delivered, but gone when it was to be disposed of, is due for that once it is back.
        Those of a rejected sighting have ended at once, durably, and are never to be claimed.
        """
        ...

    def claim(
        self, destination: str, now: datetime, priority: Priority = Priority.OLDEST, limit: int = 1
    ) -> list[Delivery]:
        """Return the due deliveries that go first, now claimed: at most so many, more than one if small."""
        ...

    def next_due(self, destination: str) -> datetime | None:
        """Return when the next pending delivery of a destination is due."""
        ...

    def bring_forward(self, destination: str, latest: datetime) -> None:
        """Make no pending delivery of a destination due after a time."""
        ...

    def record(self, finished: Sequence[ClaimResult], now: datetime) -> list[CompletedArchive]:
        """Commit, durably, how claims ended; return the archives that are settled by it."""
        ...

    def pending_dispositions(self, after_id: int = 0, limit: int = 256) -> list[CompletedArchive]:
        """Return settled archives whose files are still to be disposed of: the first, by id, after one."""
        ...

    def count_pending_dispositions(self) -> int:
        """Return how many settled archives there are whose files are still to be disposed of."""
        ...

    def record_dispositions(
        self, done: Sequence[DispositionResult], still_due: Sequence[int], now: datetime
    ) -> None:
        """Note what became of the files of settled archives, all of which are announced.

        `still_due` are the archives' ids whose file could not be disposed of.
        """
        ...

    def release_claims(self, delivery_ids: Sequence[str] | None = None) -> int:
        """Make claimed deliveries pending again, which nobody holds; return how many there were.

        All that are claimed, unless some are named.
        """
        ...

    def backlog(self) -> Mapping[str, Backlog]:
        """Return what is pending (and claimed), by destination."""
        ...

    def count_quarantined(self) -> int:
        """Return how many rejected archives are in quarantine."""
        ...

    def save_circuit(self, destination: str, gate: Circuit, error: str | None) -> None:
        """Note how a destination's gate stands, for whoever asks beside the daemon."""
        ...

    def check_storage(self) -> None:
        """Raise LedgerError if what is recorded goes where nobody will find it."""
        ...

    def close(self) -> None:
        """Close the ledger; further calls are errors."""
        ...


def content_key(relpath: bytes, fingerprint: Fingerprint) -> int:
    """Return a number that stands for one content under one name, within this process."""
    return hash((relpath, *identity(fingerprint)))
