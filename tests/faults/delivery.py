"""One delivery after another under a daemon that loads the shim, and what has to be true of each."""

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
"""Bytes of an archive: three pieces of a request's body."""


class BrokenError(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a drop's deliveries end, and the configuration that has them do so."""

    name: str
    drop: str
    folder: str
    """Where the archive ends, relative to the drop folder; "" for nowhere."""
    record: str = ""
    state: str = "delivered"
    since: str = "seen"
    """The first step that is its own; those before are the same as of an archive that is moved."""


MOVED = Ending("moved", "", "sent", "receipt")
DELETED = Ending("deleted", 'on_delivered = "delete"', "", since="outcome committed")
KEPT = Ending("kept", 'on_delivered = "keep"', ".", since="outcome committed")
REJECTED = Ending("rejected", 'inspect = "quick"\ninspect_grace = "0s"', "rejected", "reason", "rejected")


def name_of(ending: Ending, can_lose_power: bool) -> str:
    """Return what happens to archives of an ending, and to their host."""
    return f"an archive that is {ending.name}" + ", the power cut" * can_lose_power


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive that was dropped."""

    name: str
    content: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class Ground:
    """An installation whose drop folder and ledger lie in one folder, `disk`, with a receiver beside it.

    Each is on a disk of its own where the power can be lost: none syncs what is of the other.
    """

    def __init__(self, base: Path, ending: Ending, *, can_lose_power: bool = False) -> None:
        self.ending = ending
        self.drives: list[Disk] = []
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
        """Return what happens to its archives and to it."""
        return name_of(self.ending, self._can_lose_power)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Run the receiver; end everything afterwards."""
        stage = self.stage
        tls = ServerTls(stage.pki.server_cert, stage.pki.server_key, stage.pki.ca_pem)
        with contextlib.ExitStack() as after:
            if self._can_lose_power:
                for folder in (self.files, stage.state):
                    folder.mkdir(exist_ok=True)
                    image = stage.base / f"{folder.name}.img"
                    self.drives.append(after.enter_context(a_disk(image, folder)))
            stage.drop.mkdir(exist_ok=True)
            after.callback(stage.end)
            after.callback(self.shim.disarm)
            with RunningReceiver(stage.store, tls) as receiver:
                stage.configure(
                    receiver.url,
                    top='heartbeat_every = "1h"',
                    drop=f'stable_for = "0s"\n{self.ending.drop}',
                    destination='workers = 1\n[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.2s"',
                )
                yield

    def start(self) -> Daemon:
        """Start the daemon, with the shim at rest, where none runs."""
        if self.daemon is None or self.daemon.process.poll() is not None:
            self.shim.disarm()
            self.daemon = self.stage.daemon(self.shim.environ, "tests.faults.stepping").ready()
        return self.daemon

    def restart(self, *, gently: bool = False) -> Daemon:
        """Start the daemon anew, without a fault; gently: the fault ends first, then it is told to stop."""
        if gently:
            self.shim.disarm()
        if self.daemon is not None:
            if gently:
                self.daemon.stop()
            else:
                self.daemon.kill()
            self.daemon = None
        return self.start()

    def put(self, before_it_is_seen: Callable[[], None] = lambda: None) -> list[Archive]:
        """Drop an archive behind the back of the daemon, which sees it once it is on the disk.

        Two where the power can be lost: what is not synced of one is missed once the other is under way.
        """
        daemon = self.start()
        archives = [self._write() for _ in range(2 if self.drives else 1)]
        daemon.process.send_signal(signal.SIGSTOP)
        until(lambda: stands_still(daemon.pid), "the daemon to stand still")
        try:
            for archive in archives:
                (self.files / archive.name).rename(self.stage.drop / archive.name)
            for folder in (self.files, self.stage.drop):
                fd = os.open(folder, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
            before_it_is_seen()
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        return archives

    def _write(self) -> Archive:
        """Write a new archive beside the drop folder; of a drop that inspects, this is no archive at all."""
        self._number += 1
        archive = Archive(f"sw-{self._number:05}.tar.gz", b"%05d" % self._number + os.urandom(SIZE))
        with (self.files / archive.name).open("wb") as stream:
            stream.write(archive.content)
            stream.flush()
            os.fsync(stream.fileno())
        return archive

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Have a daemon that still runs touch nothing while it is looked at."""
        daemon = self.daemon
        if daemon is None or daemon.process.poll() is not None:
            yield
            return
        daemon.process.send_signal(signal.SIGSTOP)
        until(lambda: daemon.process.poll() is not None or stands_still(daemon.pid), "it to stand still")
        try:
            yield
        finally:
            daemon.process.send_signal(signal.SIGCONT)

    def told(self, name: str, archive: Archive) -> int:
        """Return how often an event of an archive was logged, whatever daemon it was."""
        count = 0
        for line in self.stage.log.read_bytes().splitlines():
            if name.encode() in line and archive.name.encode() in line:
                with contextlib.suppress(ValueError):  # the beginning of a line, at a kill
                    count += json.loads(line)["event"] == name
        return count

    def is_over(self, archive: Archive) -> bool:
        """Tell whether the archive's file was disposed of, and that was noted."""
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self._ledger()) as ledger:
            # raised where the daemon is killed meanwhile, or the power is cut
            row = ledger.execute(
                "SELECT 1 FROM archive WHERE relpath = ? AND disposition = 'done' AND state = ?",
                (archive.name.encode(), self.ending.state),
            ).fetchone()
            return row is not None
        return False

    def wait_until_over(self, archive: Archive, patience: float = 180.0) -> None:
        until(lambda: self.is_over(archive), f"the end of {archive.name}", patience)

    def stored(self, archive: Archive) -> int:
        """Return how often the receiver has an archive."""
        folder = self.stage.store / "archives"
        name = f"{archive.name.removesuffix('.tar.gz')}.{archive.digest[:16]}*"
        return sum(path.read_bytes() == archive.content for path in folder.glob(name))

    def copies(self, archive: Archive) -> list[Path]:
        """Return the whole copies of an archive below the drop folder, hidden ones too."""
        found = (path for path in self.stage.drop.rglob("*") if path.is_file())
        same = (path for path in found if path.stat().st_size == len(archive.content))
        return [path for path in same if path.read_bytes() == archive.content]

    def check_nothing_lost(self, archive: Archive) -> None:
        """Check what holds at any moment: the archive is there, unless it was delivered and deleted."""
        copies = self.copies(archive)
        stored = self.stored(archive)
        in_place = self.stage.drop / archive.name in copies
        _expect(stored <= 1, f"the receiver stored it {stored} times")
        _expect(len(copies) <= 1, f"there are several: {copies}")
        if self.ending is REJECTED:
            _expect(bool(copies), "it is gone")
            _expect(not stored, "it was sent")
        elif not in_place:
            _expect(bool(stored), f"it left its place and was not delivered: {copies}")
            _expect(bool(copies) or self.ending is DELETED, "it is gone")
        for event in ("delivery.verified", "archive.delivered", "archive.disposed"):
            if self.ending is not REJECTED and self.told(event, archive):
                _expect(bool(stored), f"{event} was told before it was stored")

    def check_the_end(self, archive: Archive) -> int:
        """Check what holds in the end; return how often the archive's end was told."""
        self.check_nothing_lost(archive)
        ending, drop = self.ending, self.stage.drop
        wanted = [drop / ending.folder / archive.name] if ending.folder else []
        _expect(self.copies(archive) == wanted, f"copies: {self.copies(archive)}")
        _expect(self.stored(archive) == (ending is not REJECTED), "it is not stored")
        leftovers = [p for p in drop.rglob(".*") if p.is_file()]
        _expect(not leftovers, f"left behind: {leftovers}")
        if ending.record:
            records = list((drop / ending.folder).glob(f"{archive.name}.*.json"))
            _expect(len(records) == 1, f"records: {records}")
            said = json.loads(records[0].read_bytes())
            _expect((said["archive"], said["size"]) == (archive.name, len(archive.content)), f"says {said}")
            if ending is not REJECTED:
                _expect(said["digest"] == f"sha256:{archive.digest}", f"says {said}")
        with contextlib.closing(self._ledger()) as ledger:
            rows = ledger.execute(
                "SELECT a.state, d.state, d.verified FROM archive a JOIN delivery d ON d.archive_id = a.id"
                " WHERE relpath = ? AND a.state <> 'superseded'",
                (archive.name.encode(),),
            ).fetchall()
        if ending is not REJECTED and not self.drives:  # a cut of the power may take the admission
            _expect(self._keys(archive) == 1, f"{self._keys(archive)} idempotency keys")
        verified = None if ending is REJECTED else 1
        _expect(rows == [(ending.state, ending.state, verified)], f"the ledger has {rows}")
        told = self.told(f"archive.{ending.state}", archive)
        _expect(told >= 1, "its end was not told")
        other = "archive.delivered" if ending is REJECTED else "archive.rejected"
        _expect(not self.told(other, archive), f"{other} was told")
        return told

    def check_the_ledger(self) -> None:
        with contextlib.closing(self._ledger()) as ledger:
            rows: list[Any] = ledger.execute("PRAGMA integrity_check").fetchall()
        _expect(rows == [("ok",)], f"integrity_check: {rows}")

    def clear(self, archive: Archive) -> None:
        """Remove what an archive left, so that looking for the next one costs no more."""
        for path in [*self.copies(archive), *self.stage.drop.rglob(f"{archive.name}.*.json")]:
            path.unlink()
        for path in (self.stage.store / "archives").iterdir():
            path.unlink()

    def _keys(self, archive: Archive) -> int:
        """Return under how many keys the receiver was sent an archive."""
        with contextlib.closing(sqlite3.connect(self.stage.store / "index.sqlite", timeout=30)) as index:
            query = "SELECT count(*) FROM idempotency_key WHERE sha256 = ?"
            return int(index.execute(query, (archive.digest,)).fetchone()[0])

    def _ledger(self) -> sqlite3.Connection:
        return sqlite3.connect(self.stage.state / "ledger.sqlite3", timeout=30)


def stands_still(pid: int) -> bool:
    """Tell whether every thread of a process is stopped, which a signal does in its own time."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def _expect(is_true: bool, what: str) -> None:
    if not is_true:
        raise BrokenError(what)
