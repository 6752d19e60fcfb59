"""What is seen to at each heartbeat, apart from deliveries."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from backupd.core.clock_skew import ZERO, ClockSkews
from backupd.core.errors import LedgerError, LedgerHeldError
from backupd.daemon.runtime import Runtime
from backupd.intake.device_tracker import DeviceTracker
from backupd.ledger.port import ClockReading, DeviceLedger
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_NOTICED = timedelta(seconds=1)
"""What is less between two looks is the clock being kept right."""


class HostClock:
    """Notices when the clock is set; a host that slept is no such thing. Of several threads.

    `before` is what was noted before the start. Whether the host was off since then or the clock is wrong,
    nobody can tell, so the time between is doubted like a step.
    """

    def __init__(self, before: ClockReading | None = None) -> None:
        self._lock = threading.Lock()
        self._offset = _offset()
        self._doubts = ClockSkews(before.skews if before else (), _since_boot())
        if before is not None:
            self._doubts.add(datetime.now(UTC) - before.seen_at, _since_boot())

    def distrust_since(self, last: datetime) -> bool:
        """Doubt all of the time since a known one for a day; return False where that is done already."""
        with self._lock:
            boot = _since_boot()
            more = datetime.now(UTC) - last - self._doubts.recent(boot)
            self._doubts.add(max(more, ZERO), boot)
            return more > ZERO

    def step(self) -> timedelta:
        """Return by how much the clock was set since last asked, negative where it was set back."""
        with self._lock:
            before, self._offset = self._offset, _offset()
            step = self._offset - before
            if abs(step) < _NOTICED:
                return ZERO
            self._doubts.add(step, _since_boot())
            return step

    def trusted_now(self) -> datetime:
        """Return the time by which archives may be removed: without what the clock went forward by lately."""
        with self._lock:
            now = datetime.now(UTC)
            unnoticed = _offset() - self._offset  # of a step in this very moment as well
            return now - self._doubts.total(_since_boot()) - max(unnoticed, ZERO)

    def reading(self) -> ClockReading:
        """Return what is to be known of it at the next start."""
        with self._lock:
            now = datetime.now(UTC)
            unnoticed = _offset() - self._offset  # the next start will notice it
            return ClockReading(now - max(unnoticed, ZERO), self._doubts.active(_since_boot()))


def _since_boot() -> timedelta:
    return timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME))


def _offset() -> timedelta:
    return timedelta(seconds=time.time()) - _since_boot()


_BATCH = 200
"""Archives that go in one transaction: others wait some milliseconds for the ledger, no longer."""

_AT_MOST = 0.2
"""Seconds that a tick takes, as long as there is more; the next one goes on."""


class HistoryPruning:
    """Forgets what ended long ago; `tick` is called at each heartbeat."""

    def __init__(self, ledger: DeviceLedger) -> None:
        self._ledger = ledger

    def tick(self, before: Callable[[], datetime]) -> None:
        """Delete some of what ended before a time, if anything did."""
        until = time.monotonic() + _AT_MOST
        while self._ledger.prune(before, _BATCH) == _BATCH and time.monotonic() < until:
            pass


_NOTE_EVERY = 60.0
"""Seconds, by which a doubt of the clock may last longer where the end of the daemon is not noted."""


class Housekeeping:
    """Says which devices fell silent, and ends old history; `tick` is called at each heartbeat.

    `mind_clock` is called more often.
    """

    def __init__(self, parts: Runtime, log: EventLog, freshness: DeviceTracker, clock: HostClock) -> None:
        self._clock = clock
        self._parts = parts
        self._log = log
        self._freshness = freshness
        self._pruning = HistoryPruning(parts.ledger)
        self._noted = -math.inf
        """When the clock was noted last (monotonic)."""

    @property
    def overdue(self) -> int:
        """Return how many devices are overdue."""
        return self._freshness.overdue

    def tick(self) -> None:
        """Do it; what the ledger does not allow now is done at the next one."""
        now = datetime.now(UTC)
        try:
            self._freshness.tick(now)
            self._pruning.tick(lambda: self._clock.trusted_now() - self._parts.config.keep_history_for)
            self._parts.ledger.check_storage()
        except LedgerError as error:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)

    def bring_forward(self) -> None:
        """Have no delivery wait for a time that only a wrong clock can have meant.

        Raises LedgerError where the ledger can't be written.
        """
        now = datetime.now(UTC)
        for name, destination in self._parts.config.destination.items():
            self._parts.ledger.bring_forward(name, now + destination.retry.max)

    def save_clock(self) -> None:
        """Have the next start know of the clock; to be called at the end, too."""
        self._noted = time.monotonic()
        try:
            self._parts.ledger.save_clock_reading(self._clock.reading())
        except LedgerHeldError:
            pass  # nobody is waited for here: the next time will do
        except LedgerError as error:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)

    def check_clock(self) -> None:
        """Look whether the clock was set, say so, and see to what waits for a time."""
        step = self._clock.step()
        if step != ZERO or time.monotonic() - self._noted > _NOTE_EVERY:
            self.save_clock()
        if step == ZERO:
            return
        self._log.emit(
            events.CLOCK_STEPPED,
            step_s=step,
            hint="see to the host's clock; for a day, what is removed in time goes by the clock as it was"
            if step > ZERO
            else "see to the host's clock; what waits is tried no later than it would have been",
        )
        if step > ZERO:
            return
        for gate in self._parts.circuits.values():
            gate.shift_earlier(-step)
        try:
            self.bring_forward()
            drops = {name: running.drop for name, running in self._parts.drops.items()}
            self._freshness.configure(drops, datetime.now(UTC))
        except LedgerError as error:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)
