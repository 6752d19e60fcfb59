"""Durations and sizes as people write them: "5m", "20MB"."""

import re
from datetime import timedelta
from decimal import Decimal
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

from backupd.config.faults import expected

_NUMBER: Final = r"[0-9]{1,20}(?:\.[0-9]{1,9})?"
_MICROSECONDS: Final = {
    "d": 86_400_000_000,
    "h": 3_600_000_000,
    "m": 60_000_000,
    "s": 1_000_000,
    "ms": 1_000,
}
DURATION_PATTERN: Final = "^(?=.)" + "".join(f"(?:{_NUMBER}{unit})?" for unit in _MICROSECONDS) + "$"
_DURATION: Final = re.compile(DURATION_PATTERN)
_DURATION_PART: Final = re.compile(f"({_NUMBER})(ms|[dhms])")

_BYTES: Final = {"B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("kMGTP", start=1)
}
_BYTES_BY_UNIT: Final = {unit.lower(): factor for unit, factor in _BYTES.items()}
SIZE_PATTERN: Final = f"^{_NUMBER} ?(?:[kKmMgGtTpP][iI]?)?[bB]$"
_SIZE: Final = re.compile(f"({_NUMBER}) ?((?:[kmgtp]i?)?b)", re.IGNORECASE)

PERCENT_PATTERN: Final = f"^{_NUMBER}%$"
_PERCENT: Final = re.compile(f"({_NUMBER})%")

LONGEST: Final = timedelta(days=36500)
LARGEST: Final = 2**63 - 1

_A_DURATION: Final = 'a duration such as "2s"'
_A_SIZE: Final = 'a size such as "20MB"'
_A_PERCENTAGE: Final = 'a percentage from "1%" to "1000%"'


def parse_duration(text: str) -> timedelta:
    """Return the duration that `text` spells; units are d, h, m, s and ms, in this order.

    Raise `ValueError` for anything else, and for more than a hundred years.
    """
    if not _DURATION.fullmatch(text):
        raise ValueError(f"expected {_A_DURATION}")
    microseconds = sum(
        (Decimal(number) * _MICROSECONDS[unit] for number, unit in _DURATION_PART.findall(text)), Decimal(0)
    )
    if microseconds > LONGEST // timedelta(microseconds=1):
        raise ValueError(f'expected a duration of at most "{LONGEST.days}d"')
    return timedelta(microseconds=int(microseconds))


def format_duration(duration: timedelta) -> str:
    """Return `duration` in the largest unit of which it is a whole number, in seconds otherwise."""
    microseconds = duration // timedelta(microseconds=1)
    if not microseconds:
        return "0s"
    for unit in ("d", "h", "m", "s"):
        if microseconds % _MICROSECONDS[unit] == 0:
            return f"{microseconds // _MICROSECONDS[unit]}{unit}"
    seconds = Decimal(microseconds) / _MICROSECONDS["s"]
    return f"{seconds:f}s"


def parse_size(text: str) -> int:
    """Return the bytes that `text` spells; kB is a thousand of them, KiB 1024.

    Raise `ValueError` for anything else, for parts of a byte, and for more than 2**63 - 1.
    """
    if not (match := _SIZE.fullmatch(text)):
        raise ValueError(f"expected {_A_SIZE}")
    number, unit = match.groups()
    size = Decimal(number) * _BYTES_BY_UNIT[unit.lower()]
    if size > LARGEST:
        raise ValueError('expected a size of less than "8192PiB"')
    if size != int(size):
        raise ValueError("expected a whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """Return `size` in the unit of which it is the smallest whole number."""
    amounts = [(size // factor, unit) for unit, factor in _BYTES.items() if size and size % factor == 0]
    amount, unit = min(amounts, key=lambda each: each[0], default=(0, "B"))
    return f"{amount}{'KiB' if unit == 'kiB' else unit}"


def _to_duration(value: object) -> timedelta:
    if isinstance(value, timedelta):
        if not timedelta(0) <= value <= LONGEST:
            raise expected(_A_DURATION)
        return value
    if not isinstance(value, str):
        raise expected(_A_DURATION)
    try:
        return parse_duration(value)
    except ValueError as error:
        raise expected(str(error).removeprefix("expected ")) from None


def _to_size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST:
        return value
    if not isinstance(value, str):
        raise expected(_A_SIZE)
    try:
        return parse_size(value)
    except ValueError as error:
        raise expected(str(error).removeprefix("expected ")) from None


def _to_fraction(value: object) -> float:
    if isinstance(value, float) and 0.01 <= value <= 10:
        return value
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    fraction = Decimal(match[1]) / 100 if match else Decimal(0)
    if not Decimal("0.01") <= fraction <= 10:
        raise expected(_A_PERCENTAGE)
    return float(fraction)


def _as_percentage(fraction: float) -> str:
    return f"{fraction * 100:.10g}%"


def _longer_than_nothing(value: timedelta) -> timedelta:
    if not value:
        raise expected('a duration longer than "0s"')
    return value


Duration = Annotated[
    timedelta,
    BeforeValidator(_to_duration),
    PlainSerializer(format_duration, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN}),
]
"""A duration from nothing to a hundred years."""

PositiveDuration = Annotated[
    Duration,
    AfterValidator(_longer_than_nothing),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN.replace("(?=.)", "(?=.*[1-9])")}),
]
"""A duration of more than nothing."""

Size = Annotated[
    int,
    BeforeValidator(_to_size),
    PlainSerializer(format_size, return_type=str, when_used="json"),
    WithJsonSchema({"type": ["string", "integer"], "minimum": 0, "pattern": SIZE_PATTERN}),
]
"""A number of bytes; a bare number counts bytes, too."""

Percentage = Annotated[
    float,
    BeforeValidator(_to_fraction),
    PlainSerializer(_as_percentage, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": PERCENT_PATTERN}),
]
"""A fraction, written in percent."""
