"""The claims of a destination's workers, on a real ledger that can't always be written."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from backupd.config.models import DestinationConfig
from backupd.core.backoff import Backoff
from backupd.core.errors import LedgerError
from backupd.core.model import Deferred, Digest, Outcome
from backupd.core.policy import Reason
from backupd.core.transition import Priority, RetryPolicy
from backupd.delivery.circuit_breaker import CircuitBreaker, Notifier
from backupd.delivery.destination import Destination, DestinationQueue
from backupd.delivery.worker import Worker
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from backupd.upload.base import Uploader, UploadJob
from tests.factories import NOW, a_candidate, a_digest, a_drop, deferred
from tests.stage import PATIENCE

A_CONFIG = DestinationConfig(url="https://vault.example.net/")


class Failing(SqliteLedger):
    """A ledger on a disk that is full for a while."""

    full = False

    def release_claims(self, delivery_ids: Sequence[str] | None = None) -> int:
        if self.full:
            raise LedgerError("the ledger can't be written: database or disk is full", "make room")
        return super().release_claims(delivery_ids)


class StoppedRightAfterALook(threading.Event):
    """A stop event that somebody sets, and rings for, in the moment after it was looked at."""

    def __init__(self, wakeup: Notifier) -> None:
        super().__init__()
        self._wakeup = wakeup

    def is_set(self) -> bool:
        was_set = super().is_set()
        self.set()
        self._wakeup.notify()
        return was_set


def a_lane(ledger: SqliteLedger, log: EventLog) -> DestinationQueue:
    wakeup, backoff = Notifier(), Backoff(timedelta(hours=1), timedelta(hours=1))
    gate = CircuitBreaker("vault", backoff, log, wakeup, ledger)
    destination = Destination("vault", A_CONFIG, RetryPolicy(backoff, None), Priority.OLDEST)
    return DestinationQueue(destination, ledger, gate, wakeup, {}, log)


class NoUploader(Uploader):
    """For workers that come to no upload."""

    def upload(self, cargo: UploadJob) -> Outcome:
        raise AssertionError(cargo)

    def query(self, cargo: UploadJob, digest: Digest) -> Outcome | None:
        raise AssertionError(cargo)

    def close(self) -> None:
        pass


def test_no_stop_is_missed_while_the_gate_is_shut_for_long(tmp_path: Path) -> None:
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    with open(os.devnull, "wb") as null:
        lane = a_lane(ledger, EventLog(LineWriter(null.fileno())))
        lane.circuit.record_outcome(deferred(Reason.FORBIDDEN))
        assert (lane.circuit.wait_time() or 0) > PATIENCE
        worker = Worker(lane, NoUploader(), lambda finished: None)
        thread = threading.Thread(
            target=worker.run, args=(StoppedRightAfterALook(lane.notifier),), daemon=True
        )
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    ledger.close()


class Unlucky(NoUploader):
    """Meets a bug."""

    def upload(self, cargo: UploadJob) -> Outcome:
        raise RuntimeError("a bug")


class Unreadable(DropFolder):
    """A folder on a host without a descriptor left."""

    def open(self, relpath: bytes) -> int:
        raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("kind", [DropFolder, Unreadable])
def test_what_may_be_there_is_remembered_whatever_fails_next(tmp_path: Path, kind: type[DropFolder]) -> None:
    """Else it would be sent again without the question for it."""
    (tmp_path / "r1").write_bytes(b"abc")
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    ledger.enqueue([a_candidate(b"r1")], ["vault"], NOW)
    (delivery,) = ledger.claim("vault", NOW)
    folder = kind(str(tmp_path))
    with open(os.devnull, "wb") as null:
        lane = a_lane(ledger, EventLog(LineWriter(null.fileno())))
        lane.drops = {"switches": a_drop(folder)}
        worker = Worker(lane, Unlucky(), lambda finished: None)
        attempts = worker.attempt(replace(delivery, unconfirmed_digest=a_digest()), threading.Event())
    outcome = attempts[-1].outcome
    assert isinstance(outcome, Deferred)
    assert outcome.unconfirmed_digest == a_digest()
    folder.close()
    ledger.close()


def test_claims_that_cannot_be_given_back_are_kept_and_not_lost(tmp_path: Path) -> None:
    ledger = Failing(open_ledger(tmp_path).connection)
    lane = a_lane(ledger, EventLog(LineWriter(1), level="error"))
    ledger.enqueue([a_candidate(b"r%d" % number) for number in range(4)], ["vault"], NOW)
    assert lane.claim() is not None
    ledger.full = True
    lane.release_claims()
    ledger.full = False
    assert lane.claim() is not None
    lane.release_claims()
    assert len(ledger.claim("vault", NOW, limit=4)) == 2
    ledger.close()
