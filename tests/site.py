"""A drop folder with sent archives and their ledger, without a daemon."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from backupd.core.model import Archive, Delivery, Outcome, fingerprint_of
from backupd.core.retention_policy import RetentionPolicy
from backupd.delivery.disposition import Disposition
from backupd.delivery.retention import Retention, RetentionScope
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.port import FileCandidate
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.factories import NOW, a_claim_result, a_drop, delivered, record_dispositions, rejected


class Site:
    """A drop folder with a ledger, a `Disposition` and a `Retention`."""

    def __init__(self, base: Path, drop: Path) -> None:
        self.root = drop
        self.state = base / "state"
        self.state.mkdir()
        self.root.mkdir(exist_ok=True)
        self.folder = DropFolder(str(self.root))
        self.ledger = SqliteLedger(open_ledger(self.state).connection)
        self._log_path = base / "log"
        self._log = EventLog(LineWriter(os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)))
        self._disposition = Disposition({"switches": a_drop(self.folder)}, self._log)
        self._started = time.time() - 1
        self.now = NOW
        self.policy = RetentionPolicy()
        self.label_pattern: re.Pattern[str] | None = None
        self.uses_checksum_files = False
        self.expects_devices = False
        self.restart()

    def restart(self) -> None:
        """Create a new retention, as a restart of the daemon does."""
        self.retention = Retention(self.ledger, self._scope, self._device_of, self._log, lambda: self.now)

    def lose_ledger(self) -> None:
        """Delete the ledger, create a new one, and restart."""
        self.ledger.close()
        for path in self.state.iterdir():
            path.unlink()
        self.ledger = SqliteLedger(open_ledger(self.state).connection)
        self.restart()

    def close(self) -> None:
        self.ledger.close()
        self.folder.close()

    def _device_of(self, archive: Archive) -> str | None:
        return os.fsdecode(archive.relpath).partition("-")[0]

    def _scope(self) -> RetentionScope:
        drop = a_drop(
            self.folder,
            checksum_file="auto" if self.uses_checksum_files else "off",
            expect={"every": "1h"} if self.expects_devices else {},
        )
        drop = replace(drop, retention=self.policy, label_pattern=self.label_pattern)
        return RetentionScope({"switches": drop}, timedelta(minutes=1))

    def send(self, name: str, at: datetime, content: bytes = b"abc", *, accepted: bool = True) -> Path:
        """Deliver or reject a file and dispose of it, at a time; return its new path."""
        self.enqueue(name, at, content)
        [claim] = self.ledger.claim("vault", at)
        return self.finish(claim, at, delivered(content) if accepted else rejected())

    def enqueue(self, name: str, at: datetime, content: bytes = b"abc") -> None:
        """Write a file into the drop folder at a time, and queue it."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        set_time(path, at)
        candidate = FileCandidate("switches", os.fsencode(name), fingerprint_of(path.stat()))
        self.ledger.enqueue([candidate], ["vault"], at)

    def finish(self, claim: Delivery, at: datetime, outcome: Outcome) -> Path:
        """Record the outcome of a delivery and dispose of its file, at a time; return its new path."""
        result = a_claim_result(claim, outcome, now=at)
        done, _ = self._disposition.dispose(self.ledger.record([result], at).completed)
        record_dispositions(self.ledger, done, [], at)
        assert done[0].moved_to is not None
        path = self.root / os.fsdecode(done[0].moved_to)
        for receipt in path.parent.glob("*.json"):
            if receipt.lstat().st_mtime > self._started and not receipt.is_symlink():  # just written
                set_time(receipt, at)
        return path

    def apply(self, now: datetime = NOW, **policy: Any) -> None:
        """Apply a policy, or the last one."""
        if policy:
            self.policy = RetentionPolicy(**policy)
        self.now = now
        self.retention.apply()

    def sent(self) -> list[str]:
        """Return the paths of the archives in `sent_dir`."""
        found = (p for p in (self.root / "sent").rglob("*") if p.is_file())
        return sorted(str(p.relative_to(self.root / "sent")) for p in found if p.suffix != ".json")

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._log_path.read_text().splitlines()]
        return [line for line in lines if line["event"] == name]


def set_time(path: Path, at: datetime) -> None:
    """Set the modification time of a file."""
    os.utime(path, (at.timestamp(), at.timestamp()))
