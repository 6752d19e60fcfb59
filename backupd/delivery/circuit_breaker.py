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

    def notify(self) -> None:
        """Wake all who wait."""
        with self._changed:
            self._rings += 1
            self._changed.notify_all()

    def generation(self) -> int:
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

    def try_acquire(self) -> bool:
        """Tell whether one more delivery may go to the destination."""
        with self._lock:
            entered = self._gate.try_acquire(datetime.now(UTC))
            self._gate = entered or self._gate
        return entered is not None

    def wait_time(self) -> float | None:
        """Return the seconds until `enter` may succeed again; None: until a report."""
        left = self._gate.wait_time(datetime.now(UTC))
        return None if left is None else left.total_seconds()

    def shift_earlier(self, by: timedelta) -> None:
        """Note that the clock was set back."""
        with self._lock:
            self._gate = self._gate.shift_earlier(by)
        self._wakeup.notify()
        self.save()

    def release(self) -> None:
        """Note that what had entered told nothing about the destination."""
        with self._lock:
            before, self._gate = self._gate, self._gate.released(datetime.now(UTC))
        if self._gate is not before:
            self._wakeup.notify()

    def record_outcome(self, outcome: Outcome) -> None:
        """Note how an upload ended."""
        now = datetime.now(UTC)
        if isinstance(outcome, Superseded) or (
            isinstance(outcome, Deferred) and rule_of(outcome.reason).action is not Action.PAUSE
        ):
            self.release()
            return
        with self._lock:
            before = self._gate
            if isinstance(outcome, Deferred):
                after = before.record_failure(
                    outcome.reason,
                    now,
                    self._backoff,
                    random.random(),
                    outcome.retry_after,
                )
            else:
                after = before.record_success()
            self._gate = after
        if after != before:
            self._wakeup.notify()
            self._tell(before, after, outcome, now)
            self.save(outcome.error if isinstance(outcome, Deferred) else None)

    def save(self, error: str | None = None) -> None:
        """Write to the ledger how the gate stands."""
        if self._retired:
            return
        with suppress(LedgerError):  # nothing hangs on it; what matters fails by itself, and is said
            self._ledger.save_circuit(self._destination, self._gate, error)

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
                failures=after.failures,
                paused_for_s=after.until - now,
                down_for_s=down_for,
            )
        elif before.state is not CircuitState.WORKING:
            self._log.emit(events.DESTINATION_RESUMED, destination=self._destination, down_for_s=down_for)


def hint_for(reason: Reason) -> str:
    """Return what to do about a reason."""
    return rule_of(reason).hint
