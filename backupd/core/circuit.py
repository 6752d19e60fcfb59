"""The circuit of a destination: whether it takes deliveries now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from backupd.core.backoff import Backoff
from backupd.core.policy import Reason


class CircuitState(StrEnum):
    """The state of a circuit; a circuit breaker calls these states closed, open and half-open.

    `working` lets every delivery through and `paused` none. `probing` has let a single delivery through and
    waits for its result, or until its upload has been under way for some seconds.
    """

    WORKING = "working"
    PAUSED = "paused"
    PROBING = "probing"


@dataclass(frozen=True, slots=True)
class Circuit:
    """The state of a destination's circuit.

    `until` is the end of the pause. `failures` counts the destination's failures in a row, `reason` is that
    of the last one, and `since` the time of the first. `takes_bytes` is whether the probe has shown that the
    destination takes an archive, so that others need not wait for its end.
    """

    state: CircuitState = CircuitState.WORKING
    until: datetime | None = None
    failures: int = 0
    reason: Reason | None = None
    since: datetime | None = None
    takes_bytes: bool = False

    def try_acquire(self, now: datetime) -> Circuit | None:
        """Return the circuit after it let one more delivery through, or None if it lets none through now."""
        if self.state is CircuitState.WORKING or self.takes_bytes:
            return self
        if self.state is CircuitState.PAUSED and self.until is not None and now >= self.until:
            return replace(self, state=CircuitState.PROBING)
        return None

    def wait_time(self, now: datetime) -> timedelta | None:
        """Return the time until `try_acquire` can succeed; None while that depends on the probe."""
        if self.state is CircuitState.PROBING:
            return timedelta(0) if self.takes_bytes else None
        return timedelta(0) if self.until is None else max(self.until - now, timedelta(0))

    def record_failure(
        self, reason: Reason, now: datetime, backoff: Backoff, chance: float, retry_after: timedelta | None
    ) -> Circuit:
        """Return the circuit after a failure of the destination; `chance` is a random number in [0, 1).

        Uploads that were running when the circuit paused do not lengthen the pause when they fail too,
        unless the destination requests it by `retry_after`.
        """
        if self.state is CircuitState.PAUSED and retry_after is None:
            return self
        failures = self.failures if self.state is CircuitState.PAUSED else self.failures + 1
        wait = backoff.before(failures, chance)
        if retry_after is not None:
            wait = max(wait, retry_after)
        until = now + wait if self.until is None else max(now + wait, self.until)
        return Circuit(CircuitState.PAUSED, until, failures, reason, self.since or now)

    def record_success(self) -> Circuit:
        """Return the circuit after a response that shows that the destination works.

        A response that rejects the archive counts too.
        """
        return Circuit()

    def shift_earlier(self, by: timedelta) -> Circuit:
        """Return the circuit after the clock was set back by `by`: the pause does not get longer."""
        until, since = (None if time is None else time - by for time in (self.until, self.since))
        return replace(self, until=until, since=since)

    def released(self, now: datetime) -> Circuit:
        """Return the circuit after a probe without a result: no delivery was due, or the daemon stopped.

        The next delivery probes at once.
        """
        if self.state is CircuitState.PROBING and not self.takes_bytes:
            return replace(self, state=CircuitState.PAUSED, until=now)
        return self
