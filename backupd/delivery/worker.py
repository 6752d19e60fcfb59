"""A worker: claim, upload, hand over for the record; one of a few for a destination."""

from __future__ import annotations

import os
import random
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import tenacity

from backupd.core.errors import LedgerError
from backupd.core.model import Attempt, Deferred, Delivery, Outcome, Superseded
from backupd.core.names import template_values
from backupd.core.policy import Reason, rule_of
from backupd.core.transition import next_step
from backupd.delivery.destination import DestinationQueue
from backupd.dropfolder.drop import Drop
from backupd.ledger.port import ClaimResult
from backupd.telemetry import events
from backupd.telemetry.thread_watchdog import ThreadWatchdog
from backupd.upload.base import Uploader, UploadJob

_MOST = 3


class _StoppingError(Exception):
    """The wait was ended by the stop event; tenacity would make one more attempt if it only returned."""


def short_attempts(once: Callable[[], Outcome], stop: threading.Event) -> None:
    """Call `once` until its outcome is one that a moment's patience can't mend, three times at most."""

    def sleep(seconds: float) -> None:
        if stop.wait(seconds):
            raise _StoppingError

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_MOST),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=2),
        retry=tenacity.retry_if_result(_is_worth_another),
        retry_error_callback=lambda _state: None,
        sleep=sleep,
    )
    try:
        retrying(once)
    except _StoppingError:
        return


def _is_worth_another(outcome: Outcome) -> bool:
    return isinstance(outcome, Deferred) and rule_of(outcome.reason).retry_immediately


_IDLE = 5.0
"""Seconds after which a worker looks at the ledger unasked: another process may have put something there."""

_UNTIL_CONFIGURED = timedelta(days=1)
"""How long what comes from a drop that is configured no more is left alone; a start or reload ends it."""


