"""What is seen to at each heartbeat, apart from deliveries."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime

from backupd.clock import Clock
from backupd.core.doubt import ZERO
from backupd.core.errors import LedgerError, LedgerHeldError
from backupd.delivery.pruning import Pruning
from backupd.intake.freshness import Freshness
from backupd.ops import events
from backupd.ops.log import EventLog
from backupd.parts import Parts

_NOTE_EVERY = 60.0
"""Seconds, by which a doubt of the clock may last longer where the end of the daemon is not noted."""


class Upkeep:
    """Says which devices fell silent, and ends old history; `tick` is called at each heartbeat.

    `mind_clock` is called more often.
    """

    def __init__(self, parts: Parts, log: EventLog, freshness: Freshness, clock: Clock) -> None:
        self._clock = clock
        self._parts = parts
        self._log = log
        self._freshness = freshness
        self._pruning = Pruning(parts.ledger)
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
            self._pruning.tick(lambda: self._clock.believed() - self._parts.config.keep_history_for)
            self._parts.ledger.check_files()
        except LedgerError as error:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)

    def bring_forward(self) -> None:
        """Have no delivery wait for a time that only a wrong clock can have meant.

        Raises LedgerError where the ledger can't be written.
        """
        now = datetime.now(UTC)
        for name, destination in self._parts.config.destination.items():
            self._parts.ledger.bring_forward(name, now + destination.retry.max)

    def note_clock(self) -> None:
        """Have the next start know of the clock; to be called at the end, too."""
        self._noted = time.monotonic()
        try:
            self._parts.ledger.note_clock(self._clock.note())
        except LedgerHeldError:
            pass  # nobody is waited for here: the next time will do
        except LedgerError as error:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)

    def mind_clock(self) -> None:
        """Look whether the clock was set, say so, and see to what waits for a time."""
        step = self._clock.step()
        if step != ZERO or time.monotonic() - self._noted > _NOTE_EVERY:
            self.note_clock()
        if step == ZERO:
            return
        self._log.emit(
            events.CLOCK_SET,
            step_s=step,
            hint="see to the host's clock; for a day, what is removed in time goes by the clock as it was"
            if step > ZERO
            else "see to the host's clock; what waits is tried no later than it would have been",
        )
        if step > ZERO:
            return
        for gate in self._parts.gates.values():
            gate.set_back(-step)
        try:
            self.bring_forward()
            self._freshness.begin(self._parts.config.drop, datetime.now(UTC))
        except LedgerError as error:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)
