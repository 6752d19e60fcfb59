"""The running parts of the daemon, by drop and destination, and how a reload changes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from backupd.config.models import Config
from backupd.delivery.circuit_breaker import CircuitBreaker, Notifier
from backupd.delivery.destination import DestinationQueue
from backupd.delivery.operator_pauses import OperatorPauses
from backupd.delivery.recorder import Recorder
from backupd.delivery.retention import Retention
from backupd.delivery.worker import Worker
from backupd.dropfolder.drop import Drop
from backupd.intake.examiner import ExaminerPool
from backupd.intake.intake import Intake
from backupd.ledger.port import Ledger
from backupd.telemetry.thread_watchdog import ThreadWatchdog
from backupd.upload.base import Abort, Endpoint


@dataclass(slots=True)
class RunningDrop:
    """A drop, its intake and its examiners; `stop` stops these only."""

    drop: Drop
    intake: Intake
    examiner_pool: ExaminerPool
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def watchdogs(self) -> list[ThreadWatchdog]:
        """Return those of all threads of the drop."""
        return [self.intake.watchdog, *(thread.watchdog for thread in self.examiner_pool.threads)]

    def request_stop(self) -> None:
        """Request the threads to stop; do not wait for them."""
        self.stop.set()
        self.intake.wake()
        self.examiner_pool.wake()


@dataclass(slots=True)
class RunningDestination:
    """The workers of a destination and the objects that they share.

    `stop` stops the workers once their current uploads have ended.
    """

    queue: DestinationQueue
    workers: list[Worker]
    circuit: CircuitBreaker
    notifier: Notifier
    endpoint: Endpoint
    probe_abort: Abort
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def is_settled(self) -> bool:
        """Return whether all workers wait, and nothing was due after the last notification."""
        generation = self.notifier.generation()
        return all(worker.waits_since == generation for worker in self.workers if not worker.is_replaced)

    def request_stop(self) -> None:
        """Request the workers to stop; do not wait for them."""
        self.stop.set()
        self.probe_abort.set()
        self.notifier.notify()

    def replace_hung(self) -> list[Worker]:
        """Replace the workers that hang with a drop folder, and return the new ones, to be started."""
        self.workers = [worker for worker in self.workers if worker.current or not worker.is_replaced]
        new = [each.replaced_by(self.endpoint.make_uploader()) for each in self.workers if each.hangs]
        self.workers += new
        return new


@dataclass(slots=True)
class Runtime:
    """Everything that the daemon runs; `abort` ends all uploads at once."""

    config: Config
    ledger: Ledger
    drops: dict[str, RunningDrop]
    destinations: dict[str, RunningDestination]
    recorder: Recorder
    abort: Callable[[], None]
    retention: Retention
    pauses: OperatorPauses = field(default_factory=OperatorPauses)
    retired: list[RunningDestination] = field(default_factory=list)
    """Destinations of an earlier configuration with an upload that has not ended."""

    @property
    def workers(self) -> list[Worker]:
        """Return the workers of all destinations."""
        return [worker for each in (*self.destinations.values(), *self.retired) for worker in each.workers]

    @property
    def in_flight(self) -> int:
        """Return the number of deliveries in progress."""
        return sum(worker.current is not None for worker in self.workers)

    @property
    def circuits(self) -> Mapping[str, CircuitBreaker]:
        """Return the circuit breaker of each destination."""
        return {name: running.circuit for name, running in self.destinations.items()}


@dataclass(frozen=True, slots=True)
class ReloadDiff:
    """The drops and destinations that a reload removed from and added to the runtime.

    A changed one is in both; the caller stops and starts the threads.
    """

    drops_stopped: Mapping[str, RunningDrop]
    drops_started: Mapping[str, RunningDrop]
    destinations_stopped: Mapping[str, RunningDestination]
    destinations_started: Mapping[str, RunningDestination]
