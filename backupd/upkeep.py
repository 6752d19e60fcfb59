"""What is seen to at each heartbeat, apart from deliveries."""

from __future__ import annotations

from datetime import UTC, datetime

from backupd.core.errors import LedgerError
from backupd.delivery.pruning import Pruning
from backupd.intake.freshness import Freshness
from backupd.ops import events
from backupd.ops.log import EventLog
from backupd.parts import Parts


class Upkeep:
    """Says which devices fell silent, and ends old history; `tick` is called at each heartbeat."""

    def __init__(self, parts: Parts, log: EventLog, freshness: Freshness) -> None:
        self._parts = parts
        self._log = log
        self._freshness = freshness
        self._pruning = Pruning(parts.ledger)

    @property
    def overdue(self) -> int:
        """Return how many devices are overdue."""
        return self._freshness.overdue

    def tick(self) -> None:
        """Do it; what the ledger does not allow now is done at the next one."""
        now = datetime.now(UTC)
        try:
            self._freshness.tick(now)
            self._pruning.tick(now - self._parts.config.keep_history_for)
        except LedgerError as error:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)
