"""What is asked of a ledger beside deliveries: devices and their habits, an end of old history, the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from backupd.core.doubt import Doubt
from backupd.core.freshness import Device, Expectation


@dataclass(frozen=True, slots=True)
class Tracked:
    """The device that an archive comes from, and by what fraction its size may differ from the usual."""

    device: str
    size_alarm: float | None = None


@dataclass(frozen=True, slots=True)
class ClockNote:
    """What the clock said, and what was doubted of that, the latest doubt last."""

    seen_at: datetime
    doubts: Sequence[Doubt] = ()


@dataclass(frozen=True, slots=True)
class UnusualSize:
    """An archive whose size differs from the median of its device's last ones."""

    archive_id: int
    drop: str
    relpath: bytes
    device: str
    size: int
    median_size: int


class Habits(Protocol):
    """The part of a ledger that remembers devices; safe to use from several threads.

    Every method raises `LedgerError` where the record can't be read or written; nothing is half done then.
    """

    def expect(self, expectations: Mapping[str, Expectation], now: datetime) -> None:
        """Take over what the configuration expects of each drop, before anything is admitted.

        Listed devices are known from now on. Those that were told apart in another way are forgotten, and so
        are those that were listed, are not any more, and never came.
        """
        ...

    def doubtful(self, now: datetime) -> list[Device]:
        """Return the devices that are overdue, or that were said to be."""
        ...

    def alarmed(self, overdue: Sequence[Device], recovered: Sequence[Device]) -> None:
        """Note which devices were said to be overdue, and which to have recovered."""
        ...

    def unusual(self) -> list[UnusualSize]:
        """Return the archives of unusual size of which that is still to be said, the oldest first."""
        ...

    def told(self, unusual: Sequence[UnusualSize]) -> None:
        """Note that the unusual size of these archives was said."""
        ...

    def clock(self) -> ClockNote | None:
        """Return what was noted of the clock last; None where nothing was."""
        ...

    def note_clock(self, note: ClockNote, *, patience: float = 0.0) -> None:
        """Note what the clock says, and what is doubted of it.

        Raises LedgerHeldError where another process holds the ledger for longer than `patience`, in seconds.
        """
        ...

    def prune(self, before: Callable[[], datetime], most: int) -> int:
        """Forget at most so many archives that ended before a time; return how many there were.

        The time is asked for once nobody else can write: a clock is doubted before old history comes back.

        Deliveries and attempts go with them. What is pending, still to be disposed of, in its drop folder or
        in quarantine stays, however old.
        """
        ...
