"""How far the host's clock may be ahead of the true time, and for how long that part of it is distrusted.

A clock that jumped forward by mistake would make archives look older than they are, and retention would
remove them. Each step forward is therefore distrusted for a day: until then, times are compared with a clock
without that step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

TRUST_AFTER = timedelta(days=1)
"""Time after which a step of the clock is trusted, if it was not reverted."""

_MERGE_WITHIN = timedelta(hours=1)
"""Steps within this time are stored as one, so that a clock that steps often does not fill the list."""

ZERO = timedelta(0)


@dataclass(frozen=True, slots=True)
class ClockSkew:
    """A step forward of the clock by `ahead`, which is distrusted for another `remaining`."""

    ahead: timedelta
    remaining: timedelta


class ClockSkews:
    """The steps forward of the clock that are distrusted, each for 24 to 25 hours after it happened.

    `now` is always the time of a clock that is never set, such as the time since boot.
    """

    def __init__(self, skews: Iterable[ClockSkew], now: timedelta) -> None:
        self._steps = [(skew.ahead, now + skew.remaining) for skew in skews]
        """The size of each step, and the time until which it is distrusted; the latest step last."""

    def total(self, now: timedelta) -> timedelta:
        """Return how far the clock may be ahead: the sum of all steps that are distrusted."""
        return sum((ahead for ahead, until in self._steps if now < until), ZERO)

    def recent(self, now: timedelta) -> timedelta:
        """Return the part of `total` that stays distrusted for at least `TRUST_AFTER`."""
        return sum((ahead for ahead, until in self._steps if until >= now + TRUST_AFTER), ZERO)

    def active(self, now: timedelta) -> list[ClockSkew]:
        """Return the steps that are still distrusted, to be stored until the next start."""
        return [ClockSkew(ahead, until - now) for ahead, until in self._steps if now < until]

    def add(self, step: timedelta, now: timedelta) -> None:
        """Distrust a step of the clock from now on.

        A negative step, back to an earlier time, cancels distrusted steps by as much, the latest first.
        """
        self._steps = [(ahead, until) for ahead, until in self._steps if now < until]
        while step < ZERO and self._steps:
            ahead, until = self._steps.pop()
            step += ahead
            if step > ZERO:
                self._steps.append((step, until))
                return
        if step <= ZERO:
            return
        if self._steps and self._steps[-1][1] >= now + TRUST_AFTER:
            ahead, until = self._steps.pop()
            self._steps.append((ahead + step, until))
        else:
            self._steps.append((step, now + TRUST_AFTER + _MERGE_WITHIN))
