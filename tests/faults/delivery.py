"""A harness that delivers one archive after another under the shim, and checks each delivery."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.faults.disk import Disk, a_disk
from tests.faults.shim import Shim
from tests.stage import Daemon, Stage, until

SIZE = 600_000
"""Bytes of an archive: three chunks of the request body."""


class BrokenError(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A disposition of archives, and the configuration that leads to it."""

    name: str
    drop: str
    folder: str
    """The folder of the archive in the end, relative to the drop folder; "" for none."""
    receipt: str = ""
    state: str = "delivered"
    since: str = "seen"
    """The first step that differs from those of an archive that is moved."""


MOVED = Scenario("moved", "", "sent", "receipt")
DELETED = Scenario("deleted", 'on_delivered = "delete"', "", since="outcome committed")
KEPT = Scenario("kept", 'on_delivered = "keep"', ".", since="outcome committed")
REJECTED = Scenario(
    "rejected", 'inspect_grace = "0s"\non_suspicious = "reject"', "rejected", "reason", "rejected"
)


def name_of(scenario: Scenario, can_lose_power: bool) -> str:
    """Return the name of a scenario, with or without power cuts."""
    return f"an archive that is {scenario.name}" + ", with power cuts" * can_lose_power


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive in the drop folder."""

    name: str
    content: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class Harness:
    """An installation with the drop folder and the ledger in one folder, `disk`, and a receiver beside it.

    With `can_lose_power` both are on a disk of their own, so that a sync of one does not sync the other.
    """

    def __init__(self, base: Path, scenario: Scenario, *, can_lose_power: bool = False) -> None:
        self.scenario = scenario
        self.disks: list[Disk] = []
        self._can_lose_power = can_lose_power
        self.stage = Stage(base)
        self.disk = base / "disk"
        self.files = self.disk / "files"
        self.files.mkdir(parents=True)
        self.stage.drop.rmdir()
        self.stage.drop, self.stage.state = self.files / "drop", self.disk / "state"
        self.stage.sent, self.stage.rejected = self.stage.drop / "sent", self.stage.drop / "rejected"
        self.shim = Shim(base, self.disk)
        self.daemon: Daemon | None = None
        self._number = 0

    @property
    def name(self) -> str:
        """Return the name of the scenario."""
        return name_of(self.scenario, self._can_lose_power)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Mount the disks and run the receiver; end everything afterwards."""
        stage = self.stage
        tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
        with contextlib.ExitStack() as after:
            if self._can_lose_power:
                for folder in (self.files, stage.state):
                    folder.mkdir(exist_ok=True)
                    image = stage.base / f"{folder.name}.img"
                    self.disks.append(after.enter_context(a_disk(image, folder)))
            stage.drop.mkdir(exist_ok=True)
            after.callback(stage.end)
            after.callback(self.shim.disarm)
            with RunningReceiver(stage.store, tls) as receiver:
                stage.configure(
                    receiver.url,
                    top='heartbeat_every = "1h"',
                    drop=f'stable_for = "0s"\n{self.scenario.drop}',
                    destination='workers = 1\n[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.2s"',
                )
                yield

    def start(self) -> Daemon:
        """Start the daemon with the shim disarmed, unless it runs."""
        if self.daemon is None or self.daemon.process.poll() is not None:
            self.shim.disarm()
            self.daemon = self.stage.daemon(self.shim.environ, "tests.faults.stepping").ready()
        return self.daemon

    def restart(self, *, gently: bool = False) -> Daemon:
        """Restart the daemon without a fault, by SIGKILL, or gently: disarm the shim, then send SIGTERM."""
        if gently:
            self.shim.disarm()
        if self.daemon is not None:
            if gently:
                self.daemon.stop()
            else:
                self.daemon.kill()
            self.daemon = None
        return self.start()

    def put(self, before_seen: Callable[[], None] = lambda: None) -> list[Archive]:
        """Rename an archive into the drop folder while the daemon is stopped, and sync it.

        With power cuts two archives: unsynced data of the first is lost while the second is in progress.
        """
        daemon = self.start()
        archives = [self._write() for _ in range(2 if self.disks else 1)]
        daemon.process.send_signal(signal.SIGSTOP)
        until(lambda: is_stopped(daemon.pid), "the daemon to stop")
        try:
            for archive in archives:
                (self.files / archive.name).rename(self.stage.drop / archive.name)
            for folder in (self.files, self.stage.drop):
                fd = os.open(folder, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
            before_seen()
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        return archives

    def _write(self) -> Archive:
        """Write a new archive beside the drop folder; to be rejected, it starts like gzip, but is none."""
        self._number += 1
        start = b"\x1f\x8b\x08" if self.scenario is REJECTED else b""
        archive = Archive(f"sw-{self._number:05}.tar.gz", start + b"%05d" % self._number + os.urandom(SIZE))
        with (self.files / archive.name).open("wb") as stream:
            stream.write(archive.content)
            stream.flush()
            os.fsync(stream.fileno())
        return archive

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop a daemon that still runs with SIGSTOP, for a check of its files."""
        daemon = self.daemon
        if daemon is None or daemon.process.poll() is not None:
            yield
            return
        daemon.process.send_signal(signal.SIGSTOP)
        until(lambda: daemon.process.poll() is not None or is_stopped(daemon.pid), "the daemon to stop")
        try:
            yield
        finally:
            daemon.process.send_signal(signal.SIGCONT)

    def count_logged(self, name: str, archive: Archive) -> int:
        """Return how often an event of an archive was logged, by all daemons together."""
        count = 0
        for line in self.stage.log.read_bytes().splitlines():
            if name.encode() in line and archive.name.encode() in line:
                with contextlib.suppress(ValueError):  # a kill cuts the last line
                    count += json.loads(line)["event"] == name
        return count

    def is_completed(self, archive: Archive) -> bool:
        """Return whether the disposition of the archive is committed."""
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self._ledger()) as ledger:
            # raised if the daemon is killed meanwhile, or the power is cut
            row = ledger.execute(
                "SELECT 1 FROM archive WHERE relpath = ? AND disposition = 'done' AND state = ?",
                (archive.name.encode(), self.scenario.state),
            ).fetchone()
            return row is not None
        return False

    def wait_until_completed(self, archive: Archive, timeout: float = 180.0) -> None:
        until(lambda: self.is_completed(archive), f"the disposition of {archive.name}", timeout)

    def stored(self, archive: Archive) -> int:
        """Return how many copies of an archive the receiver has."""
        folder = self.stage.store / "archives"
        name = f"{archive.name.removesuffix('.tar.gz')}.{archive.digest[:16]}*"
        return sum(path.read_bytes() == archive.content for path in folder.glob(name))

    def copies(self, archive: Archive) -> list[Path]:
        """Return the complete copies of an archive below the drop folder, hidden ones included."""
        found = (path for path in self.stage.drop.rglob("*") if path.is_file())
        same = (path for path in found if path.stat().st_size == len(archive.content))
        return [path for path in same if path.read_bytes() == archive.content]

    def check_nothing_lost(self, archive: Archive) -> None:
        """Check the promises that hold at any moment: the archive exists, or was delivered and deleted."""
        copies = self.copies(archive)
        stored = self.stored(archive)
        in_place = self.stage.drop / archive.name in copies
        _expect(stored <= 1, f"the receiver stored it {stored} times")
        _expect(len(copies) <= 1, f"there are several copies: {copies}")
        if self.scenario is REJECTED:
            _expect(bool(copies), "it is lost")
            _expect(not stored, "it was uploaded")
        elif not in_place:
            _expect(bool(stored), f"it left the drop folder and was not delivered: {copies}")
            _expect(bool(copies) or self.scenario is DELETED, "it is lost")
        for event in ("delivery.verified", "archive.delivered", "archive.disposed"):
            if self.scenario is not REJECTED and self.count_logged(event, archive):
                _expect(bool(stored), f"{event} was logged before it was stored")

    def check_completed(self, archive: Archive) -> int:
        """Check the promises that hold in the end; return how often the result was logged."""
        self.check_nothing_lost(archive)
        scenario, drop = self.scenario, self.stage.drop
        expected = [drop / scenario.folder / archive.name] if scenario.folder else []
        _expect(self.copies(archive) == expected, f"copies: {self.copies(archive)}")
        copies = self.stored(archive)
        _expect(copies == (scenario is not REJECTED), f"the receiver has {copies} copies")
        leftovers = [p for p in drop.rglob(".*") if p.is_file()]
        _expect(not leftovers, f"temporary files are left: {leftovers}")
        if scenario.receipt:
            receipts = list((drop / scenario.folder).glob(f"{archive.name}.*.json"))
            _expect(len(receipts) == 1, f"receipt files: {receipts}")
            receipt = json.loads(receipts[0].read_bytes())
            named = receipt["archive"], receipt["size"]
            _expect(named == (archive.name, len(archive.content)), f"the receipt file has {receipt}")
            if scenario is not REJECTED:
                _expect(receipt["digest"] == f"sha256:{archive.digest}", f"the receipt file has {receipt}")
        with contextlib.closing(self._ledger()) as ledger:
            rows = ledger.execute(
                "SELECT a.state, d.state, d.verified FROM archive a JOIN delivery d ON d.archive_id = a.id"
                " WHERE relpath = ? AND a.state <> 'superseded'",
                (archive.name.encode(),),
            ).fetchall()
        if scenario is not REJECTED and not self.disks:  # a power cut may lose the queued delivery
            _expect(self._keys(archive) == 1, f"{self._keys(archive)} idempotency keys")
        verified = None if scenario is REJECTED else 1
        _expect(rows == [(scenario.state, scenario.state, verified)], f"the ledger has {rows}")
        logged = self.count_logged(f"archive.{scenario.state}", archive)
        _expect(logged >= 1, "its result was not logged")
        other = "archive.delivered" if scenario is REJECTED else "archive.rejected"
        _expect(not self.count_logged(other, archive), f"{other} was logged")
        return logged

    def check_the_ledger(self) -> None:
        with contextlib.closing(self._ledger()) as ledger:
            rows: list[Any] = ledger.execute("PRAGMA integrity_check").fetchall()
        _expect(rows == [("ok",)], f"integrity_check: {rows}")

    def clear(self, archive: Archive) -> None:
        """Remove the files of an archive, so that the check of the next one costs no more."""
        for path in [*self.copies(archive), *self.stage.drop.rglob(f"{archive.name}.*.json")]:
            path.unlink()
        for path in (self.stage.store / "archives").iterdir():
            path.unlink()

    def _keys(self, archive: Archive) -> int:
        """Return the number of idempotency keys that the receiver got with an archive."""
        with contextlib.closing(sqlite3.connect(self.stage.store / "index.sqlite", timeout=30)) as index:
            query = "SELECT count(*) FROM idempotency_key WHERE sha256 = ?"
            return int(index.execute(query, (archive.digest,)).fetchone()[0])

    def _ledger(self) -> sqlite3.Connection:
        return sqlite3.connect(self.stage.state / "ledger.sqlite3", timeout=30)


def is_stopped(pid: int) -> bool:
    """Return whether every thread of a process is stopped; SIGSTOP takes effect after a while."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def _expect(holds: bool, failure: str) -> None:
    if not holds:
        raise BrokenError(failure)
