"""What is asked of a ledger by those who see to the archives that were put away."""

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
    """A delivered archive whose file was moved to `to`, relative to its drop folder, at `since`."""

    archive: Archive
    moved_to: bytes
    moved_at: datetime


@dataclass(frozen=True, slots=True)
class RestoredArchive:
    """An archive as the record beside it tells of it: its file was moved to `to` at `since`.

    It is to have the number `ident`; `device` is whom it comes from, where that is of interest.
    """

    archive_id: int
    completed: CompletedArchive
    moved_to: bytes
    moved_at: datetime
    device: str | None = None


class RemovalReason(StrEnum):
    """What became of a file in sent_dir: removed by us, or no longer there, or no longer ours before that."""

    EXPIRED = "expired"
    GONE = "gone"
    CHANGED = "changed"


class SentIndex(Protocol):
    """The archives that were put away; for one thread.

    Every method raises `LedgerError` where the record can't be read or written; nothing is half done then.
    """

    def without_series(self, drop: str, most: int) -> list[SentArchive]:
        """Return archives of a drop whose series is not noted yet, the first ones first."""
        ...

    def set_series(self, series: Mapping[int, bytes]) -> None:
        """Note the series of archives, by their ids."""
        ...

    def oldest(
        self, drop: str, after: SentArchive | None, until: datetime | None, most: int
    ) -> list[SentArchive]:
        """Return archives of a drop that were moved until a time, if one is given, the oldest first.

        `after` is the last one that is not wanted again.
        """
        ...

    def count_newer(self, kept: SentArchive, most: int) -> int:
        """Return how many archives of the same series came after one; `most` for more than that.

        The fewer count, of those that were moved after it and those that were admitted after it: a clock that
        was wrong makes none seem old. How those of a restored history were numbered tells nothing.
        """
        ...

    def beyond_newest(self, drop: str, series: bytes, last: int, until: datetime, most: int) -> list[SentArchive]:
        """Return what is not among the last of a series, as `newer` counts, and was moved until a time.

        The newest come first.
        """
        ...

    def mark_expiring(self, archive_ids: Sequence[int]) -> None:
        """Note, durably, that archives are about to be removed; they are kept no longer."""
        ...

    def list_expiring(self, drop: str, most: int) -> list[SentArchive]:
        """Return archives of a drop whose removal is noted as begun."""
        ...

    def record_removals(self, removals: Mapping[int, RemovalReason], now: datetime) -> None:
        """Note what became of files, by the ids of their archives."""
        ...

    def is_restored(self, drop: str, folder: bytes) -> bool:
        """Tell whether what lies in a folder of a drop is known as far as its records tell of it."""
        ...

    def lowest_id(self) -> int:
        """Return a number that is below those of all archives, and of all that are to come."""
        ...

    def unknown(self, found: Sequence[RestoredArchive]) -> list[RestoredArchive]:
        """Return those archives that are not known."""
        ...

    def restore(self, found: Sequence[RestoredArchive]) -> int:
        """Note archives that are not known; return how many those were."""
        ...

    def mark_restored(self, drop: str, folder: bytes) -> None:
        """Note that all records in a folder of a drop were read; `b""` for all of its folders."""
        ...

    def close(self) -> None:
        """Close it; further calls are errors."""
        ...
