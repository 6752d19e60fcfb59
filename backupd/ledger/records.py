"""What `History` tells of archives and drops, and what it is asked by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

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
