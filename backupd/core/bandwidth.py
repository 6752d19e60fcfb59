"""How many bytes may go out now."""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST_GRANT = 16 * 1024
"""Bytes of a TLS record; less is not worth a system call."""
LARGEST_GRANT = 64 * 1024
"""Bytes at a time, so that several workers share evenly."""
_BURST = 0.1
"""Seconds' worth of bytes that may have been saved up."""


@dataclass(frozen=True, slots=True)
class RateWindow:
    """A part of the day, in minutes after local midnight, `end` excluded; it may span midnight.

    `rate` is in bytes per second, None for no limit.
    """

    start: int
    end: int
    rate: int | None

    def holds(self, minute: int) -> bool:
        """Tell whether a minute of the day lies in it."""
        if self.start <= self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


@dataclass(frozen=True, slots=True)
class RateSchedule:
    """Rates by the time of day; the first window that holds the time counts."""

    windows: tuple[RateWindow, ...]
    default: int | None

    def rate_at(self, minute: int) -> int | None:
        """Return the bytes per second at a minute of the day, None for no limit."""
        for window in self.windows:
            if window.holds(minute):
                return window.rate
        return self.default


@dataclass(slots=True)
class TokenBucket:
    """A token bucket; times are seconds of a monotonic clock."""

    tokens: float = 0.0
    filled_at: float = 0.0

    def take(self, wanted: int, rate: int, now: float) -> tuple[int, float]:
        """Return how many bytes may go now, and if none, the seconds until some may."""
        capacity = max(rate * _BURST, SMALLEST_GRANT)
        self.tokens = min(self.tokens + (now - self.filled_at) * rate, capacity)
        self.filled_at = now
        least = min(wanted, SMALLEST_GRANT)
        if self.tokens < least:
            return 0, (least - self.tokens) / rate
        granted = min(wanted, LARGEST_GRANT, int(self.tokens))
        self.tokens -= granted
        return granted, 0.0
