"""A drop folder with a ledger whose archives were put away, without a daemon."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from backupd.core.model import Delivery, Outcome, fingerprint_of
from backupd.core.retention_policy import RetentionPolicy
from backupd.delivery.disposition import Disposition
from backupd.delivery.retention import Retention, RetentionScope
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.port import FileCandidate
from backupd.ledger.sent_index import SentIndex
from backupd.ledger.sqlite.connection import FILE_NAME, open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.ledger.sqlite.sent_rows import open_sent_index
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.factories import NOW, a_drop, delivered, finished, rejected


class Site:
    """A drop folder with a ledger, and a keeper of what is sent from it."""

    def __init__(self, base: Path, drop: Path) -> None:
        self.root = drop
        self.state = base / "state"
        self.state.mkdir()
        self.root.mkdir(exist_ok=True)
        self.folder = DropFolder(str(self.root))
        self.ledger = SqliteLedger(open_ledger(self.state).connection)
        self._closing = ExitStack()
        self._lines = base / "log"
        self._log = EventLog(LineWriter(os.open(self._lines, os.O_WRONLY | os.O_CREAT | os.O_APPEND)))
        self._disposal = Disposition({"switches": a_drop(self.folder)}, self._log)
        self.now = NOW
        self.order = RetentionPolicy()
        self.pattern: re.Pattern[str] | None = None
        self.checksums = False
        self.begin()

    def begin(self) -> None:
        """Begin as another daemon."""
        self.keeper = Retention(self._open_shelf, self._stocks, self._log, lambda: self.now)

    def _open_shelf(self) -> SentIndex:
        shelf = open_sent_index(self.state)
        self._closing.callback(shelf.close)
        return shelf

    def end(self) -> None:
        self._closing.close()
        self.ledger.close()
        self.folder.close()

    def _stocks(self) -> RetentionScope:
        drop = a_drop(self.folder, checksum_file="auto" if self.checksums else "off")
        drop = replace(drop, retention=self.order, label_pattern=self.pattern)
        return RetentionScope({"switches": drop}, timedelta(minutes=1))

    def send(self, name: str, at: datetime, content: bytes = b"abc", *, good: bool = True) -> Path:
        """Have a file delivered, or rejected, and put away at a time; return where it lies."""
        self.admit(name, at, content)
        [claim] = self.ledger.claim("vault", at)
        return self.put_away(claim, at, delivered(content) if good else rejected())

    def admit(self, name: str, at: datetime, content: bytes = b"abc") -> None:
        """Have a file come."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        seen = FileCandidate("switches", os.fsencode(name), fingerprint_of(path.stat()))
        self.ledger.enqueue([seen], ["vault"], at)

    def put_away(self, claim: Delivery, at: datetime, outcome: Outcome) -> Path:
        """Have a delivery end so, and its file put away, at a time; return where that lies."""
        ended = finished(claim, outcome, now=at)
        done, _ = self._disposal.dispose(self.ledger.record([ended], at))
        self.ledger.record_dispositions(done, [], at)
        assert done[0].moved_to is not None
        return self.root / os.fsdecode(done[0].moved_to)

    def keep(self, now: datetime = NOW, **order: Any) -> None:
        """Keep to an order, until there is nothing more to do."""
        if order:
            self.order = RetentionPolicy(**order)
        self.now = now
        while self.keeper.tick():
            pass

    def sent(self) -> list[str]:
        """Return the archives in sent_dir."""
        found = (p for p in (self.root / "sent").rglob("*") if p.is_file())
        return sorted(str(p.relative_to(self.root / "sent")) for p in found if p.suffix != ".json")

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._lines.read_text().splitlines()]
        return [line for line in lines if line["event"] == name]

    def removals(self) -> dict[str, str | None]:
        with closing(sqlite3.connect(self.state / FILE_NAME)) as db:
            rows = db.execute("SELECT relpath, removal FROM archive").fetchall()
        return {os.fsdecode(path): removal for path, removal in rows}
