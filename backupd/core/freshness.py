"""Which devices have not been heard of for too long."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from backupd.core.template import Template

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
class Expectation:
    """How often a drop's devices are expected, by what they are told apart, and which have to come."""

    every: timedelta | None = None
    by: str | None = None
    devices: tuple[str, ...] = ()


def device_of(by: Template | None, values: Mapping[str, str]) -> str | None:
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


def judged(devices: Iterable[Device], now: datetime) -> tuple[list[Device], list[Device]]:
    """Return which devices are overdue, and which were said to be and are no longer."""
    overdue, recovered = [], []
    for device in devices:
        if overdue_by(device, now) is not None:
            overdue.append(device)
        elif device.alarmed:
            recovered.append(device)
    return overdue, recovered
