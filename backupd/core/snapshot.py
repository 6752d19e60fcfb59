"""The state of a daemon at one moment; everything that shows the state reads this one record.

The daemon writes it to the ledger while something changes, and with each heartbeat at least. `status`,
`--check`, the metrics, the page, the heartbeat and the notifications are made from it, so that they agree.
File names are text in it, with bytes that are not UTF-8 escaped. Times are UTC, sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from backupd.core.certificate_life import CertificateLife
from backupd.core.circuit import CircuitState
from backupd.core.drop_problem import FOLDER_REASONS

MIN_HUNG_AFTER = timedelta(minutes=1)
"""The least age at which the state of a running daemon shows that it hangs."""

MAX_INTERVAL = timedelta(minutes=5)
"""The longest time between two snapshots, whatever the interval of the heartbeats is."""


@dataclass(frozen=True, slots=True)
class OperatorPause:
    """A pause of a destination or a drop that a person has requested.

    `kind` is `destination` or `drop`. `until` is the end of the pause, None if it lasts until it is ended by
    a person. `by` is the user who requested it, `note` the reason in the user's words, empty without one.
    """

    kind: str
    name: str
    since: datetime
    until: datetime | None = None
    by: str = ""
    note: str = ""

    def is_over(self, now: datetime) -> bool:
        """Return whether the end of the pause has passed."""
        return self.until is not None and now >= self.until


@dataclass(frozen=True, slots=True)
class DropSnapshot:
    """A drop and its queue.

    `observer` is how changes in its folder are noticed, `fault` why only scans find new files at the moment,
    and `blind_spot` why files that are still open for writing can't be detected; each is empty if there is
    none. `pending` counts the archives with an open delivery, of which the oldest was queued at `oldest`.
    `last` is the path of the newest archive, which was queued at `last_at`. `is_configured` is False for a
    folder that is no drop folder any more, but has pending archives.
    """

    name: str
    path: str
    pending: int = 0
    pending_bytes: int = 0
    oldest: datetime | None = None
    last: str | None = None
    last_at: datetime | None = None
    observer: str = ""
    filesystem: str = ""
    fault: str = ""
    blind_spot: str = ""
    is_configured: bool = True
    held: OperatorPause | None = None


@dataclass(frozen=True, slots=True)
class DestinationSnapshot:
    """A destination, its queue and its circuit.

    `pending` counts its open deliveries, and `oldest` is when the first of their archives was queued.
    `rejected` counts its rejected archives in quarantine. `circuit` is None for a destination that is no
    longer configured. `reason`, `error` and `hint` are those of the last failure of a paused one, `since` is
    the time of the first failure in a row, and `until` the end of the pause. `held` is the pause that a
    person has requested.
    """

    name: str
    address: str = ""
    pending: int = 0
    pending_bytes: int = 0
    oldest: datetime | None = None
    rejected: int = 0
    last_delivered: datetime | None = None
    circuit: CircuitState | None = None
    reason: str | None = None
    error: str | None = None
    hint: str = ""
    since: datetime | None = None
    until: datetime | None = None
    held: OperatorPause | None = None

    @property
    def is_paused(self) -> bool:
        """Return whether the destination is down or misconfigured."""
        return self.circuit not in (None, CircuitState.WORKING)


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload under way: `sent_bytes` of `size_bytes` were sent since `started_at`.

    `bytes_per_s` is the mean rate of this attempt.
    """

    delivery_id: str
    drop: str
    archive: str
    destination: str
    attempt: int
    size_bytes: int
    sent_bytes: int
    started_at: datetime
    bytes_per_s: int

    @property
    def percent(self) -> int:
        """Return the part of the bytes that was sent, in whole percent."""
        return 100 * self.sent_bytes // max(self.size_bytes, 1)

    @property
    def seconds_left(self) -> float | None:
        """Return the time until all bytes are sent, at the mean rate; None before the first byte."""
        left = max(self.size_bytes - self.sent_bytes, 0)
        return left / self.bytes_per_s if self.bytes_per_s else None


@dataclass(frozen=True, slots=True)
class CertificateSnapshot:
    """The certificate of a destination that needs a renewal first; `role` is `client` or `server`."""

    destination: str
    role: str
    path: str
    expires_at: datetime
    life: CertificateLife


