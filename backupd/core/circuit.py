"""Whether a destination takes deliveries now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from backupd.core.backoff import Backoff
from backupd.core.policy import Reason


class CircuitState(StrEnum):
    """Open, shut for a while, or letting a single delivery through to see."""

    WORKING = "working"
    PAUSED = "paused"
    PROBING = "probing"


@dataclass(frozen=True, slots=True)
class Circuit:
    """A destination's gate; `failures` counts the destination's failures in a row."""

    state: CircuitState = CircuitState.WORKING
    until: datetime | None = None
    failures: int = 0
    reason: Reason | None = None
    since: datetime | None = None

    def try_acquire(self, now: datetime) -> Circuit | None:
        """Return the gate with one more delivery let through, or None where it has to wait."""
        if self.state is CircuitState.WORKING:
            return self
        if self.state is CircuitState.PAUSED and self.until is not None and now >= self.until:
            return replace(self, state=CircuitState.PROBING)
        return None

    def wait_time(self, now: datetime) -> timedelta | None:
        """Return how long until another `enter` may succeed; None: only a report can change it."""
        if self.state is CircuitState.PROBING:
            return None
        return timedelta(0) if self.until is None else max(self.until - now, timedelta(0))

    def record_failure(
        self, reason: Reason, now: datetime, backoff: Backoff, chance: float, asked: timedelta | None
    ) -> Circuit:
        """Return the gate after a fault of the destination, `asked` being its Retry-After.

        A gate that is paused already is not paused for longer by the other uploads that were under way.
        """
        if self.state is CircuitState.PAUSED and asked is None:
            return self
        failures = self.failures if self.state is CircuitState.PAUSED else self.failures + 1
        wait = backoff.before(failures, chance)
        if asked is not None:
            wait = max(wait, asked)
        until = now + wait if self.until is None else max(now + wait, self.until)
        return Circuit(CircuitState.PAUSED, until, failures, reason, self.since or now)

    def record_success(self) -> Circuit:
        """Return the gate after the destination did its part, whatever it said of the archive."""
        return Circuit()

    def shift_earlier(self, by: timedelta) -> Circuit:
        """Return the gate where the clock was set back; it opens no later than it would have."""
        until, since = (None if time is None else time - by for time in (self.until, self.since))
        return replace(self, until=until, since=since)

    def released(self, now: datetime) -> Circuit:
        """Return the gate after a probe that told nothing (nothing was due, or we were stopped)."""
        if self.state is CircuitState.PROBING:
            return replace(self, state=CircuitState.PAUSED, until=now)
        return self
