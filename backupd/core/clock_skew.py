"""By how much a clock may be ahead, and for how long that is not believed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

TRUST_AFTER = timedelta(days=1)
_TOGETHER = timedelta(hours=1)
"""What comes within so long ends together, so that a restless clock makes no endless list."""

ZERO = timedelta(0)


@dataclass(frozen=True, slots=True)
class ClockSkew:
    """Time that a clock may have gone forward by wrongly, and how much longer that is not believed."""

    ahead: timedelta
    remaining: timedelta


class ClockSkews:
    """The doubts that are left. Each ends by itself, a day to a day and an hour after it came.

    Times are of a clock that nobody sets, such as the time since the boot.
    """

    def __init__(self, doubts: Iterable[ClockSkew], now: timedelta) -> None:
        self._parts = [(doubt.ahead, now + doubt.remaining) for doubt in doubts]
        """How much, and until when; what was added last at the end."""

    def total(self, now: timedelta) -> timedelta:
        """Return by how much the clock may be ahead."""
        return sum((ahead for ahead, until in self._parts if now < until), ZERO)

    def recent(self, now: timedelta) -> timedelta:
        """Return how much of that will be doubted for a day yet."""
        return sum((ahead for ahead, until in self._parts if until >= now + TRUST_AFTER), ZERO)

    def remaining(self, now: timedelta) -> list[ClockSkew]:
        """Return what is left of them, to be kept."""
        return [ClockSkew(ahead, until - now) for ahead, until in self._parts if now < until]

    def add(self, step: timedelta, now: timedelta) -> None:
        """Doubt a step forward from now on; one back takes away from what was doubted, the latest first."""
        self._parts = [(ahead, until) for ahead, until in self._parts if now < until]
        while step < ZERO and self._parts:
            ahead, until = self._parts.pop()
            step += ahead
            if step > ZERO:
                self._parts.append((step, until))
                return
        if step <= ZERO:
            return
        if self._parts and self._parts[-1][1] >= now + TRUST_AFTER:
            ahead, until = self._parts.pop()
            self._parts.append((ahead + step, until))
        else:
            self._parts.append((step, now + TRUST_AFTER + _TOGETHER))
