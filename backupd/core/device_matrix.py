"""The matrix of devices by days: on which days a backup arrived, and on which one was missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from backupd.core.devices import Device
from backupd.core.snapshot import DeviceDay


class DayState(StrEnum):
    """The judgement of a day of a device.

    `delivered`: all archives of the day are delivered. `late`: they are, but the first came later than
    expected. `waiting`: one is not delivered yet. `rejected`: one is in quarantine, and none was delivered.
    `missing`: one was expected, and none came. `none`: none came, and none was expected.
    """

    DELIVERED = "delivered"
    LATE = "late"
    WAITING = "waiting"
    REJECTED = "rejected"
    MISSING = "missing"
    NONE = "none"


GAPS = frozenset((DayState.MISSING, DayState.REJECTED))
"""The states of days without a backup that one was expected on."""


@dataclass(frozen=True, slots=True)
class CalendarDay:
    """A day of the host's time zone, such as 2026-03-01; it begins and ends at these times."""

    name: str
    begins: datetime
    ends: datetime


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A row of the matrix: the state of each day, oldest first.

    `device` is empty for a drop as a whole. `unusual` has the positions of the days with an archive of
    unusual size.
    """

    drop: str
    device: str
    states: tuple[DayState, ...]
    unusual: tuple[int, ...] = ()

    @property
    def has_gap(self) -> bool:
        """Return whether the backup of a day is missing."""
        return not GAPS.isdisjoint(self.states)

    @property
    def is_missing_now(self) -> bool:
        """Return whether the backup of the last day is missing."""
        return self.states[-1] in GAPS

    @property
    def rank(self) -> tuple[bool, bool]:
        """Return a key that sorts the most serious rows first."""
        return not self.is_missing_now, not self.has_gap


def device_matrix(
    devices: Iterable[Device],
    days: Iterable[DeviceDay],
    calendar: Sequence[CalendarDay],
    now: datetime,
    history_from: Mapping[str, datetime],
) -> list[DeviceRow]:
    """Return a row for each device, and for each one that sent archives without being tracked.

    `days` are in the order of time and may begin before the calendar; the archives before it show when the
    first one in it was due. `history_from` is the time from which on the ledger knows all archives of a drop.
    The rows of a drop are together. Drops and devices without a backup of today come first, then those with
    a gap, then by name.
    """
    positions = {day.name: position for position, day in enumerate(calendar)}
    rows = {
        (device.drop, device.name): _Row(device, calendar, now, history_from.get(device.drop))
        for device in devices
    }
    for sent in days:
        position = positions.get(sent.day)
        row = rows.get((sent.drop, sent.device))
        if row is None:
            if position is None:
                continue
            untracked = Device(sent.drop, sent.device, sent.first_at)
            row = rows[sent.drop, sent.device] = _Row(untracked, calendar, now, None)
        row.add(sent, position)
    finished = [row.finish() for row in rows.values()]
    ranks: dict[str, tuple[bool, bool]] = {}
    for each in finished:
        ranks[each.drop] = min(each.rank, ranks.get(each.drop, each.rank))
    return sorted(finished, key=lambda row: (ranks[row.drop], row.drop, row.rank, row.device))


class _Row:
    """A row to which the days of its device are added, oldest first.

    `last` is the time from which on the next backup is expected within `every`.
    """

    __slots__ = ("calendar", "device", "every", "last", "now", "states", "unusual")

    def __init__(
        self, device: Device, calendar: Sequence[CalendarDay], now: datetime, history_from: datetime | None
    ) -> None:
        self.device = device
        self.calendar = calendar
        self.now = now
        self.every = device.every
        self.last = _expected_from(device, calendar[0], history_from)
        self.states: list[DayState] = []
        self.unusual: list[int] = []

    def add(self, sent: DeviceDay, position: int | None) -> None:
        """Add a day; its position in the calendar is None if it is before."""
        if position is None:
            self.last = max(self.last, sent.last_at)
            return
        self._skip_to(position)
        self.states.append(self._state_of(sent))
        if sent.unusual:
            self.unusual.append(position)
        self.last = sent.last_at

    def finish(self) -> DeviceRow:
        """Return the row, with the days after the last one that was added."""
        self._skip_to(len(self.calendar))
        return DeviceRow(self.device.drop, self.device.name, tuple(self.states), tuple(self.unusual))

    def _skip_to(self, position: int) -> None:
        """Add the days before a position on which no archive came."""
        for day in self.calendar[len(self.states) : position]:
            is_missing = self.every is not None and self.last + self.every < min(day.ends, self.now)
            self.states.append(DayState.MISSING if is_missing else DayState.NONE)

    def _state_of(self, sent: DeviceDay) -> DayState:
        if sent.delivered + sent.rejected < sent.archives:
            return DayState.WAITING
        if not sent.delivered:
            return DayState.REJECTED
        is_late = self.every is not None and sent.first_at - self.last > self.every
        return DayState.LATE if is_late else DayState.DELIVERED


def _expected_from(device: Device, first: CalendarDay, history_from: datetime | None) -> datetime:
    """Return the time from which on the first backup in the calendar is expected within the interval."""
    if device.last_at is not None and device.last_at < first.begins:
        return device.last_at
    if device.archives and history_from is not None:
        # a device may be older than the ledger, which knows nothing of the time before
        return max(device.known_at, history_from)
    return device.known_at
