"""The claims of a destination's workers, on a real ledger that can't always be written."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from backupd.core.errors import LedgerError
from backupd.core.model import Deferred, Digest, Outcome
from backupd.core.policy import Reason
from backupd.core.retry import Backoff
from backupd.core.step import Patience, Priority
from backupd.delivery.gate import SharedGate
from backupd.delivery.wakeup import Wakeup
from backupd.delivery.worker import Lane, Source, Worker
from backupd.drop.folder import DropFolder
from backupd.ledger.database import open_ledger
from backupd.ledger.sqlite import SqliteLedger
from backupd.ops.lines import LineWriter
from backupd.ops.log import EventLog
from backupd.upload.port import Cargo, Uploader
from tests.factories import NOW, a_digest, a_sighting, deferred, finished


class Failing(SqliteLedger):
    """A ledger on a disk that is full for a while."""

    full = False

    def release_claims(self, delivery_ids: Sequence[str] | None = None) -> int:
        if self.full:
            raise LedgerError("the ledger can't be written: database or disk is full", "make room")
        return super().release_claims(delivery_ids)


def a_lane(ledger: SqliteLedger, folder: DropFolder | None = None) -> Lane:
    log, wakeup = EventLog(LineWriter(1), level="error"), Wakeup()
    backoff = Backoff(timedelta(seconds=1), timedelta(seconds=2))
    gate = SharedGate("vault", backoff, log, wakeup, ledger)
    sources = {} if folder is None else {"switches": Source(folder)}
    return Lane("vault", ledger, gate, Patience(backoff, None), Priority.OLDEST, wakeup, sources, log)


def test_claims_that_cannot_be_given_back_are_kept_and_not_lost(tmp_path: Path) -> None:
    ledger = Failing(open_ledger(tmp_path).connection)
    lane = a_lane(ledger)
    ledger.admit([a_sighting(b"r%d" % number) for number in range(4)], ["vault"], NOW)
    assert lane.claim() is not None
    ledger.full = True
    lane.give_back()
    ledger.full = False
    assert lane.claim() is not None
    lane.give_back()
    assert len(ledger.claim("vault", NOW, most=4)) == 2
    ledger.close()


class Unopenable(DropFolder):
    """A folder in a process that has no descriptor left."""

    def open(self, relpath: bytes) -> int:
        raise OSError(errno.EMFILE, "Too many open files")


class Broken(Uploader):
    """An uploader with a bug."""

    def upload(self, cargo: Cargo) -> Outcome:
        raise ZeroDivisionError

    def ask(self, cargo: Cargo, digest: Digest) -> Outcome | None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Unopenable, Reason.UNREADABLE), (DropFolder, Reason.INTERNAL)],
    ids=["no descriptor", "a bug"],
)
def test_an_attempt_that_sends_nothing_forgets_no_lost_answer(
    tmp_path: Path, kind: type[DropFolder], reason: Reason
) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"abc")
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    ledger.admit([a_sighting(b"a.tar.gz")], ["vault"], NOW)
    [delivery] = ledger.claim("vault", NOW)
    lost = replace(deferred(), unknown=a_digest())
    ledger.record([finished(delivery, lost)], NOW)
    [delivery] = ledger.claim("vault", NOW + timedelta(hours=1))
    told_to_stop = threading.Event()
    told_to_stop.set()
    folder = kind(str(tmp_path))

    [attempt] = Worker(a_lane(ledger, folder), Broken(), lambda _: None).attempt(delivery, told_to_stop)
    outcome = attempt.outcome
    assert isinstance(outcome, Deferred)
    assert outcome.reason is reason
    ledger.record([finished(delivery, outcome)], NOW)
    [delivery] = ledger.claim("vault", NOW + timedelta(days=1))
    assert delivery.unknown == a_digest()
    folder.close()
    ledger.close()