class Worker:
    """Brings deliveries to one destination, one at a time; `run` is the body of its thread."""

    def __init__(
        self, lane: DestinationQueue, uploader: Uploader, hand_over: Callable[[ClaimResult], None]
    ) -> None:
        self._lane = lane
        self._uploader = uploader
        self._hand_over = hand_over
        self.watchdog = ThreadWatchdog(f"worker of {lane.destination.name}")
        self.current: Delivery | None = None

    def run(self, stop: threading.Event) -> None:
        """Deliver until told to stop; what is claimed then is still carried to its end."""
        try:
            while True:
                heard = self._lane.notifier.generation()  # first: whoever sets `stop` rings afterwards
                if stop.is_set():
                    return
                self.watchdog.alive()
                if not self._one(stop):
                    patience = self._patience()
                    self.watchdog.idle()
                    self._lane.notifier.wait(heard, patience)
        finally:
            self._lane.release_claims()
            self.watchdog.idle()
            self._uploader.close()

    def _one(self, stop: threading.Event) -> bool:
        """Carry one delivery to its end; return False where there is nothing to do now."""
        lane = self._lane
        if not lane.circuit.try_acquire():
            lane.release_claims()  # nobody knows for how long
            return False
        delivery = None
        try:
            delivery = lane.claim()
        except LedgerError as error:
            lane.log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)
        if delivery is None:
            lane.circuit.release()
            return False
        self.current = delivery
        attempts = self.attempt(delivery, stop)
        self._finish(delivery, attempts)
        self.current = None
        return True

    def _patience(self) -> float:
        """Return for how many seconds there is nothing to do."""
        shut = self._lane.circuit.wait_time()
        if shut != 0.0:
            return _IDLE if shut is None else shut
        try:
            due = self._lane.ledger.next_due(self._lane.destination.name)
        except LedgerError:
            return _IDLE
        if due is None:
            return _IDLE
        return min(max((due - datetime.now(UTC)).total_seconds(), 0.01), _IDLE)

    def attempt(self, delivery: Delivery, stop: threading.Event) -> list[Attempt]:
        """Make the short attempts of one claim; the last one's outcome counts."""
        attempts: list[Attempt] = []

        def once() -> Outcome:
            nonlocal delivery
            attempts.append(self._upload(delivery))
            self._tell_failure(delivery, len(attempts), attempts[-1])
            outcome = attempts[-1].outcome
            if isinstance(outcome, Deferred):  # what may be there is asked about before the next attempt
                delivery = replace(delivery, unconfirmed_digest=outcome.unconfirmed_digest)
            return outcome

        short_attempts(once, stop)
        return attempts

    def _upload(self, delivery: Delivery) -> Attempt:
        self.watchdog.alive()
        started_at, began = datetime.now(UTC), time.monotonic()
        outcome, sent = self._open_and_upload(delivery)
        duration = timedelta(seconds=time.monotonic() - began)
        return Attempt(started_at, duration, sent, outcome)

    def _open_and_upload(self, delivery: Delivery) -> tuple[Outcome, int]:
        archive = delivery.archive
        source = self._lane.drops.get(archive.drop)
        if source is None:
            self._lane.log_removed_drop(archive.drop)
            error = f"no drop named {archive.drop} is configured any more"
            return Deferred(Reason.UNREADABLE, error, None, _UNTIL_CONFIGURED, delivery.unconfirmed_digest), 0
        try:
            fd = source.folder.open(archive.relpath)
        except (FileNotFoundError, NotADirectoryError):
            if source.folder.is_unreachable(archive.relpath, archive.fingerprint.device):
                error = "its filesystem is not mounted on the drop folder"
                return Deferred(Reason.UNREADABLE, error, unconfirmed_digest=delivery.unconfirmed_digest), 0
            return Superseded("the file is gone", missing=True), 0
        except OSError as error:
            if _is_something_else(source, archive.relpath):
                return Superseded("something that is no file has its name", missing=True), 0
            return Deferred(
                Reason.UNREADABLE,
                error.strerror or str(error),
                unconfirmed_digest=delivery.unconfirmed_digest,
            ), 0
        try:
            cargo = UploadJob(
                delivery.id,
                archive.relpath.rpartition(b"/")[2],
                fd,
                archive.fingerprint,
                template_values(archive, self._lane.host, source.label_pattern),
                on_alive=self.watchdog.alive,
                on_idle=self.watchdog.idle,
                unconfirmed_digest=delivery.unconfirmed_digest,
            )
            return _seen_again(self._uploader.upload(cargo), fd, source, archive.relpath), cargo.sent_bytes
        except Exception as error:  # noqa: BLE001 -- a bug must cost neither the archive nor the worker
            self._lane.log.emit(events.DAEMON_FAILED, error=repr(error), exc_info=error)
            return Deferred(Reason.INTERNAL, repr(error), unconfirmed_digest=delivery.unconfirmed_digest), 0
        finally:
            os.close(fd)

    def _finish(self, delivery: Delivery, attempts: list[Attempt]) -> None:
        outcome = attempts[-1].outcome
        self._lane.circuit.record_outcome(outcome)
        now = datetime.now(UTC)
        step = next_step(delivery, outcome, now, self._lane.destination.retry_policy, random.random())
        self.watchdog.idle()  # the recorder may be waiting for room on the disk
        self._hand_over(ClaimResult(delivery, tuple(attempts), step))
        self.watchdog.alive()

    def _tell_failure(self, delivery: Delivery, number: int, attempt: Attempt) -> None:
        outcome = attempt.outcome
        if not isinstance(outcome, Deferred) or outcome.reason is Reason.STOPPED:
            return
        self._lane.log.emit(
            events.ATTEMPT_FAILED,
            drop=delivery.archive.drop,
            archive=delivery.archive.relpath,
            destination=delivery.destination,
            delivery_id=delivery.id,
            attempt=delivery.attempts + number,
            reason=outcome.reason,
            error=outcome.error,
            hint=rule_of(outcome.reason).hint,
            http_status=outcome.http_status,
            sent_bytes=attempt.sent_bytes,
            duration_s=attempt.duration,
        )


def _is_something_else(source: Drop, relpath: bytes) -> bool:
    """Tell whether what can't be opened is a link, a folder or a device: the archive itself is gone."""
    try:
        return not stat.S_ISREG(source.folder.stat(relpath).st_mode)
    except OSError:
        return False


def _seen_again(outcome: Outcome, fd: int, source: Drop, relpath: bytes) -> Outcome:
    """Return the outcome; of a file that changed while it was read this tells whether it was removed."""
    if not isinstance(outcome, Superseded) or os.fstat(fd).st_nlink > 0:
        return outcome
    try:
        source.folder.stat(relpath)
    except (FileNotFoundError, NotADirectoryError):
        return replace(outcome, error="the file was removed while it was sent", missing=True)
    except OSError:
        pass  # whoever looks at it next will say so
    return outcome
