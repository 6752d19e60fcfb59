"""The devices that send archives: which are overdue, and which sent an archive of an unusual size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from backupd.core.names import TextTemplate

WHOLE_DROP = ""
"""The name of the only device of a drop without `expect.by`."""

KEPT_SIZES = 10
"""Number of latest archive sizes that are stored per device."""

_MIN_SIZES = 3
"""Number of earlier sizes without which no size is called unusual."""


@dataclass(frozen=True, slots=True)
class Device:
    """A sender of archives, as stored in the ledger.

    `known_at` is the time of its first archive, or that at which it was listed in the configuration.
    `last_at` is the time at which its last archive was queued, None if none was. `every` is the longest
    time expected between two archives, None if none is expected. `alarmed` is True from the log event that
    reports it as overdue until the one that reports its recovery.
    """

    drop: str
    name: str
    known_at: datetime
    last_at: datetime | None = None
    archives: int = 0
    every: timedelta | None = None
    alarmed: bool = False


@dataclass(frozen=True, slots=True)
class DeviceExpectation:
    """The `expect` table of a drop.

    `every` is the longest time expected between two archives of a device, `by` the template of a device's
    name, and `devices` are the names of those that are expected from the start.
    """

    every: timedelta | None = None
    by: str | None = None
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SizeAnomaly:
    """An unusual size: `median` is the usual one in bytes, `change` the difference as a fraction of it.

    A `change` of -0.5 is half the usual size.
    """

    median: int
    change: float


def device_of(by: TextTemplate | None, values: Mapping[str, str]) -> str | None:
    """Return the name of the device that an archive with these template values comes from.

    None if every placeholder of `by` is empty: the label pattern did not match, so the device is unknown.
    """
    if by is None:
        return WHOLE_DROP
    return by.render(values) if any(values[name] for name in by.names) else None


def overdue_by(device: Device, now: datetime) -> timedelta | None:
    """Return for how long a device has been overdue, or None if it is not."""
    if device.every is None:
        return None
    late = now - (device.last_at or device.known_at) - device.every
    return late if late > timedelta(0) else None


def overdue_and_recovered(devices: Iterable[Device], now: datetime) -> tuple[list[Device], list[Device]]:
    """Return the devices that are overdue, and those that were reported as overdue and no longer are."""
    overdue, recovered = [], []
    for device in devices:
        if overdue_by(device, now) is not None:
            overdue.append(device)
        elif device.alarmed:
            recovered.append(device)
    return overdue, recovered


def size_anomaly(size: int, before: Sequence[int], alarm: float) -> SizeAnomaly | None:
    """Return the anomaly if a size differs from the median of the earlier ones by the fraction `alarm`.

    None if it differs less, or if there are too few earlier sizes to compare with.
    """
    if len(before) < _MIN_SIZES:
        return None
    usual = median(before)
    change = relative_change(size, usual)
    return SizeAnomaly(usual, change) if abs(change) >= alarm else None


def median(sizes: Sequence[int]) -> int:
    """Return the median of sizes, rounded down to a whole number."""
    ordered = sorted(sizes)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def relative_change(size: int, usual: int) -> float:
    """Return the difference between a size and the usual one, as a fraction of the usual one."""
    return (size - usual) / max(usual, 1)
