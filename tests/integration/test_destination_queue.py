"""The queue of a destination and its workers, on a real ledger that may refuse writes."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from backupd.config.models import HttpDestinationConfig
from backupd.core.backoff import Backoff
from backupd.core.errors import LedgerError
from backupd.core.model import Deferred, Delivery, Digest, Outcome
from backupd.core.policy import Reason
from backupd.core.transition import Priority, RetryPolicy
from backupd.delivery.circuit_breaker import CircuitBreaker, Notifier
from backupd.delivery.destination import Destination, DestinationQueue
from backupd.delivery.worker import Worker, short_attempts
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from backupd.upload.base import Uploader, UploadJob
from tests.factories import NOW, a_candidate, a_digest, a_drop, deferred
from tests.scripted import Peer, Request, ScriptedServer, header_of, receipt_for, server_context
from tests.stage import TIMEOUT, Stage, until

A_CONFIG = HttpDestinationConfig(url="https://vault.example.net/")


class FullDiskLedger(SqliteLedger):
    """A ledger that refuses writes while `is_full` is set."""

    is_full = False

    def release(self, deliveries: Sequence[Delivery]) -> None:
        if self.is_full:
            raise LedgerError("the ledger can't be written: database or disk is full", "free disk space")
        super().release(deliveries)


class SetRightAfterTheCheck(threading.Event):
    """A stop event that is set and notified right after its first check."""

    def __init__(self, notifier: Notifier) -> None:
        super().__init__()
        self._notifier = notifier

    def is_set(self) -> bool:
        was_set = super().is_set()
        self.set()
        self._notifier.notify()
        return was_set


def a_queue(
    ledger: SqliteLedger, log: EventLog, kind: type[DestinationQueue] = DestinationQueue
) -> DestinationQueue:
    notifier, backoff = Notifier(), Backoff(timedelta(hours=1), timedelta(hours=1))
    circuit = CircuitBreaker("vault", backoff, log, notifier, ledger)
    destination = Destination("vault", A_CONFIG, RetryPolicy(backoff, None), Priority.OLDEST)
    return kind(destination, ledger, circuit, notifier, {}, log)


class NoUploader(Uploader):
    """For workers that make no upload."""

    def upload(self, job: UploadJob) -> Outcome:
        raise AssertionError(job)

    def query(self, job: UploadJob, digest: Digest) -> Outcome | None:
        raise AssertionError(job)

    def close(self) -> None:
        pass


def test_a_stop_ends_the_wait_of_a_paused_worker(tmp_path: Path) -> None:
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    with open(os.devnull, "wb") as null:
        queue = a_queue(ledger, EventLog(LineWriter(null.fileno())))
        queue.circuit.record_outcome(deferred(Reason.FORBIDDEN))
        assert (queue.circuit.wait_time() or 0) > TIMEOUT
        worker = Worker(queue, NoUploader(), lambda result: None)
        thread = threading.Thread(
            target=worker.run, args=(SetRightAfterTheCheck(queue.notifier),), daemon=True
        )
        thread.start()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    ledger.close()


class CountedQueue(DestinationQueue):
    """Counts the queries for a delivery."""

    queries = 0

    def claim(self) -> Delivery | None:
        self.queries += 1
        return super().claim()


def test_workers_do_not_wake_each_other_after_a_pause_if_no_delivery_is_due(tmp_path: Path) -> None:
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    with open(os.devnull, "wb") as null:
        queue = a_queue(ledger, EventLog(LineWriter(null.fileno())), CountedQueue)
        assert isinstance(queue, CountedQueue)
        queue.circuit.record_outcome(deferred(Reason.FORBIDDEN))
        queue.circuit.shift_earlier(timedelta(hours=2))
        stop = threading.Event()
        threads = [
            threading.Thread(target=Worker(queue, NoUploader(), lambda result: None).run, args=(stop,))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        stop.wait(1.0)
        stop.set()
        queue.notifier.notify()
        for thread in threads:
            thread.join(TIMEOUT)
        assert queue.queries <= 2 * len(threads)
    ledger.close()


class FailingUploader(NoUploader):
    """Raises an unexpected exception."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def upload(self, job: UploadJob) -> Outcome:
        raise self._error