@dataclass(frozen=True, slots=True)
class OverdueDevice:
    """A device that has not sent a backup within its expected interval; `last_at` is None if it never did.

    `device` is empty for a drop as a whole. It has been overdue since `since`.
    """

    drop: str
    device: str
    last_at: datetime | None
    since: datetime


@dataclass(frozen=True, slots=True)
class ProblemSnapshot:
    """The problems of a drop with one reason: their number, and the time of the oldest one.

    `example` is the path of the oldest one's file, empty for the folder itself, with its `error` and `hint`.
    """

    drop: str
    reason: str
    files: int
    since: datetime
    example: str
    error: str
    hint: str

    @property
    def is_critical(self) -> bool:
        """Return whether the drop folder cannot be used at all."""
        return self.reason in FOLDER_REASONS


@dataclass(frozen=True, slots=True)
class DaemonProblem:
    """A problem of the daemon itself, such as a refused configuration or a notification that fails.

    `subject` is one word for what has the problem, or a key of the configuration.
    """

    subject: str
    since: datetime
    error: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a daemon, of the queue and of everything that needs a person, at the time `taken_at`.

    The daemon takes one every `heartbeat_every` at least, or every `MAX_INTERVAL`. `rejected` is the number
    of archives in quarantine. `is_ready` is whether every drop folder has been scanned since the start.
    Counts of the process are None if /proc cannot be read.
    """

    taken_at: datetime
    host: str
    version: str
    pid: int
    started_at: datetime
    heartbeat_every: timedelta
    is_ready: bool
    drops: tuple[DropSnapshot, ...] = ()
    destinations: tuple[DestinationSnapshot, ...] = ()
    uploads: tuple[Upload, ...] = ()
    rejected: int = 0
    problems: tuple[ProblemSnapshot, ...] = ()
    certificates: tuple[CertificateSnapshot, ...] = ()
    devices: int = 0
    overdue: tuple[OverdueDevice, ...] = ()
    daemon_problems: tuple[DaemonProblem, ...] = ()
    memory_bytes: int | None = None
    open_files: int | None = None
    open_files_limit: int | None = None

    @property
    def pending(self) -> int:
        """Return the number of open deliveries."""
        return sum(each.pending for each in self.destinations)

    @property
    def pending_bytes(self) -> int:
        """Return the size of the archives of all open deliveries."""
        return sum(each.pending_bytes for each in self.destinations)

    @property
    def oldest(self) -> datetime | None:
        """Return when the oldest archive with an open delivery was queued."""
        return min((each.oldest for each in self.destinations if each.oldest), default=None)

    @property
    def holds(self) -> Iterator[OperatorPause]:
        """Yield the pauses that people have requested."""
        held = (*(each.held for each in self.destinations), *(each.held for each in self.drops))
        yield from (pause for pause in held if pause is not None)

    def age(self, now: datetime) -> timedelta:
        """Return the time since it was taken."""
        return max(now - self.taken_at, timedelta(0))

    @property
    def hung_after(self) -> timedelta:
        """Return the age from which on its daemon hangs, if it runs."""
        return max(3 * min(self.heartbeat_every, MAX_INTERVAL), MIN_HUNG_AFTER)

    def is_outdated(self, now: datetime) -> bool:
        """Return whether it is so old that its daemon has ended or hangs."""
        return self.age(now) > self.hung_after


@dataclass(frozen=True, slots=True)
class DeviceDay:
    """The archives of a device on one day of the host's time zone.

    `day` is such as 2026-03-01. `archives` were queued on it, of which `delivered` have been delivered to
    every destination by now and `rejected` are in quarantine. `unusual` counts those of an unusual size.
    `first_at` and `last_at` are when the first and the last of them were queued. `device` is empty for a drop
    as a whole, and for archives of an unknown device.
    """

    drop: str
    device: str
    day: str
    archives: int
    delivered: int
    rejected: int
    unusual: int
    first_at: datetime
    last_at: datetime


@dataclass(frozen=True, slots=True)
class HourThroughput:
    """The deliveries to a destination that ended in the hour from `hour` on."""

    destination: str
    hour: datetime
    delivered: int
    delivered_bytes: int
