"""What a daemon runs, by the configuration that asked for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from backupd.config.models import Config
from backupd.delivery.circuit_breaker import CircuitBreaker, Notifier
from backupd.delivery.recorder import Recorder
from backupd.delivery.restoring import HistoryRestorer
from backupd.delivery.retention import Retention
from backupd.delivery.destination import DestinationQueue
from backupd.delivery.worker import Worker
from backupd.dropfolder.drop import Drop
from backupd.intake.intake import Intake
from backupd.ledger.port import Ledger
from backupd.upload.http.tls import ReloadingTlsContext


@dataclass(slots=True)
class RunningDrop:
    """A drop and its intake; `stop` ends it alone."""

    drop: Drop
    intake: Intake
    stop: threading.Event = field(default_factory=threading.Event)

    def request_stop(self) -> None:
        """Have it end, without waiting for it."""
        self.stop.set()
        self.intake.wake()


@dataclass(slots=True)
class RunningDestination:
    """The workers of a destination and what they share; `stop` ends them once their upload is done."""

    queue: DestinationQueue
    workers: tuple[Worker, ...]
    circuit: CircuitBreaker
    notifier: Notifier
    tls_context: ReloadingTlsContext
    stop: threading.Event = field(default_factory=threading.Event)

    def request_stop(self) -> None:
        """Have the workers end, without waiting for them."""
        self.stop.set()
        self.notifier.notify()


@dataclass(slots=True)
class Runtime:
    """Everything a daemon runs."""

    config: Config
    ledger: Ledger
    drops: dict[str, RunningDrop]
    destinations: dict[str, RunningDestination]
    recorder: Recorder
    abort: Callable[[], None]
    retention: Retention
    restorer: HistoryRestorer

    @property
    def circuits(self) -> Mapping[str, CircuitBreaker]:
        """Return the gate of each destination."""
        return {name: part.circuit for name, part in self.destinations.items()}


@dataclass(frozen=True, slots=True)
class ReloadDiff:
    """What a new configuration made of the parts, which hold what is new already."""

    drops_stopped: Mapping[str, RunningDrop]
    drops_started: Mapping[str, RunningDrop]
    destinations_stopped: Mapping[str, RunningDestination]
    destinations_started: Mapping[str, RunningDestination]
