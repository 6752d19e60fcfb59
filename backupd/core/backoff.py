"""The wait before a failed request is repeated."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

MAX_RETRY_AFTER = timedelta(hours=1)
"""Longest wait that a destination can ask for.

A request per hour costs the destination little; a longer wait could delay the backups of a whole day.
"""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with full jitter: a random part of `initial` x 2^n, at most `longest`.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    initial: timedelta
    longest: timedelta

    def before(self, failures: int, chance: float) -> timedelta:
        """Return the wait after this number of failures in a row; `chance` is a random number in [0, 1).

        The wait is at least a tenth of the full step: a small random number must not start a busy loop.
        """
        doublings = min(max(failures - 1, 0), 30)
        is_below_longest = self.initial <= self.longest // (1 << doublings)  # the product could overflow
        step = self.initial * (1 << doublings) if is_below_longest else self.longest
        return step * (0.1 + 0.9 * chance)


def parse_retry_after(value: str, now: datetime) -> timedelta | None:
    """Return the wait that a Retry-After field requests, limited to 0 to 1 h; None if it is malformed.

    The value is a number of seconds or an HTTP date (RFC 9110, section 10.2.3).
    """
    text = value.strip()
    if text.isascii() and text.isdigit():
        requested = timedelta(seconds=int(text.lstrip("0")[:9] or "0"))
    else:
        try:
            when = parsedate_to_datetime(text)
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        requested = when - now
    return min(max(requested, timedelta(0)), MAX_RETRY_AFTER)
