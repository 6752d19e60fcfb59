"""A destination's gate, shared by its workers."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from backupd.core.backoff import Backoff
from backupd.core.circuit import Circuit, CircuitState
from backupd.core.errors import LedgerError
from backupd.core.model import Deferred, Outcome, Superseded
from backupd.core.policy import Action, Reason, rule_of
from backupd.ledger.port import Ledger
from backupd.telemetry import events
from backupd.telemetry.log import EventLog


class Notifier:
    """Like an event that is never cleared: who waits hears of every ring after the one last heard."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rings = 0

    def ring(self) -> None:
        """Wake all who wait."""
        with self._changed:
            self._rings += 1
            self._changed.notify_all()

    def heard(self) -> int:
        """Return the number of the last ring, to be passed to `wait`."""
        with self._changed:
            return self._rings

    def wait(self, heard: int, timeout: float | None) -> None:
        """Wait for a ring after `heard`, at most `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._rings != heard, timeout)


class CircuitBreaker:
    """Keeps a destination's `Gate`, tells of its changes, and keeps its workers back while it is shut.

    `wakeup` is rung at each change, and the ledger told for whoever asks beside the daemon.
    """

    def __init__(
        self, destination: str, backoff: Backoff, log: EventLog, wakeup: Notifier, ledger: Ledger
    ) -> None:
        self._destination = destination
        self._backoff = backoff
        self._log = log
        self._wakeup = wakeup
        self._ledger = ledger
        self._lock = threading.Lock()
        self._gate = Circuit()
        self._retired = False

    def retire(self) -> None:
        """Say nothing any more: the destination has another gate, and this one's last word is old."""
        self._retired = True

    @property
    def state(self) -> CircuitState:
        """Return whether it is open."""
        return self._gate.state

    def enter(self) -> bool:
        """Tell whether one more delivery may go to the destination."""
        with self._lock:
            entered = self._gate.enter(datetime.now(UTC))
            self._gate = entered or self._gate
        return entered is not None

    def wait(self) -> float | None:
        """Return the seconds until `enter` may succeed again; None: until a report."""
        left = self._gate.wait(datetime.now(UTC))
        return None if left is None else left.total_seconds()

    def set_back(self, by: timedelta) -> None:
        """Note that the clock was set back."""
        with self._lock:
            self._gate = self._gate.set_back(by)
        self._wakeup.ring()
        self.note()

    def leave(self) -> None:
        """Note that what had entered told nothing about the destination."""
        with self._lock:
            before, self._gate = self._gate, self._gate.left(datetime.now(UTC))
        if self._gate is not before:
            self._wakeup.ring()

    def report(self, outcome: Outcome) -> None:
        """Note how an upload ended."""
        now = datetime.now(UTC)
        if isinstance(outcome, Superseded) or (
            isinstance(outcome, Deferred) and rule_of(outcome.reason).then is not Action.PAUSE
        ):
            self.leave()
            return
        with self._lock:
            before = self._gate
            if isinstance(outcome, Deferred):
                after = before.failed(
                    outcome.reason,
                    now,
                    self._backoff,
                    random.random(),
                    outcome.retry_after,
                )
            else:
                after = before.answered()
            self._gate = after
        if after != before:
            self._wakeup.ring()
            self._tell(before, after, outcome, now)
            self.note(outcome.error if isinstance(outcome, Deferred) else None)

    def note(self, error: str | None = None) -> None:
        """Write to the ledger how the gate stands."""
        if self._retired:
            return
        with suppress(LedgerError):  # nothing hangs on it; what matters fails by itself, and is said
            self._ledger.note_gate(self._destination, self._gate, error)

    def _tell(self, before: Circuit, after: Circuit, outcome: Outcome, now: datetime) -> None:
        if self._retired:
            return
        down_for = now - (before.since or now)
        if isinstance(outcome, Deferred) and after.until is not None:
            self._log.emit(
                events.DESTINATION_PAUSED,
                destination=self._destination,
                reason=outcome.reason,
                error=outcome.error,
                hint=hint_for(outcome.reason),
                faults=after.faults,
                paused_for_s=after.until - now,
                down_for_s=down_for,
            )
        elif before.state is not CircuitState.OPEN:
            self._log.emit(events.DESTINATION_RESUMED, destination=self._destination, down_for_s=down_for)


def hint_for(reason: Reason) -> str:
    """Return what to do about a reason."""
    return rule_of(reason).hint
