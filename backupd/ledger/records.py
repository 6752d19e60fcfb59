"""What `History` tells of archives, deliveries and whom they come from or go to, and what it is asked by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from backupd.core.model import Archive, DeliveryState


@dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """An archive and what became of its file: `removal` tells how it left `disposed_to`, if it did."""

    archive: Archive
    state: str
    digest: str | None
    disposition: str | None
    disposed_to: bytes | None
    disposed_at: datetime | None
    removal: str | None
    removed_at: datetime | None


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A delivery with all that the ledger knows of it; times are UTC."""

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
    """A request that was made for a delivery."""

    number: int
    started_at: datetime
    duration_s: float
    sent: int
    outcome: str
    reason: str | None
    error: str | None
    http_status: int | None


@dataclass(frozen=True, slots=True)
class DestinationRecord:
    """How things stand with a destination; `gate` None if the daemon has never noted one."""

    name: str
    pending: int
    pending_bytes: int
    oldest: datetime | None
    rejected: int
    last_delivered: datetime | None
    gate: str | None
    reason: str | None
    error: str | None
    since: datetime | None
    until: datetime | None


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A device that archives come from; `device` is empty for a drop as a whole.

    `last_at` is None if nothing ever came of it, `every` where nothing is expected.
    """

    drop: str
    device: str
    last_at: datetime | None
    archives: int
    overdue: bool
    every: timedelta | None


@dataclass(frozen=True, slots=True)
class DropRecord:
    """How things stand with a drop; `last` is the archive that was admitted last."""

    pending: int
    pending_bytes: int
    oldest: datetime | None
    last: bytes | None
    last_at: datetime | None


@dataclass(frozen=True, slots=True)
class Search:
    """Which deliveries are wanted; times are those of the archive's admission."""

    state: DeliveryState | None = None
    drop: str | None = None
    destination: str | None = None
    since: datetime | None = None
    until: datetime | None = None


Wanted = Callable[[str, bytes], bool]
"""Called with a drop and a path in it."""
