"""When to try again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

LONGEST_RETRY_AFTER = timedelta(hours=1)
"""A destination may ask for no more than this; a probe costs it little, silence costs us a day."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential back-off with full jitter: a random part of `initial` x 2^n, at most `longest`.

    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    initial: timedelta
    longest: timedelta

    def before(self, failures: int, chance: float) -> timedelta:
        """Return how long to wait after so many failures in a row, `chance` being random in [0, 1).

        At least a tenth of the step is waited, so that bad luck is no fast loop.
        """
        doublings = min(max(failures - 1, 0), 30)
        reaches = self.initial <= self.longest // (1 << doublings)  # else the product might overflow
        step = self.initial * (1 << doublings) if reaches else self.longest
        return step * (0.1 + 0.9 * chance)


def parse_retry_after(value: str, now: datetime) -> timedelta | None:
    """Return the wait that a Retry-After field asks for, in [0, 1 h]; None if it is malformed.

    RFC 9110 section 10.2.3: seconds or an HTTP date.
    """
    text = value.strip()
    if text.isascii() and text.isdigit():
        asked = timedelta(seconds=int(text.lstrip("0")[:9] or "0"))
    else:
        try:
            when = parsedate_to_datetime(text)
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        asked = when - now
    return min(max(asked, timedelta(0)), LONGEST_RETRY_AFTER)
