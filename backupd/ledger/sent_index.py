"""The index of archives in `sent_dir`, for retention and for restoring the history of a new ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from backupd.core.model import Archive
from backupd.ledger.port import CompletedArchive


@dataclass(frozen=True, slots=True)
class SentArchive:
    """A delivered archive with a file in `sent_dir`; `moved_to` is relative to its drop folder."""

    archive: Archive
    moved_to: bytes
    moved_at: datetime


@dataclass(frozen=True, slots=True)
class RestoredArchive:
    """An archive that is restored from its receipt file, under the id `archive_id`.

    `moved_to` is relative to its drop folder. `device` is its device, if the drop's devices are tracked.
    """

    archive_id: int
    completed: CompletedArchive
    moved_to: bytes
    moved_at: datetime
    device: str | None = None


class RemovalReason(StrEnum):
    """Why an archive is no longer in `sent_dir`.

    It was removed by retention, its file was missing before that, or another file had its name.
    """

    EXPIRED = "expired"
    MISSING = "missing"
    CHANGED = "changed"


class SentIndex(Protocol):
    """The archives in `sent_dir`; for one thread.

    Every method is one transaction, and raises `LedgerError` if the ledger can't be read or written. A series
    is the archives of one device or folder, of which the newest are kept; its name is bytes.
    """

    def without_series(self, drop: str, limit: int) -> list[SentArchive]:
        """Return up to `limit` archives of a drop that have no series yet, by id."""
        ...

    def set_series(self, series: Mapping[int, bytes]) -> None:
        """Record the series of archives, by their ids."""
        ...

    def oldest(
        self, drop: str, after: SentArchive | None, until: datetime | None, limit: int
    ) -> list[SentArchive]:
        """Return up to `limit` archives of a drop in the order in which they were moved.

        Only those after the archive `after`, and those that were moved until a time, where these are given.
        """
        ...

    def count_newer(self, sent: SentArchive, limit: int) -> int:
        """Return how many archives of the same series are newer, at most `limit`.

        It is the smaller of two counts, the archives that were moved later and those that were queued later,
        so that a wrong clock makes no archive look old. For an archive that was restored, it is the first
        count.
        """
        ...

    def beyond_newest(
        self, drop: str, series: bytes, keep: int, until: datetime, limit: int
    ) -> list[SentArchive]:
        """Return up to `limit` archives of a series that were moved until a time, except the newest `keep`.

        The order is by the time of the move, newest first; newer is meant as in `count_newer`.
        """
        ...

    def mark_expiring(self, archive_ids: Sequence[int]) -> None:
        """Record that the files of archives are about to be removed. Durable."""
        ...

    def list_expiring(self, drop: str, limit: int) -> list[SentArchive]:
        """Return up to `limit` archives of a drop that are marked as expiring."""
        ...

    def record_removals(self, removals: Mapping[int, RemovalReason], now: datetime) -> None:
        """Record why archives are no longer in `sent_dir`, by their ids."""
        ...

    def is_restored(self, drop: str, folder: bytes) -> bool:
        """Return whether the receipt files in a folder of a drop have been read into the ledger."""
        ...

    def lowest_id(self) -> int:
        """Return an id that is lower than those of all archives, for the first restored one."""
        ...

    def unknown(self, archives: Sequence[RestoredArchive]) -> list[RestoredArchive]:
        """Return the archives of which no delivery is in the ledger."""
        ...

    def restore(self, archives: Sequence[RestoredArchive]) -> int:
        """Add the archives of which no delivery is in the ledger; return their number."""
        ...

    def mark_restored(self, drop: str, folder: bytes) -> None:
        """Record that all receipt files in a folder of a drop were read; `b""` is all of its folders."""
        ...

    def close(self) -> None:
        """Close the index; every later call is an error."""
        ...
