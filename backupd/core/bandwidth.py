"""Bandwidth limits: the rate by the time of day, and a token bucket that enforces it."""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST_GRANT = 16 * 1024
"""Smallest number of bytes granted at once: a TLS record; fewer are not worth a system call."""
LARGEST_GRANT = 64 * 1024
"""Largest number of bytes granted at once, so that several workers get even shares."""
_BURST_SECONDS = 0.1
"""Capacity of the bucket, in seconds at the full rate."""


@dataclass(frozen=True, slots=True)
class RateWindow:
    """A part of the day with its own rate.

    `start` (inclusive) and `end` (exclusive) are minutes after local midnight; a window that ends before it
    starts spans midnight. `rate` is in bytes per second, None for no limit.
    """

    start: int
    end: int
    rate: int | None

    def contains(self, minute: int) -> bool:
        """Return whether a minute of the day is within the window."""
        if self.start <= self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


@dataclass(frozen=True, slots=True)
class RateSchedule:
    """Rates by the time of day, in bytes per second; the first window that contains the time applies."""

    windows: tuple[RateWindow, ...]
    default: int | None

    def rate_at(self, minute: int) -> int | None:
        """Return the rate at a minute of the day in bytes per second, None for no limit."""
        for window in self.windows:
            if window.contains(minute):
                return window.rate
        return self.default


@dataclass(slots=True)
class TokenBucket:
    """A token bucket in bytes; times are seconds of a monotonic clock."""

    tokens: float = 0.0
    filled_at: float = 0.0

    def acquire(self, wanted: int, rate: int, now: float) -> tuple[int, float]:
        """Return the number of bytes that may be sent now, and if 0, the seconds until some may be sent.

        `wanted` is the number of bytes to send, `rate` the current limit in bytes per second.
        """
        capacity = max(rate * _BURST_SECONDS, SMALLEST_GRANT)
        self.tokens = min(self.tokens + (now - self.filled_at) * rate, capacity)
        self.filled_at = now
        smallest = min(wanted, SMALLEST_GRANT)
        if self.tokens < smallest:
            return 0, (smallest - self.tokens) / rate
        granted = min(wanted, LARGEST_GRANT, int(self.tokens))
        self.tokens -= granted
        return granted, 0.0
