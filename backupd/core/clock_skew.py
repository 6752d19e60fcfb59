"""How far the host's clock may be ahead of the true time, and until when that is distrusted.

A clock that jumped forward by mistake would make archives look older than they are, and retention would
remove them. A step forward is therefore distrusted for a day: until then, retention uses the time without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

TRUST_AFTER = timedelta(days=1)
"""Time after which a step of the clock is trusted, if it was not reverted."""

ZERO = timedelta(0)


@dataclass(frozen=True, slots=True)
class ClockSkew:
    """The clock may be `ahead` by the sum of its steps, which are distrusted `until` a time.

    `until` and `now` are times of a clock that is never set, such as the time since boot.
    """

    ahead: timedelta = ZERO
    until: timedelta = ZERO

    def at(self, now: timedelta) -> timedelta:
        """Return how far the clock may be ahead; zero once it is trusted."""
        return self.ahead if now < self.until else ZERO

    def after(self, step: timedelta, now: timedelta) -> ClockSkew:
        """Return the skew after a step of the clock; a negative step, to an earlier time, reduces it.

        The day starts again only for a step larger than the skew before it, so that it ends even if the clock
        steps often.
        """
        before = self.at(now)
        return ClockSkew(max(before + step, ZERO), now + TRUST_AFTER if step > before else self.until)
