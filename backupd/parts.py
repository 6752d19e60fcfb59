"""What a daemon runs, by the configuration that asked for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from backupd.config.models import Config
from backupd.delivery.gate import SharedGate
from backupd.delivery.keeping import Keeper
from backupd.delivery.recorder import Recorder
from backupd.delivery.restoring import Restorer
from backupd.delivery.wakeup import Wakeup
from backupd.delivery.worker import Lane, Worker
from backupd.intake.intake import Intake
from backupd.ledger.port import Ledger
from backupd.upload.identity import Identity


@dataclass(slots=True)
class DropPart:
    """The intake of a drop; `stop` ends it alone."""

    intake: Intake
    stop: threading.Event = field(default_factory=threading.Event)

    def end(self) -> None:
        """Have it end, without waiting for it."""
        self.stop.set()
        self.intake.poke()


@dataclass(slots=True)
class DestinationPart:
    """The workers of a destination and what they share; `stop` ends them once their upload is done."""

    lane: Lane
    workers: tuple[Worker, ...]
    gate: SharedGate
    wakeup: Wakeup
    identity: Identity
    stop: threading.Event = field(default_factory=threading.Event)

    def end(self) -> None:
        """Have the workers end, without waiting for them."""
        self.stop.set()
        self.wakeup.ring()


@dataclass(slots=True)
class Parts:
    """Everything a daemon runs."""

    config: Config
    ledger: Ledger
    drops: dict[str, DropPart]
    destinations: dict[str, DestinationPart]
    recorder: Recorder
    abort: Callable[[], None]
    keeper: Keeper
    restorer: Restorer

    @property
    def gates(self) -> Mapping[str, SharedGate]:
        """Return the gate of each destination."""
        return {name: part.gate for name, part in self.destinations.items()}


@dataclass(frozen=True, slots=True)
class Change:
    """What a new configuration made of the parts, which hold what is new already."""

    drops_ended: Mapping[str, DropPart]
    drops_begun: Mapping[str, DropPart]
    destinations_ended: Mapping[str, DestinationPart]
    destinations_begun: Mapping[str, DestinationPart]
