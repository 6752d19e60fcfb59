"""The ledger as the daemon uses it: the durable state of archives, deliveries, devices and circuits.

An adapter implements `Ledger`. Each method is one transaction: it takes effect as a whole, or raises an error
and changes nothing. The effect of a durable method is on disk once it has returned. If a power loss undoes
one of the others, the daemon repeats it at the next start, from the files in the drop folders. Times are UTC
datetimes with microseconds, sizes are bytes, paths are bytes relative to the drop folder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from backupd.core.archive_formats import Damage
from backupd.core.clock_skew import ZERO
from backupd.core.devices import Device, DeviceExpectation
from backupd.core.drop_problem import DropProblem, DropState, ProblemCount
from backupd.core.errors import LedgerDamagedError
from backupd.core.folder_place import FolderPlace
from backupd.core.model import Archive, Attempt, Delivery, DeliveryState, Digest, Fingerprint, Rejected
from backupd.core.notifications import NotificationState
from backupd.core.snapshot import OperatorPause, Snapshot
from backupd.core.transition import Priority, Transition


@dataclass(frozen=True, slots=True)
class TrackedDevice:
    """The device that an archive comes from.

    `size_alarm` is the fraction of the median by which the archive's size may differ, such as 0.5; None if
    sizes are not checked.
    """

    device: str
    size_alarm: float | None = None


@dataclass(frozen=True, slots=True)
class FileCandidate:
    """A stable, eligible file in a drop folder that is to be queued.

    `tracked` is its device, if the drop's devices are tracked. `rejected` is set if an inspection found the
    file damaged, so that it is not to be uploaded; `suspicion`, which the ledger ignores, if it may be
    damaged and is to be uploaded. `folder_id` is the number of the drop folder, see `DropFolder.id`.
    `digests` are those of its content that are known, with an empty value for one that can't be calculated.
    `touched` is whether its metadata changed while it was to become stable: it is only stable if its content
    has one of `digests` still.
    """

    drop: str
    relpath: bytes
    fingerprint: Fingerprint
    tracked: TrackedDevice | None = None
    rejected: Rejected | None = None
    folder_id: int = 0
    suspicion: Damage | None = None
    digests: tuple[Digest, ...] = ()
    touched: bool = False


Cursor = tuple[int, ...]
"""A position in the changes of a ledger; () is their beginning, all others are known to the adapter only."""


@dataclass(frozen=True, slots=True)
class KnownChanges:
    """The files in a drop folder that got or lost their entry in the ledger, or got another fingerprint.

    `added` has the `content_key` of the newest file with a path, by the `hash` of the relative path.
    `removed` has the hashes of the paths that have no entry any more. A path that got and lost its only entry
    in between is in none. `cursor` is the argument for the next call of `Ledger.known_since`.
    """

    cursor: Cursor
    added: Mapping[int, int]
    removed: Collection[int]


@dataclass(frozen=True, slots=True)
class UndecidedFile:
    """A candidate with the path, size and modification time of an archive, but another fingerprint.

    `Ledger.enqueue` decides by the content, once the candidate has its digests by these `algorithms`.
    """

    candidate: FileCandidate
    algorithms: frozenset[str]


@dataclass(frozen=True, slots=True)
class EnqueueResult:
    """The effect of `Ledger.enqueue`; each group is in the order of the candidates.

    `queued` are the new archives to upload. `rejected` are the new archives that were rejected at once;
    `Ledger.pending_dispositions` returns them. `superseded` are the archives with pending deliveries that
    ended, because a newer content has their path. `has_unusual_size` is whether `Ledger.unusual_archives` has
    a new entry. `reappeared` is whether a delivered archive that had been missing is in its drop folder
    again, so that `Ledger.pending_dispositions` returns it once more. The `undecided` candidates had no
    effect.
    """

    queued: tuple[Archive, ...] = ()
    superseded: tuple[Archive, ...] = ()
    has_unusual_size: bool = False
    rejected: tuple[Archive, ...] = ()
    reappeared: bool = False
    undecided: tuple[UndecidedFile, ...] = ()


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """The end of a claim: the attempts that were made since `Ledger.claim`, and the delivery's next state.

    `delivery` is as `Ledger.claim` returned it.
    """

    delivery: Delivery
    attempts: tuple[Attempt, ...]
    transition: Transition


@dataclass(frozen=True, slots=True)
class DeliveryResult:
    """The end of one delivery: delivered, rejected or superseded.

    `digest` is the digest of the bytes that were sent, as `algorithm:hex`, None if they were not sent
    completely. `verified` is whether the destination's receipt has the same digest; None unless delivered.
    `http_status` is the status of the last response, None without a response. `reason` (a `Reason`) and
    `error` describe a failure. `receipt` is the text of the destination's response, cut to a limit; None
    unless delivered.
    """

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
    """An archive that has no open delivery, so that its file is to be moved, deleted or kept.

    `state` is delivered or rejected. `digest` is the digest of the content that was sent, as `algorithm:hex`,
    None if no delivery sent it completely. `results` are ordered by destination. `already_logged` is whether
    the end of the archive was logged in an earlier attempt to dispose of its file.
    """

    archive: Archive
    state: DeliveryState
    digest: str | None
    results: tuple[DeliveryResult, ...]
    already_logged: bool = False


@dataclass(frozen=True, slots=True)
class RecordResult:
    """The effect of `Ledger.record`; both are in the order of the results.

    `completed` are the archives that the results completed. `lost` are the results that were refused, because
    their claim was released meanwhile: another session may deliver these archives. `superseded` are results
    as they were recorded instead of a delivery: another destination has another content of the archive.
    """

    completed: tuple[CompletedArchive, ...] = ()
    lost: tuple[ClaimResult, ...] = ()
    superseded: tuple[ClaimResult, ...] = ()


@dataclass(frozen=True, slots=True)
class DispositionResult:
    """The disposition of a completed archive's file.

    `moved_to` is its new path, None if it was deleted. Or the file stays in the drop folder
    (`kept_in_place`), or was `missing` when it was to be disposed of; then `moved_to` is None, too.
    """

    archive_id: int
    moved_to: bytes | None
    kept_in_place: bool = False
    missing: bool = False


@dataclass(frozen=True, slots=True)
class Backlog:
    """The open deliveries of a destination, pending and claimed.

    `pending` is their number, `pending_bytes` the total size of their archives, and `oldest` the time at
    which the first of these archives was queued.
    """

    pending: int
    pending_bytes: int
    oldest: datetime | None


@dataclass(frozen=True, slots=True)
class NewestArchive:
    """The archive of a drop that was queued last, by its path."""

    relpath: bytes
    queued_at: datetime


@dataclass(frozen=True, slots=True)
class QueueState:
    """The state of all queues.

    `destinations` are the open deliveries by destination; `drops` are the archives with one by drop. Names
    without any are left out of both. `rejected` counts the rejected deliveries with a file in quarantine by
    destination, `quarantined` the archives. `last_delivered` has the end of the last delivery by destination,
    and `newest` the newest archive by drop, of those that the caller named.
    """

    destinations: Mapping[str, Backlog]
    drops: Mapping[str, Backlog]
    rejected: Mapping[str, int]
    quarantined: int
    last_delivered: Mapping[str, datetime]
    newest: Mapping[str, NewestArchive]


@dataclass(frozen=True, slots=True)
class DropBacklog:
    """The archives of a drop that wait for a delivery or a disposition.

    `oldest` is the time at which the first of them was queued, `path` that of the drop folder, None if the
    ledger does not know it.
    """

    archives: int
    oldest: datetime | None
    path: str | None


@dataclass(frozen=True, slots=True)
class UnusualArchive:
    """An archive with a size that differs from the median of its device's archives before it."""

    archive_id: int
    drop: str
    relpath: bytes
    device: str
    size_bytes: int
    median_size_bytes: int


