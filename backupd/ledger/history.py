"""The ledger as the commands use it: queries, and the few changes that a person makes.

An adapter implements `History`. A command may use it while a daemon is running. Times are UTC datetimes,
sizes are bytes, paths are bytes relative to the drop folder.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from backupd.core.device_matrix import CalendarDay
from backupd.core.devices import Device
from backupd.core.drop_problem import DropProblem
from backupd.core.model import Archive, DeliveryState
from backupd.core.names import as_text
from backupd.core.snapshot import DeviceDay, HourThroughput, OperatorPause, Snapshot
from backupd.ledger.port import DropBacklog


@dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """An archive and the disposition of its file; times are UTC.

    `state` is a `DeliveryState` other than claimed. `digest` is that of the content that was sent, as
    `algorithm:hex`. `disposition` is `due` or `done`, None while a delivery is open. `disposed_to` is the new
    path of the file, relative to its drop folder, None if it was not moved; the file may be removed since.
    `missing` is whether the file was missing when it was to be disposed of.
    """

    archive: Archive
    state: str
    digest: str | None
    disposition: str | None
    disposed_to: bytes | None
    disposed_at: datetime | None
    missing: bool


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A delivery; times are UTC.

    `due_at` is set while it is pending, `ended_at` after that. The fields from `reason` to `receipt` are as
    in `DeliveryResult`, for a pending delivery of the last attempt. `disposed_to` is as in `ArchiveRecord`.
    """

    id: str
    archive: Archive
    destination: str
    state: DeliveryState
    due_at: datetime | None
    ended_at: datetime | None
    attempts: int
    reason: str | None
    error: str | None
    digest: str | None
    verified: bool | None
    http_status: int | None
    receipt: str | None
    disposed_to: bytes | None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One request that was made for a delivery; `outcome` is the lower-case name of its outcome's class."""

    number: int
    started_at: datetime
    duration_s: float
    sent_bytes: int
    outcome: str
    reason: str | None
    error: str | None
    http_status: int | None


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A device that archives come from; `device` is empty for a drop as a whole.

    `last_at` is when its last archive was queued, None without one. `every` is how often an archive is
    expected, None if none is.
    """

    drop: str
    device: str
    last_at: datetime | None
    archives: int
    overdue: bool
    every: timedelta | None


@dataclass(frozen=True, slots=True)
class Selector:
    """Deliveries that a person names in one or several ways; those that match any of the fields are meant.

    `id_prefix` is the beginning of a delivery's id, and `archive_id` the number of an archive. `path` is the
    path of an archive, or the end of it from the beginning of a name on, in the drop folder or where its file
    was moved to; with `drop`, it is the whole path in that drop. `digest` is the beginning of a digest, with
    or without the algorithm and a colon. An empty value or None matches nothing.
    """

    id_prefix: str = ""
    archive_id: int | None = None
    path: bytes = b""
    drop: str | None = None
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Search:
    """The deliveries to find; None or an empty value is any.

    `since` and `until` limit when their archives were queued. `name` is a glob such as `*.cfg` for the name
    of the archive, or for its path if the glob contains a slash; upper and lower case are the same. `labels`
    are the values of named groups that the label pattern of the archive's drop, in `label_patterns`, has to
    find in its path. Only deliveries that one of the `selectors` matches are found, if there are any.
    """

    state: DeliveryState | None = None
    drop: str | None = None
    destination: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    label_patterns: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    selectors: Sequence[Selector] = ()

    def path_filter(self) -> Callable[[str, bytes], bool]:
        """Return a function that applies `name` and `labels` to the drop and path of an archive."""
        glob = re.compile(fnmatch.translate(self.name), re.IGNORECASE) if self.name else None

        def matches(drop: str, relpath: bytes) -> bool:
            path = as_text(relpath)
            if glob and not glob.match(path if "/" in self.name else path.rpartition("/")[2]):
                return False
            if not self.labels:
                return True
            match = self.label_patterns[drop].fullmatch(path) if drop in self.label_patterns else None
            return match is not None and self.labels.items() <= match.groupdict().items()

        return matches


class History(Protocol):
    """The archives, deliveries and devices in a ledger; for one thread.

    Every method raises LedgerError if the ledger can't be read or written.
    """

    def daemon_pid(self) -> int | None:
        """Return the process id of the daemon that uses the ledger, None if no daemon runs."""
        ...

    def snapshots(self) -> list[Snapshot]:
        """Return the state of the daemon on each host, by the hosts' names; it is the last one that ran."""
        ...

    def pauses(self) -> list[OperatorPause]:
        """Return the pauses that people have requested, by kind and name."""
        ...

    def pause(self, pause: OperatorPause) -> None:
        """Add a pause, or replace that of the same destination or drop."""
        ...

    def resume(self, kind: str, name: str) -> bool:
        """End a pause; return whether there was one."""
        ...

    def device_days(self, drops: Collection[str], days: Iterable[CalendarDay]) -> Iterator[DeviceDay]:
        """Yield the archives of each device of these drops on each of these days; empty ones are left out.

        Archives that a newer content has superseded before their delivery are left out, and rejected ones
        that were queued again.
        """
        ...

    def first_queued(self, drops: Collection[str]) -> Mapping[str, datetime]:
        """Return when the oldest archive in the ledger was queued, for each of these drops that has one."""
        ...

    def throughput(self, destinations: Collection[str], since: datetime) -> list[HourThroughput]:
        """Return the deliveries to each of these destinations by the hour; empty hours are left out."""
        ...

    def find(self, search: Search, limit: int) -> list[DeliveryRecord]:
        """Return up to `limit` deliveries of a search, those of the newest archives first."""
        ...

    def files(self, drop: str) -> list[tuple[Archive, DeliveryState]]:
        """Return the archives with a file that the daemon does not queue again, with their states, by id."""
        ...

    def deliveries_of(self, archive_id: int) -> list[DeliveryRecord]:
        """Return the deliveries of an archive, by destination."""
        ...

    def attempts(self, delivery_id: str) -> list[AttemptRecord]:
        """Return the attempts of a delivery, in their order."""
        ...

    def archive(self, archive_id: int) -> ArchiveRecord:
        """Return an archive; raises UsageError if there is none with this id."""
        ...

    def destinations_pending(self) -> list[str]:
        """Return the names of the destinations with open deliveries, in alphabetical order."""
        ...

    def pending_drops(self) -> Mapping[str, DropBacklog]:
        """Return the drops with archives that wait for a delivery or a disposition, by name."""
        ...

    def problems(self, drop: str | None, limit: int) -> list[DropProblem]:
        """Return up to `limit` problems of a drop, or of all if `drop` is None, the oldest first."""
        ...

    def devices(self, now: datetime) -> list[DeviceRecord]:
        """Return all devices by drop and name, each with whether it is overdue at `now`."""
        ...

    def tracked_devices(self) -> list[Device]:
        """Return all devices by drop and name, each with when it became known."""
        ...

    def retry_now(self, delivery_id: str) -> bool:
        """Make a pending delivery due now; return False if it is not pending."""
        ...

    def mark_retried(self, archive_id: int) -> AbstractContextManager[None]:
        """Record that a rejected archive is no longer in quarantine, if the `with` block succeeds.

        An error in the block undoes it. Until its end, the daemon can't change this archive.
        """
        ...

    def forget_device(self, device: str, drop: str | None, now: datetime) -> list[tuple[str, bool]]:
        """Forget a device in one drop, or in all if `drop` is None.

        Returns the drops that had it, each with whether the configuration lists it there. A listed device
        stays known, as if it had been listed only at `now`.
        """
        ...

    def give_up_drop(self, drop: str, now: datetime) -> int:
        """End what is pending from a drop that is no longer configured; return its number.

        The files stay where they are. Its pending deliveries are superseded.
        """
        ...

    def give_up_destination(self, destination: str, now: datetime) -> int:
        """End the pending deliveries to a destination that is no longer configured; return their number.

        An archive with other deliveries goes on as if it never had this one. Any other is superseded, so that
        the daemon queues its file again, for the destinations of today.
        """
        ...

    def close(self) -> None:
        """Close the connection to the ledger."""
        ...
