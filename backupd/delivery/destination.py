"""One destination: its settings, and the queue that its workers share."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from backupd.config.models import DestinationConfig
from backupd.core.backoff import Backoff
from backupd.core.circuit import CircuitState
from backupd.core.errors import LedgerError
from backupd.core.model import Deferred, Delivery
from backupd.core.transition import Priority, RetryPolicy
from backupd.delivery.circuit_breaker import CircuitBreaker, Notifier
from backupd.delivery.operator_pauses import OperatorPauses
from backupd.dropfolder.drop import Drop
from backupd.ledger.port import Ledger
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_CLAIM_BATCH_SIZE = 16
"""Deliveries that are claimed in one transaction."""

_CLAIM_BATCH_SIZE_BESIDE = 256
"""The same while the deliveries of a failing drop have to be passed over, which takes time for each."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Everything the daemon knows about one destination; built once for each configuration."""

    name: str
    config: DestinationConfig
    retry_policy: RetryPolicy
    priority: Priority

    @classmethod
    def of(cls, name: str, config: DestinationConfig) -> Destination:
        """Return the destination for its table in the configuration."""
        backoff = Backoff(config.retry.initial, config.retry.max)
        retry_policy = RetryPolicy(backoff, config.retry.give_up_after)
        return cls(name, config, retry_policy, Priority(config.priority))


@dataclass(slots=True)
class DestinationQueue:
    """The source from which the workers of one destination get deliveries, and the objects that they share.

    The pending deliveries themselves are in the ledger. This object buffers a few that are claimed but not
    started, and holds the circuit breaker, notifier, drops and log of the workers. `drops` holds every drop
    by its name, those that are no longer configured included. `probe` finds out whether the destination would
    take an archive, and returns the failure if it would not.
    """

    destination: Destination
    ledger: Ledger
    circuit: CircuitBreaker
    notifier: Notifier
    drops: Mapping[str, Drop]
    log: EventLog
    pauses: OperatorPauses = field(default_factory=OperatorPauses)
    probe: Callable[[], Deferred | None] = lambda: None
    _claimed: deque[Delivery] = field(default_factory=deque)
    _removed_drops: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_held(self) -> bool:
        """Return whether a person has paused the destination."""
        return self.pauses.of("destination", self.destination.name) is not None

    def claim(self) -> Delivery | None:
        """Claim the next delivery that is due; return None if there is none.

        Raises LedgerError. Small archives are claimed a few at a time, so that they cost one transaction.
        Those in a drop folder that cannot be used, or is paused, wait. After a pause the smallest one tests
        the destination: a large one takes long, and may be what the destination fails on.
        """
        with self._lock:
            failing = self._failing()
            is_probe = self.circuit.state is CircuitState.PROBING
            if is_probe or any(delivery.archive.drop in failing for delivery in self._claimed):
                self.ledger.release(list(self._claimed))
                self._claimed.clear()
            if not self._claimed:
                name = self.destination.name
                priority = Priority.SMALLEST if is_probe else self.destination.priority
                limit = _CLAIM_BATCH_SIZE if not failing else _CLAIM_BATCH_SIZE_BESIDE
                limit = 1 if is_probe else limit
                self._claimed += self.ledger.claim(name, self.ledger.now(), priority, limit, failing)
            return self._claimed.popleft() if self._claimed else None

    def next_due(self) -> datetime | None:
        """Return when the next delivery is due, None if none is pending; raises LedgerError."""
        return self.ledger.next_due(self.destination.name, self._failing())

    def _failing(self) -> list[str]:
        """Return the names of the drops that are paused or have a folder that cannot be used."""
        return [
            name
            for name, drop in self.drops.items()
            if not drop.folder.is_ready() or self.pauses.of("drop", drop.label) is not None
        ]

    def release_claims(self) -> bool:
        """Make claimed deliveries that no worker has started pending again; return False if that failed."""
        with self._lock:
            if self._claimed:
                try:
                    self.ledger.release(list(self._claimed))
                except LedgerError:  # they stay claimed here and are uploaded before all others
                    return False
                self._claimed.clear()
        return True

    def log_removed_drop(self, drop: str) -> None:
        """Log, once, that archives of a drop that is no longer configured are pending."""
        with self._lock:
            is_new = drop not in self._removed_drops
            self._removed_drops.add(drop)
        if is_new:
            self.log.emit(
                events.CONFIG_WARNING,
                path=f"drop.{drop}",
                error=f"archives from this drop are pending for {self.destination.name}, but it is no longer"
                " configured",
                hint="add the drop back until its archives are delivered; the files stay in its folder",
            )
