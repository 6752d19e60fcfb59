"""Hours in minutes: arrivals, faults and restarts round after round, and nothing that grows."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.faults.campaign import Report, Terms
from tests.stage import Daemon, Stage, until

ARCHIVES = 10
"""What arrives in a round."""

_WARM_UP = 10
"""Rounds after which nothing is new any more: every fault was met, every cache is full."""

_ALLOWED = {"descriptors": 2.0, "threads": 0.0, "memory": 3.0 * 2**20}
"""How much more there may be in the last third of a daemon's life than in the one before."""


_LEDGER_FOR_EACH = 8_000
"""Bytes: an archive has a row, a delivery, a receipt, and an attempt for each time that it failed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a daemon holds at the end of a round."""

    descriptors: int
    threads: int
    memory: int


@dataclass(slots=True)
class Soak:
    """An installation, the faults that it meets, and what was measured."""

    stage: Stage
    receiver: RunningReceiver
    chance: random.Random
    archives: int = 0
    pending: dict[str, bytes] = field(default_factory=dict)
    """The content of each archive that was dropped since the last check."""
    over: dict[str, bytes] = field(default_factory=dict)
    """The last content of each that was renamed over, without its suffix."""
    faults: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    ledger_sizes: list[tuple[int, int]] = field(default_factory=list)
    """How many archives there were, and the bytes of the ledger then."""

    def arrive(self, count: int = ARCHIVES) -> None:
        """Drop some archives, of any size."""
        for _ in range(count):
            self.archives += 1
            name = f"sw-{self.archives:06}.tar.gz"
            self.pending[name] = self._content()
            self.stage.put(name, self.pending[name])

    def _content(self) -> bytes:
        return b"%d " % self.archives + os.urandom(self.chance.choice((10, 3_000, 200_000, 900_000)))

    def wait(self, daemon: Daemon) -> None:
        """Wait until everything is where it belongs, and check it."""
        stage = self.stage
        with contextlib.suppress(FileNotFoundError):
            until(lambda: not _waiting(stage), f"all archives\n{daemon.text()[-3000:]}")
        for name, content in self.pending.items():
            sent = stage.sent / name
            until(sent.exists, name)
            assert sent.read_bytes() == content, f"{name} is not what was dropped"
            stored = [p.read_bytes() for p in (stage.store / "archives").glob(f"{name.split('.')[0]}.*")]
            assert stored == [content], f"the receiver has {len(stored)} of {name}"
        self.pending.clear()
        for stem, content in self.over.items():  # what it was renamed over may be there as well
            for folder in (stage.sent, stage.store / "archives"):
                found = [p.read_bytes() for p in folder.glob(f"{stem}.*") if p.suffix != ".json"]
                assert found.count(content) == 1, f"{folder} has {len(found)} of {stem}, not its last once"
        self.over.clear()

    def outage(self, daemon: Daemon) -> None:
        """The receiver is down while archives arrive, and comes back."""
        self.receiver.__exit__(None, None, None)
        self.arrive()
        daemon.wait_for("attempt.failed", len(daemon.events("attempt.failed")) + 1)
        self.receiver.__enter__()

    def reload(self, daemon: Daemon) -> None:
        """The configuration changes, and with it the workers; and back again."""
        text = self.stage.config.read_text()
        for workers in (3, 2):
            self.stage.config.write_text(re.sub(r"workers = \d", f"workers = {workers}", text))
            known = len(daemon.events("config.reloaded"))
            daemon.process.send_signal(signal.SIGHUP)
            self.arrive()
            daemon.wait_for("config.reloaded", known + 1)

    def locked_ledger(self, daemon: Daemon) -> None:
        """Another process holds the ledger until that is said."""
        known = len(daemon.events("ledger.failed"))
        with contextlib.closing(sqlite3.connect(self.stage.state / "ledger.sqlite3")) as ledger:
            ledger.execute("BEGIN IMMEDIATE")
            self.arrive()
            daemon.wait_for("ledger.failed", known + 1)
            ledger.execute("ROLLBACK")

    def stopped(self, daemon: Daemon) -> None:
        """The process stands still while archives arrive, as on a host that sleeps."""
        daemon.process.send_signal(signal.SIGSTOP)
        self.arrive()
        daemon.process.send_signal(signal.SIGCONT)

    def changes(self, daemon: Daemon) -> None:
        """One archive is removed, and another renamed over, whether they are sent already or not."""
        self.archives += 1
        gone = self.stage.put(f"gone-{self.archives}.tar.gz", self._content())
        for _ in range(2):
            self.over[f"over-{self.archives}"] = content = self._content()
            self.stage.put(f"over-{self.archives}.tar.gz", content)
        gone.unlink(missing_ok=True)

    def measure(self, daemon: Daemon) -> None:
        folder = Path(f"/proc/{daemon.pid}")
        self.samples.append(
            Sample(
                len(list((folder / "fd").iterdir())),
                len(list((folder / "task").iterdir())),
                daemon.memory("VmRSS"),
            )
        )
        size = (self.stage.state / "ledger.sqlite3").stat().st_size
        self.ledger_sizes.append((self.archives, size))

    def rounds(self, daemon: Daemon) -> Iterator[int]:
        """Yield after each round of arrivals and one fault; the caller ends it."""
        kinds: list[Callable[[Daemon], None]] = [
            self.outage,
            self.reload,
            self.locked_ledger,
            self.stopped,
            self.changes,
        ]
        number = 0
        while True:
            kind = kinds[number % len(kinds)]
            self.faults[kind.__name__] += 1
            self.arrive()
            kind(daemon)
            self.wait(daemon)
            self.measure(daemon)
            number += 1
            yield number


