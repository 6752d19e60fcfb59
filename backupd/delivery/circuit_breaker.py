"""The circuit breaker of a destination, which all of its workers share."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from backupd.core.backoff import Backoff
from backupd.core.circuit import Circuit, CircuitState
from backupd.core.errors import LedgerError
from backupd.core.model import Deferred, Delivery, Outcome, Superseded
from backupd.core.outcome_review import OutcomeReview
from backupd.core.policy import Action, Reason, rule_of
from backupd.ledger.port import Ledger
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_MAX_SECONDS_ALONE = 3.0
"""Seconds after which a probe of which bytes went out shows that the destination works."""


class Notifier:
    """Wakes waiting threads; a notification between `generation` and `wait` is not lost."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._generation = 0

    def notify(self) -> None:
        """Wake all waiting threads."""
        with self._condition:
            self._generation += 1
            self._condition.notify_all()

    def generation(self) -> int:
        """Return the number of the last notification, to be passed to `wait`."""
        with self._condition:
            return self._generation

    def wait(self, generation: int, timeout: float | None) -> None:
        """Wait for a notification after the one numbered `generation`, for at most `timeout` seconds."""
        with self._condition:
            self._condition.wait_for(lambda: self._generation != generation, timeout)


class CircuitBreaker:
    """Holds the circuit of a destination and logs its changes; workers ask it before each delivery.

    Each change wakes the workers through `notifier` and is saved in the ledger for the other commands.
    """

    def __init__(
        self, destination: str, backoff: Backoff, log: EventLog, notifier: Notifier, ledger: Ledger
    ) -> None:
        self._destination = destination
        self._backoff = backoff
        self._log = log
        self._notifier = notifier
        self._ledger = ledger
        self._lock = threading.Lock()
        self._circuit = Circuit()
        self._error: str | None = None
        """The error of the last failure of the destination, None while it works."""
        self._saved: str | None = None
        """The reason that the ledger has."""
        self._outcome_review = OutcomeReview(was_refusing=self._saved_failure() == Reason.ALL_REFUSED)
        self._probing_since = 0.0
        """When the probe began (monotonic)."""
        self._retired = False

    @property
    def state(self) -> CircuitState:
        """Return the state of the circuit."""
        return self._circuit.state

    @property
    def circuit(self) -> Circuit:
        """Return the circuit as it is now."""
        return self._circuit

    @property
    def error(self) -> str | None:
        """Return the error for which the destination is paused, None while it works."""
        return self._error

    def try_acquire(self) -> bool:
        """Return whether one more delivery may start; each True needs a `release` or `record_outcome`."""
        with self._lock:
            acquired = self._circuit.try_acquire(datetime.now(UTC))
            if acquired is not None and acquired is not self._circuit:
                self._circuit, self._probing_since = acquired, time.monotonic()
        return acquired is not None

    def report_progress(self) -> None:
        """Note that an upload goes on of which bytes went out: a long probe does not delay the others."""
        circuit = self._circuit
        if circuit.state is not CircuitState.PROBING or circuit.takes_bytes:
            return
        if time.monotonic() < self._probing_since + _MAX_SECONDS_ALONE:
            return
        with self._lock:
            if self._circuit == circuit:
                self._circuit = replace(circuit, takes_bytes=True)
        self._notifier.notify()

    def wait_time(self) -> float | None:
        """Return the seconds until `try_acquire` may succeed; None if that depends on another upload."""
        left = self._circuit.wait_time(datetime.now(UTC))
        return None if left is None else left.total_seconds()

    def release(self) -> None:
        """Give back an acquired place without a result for the destination.

        The other workers are not woken: each would acquire the place, find no delivery that is due, and wake
        the next one. The caller looks again itself once a delivery is due.
        """
        with self._lock:
            self._circuit = self._circuit.released(datetime.now(UTC))

    def begin(self, delivery: Delivery) -> None:
        """Note that an attempt begins; `review` gets its outcome."""
        with self._lock:
            self._outcome_review.begin(delivery)

    def review(self, delivery: Delivery, outcome: Outcome) -> Outcome:
        """Return the outcome of an attempt, judged by those of other archives; see `OutcomeReview`."""
        with self._lock:
            was_refusing = self._outcome_review.was_refusing
            reviewed = self._outcome_review.review(delivery, outcome)
        if was_refusing and not self._outcome_review.was_refusing:
            self.save()
        return reviewed

    @property
    def awaits_probe(self) -> bool:
        """Return whether a test without an archive can show that the destination works again.

        If it refused all archives, only another archive can.
        """
        circuit = self._circuit
        is_probing = circuit.state is CircuitState.PROBING and not circuit.takes_bytes
        return is_probing and circuit.reason is not Reason.ALL_REFUSED

    def record_probe(self, failure: Deferred | None) -> None:
        """Update the circuit by the result of a test without an archive; None if the destination works."""
        if failure is not None and rule_of(failure.reason).action is Action.PAUSE:
            self.record_outcome(failure)
        else:
            self._end_pause()

    def record_outcome(self, outcome: Outcome) -> None:
        """Update the circuit by the outcome of an upload; log and save the change, if there is one."""
        now = datetime.now(UTC)
        if isinstance(outcome, Superseded) or (
            isinstance(outcome, Deferred) and rule_of(outcome.reason).action is not Action.PAUSE
        ):
            self.release()
            return
        with self._lock:
            before = self._circuit
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
            self._circuit = after
            if after != before:
                self._error = outcome.error if isinstance(outcome, Deferred) else None
        if after != before:
            self._notifier.notify()
            self._log_change(before, after, outcome, now)
            self.save()

    def _saved_failure(self) -> str | None:
        with suppress(LedgerError):
            self._saved = self._ledger.saved_failure(self._destination)
        return self._saved

    def files_renewed(self) -> None:
        """End a pause because of unusable files, as they can be used now; try again at once after others."""
        with self._lock:
            if self._circuit.state is not CircuitState.PAUSED:
                return
            ends_pause = self._circuit.reason is Reason.LOCAL_FILES
            if not ends_pause:
                self._circuit = replace(self._circuit, until=datetime.now(UTC))
        if ends_pause:
            self._end_pause()
        else:
            self._notifier.notify()

    def _end_pause(self) -> None:
        """Set the circuit to working, log and save it."""
        now = datetime.now(UTC)
        with self._lock:
            before, self._circuit, self._error = self._circuit, Circuit(), None
        self._notifier.notify()
        if not self._retired:
            down_for = now - (before.since or now)
            self._log.emit(events.DESTINATION_RESUMED, destination=self._destination, down_for_s=down_for)
        self.save()

    def shift_earlier(self, by: timedelta) -> None:
        """Move the end of a pause by as much as the clock was set back."""
        with self._lock:
            self._circuit = self._circuit.shift_earlier(by)
        self._notifier.notify()
        self.save()

    def save(self) -> None:
        """Write the reason of the last failure to the ledger, for the next start."""
        if self._retired or (self._outcome_review.was_refusing and self._circuit == Circuit()):
            return  # the pause before the start counts until there is an outcome
        reason = self._circuit.reason
        if reason == self._saved:
            return
        # a ledger that fails is logged by the next write that matters
        with suppress(LedgerError):
            self._ledger.save_failure(self._destination, reason)
            self._saved = reason

    def retire(self) -> None:
        """Neither log nor save any further change: the destination has a new circuit breaker."""
        self._retired = True

    def _log_change(self, before: Circuit, after: Circuit, outcome: Outcome, now: datetime) -> None:
        if self._retired:
            return
        down_for = now - (before.since or now)
        if isinstance(outcome, Deferred) and after.until is not None:
            self._log.emit(
                events.DESTINATION_PAUSED,
                destination=self._destination,
                reason=outcome.reason,
                error=outcome.error,
                hint=rule_of(outcome.reason).hint,
                failures=after.failures,
                paused_for_s=after.until - now,
                down_for_s=down_for,
            )
        elif before.state is not CircuitState.WORKING:
            self._log.emit(events.DESTINATION_RESUMED, destination=self._destination, down_for_s=down_for)
