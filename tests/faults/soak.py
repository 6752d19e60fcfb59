"""Rounds of arrivals, faults and restarts, after which memory, descriptors and threads have not grown."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.faults.campaign import CampaignOptions, Report
from tests.stage import Daemon, Stage, until

ARCHIVES = 10
"""Archives of a round."""

_WARM_UP = 10
"""Rounds after which every fault has occurred and every cache is full."""

_ALLOWED = {"descriptors": 2.0, "threads": 0.0, "memory": 3.0 * 2**20}
"""The allowed growth from the second to the last third of the life of a daemon; memory in bytes."""


_LEDGER_BYTES = 8_000
"""Bytes of an archive in the ledger: a row, a delivery, a receipt, and one attempt for each failure."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The resources of a daemon at the end of a round."""

    descriptors: int
    threads: int
    memory: int


@dataclass(slots=True)
class Soak:
    """An installation, the faults that it went through, and the measurements."""

    stage: Stage
    receiver: RunningReceiver
    chance: random.Random
    archives: int = 0
    pending: dict[str, bytes] = field(default_factory=dict)
    """The content of each archive since the last check."""
    replaced: dict[str, bytes] = field(default_factory=dict)
    """The last content of each archive that another file was renamed over, by name without suffix."""
    faults: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    ledger_sizes: list[tuple[int, int]] = field(default_factory=list)
    """The number of archives, and the bytes of the ledger at that time."""

    def arrive(self, count: int = ARCHIVES) -> None:
        """Put some archives of different sizes into the drop folder."""
        for _ in range(count):
            self.archives += 1
            name = f"sw-{self.archives:06}.tar.gz"
            self.pending[name] = self._content()
            self.stage.put(name, self.pending[name])

    def _content(self) -> bytes:
        return b"%d " % self.archives + os.urandom(self.chance.choice((10, 3_000, 200_000, 900_000)))

    def wait(self, daemon: Daemon) -> None:
        """Wait until every archive is delivered and moved, and check it."""
        stage = self.stage
        with contextlib.suppress(FileNotFoundError):
            until(lambda: not _waiting(stage), f"all archives\n{daemon.text()[-3000:]}")
        for name, content in self.pending.items():
            sent = stage.sent / name
            until(sent.exists, name)
            assert sent.read_bytes() == content, f"{name} has other content"
            stored = [p.read_bytes() for p in (stage.store / "archives").glob(f"{name.split('.')[0]}.*")]
            assert stored == [content], f"the receiver has {len(stored)} copies of {name}"
        self.pending.clear()
        for stem, content in self.replaced.items():  # the content before it may be there as well
            for folder in (stage.sent, stage.store / "archives"):
                found = [p.read_bytes() for p in folder.glob(f"{stem}.*") if p.suffix != ".json"]
                assert found.count(content) == 1, f"{folder} has the last content of {stem} not once"
        self.replaced.clear()

    def outage(self, daemon: Daemon) -> None:
        """Stop the receiver while archives arrive, and start it again."""
        self.receiver.__exit__(None, None, None)
        self.arrive()
        daemon.wait_for("attempt.failed", len(daemon.events("attempt.failed")) + 1)
        self.receiver.__enter__()

    def reload(self, daemon: Daemon) -> None:
        """Change the number of workers by a reload, and change it back."""
        text = self.stage.config.read_text()
        for workers in (3, 2):
            self.stage.config.write_text(re.sub(r"workers = \d", f"workers = {workers}", text))
            known = len(daemon.events("config.reloaded"))
            daemon.process.send_signal(signal.SIGHUP)
            self.arrive()
            daemon.wait_for("config.reloaded", known + 1)

    def locked_ledger(self, daemon: Daemon) -> None:
        """Lock the ledger from another process until the daemon logs that."""
        known = len(daemon.events("ledger.failed"))
        with contextlib.closing(sqlite3.connect(self.stage.state / "ledger.sqlite3")) as ledger:
            ledger.execute("BEGIN IMMEDIATE")
            self.arrive()
            daemon.wait_for("ledger.failed", known + 1)
            ledger.execute("ROLLBACK")

    def folder_gone(self, daemon: Daemon) -> None:
        """Rename the drop folder away until the daemon logs that, as an unmounted disk."""
        known, away = len(daemon.events("drop.failed")), self.stage.base / "away"
        self.stage.drop.rename(away)
        daemon.wait_for("drop.failed", known + 1)
        away.rename(self.stage.drop)

    def no_descriptors(self, daemon: Daemon) -> None:
        """Leave the daemon without a free descriptor until it logs a fault of any kind."""
        limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        known = sum(event["level"] == "error" for event in daemon.events())
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        self.arrive()
        until(lambda: sum(event["level"] == "error" for event in daemon.events()) > known, "an error")
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)

    def stopped(self, daemon: Daemon) -> None:
        """Stop the daemon while archives arrive, as on a host that sleeps."""
        daemon.process.send_signal(signal.SIGSTOP)
        self.arrive()
        daemon.process.send_signal(signal.SIGCONT)

    def changes(self, daemon: Daemon) -> None:
        """Remove one archive, and rename a file over another, before or after their upload."""
        self.archives += 1
        gone = self.stage.put(f"gone-{self.archives}.tar.gz", self._content())
        for _ in range(2):
            self.replaced[f"over-{self.archives}"] = content = self._content()
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
        """Yield after each round of arrivals and one fault, without end."""
        kinds: list[Callable[[Daemon], None]] = [
            self.outage,
            self.reload,
            self.locked_ledger,
            self.folder_gone,
            self.no_descriptors,
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
    """Return the growth of the medians from the second to the last third of the samples."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    return {
        name: statistics.median(getattr(s, name) for s in last)
        - statistics.median(getattr(s, name) for s in middle)
        for name in _ALLOWED
    }


def run(base: Path, seed: int, has_time: Callable[[int], bool], restarts: int) -> Report:
    """Run rounds on one daemon while `has_time` is true, then restart it, every other time by SIGKILL."""
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
            if number > _WARM_UP and not has_time(number):
                break
        grown = growth(soak.samples[_WARM_UP // 2 :])
        report.broken += [
            f"{name} grew by {value:g}" for name, value in grown.items() if value > _ALLOWED[name]
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
        report.figures["restarts"] = f"{restarts}, every other by SIGKILL"
        report.figures["growth"] = (
            f"descriptors {grown['descriptors']:+g}, threads {grown['threads']:+g},"
            f" memory {grown['memory'] / 2**20:+.2f} MiB, last {soak.samples[-1].memory / 2**20:.1f} MiB"
        )
        if archives > first_archives:
            each = (size - first_size) / (archives - first_archives)
            report.figures["ledger"] = f"{size} bytes, {each:.0f} for each archive"
            if each > _LEDGER_BYTES:
                report.broken.append(f"the ledger grew by {each:.0f} bytes for each archive")
    finally:
        stage.end()
        with contextlib.suppress(AttributeError):
            receiver.__exit__(None, None, None)
    return report


def campaign(options: CampaignOptions) -> Report:
    """Run rounds for the time of the campaign, the last part of it with restarts."""
    until_restarts = options.deadline - 0.15 * (options.deadline - time.monotonic())
    return run(options.base / "soak", options.seed, lambda _: time.monotonic() < until_restarts, restarts=10)
