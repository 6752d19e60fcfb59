"""Rates, and how they change with the time of day: "2MB/s", "08:00-18:00"."""

import re
from collections.abc import Mapping
from typing import Annotated, Final

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from backupd.config.faults import expected, refused
from backupd.config.quantities import SIZE_PATTERN, format_size, parse_size
from backupd.core.bandwidth import Schedule, Window

_WINDOW: Final = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")
_A_RATE: Final = 'a rate such as "2MB/s", or "none"'
_RATE_PATTERN: Final = f"{SIZE_PATTERN[:-1]}(?:/s)?$|^none$"
_SLOWEST: Final = 1024


def _rate(value: object) -> int | None:
    if value == "none":
        return None
    if not isinstance(value, str):
        raise expected(_A_RATE)
    try:
        rate = parse_size(value.removesuffix("/s"))
    except ValueError:
        raise expected(_A_RATE) from None
    if rate < _SLOWEST:
        raise expected('a rate of at least "1KiB/s"')
    return rate


def _schedule(value: object) -> Schedule:
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, Mapping):
        return Schedule((), _rate(value))
    windows = []
    for key, rate in value.items():
        if key == "default":
            continue
        match = _WINDOW.fullmatch(str(key))
        if not match or match[1] + match[2] == match[3] + match[4]:
            raise refused('expected hours such as "08:00-18:00", or "default", as keys')
        begin, end = (int(match[i]) * 60 + int(match[i + 1]) for i in (1, 3))
        windows.append(Window(begin, end, _rate(rate)))
    return Schedule(tuple(windows), _rate(value.get("default", "none")))


def _written(schedule: Schedule) -> str | dict[str, str]:
    if not schedule.windows:
        return _rate_text(schedule.default)
    hours = {f"{_clock(w.start)}-{_clock(w.end)}": _rate_text(w.rate) for w in schedule.windows}
    return {**hours, "default": _rate_text(schedule.default)}


def _rate_text(rate: int | None) -> str:
    return "none" if rate is None else f"{format_size(rate)}/s"


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


Bandwidth = Annotated[
    Schedule,
    BeforeValidator(_schedule),
    PlainSerializer(_written, when_used="json"),
    WithJsonSchema(
        {
            "type": ["string", "object"],
            "pattern": _RATE_PATTERN,
            "additionalProperties": {"type": "string", "pattern": _RATE_PATTERN},
        }
    ),
]
"""Bytes per second by the time of day."""