@dataclass(frozen=True, slots=True)
class ClockReading:
    """The time of the host's clock, how far it may be ahead, and for how much longer that is distrusted."""

    seen_at: datetime
    ahead: timedelta = ZERO
    remaining: timedelta = ZERO


class DeviceLedger(Protocol):
    """The devices of drops, and the records that the daemon maintains beside the queue.

    These are the deletion of old archives (`prune`) and the last reading of the clock. See `Ledger` for the
    common rules.
    """

    def set_expectations(self, expectations: Mapping[str, DeviceExpectation], now: datetime) -> None:
        """Replace the expectations of all drops by those of the configuration, by the names of the drops.

        To be called before the first `enqueue`. Listed devices that are new are known since `now`. Forgets
        the devices of drops with a changed `DeviceExpectation.by`, and devices that are no longer listed and
        never sent an archive. Times later than `now` become `now`: the clock was ahead.
        """
        ...

    def possibly_overdue(self, now: datetime) -> list[Device]:
        """Return the devices that are overdue or have an alarm, by drop and name."""
        ...

    def count_devices(self) -> int:
        """Return the number of known devices."""
        ...

    def record_alarms(self, overdue: Sequence[Device], recovered: Sequence[Device]) -> None:
        """Set `Device.alarmed` for the overdue devices, and clear it for the recovered ones."""
        ...

    def knows_devices(self, drop: str) -> bool:
        """Return whether `learn_devices` was called for a drop."""
        ...

    def learn_devices(self, drop: str, devices: Sequence[Device]) -> None:
        """Add the devices of a drop that sent archives before the ledger was created, with their last times.

        A device that is known keeps its later `last_at` and its larger number of archives.
        """
        ...

    def unusual_archives(self) -> list[UnusualArchive]:
        """Return the archives of unusual size that are not reported yet, in the order of their ids."""
        ...

    def mark_reported(self, unusual: Sequence[UnusualArchive]) -> None:
        """Record that the unusual size of these archives was logged."""
        ...

    def last_clock_reading(self) -> ClockReading | None:
        """Return the reading that was saved last, None without one."""
        ...

    def save_clock_reading(self, reading: ClockReading) -> None:
        """Replace the saved reading of the clock; durable if the clock may be ahead.

        Raises LedgerHeldError at once if another process holds the ledger.
        """
        ...

    def prune(self, before: datetime, limit: int) -> int:
        """Delete up to `limit` archives that ended before a time, with their deliveries and attempts.

        Returns their number. Never deletes, whatever their age, archives that have an open delivery or
        disposition or are in their drop folder or in quarantine, and the newest archive, so that its id is
        never used again.
        """
        ...