def _waiting(stage: Stage) -> bool:
    return any(entry.is_file() for entry in os.scandir(stage.drop))


def growth(samples: list[Sample]) -> dict[str, float]:
    """Return by how much the medians of the last third exceed those of the third before."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    return {
        what: statistics.median(getattr(s, what) for s in last)
        - statistics.median(getattr(s, what) for s in middle)
        for what in _ALLOWED
    }


def run(base: Path, seed: int, go_on: Callable[[int], bool], restarts: int) -> Report:
    """Soak one daemon as long as `go_on` says, then end and start it some times, every other by a kill."""
    report, began = Report(), time.monotonic()
    base.mkdir(exist_ok=True)
    stage = Stage(base)
    tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
    receiver = RunningReceiver(stage.store, tls)
    receiver.__enter__()
    try:
        stage.configure(
            receiver.url,
            top='heartbeat_every = "1s"',
            drop='stable_for = "0s"\nrescan_every = "1s"',
            destination="workers = 2",
            more='[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.5s"',
        )
        soak = Soak(stage, receiver, random.Random(seed))
        daemon = stage.daemon().ready()
        for number in soak.rounds(daemon):
            report.tried += 1
            if number > _WARM_UP and not go_on(number):
                break
        grown = growth(soak.samples[_WARM_UP // 2 :])
        report.broken += [
            f"{what} grew by {value:g}" for what, value in grown.items() if value > _ALLOWED[what]
        ]
        for number in range(restarts):
            soak.arrive()
            if number % 2:
                daemon.kill()
            else:
                assert daemon.stop() == 0
            daemon = stage.daemon().ready()
            soak.wait(daemon)
            report.tried += 1
        assert daemon.stop() == 0
        archives, size = soak.ledger_sizes[-1]
        first_archives, first_size = soak.ledger_sizes[_WARM_UP]
        report.figures["duration"] = f"{time.monotonic() - began:.0f} s, {soak.archives} archives"
        report.figures["faults"] = ", ".join(f"{n} x {kind}" for kind, n in soak.faults.items())
        report.figures["restarts"] = f"{restarts}, every other by a kill"
        report.figures["growth"] = (
            f"descriptors {grown['descriptors']:+g}, threads {grown['threads']:+g},"
            f" memory {grown['memory'] / 2**20:+.2f} MiB, last {soak.samples[-1].memory / 2**20:.1f} MiB"
        )
        if archives > first_archives:
            each = (size - first_size) / (archives - first_archives)
            report.figures["ledger"] = f"{size} bytes, {each:.0f} for each archive"
            if each > _LEDGER_FOR_EACH:
                report.broken.append(f"the ledger grew by {each:.0f} bytes for each archive")
    finally:
        stage.end()
        with contextlib.suppress(AttributeError):
            receiver.__exit__(None, None, None)
    return report


def campaign(terms: Terms) -> Report:
    """Soak for the time that is given, the last part of it with restarts."""
    until_restarts = terms.until - 0.15 * (terms.until - time.monotonic())
    return run(terms.base / "soak", terms.seed, lambda _: time.monotonic() < until_restarts, restarts=10)
