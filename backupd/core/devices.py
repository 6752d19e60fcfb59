"""Which devices have not been heard of for too long."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from backupd.core.names import TextTemplate

WHOLE_DROP = ""
"""The name of the one device of a drop whose archives are not told apart."""


@dataclass(frozen=True, slots=True)
class Device:
    """A sender of archives, as far as it is known.

    `known_at` is when it was first heard of or listed, `last_at` when its last archive was admitted, None
    if none ever was. `every` is how often one is expected, None where nothing is. `alarmed` tells whether
    it was said to be overdue and not yet to have recovered.
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
    """How often a drop's devices are expected, by what they are told apart, and which have to come."""

    every: timedelta | None = None
    by: str | None = None
    devices: tuple[str, ...] = ()


def device_of(by: TextTemplate | None, values: Mapping[str, str]) -> str | None:
    """Return the name of the device that an archive with these values comes from.

    None if every placeholder is empty: the label pattern did not match, and the archive tells of nobody.
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


def newly_overdue_and_recovered(
    devices: Iterable[Device], now: datetime
) -> tuple[list[Device], list[Device]]:
    """Return which devices are overdue, and which were said to be and are no longer."""
    overdue, recovered = [], []
    for device in devices:
        if overdue_by(device, now) is not None:
            overdue.append(device)
        elif device.alarmed:
            recovered.append(device)
    return overdue, recovered


KEPT = 10
"""Sizes that are remembered of a device, its last ones."""

_ENOUGH = 3
"""Sizes without which nothing can be said of the next one."""


@dataclass(frozen=True, slots=True)
class SizeAnomaly:
    """How a size differs: `change` is a fraction of the median, -0.5 for half of it."""

    median: int
    change: float


def median(sizes: Sequence[int]) -> int:
    """Return the middle one of some sizes, or what lies between the two in the middle."""
    ordered = sorted(sizes)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def relative_change(size: int, usual: int) -> float:
    """Return by how much a size differs from the usual one, as a fraction of that."""
    return (size - usual) / max(usual, 1)


def size_anomaly(size: int, before: Sequence[int], alarm: float) -> SizeAnomaly | None:
    """Tell whether a size differs from the median of those before by the fraction `alarm` or more."""
    if len(before) < _ENOUGH:
        return None
    usual = median(before)
    change = relative_change(size, usual)
    return SizeAnomaly(usual, change) if abs(change) >= alarm else None