class Ledger(DeviceLedger, Protocol):
    """The durable state of archives and deliveries; safe to use from several threads.

    Every method raises LedgerError if the ledger can't be read or written. A LedgerHeldError is one because
    another process holds it for too long, a LedgerUnreachableError one because its storage doesn't answer.
    LedgerDamagedError is no LedgerError: its content is damaged, and the daemon has to be restarted.
    """

    @property
    def session(self) -> int:
        """Return the number of this run of the daemon; each time a ledger is opened it is another one.

        It may be 0 until the first claim.
        """
        ...

    def now(self) -> datetime:
        """Return the time of the ledger's clock, by which archives are queued and deliveries are due.

        It is the same on all hosts, because their own clocks may differ.
        """
        ...

    def renew(self) -> None:
        """Extend the time for which this session counts as running, if that is limited."""
        ...

    def reap(self) -> int:
        """Release the claims of sessions that are over; return their number."""
        ...

    def stewardship(self, drops: Collection[str]) -> Mapping[str, int]:
        """Return the drop folders that this session takes care of, of those given, each with its term.

        The steward of a folder scans it and disposes of its files; other sessions only deliver its archives.
        Each steward has a higher term than the one before.
        """
        ...

    def known_since(self, drop: str, cursor: Cursor = ()) -> KnownChanges:
        """Return the files in a drop folder that got or lost an entry since another call returned `cursor`.

        From the beginning, these are all files with an entry: those of archives with an open delivery or
        disposition, and those kept in place.
        """
        ...

    def enqueue(
        self, candidates: Sequence[FileCandidate], destinations: Sequence[str], now: datetime
    ) -> EnqueueResult:
        """Add an archive with a pending delivery to each destination for each file without an entry.

        A candidate has an entry if `known_since` returns its content key. One with the path, size and
        modification time of an archive that waits in an earlier folder of its drop is that archive from then
        on, see `assign_folders`. One with a new content supersedes
        the pending deliveries of older contents under its path; a claimed delivery is left to its worker,
        which detects the change. A delivered file that was missing at its disposition and has come back
        unchanged gets a pending disposition instead of a new delivery. The deliveries of a rejected candidate
        are rejected at once. The deliveries are due at `now`. Durable if a candidate is rejected.

        A candidate with the size and modification time of the newest archive under its path, but another
        fingerprint, is the same file if it has the digests that the deliveries of this archive have; the
        archive gets its fingerprint then. Without a digest of the candidate it is undecided. An archive
        without any digest is pending, and gets the fingerprint as well: its content is still to be sent.
        """
        ...

    def claim(
        self,
        destination: str,
        now: datetime,
        priority: Priority = Priority.OLDEST,
        limit: int = 1,
        except_drops: Collection[str] = (),
    ) -> list[Delivery]:
        """Change due deliveries of a destination from pending to claimed and return them, in their order.

        A delivery is returned to no other caller, in no session, until its result is recorded or its claim is
        released. The order is by the time when they are due, by size, or by the
        newest archive, as `priority` requires. Several, up to `limit`, are returned only if their archives
        have no more than 4 MiB together: a caller works on them one after the other, and a large one must not
        delay a delivery that other workers could take. Archives of `except_drops` stay pending.
        `Delivery.was_missing` is True if `Reason.MISSING` was recorded last, unless `enqueue` has given the
        archive another fingerprint since.
        """
        ...

    def next_due(self, destination: str, except_drops: Collection[str] = ()) -> datetime | None:
        """Return when the next pending delivery of a destination is due, None without one.

        Archives of `except_drops` are left out.
        """
        ...

    def bring_forward(self, destination: str, latest: datetime) -> None:
        """Change the pending deliveries of a destination that are due after `latest` to be due then."""
        ...

    def record(self, results: Sequence[ClaimResult], now: datetime) -> RecordResult:
        """Commit the results of the claims that this session still has. Durable.

        A delivery gets the state of its transition: it is pending again with a new due time, or it ended at
        `now`. Its attempts are added, numbered on from `Delivery.attempts`. An archive is completed once none
        of its deliveries is pending or claimed. It is superseded, and not returned, if one delivery is;
        otherwise rejected if one is; otherwise delivered. A result that was recorded before has no further
        effect, completes nothing and is not lost.

        The archive gets the fingerprint of `Delivered`, or the one that it had when it was claimed. If it
        has another one now, and another destination has another digest, the delivery is superseded.
        """
        ...

    def pending_dispositions(self, after_id: int = 0, limit: int = 256) -> list[CompletedArchive]:
        """Return up to `limit` completed archives with a file to dispose of, by id, from after `after_id`.

        Only those in folders that this session takes care of.
        """
        ...

    def count_pending_dispositions(self) -> int:
        """Return the number of completed archives with a file to dispose of."""
        ...

    def record_dispositions(
        self,
        done: Sequence[DispositionResult],
        still_due: Sequence[int],
        terms: Mapping[str, int],
        now: datetime,
    ) -> None:
        """Record which files were disposed of at `now`, and the ids of the archives for which it failed.

        `terms` are those that `stewardship` returned before the files were touched. Archives in other folders
        are left out, and those in folders of which this session isn't the steward in this term any more.

        The ends of all these archives were logged, so that `CompletedArchive.already_logged` is True for the
        `still_due` ones from now on. Not durable: a disposition that is lost is repeated and finds the file
        at its new path.
        """
        ...

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """Change claimed deliveries back to pending, except those with a claim that was released before."""
        ...

    def release_own(self) -> None:
        """Change all claimed deliveries of this session back to pending."""
        ...

    def backlog(self) -> Mapping[str, Backlog]:
        """Return the open deliveries by destination; destinations without any are left out."""
        ...

    def count_quarantined(self) -> int:
        """Return the number of rejected archives with a file in `rejected_dir`."""
        ...

    def queue_state(self, drops: Collection[str], destinations: Collection[str]) -> QueueState:
        """Return the state of all queues, with the newest archive and last delivery of these."""
        ...

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """Replace the snapshot of this host.

        Raises LedgerHeldError at once if another process holds the ledger.
        """
        ...

    def foreign_version(self) -> int:
        """Return a number that changes when another process has written to the ledger."""
        ...

    def pauses(self) -> list[OperatorPause]:
        """Return the pauses that people have requested, by kind and name."""
        ...

    def delete_ended_pauses(self, now: datetime) -> None:
        """Delete the pauses with an end that has passed.

        Raises LedgerHeldError at once if another process holds the ledger.
        """
        ...

    def notification_states(self) -> Mapping[str, NotificationState]:
        """Return what each receiver of this host's notifications knows."""
        ...

    def save_notification_state(self, receiver: str, state: NotificationState | None) -> None:
        """Replace what a receiver of this host's notifications knows; None forgets the receiver. Durable.

        Raises LedgerHeldError at once if another process holds the ledger.
        """
        ...

    def save_failure(self, destination: str, reason: str | None) -> None:
        """Replace the saved reason of the last failure of a destination; None for a working one."""
        ...

    def saved_failure(self, destination: str) -> str | None:
        """Return the saved reason of a destination's last failure; None if it works or none was saved."""
        ...

    def save_problems(self, found: Sequence[DropProblem], solved: Sequence[DropProblem]) -> None:
        """Add problems or replace those with the same drop, path and reason, and delete the solved ones."""
        ...

    def problems(self, drop: str | None = None) -> list[DropProblem]:
        """Return the problems of a drop, or of all drops, the oldest first."""
        ...

    def problem_counts(self) -> list[ProblemCount]:
        """Return the problems of each drop with each reason, by drop and reason."""
        ...

    def save_drop_state(self, state: DropState) -> None:
        """Replace the state of a drop."""
        ...

    def drop_states(self) -> list[DropState]:
        """Return the states of all drops that a daemon has opened, by their names."""
        ...

    def forget_drops(self, other_than: Collection[str]) -> None:
        """Delete the states and problems of all drops but these."""
        ...

    def assign_folders(self, places: Mapping[str, FolderPlace]) -> Mapping[str, FolderPlace]:
        """Have all archives follow their folders, by the folders of the configured drops.

        A drop that has the folder of another name before gets its archives and devices. If a drop has another
        folder than before, the archives that wait in the old one get a name of their own (`name_of_left`).
        Returns the places of the folders with such archives that are still pending, by that name. Claims of
        archives that get a new name, while their old one is that of another folder, are released.
        """
        ...

    def pending_drops(self) -> Mapping[str, DropBacklog]:
        """Return the drops with archives that wait for a delivery or a disposition, by name."""
        ...

    def check_storage(self) -> None:
        """Raise LedgerError if new records can't be stored or would be lost.

        That is in an outage, until a record is stored again, and if the storage was removed or replaced.
        """
        ...

    def close(self) -> None:
        """Close the ledger; every later call raises LedgerError."""
        ...


@dataclass(frozen=True, slots=True)
class RecreatedLedger:
    """The loss of a ledger that was found when it was opened; a new one replaces it.

    `path` is that of the damaged ledger, or where it should have been.
    """

    path: str
    error: str
    hint: str


@dataclass(slots=True)
class OpenedLedger:
    """The ledger of a running daemon.

    Before it is closed, the daemon sets `ended_cleanly` to False if it did not end as it should, and `damage`
    if it found the ledger damaged: the next daemon then checks the ledger when it opens it.
    """

    ledger: Ledger
    recreated: RecreatedLedger | None = None
    ended_cleanly: bool = True
    damage: LedgerDamagedError | None = None


def content_key(relpath: bytes, fingerprint: Fingerprint) -> int:
    """Return a number that identifies the content of a file by its path and fingerprint.

    It is valid within this process only. The device number does not count, as it may change with a mount.
    """
    return hash((relpath, fingerprint))