class FolderWithoutDescriptors(DropFolder):
    """A folder in a process without a free descriptor."""

    def open(self, relpath: bytes) -> int:
        raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        (DropFolder, RuntimeError("a bug"), Reason.INTERNAL),
        (DropFolder, MemoryError(), Reason.HOST_LIMIT),
        (FolderWithoutDescriptors, RuntimeError("not reached"), Reason.UNREADABLE),
    ],
    ids=["a bug", "no memory", "no descriptor"],
)
def test_an_unconfirmed_digest_is_kept_if_the_next_attempt_fails(
    tmp_path: Path, kind: type[DropFolder], error: Exception, reason: Reason
) -> None:
    """Otherwise the archive would be sent again without a query."""
    (tmp_path / "r1").write_bytes(b"abc")
    ledger = SqliteLedger(open_ledger(tmp_path).connection)
    ledger.enqueue([a_candidate(b"r1")], ["vault"], NOW)
    (delivery,) = ledger.claim("vault", NOW)
    folder = kind(str(tmp_path))
    with open(os.devnull, "wb") as null:
        queue = a_queue(ledger, EventLog(LineWriter(null.fileno())))
        queue.drops = {"switches": a_drop(folder)}
        worker = Worker(queue, FailingUploader(error), lambda result: None)
        attempts = worker.make_attempts(replace(delivery, unconfirmed_digest=a_digest()), threading.Event())
    outcome = attempts[-1].outcome
    assert isinstance(outcome, Deferred)
    assert (outcome.reason, outcome.unconfirmed_digest) == (reason, a_digest())
    folder.close()
    ledger.close()


def test_claims_that_cannot_be_released_are_kept_and_delivered(tmp_path: Path) -> None:
    ledger = FullDiskLedger(open_ledger(tmp_path).connection)
    queue = a_queue(ledger, EventLog(LineWriter(1), level="error"))
    ledger.enqueue([a_candidate(b"r%d" % number) for number in range(4)], ["vault"], NOW)
    assert queue.claim() is not None
    ledger.is_full = True
    queue.release_claims()
    ledger.is_full = False
    assert queue.claim() is not None
    queue.release_claims()
    assert len(ledger.claim("vault", NOW, limit=4)) == 2
    ledger.close()


def test_a_large_probe_does_not_delay_small_archives(stage: Stage) -> None:
    """After an outage the first archive that is sent again is a large one, over a slow connection."""
    small = {f"{number}.cfg": b"%d" % number for number in range(5)}
    finish = threading.Event()

    def script(peer: Peer) -> None:
        while True:
            head, body = peer.read_head(), b""
            size = int(header_of(head, "content-length") or 0)
            while size - len(body) > 100_000 and not finish.wait(0.2):
                body += peer.read(50_000)
            peer.send(receipt_for(Request(head, body + peer.read(size - len(body))).archive))

    with ScriptedServer(script, server_context(stage.pki)) as server:
        retry = 'retry = { initial = "0.1s", max = "0.2s" }'
        stage.configure(server.url, destination=f"workers = 2\n{retry}")
        server.refuse()
        stage.put("large.tar", os.urandom(40_000_000))
        daemon = stage.daemon().ready()
        daemon.wait_for("destination.paused", 2)
        server.accept_again()
        until(lambda: server.received > 100_000, "the large archive to be under way")
        for name, content in small.items():
            stage.put(name, content)
        daemon.wait_for("archive.disposed", len(small))
        assert (stage.drop / "large.tar").exists()
        finish.set()
        daemon.wait_for("archive.disposed", len(small) + 1)
        assert len(daemon.events("destination.resumed")) == 1
        assert daemon.stop() == 0


def test_a_probe_that_is_answered_slowly_does_not_delay_others(stage: Stage) -> None:
    finish = threading.Event()

    def script(peer: Peer) -> None:
        while True:
            content = peer.read_request().archive
            if content == b"the probe":
                finish.wait(TIMEOUT)
            peer.send(receipt_for(content))

    with ScriptedServer(script, server_context(stage.pki)) as server:
        retry = 'retry = { initial = "0.1s", max = "0.2s" }'
        stage.configure(server.url, destination=f'workers = 2\ntimeout.read = "1h"\n{retry}')
        server.refuse()
        stage.put("probe.cfg", b"the probe")
        daemon = stage.daemon().ready()
        daemon.wait_for("destination.paused", 2)
        server.accept_again()
        until(lambda: server.requests, "the probe")
        for number in range(5):
            stage.put(f"{number}.cfg", b"%d" % number)
        daemon.wait_for("archive.disposed", 5)
        assert (stage.drop / "probe.cfg").exists()
        finish.set()
        daemon.wait_for("archive.disposed", 6)
        assert daemon.stop() == 0


def test_short_attempts_end_once_another_worker_has_paused_the_destination() -> None:
    outcomes: list[Outcome] = []

    def attempt() -> Outcome:
        outcomes.append(deferred(Reason.CONNECT))
        return outcomes[-1]

    short_attempts(attempt, threading.Event(), lambda: False)
    assert len(outcomes) == 1
    short_attempts(attempt, threading.Event())
    assert len(outcomes) == 4
