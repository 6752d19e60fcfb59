"""Durations and sizes as text for people; `config.types` has the exact forms that configuration files use."""

from __future__ import annotations

from datetime import timedelta

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
