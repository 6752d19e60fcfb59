"""Durations, times and sizes as text; `config.types` has the exact forms that configuration files use."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def human_duration(duration: timedelta | float) -> str:
    """Return a duration, or a number of seconds, in at most two units: `45 s`, `20 min`, `3 h 5 min`, `2 d`.

    It is rounded down. Durations below 48 hours are given in hours, longer ones in days.
    """
    seconds = int(duration.total_seconds() if isinstance(duration, timedelta) else duration)
    if seconds < _MINUTE:
        return f"{seconds} s"
    if seconds < _HOUR:
        return f"{seconds // _MINUTE} min"
    if seconds < 2 * _DAY:
        return _two_units(seconds // _HOUR, "h", seconds % _HOUR // _MINUTE, "min")
    return _two_units(seconds // _DAY, "d", seconds % _DAY // _HOUR, "h")


def local_time(time: datetime) -> str:
    """Return a time for people, in the zone of the host, such as `2026-03-01 06:00:00 CET`."""
    try:
        time = time.astimezone()
    except (OverflowError, ValueError):  # within a day of the first or last time that there is
        time = time.astimezone(UTC)
    return f"{time:%Y-%m-%d %H:%M:%S %Z}"


def machine_time(time: datetime, timespec: str = "milliseconds") -> str:
    """Return a time for programs, in UTC by RFC 3339, such as `2026-03-01T05:00:00.000Z`."""
    return time.astimezone(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def short_duration(duration: timedelta | float) -> str:
    """Return a duration in one unit, for tables: `45 s`, `20 min`, `3 h`, `2 d`; rounded down."""
    seconds = int(duration.total_seconds() if isinstance(duration, timedelta) else duration)
    for size, unit in ((2 * _DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= size:
            return f"{seconds // min(size, _DAY)} {unit}"
    return f"{seconds} s"


def human_size(count: int) -> str:
    """Return a number of bytes with one decimal and a binary unit, such as `1.4 MiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _two_units(larger: int, unit: str, smaller: int, smaller_unit: str) -> str:
    return f"{larger} {unit} {smaller} {smaller_unit}" if smaller else f"{larger} {unit}"
