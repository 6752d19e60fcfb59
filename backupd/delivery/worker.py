"""A worker of a destination: claims a delivery, uploads its archive and submits the result."""

from __future__ import annotations

import os
import random
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial

import tenacity

from backupd.core.circuit import CircuitState
from backupd.core.errors import LedgerError
from backupd.core.model import Attempt, Deferred, Delivered, Delivery, Outcome, Superseded
from backupd.core.names import as_text, template_values
from backupd.core.policy import Reason, rule_of
from backupd.core.snapshot import Upload
from backupd.core.transition import next_step
from backupd.delivery.destination import DestinationQueue
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.filesystem import is_being_written
from backupd.dropfolder.folder import close_descriptor
from backupd.ledger.port import ClaimResult
from backupd.telemetry import events
from backupd.telemetry.log import log_ledger_failure
from backupd.telemetry.thread_watchdog import HUNG_AFTER, ThreadWatchdog
from backupd.upload.base import Uploader, UploadJob

_MAX_SHORT_ATTEMPTS = 3

_LEDGER_POLL_EVERY = 5.0
"""Seconds until a worker queries the ledger without a notification: another process may have written, or it
failed."""

_REMOVED_DROP_RETRY_AFTER = timedelta(days=1)
"""Time until a delivery from a drop that is no longer configured is retried; a start or reload ends it."""

_OTHER_FOLDER = (
    "the drop folder is not the directory in which it was queued: mount its filesystem there again; after a"
    " day it counts as missing"
)


@dataclass(frozen=True, slots=True)
class _Progress:
    """The attempt of an upload that is under way."""

    job: UploadJob
    started_at: datetime
    attempt: int


class Worker:
    """Delivers archives to one destination, one at a time; `run` is the body of its thread."""

    def __init__(
        self, queue: DestinationQueue, uploader: Uploader, submit: Callable[[ClaimResult], None]
    ) -> None:
        self._queue = queue
        self._uploader = uploader
        self._submit = submit
        self.watchdog = ThreadWatchdog(f"worker of {queue.destination.name}")
        self.current: Delivery | None = None
        """The delivery in progress."""
        self._progress: _Progress | None = None
        """The attempt in progress."""
        self._attempt_number = 0
        self.waits_since: int | None = None
        """The notification after which nothing was due, while this worker waits for the next one."""
        self._has_failing_ledger = False
        self.is_replaced = False
        """Whether another worker took over from this one, which ends after its delivery."""

    def run(self, stop: threading.Event) -> None:
        """Deliver until `stop` is set and notified; a delivery that was started is finished."""
        try:
            while True:
                # before the check: `stop` is set before the notification is sent
                generation = self._queue.notifier.generation()
                if stop.is_set() or self.is_replaced:
                    return
                self.watchdog.alive()
                if not self._deliver_next(stop):
                    wait_time = self._wait_time()
                    self.watchdog.idle()
                    self.waits_since = generation
                    self._queue.notifier.wait(generation, wait_time)
                    self.waits_since = None
        finally:
            self._queue.release_claims()
            self.watchdog.idle()
            self._uploader.close()

    def upload(self, now: datetime) -> Upload | None:
        """Return the upload under way; None without one."""
        delivery, progress = self.current, self._progress
        if delivery is None or progress is None:
            return None
        seconds = max((now - progress.started_at).total_seconds(), 0.001)
        return Upload(
            delivery.id,
            delivery.archive.drop,
            as_text(delivery.archive.relpath),
            delivery.destination,
            progress.attempt,
            delivery.archive.fingerprint.size,
            progress.job.sent_bytes,
            progress.started_at,
            round(progress.job.sent_bytes / seconds),
        )

    @property
    def hangs(self) -> bool:
        """Return whether a call on the drop folder of the delivery does not return; not if it is replaced."""
        return self.current is not None and not self.is_replaced and self.watchdog.age() > HUNG_AFTER

    def replaced_by(self, uploader: Uploader) -> Worker:
        """Return a worker that takes over from this one, which hangs with a drop folder.

        The folder is not used again before it answers. This worker ends after its delivery, if ever.
        """
        self.is_replaced = self.watchdog.may_hang = True
        drop = self._queue.drops.get(self.current.archive.drop) if self.current is not None else None
        if drop is not None:
            drop.folder.is_usable = False
        self._queue.circuit.release()  # this one may be the probe, for which all others wait
        return Worker(self._queue, uploader, self._submit)

    def make_attempts(self, delivery: Delivery, stop: threading.Event) -> list[Attempt]:
        """Make the attempts of one claim, one right after the other; the outcome of the last one counts."""
        attempts: list[Attempt] = []

        def attempt_once() -> Outcome:
            nonlocal delivery
            self._queue.circuit.begin(delivery)
            self._attempt_number = delivery.attempts + len(attempts) + 1
            attempt = self._upload(delivery)
            outcome = self._queue.circuit.review(delivery, attempt.outcome)
            attempts.append(replace(attempt, outcome=outcome))
            self._log_failure(delivery, len(attempts), attempts[-1])
            if isinstance(outcome, Deferred) and outcome.unconfirmed_digest != delivery.unconfirmed_digest:
                # the next attempt queries for this content before it sends it, and sends no other content
                delivery = replace(
                    delivery,
                    unconfirmed_digest=outcome.unconfirmed_digest,
                    known_digests=(*delivery.known_digests, *filter(None, [outcome.unconfirmed_digest])),
                )
            return outcome

        short_attempts(
            attempt_once,
            stop,
            lambda: self._queue.circuit.state is not CircuitState.PAUSED and not self._queue.is_held,
        )
        return attempts

    def _deliver_next(self, stop: threading.Event) -> bool:
        """Claim and deliver one archive; return False if nothing can be delivered now."""
        queue = self._queue
        if queue.is_held or not queue.circuit.try_acquire():
            # a pause can be extended; meanwhile other archives may become due first
            queue.release_claims()
            return False
        delivery = None
        self._has_failing_ledger = False
        try:
            delivery = queue.claim()
        except LedgerError as error:
            log_ledger_failure(queue.log, error)
            self._has_failing_ledger = True
        if delivery is None:
            self._probe_or_release()
            return False
        self.current = delivery
        attempts = self.make_attempts(delivery, stop)
        self._finish(delivery, attempts)
        self.current = None
        return True

    def _probe_or_release(self) -> None:
        """Test a paused destination without an archive if none is pending, so that its pause ends."""
        circuit = self._queue.circuit
        if circuit.awaits_probe and not self._has_failing_ledger:
            with suppress(LedgerError):
                if self._queue.next_due() is None:
                    self.watchdog.idle()  # its waits are bounded, and it ends at once when the daemon stops
                    circuit.record_probe(self._queue.probe())
                    self.watchdog.alive()
                    return
        circuit.release()

    def _wait_time(self) -> float:
        """Return the seconds until a delivery may be due, or the ledger may work again."""
        if self._has_failing_ledger or self._queue.is_held:
            return _LEDGER_POLL_EVERY
        paused_for = self._queue.circuit.wait_time()
        if paused_for != 0.0:
            return _LEDGER_POLL_EVERY if paused_for is None else paused_for
        try:
            due = self._queue.next_due()
        except LedgerError:
            return _LEDGER_POLL_EVERY
        if due is None:
            return _LEDGER_POLL_EVERY
        return min(max((due - self._queue.ledger.now()).total_seconds(), 0.01), _LEDGER_POLL_EVERY)

    def _upload(self, delivery: Delivery) -> Attempt:
        self.watchdog.alive()
        started_at, started = datetime.now(UTC), time.monotonic()
        outcome, sent_bytes, address = self._open_and_upload(delivery)
        duration = timedelta(seconds=time.monotonic() - started)
        return Attempt(started_at, duration, sent_bytes, outcome, address)

    def _open_and_upload(self, delivery: Delivery) -> tuple[Outcome, int, str]:
        """Return the outcome, the bytes of the archive that were sent, and the address they were sent to."""
        archive = delivery.archive
        deferred = partial(Deferred, unconfirmed_digest=delivery.unconfirmed_digest)
        drop = self._queue.drops.get(archive.drop)
        if drop is None:
            self._queue.log_removed_drop(archive.drop)
            error = f"the drop {archive.drop} is no longer configured"
            return deferred(Reason.UNREADABLE, error, retry_after=_REMOVED_DROP_RETRY_AFTER), 0, ""
        try:
            fd = drop.folder.open(archive.relpath)
        except (FileNotFoundError, NotADirectoryError):
            if drop.folder.is_unmounted(archive.folder_id):
                return deferred(Reason.UNREADABLE, _OTHER_FOLDER), 0, ""
            return _missing(delivery, drop, "the file is gone"), 0, ""
        except OSError as error:
            if _is_not_a_file(drop, archive.relpath):
                return _missing(delivery, drop, "its path is no longer a regular file"), 0, ""
            return deferred(Reason.UNREADABLE, error.strerror or str(error)), 0, ""
        try:
            return self._upload_file(fd, drop, delivery)
        except MemoryError:
            return deferred(Reason.HOST_LIMIT, "no memory is left"), 0, ""
        except Exception as error:  # noqa: BLE001 -- a bug must cost neither the archive nor the worker
            self._queue.log.emit(events.DAEMON_FAILED, error=repr(error), exc_info=error)
            return deferred(Reason.INTERNAL, repr(error)), 0, ""
        finally:
            close_descriptor(fd)

    def _upload_file(self, fd: int, drop: Drop, delivery: Delivery) -> tuple[Outcome, int, str]:
        archive, circuit = delivery.archive, self._queue.circuit

        def report_progress() -> None:
            self.watchdog.alive()
            if job.sent_bytes:
                circuit.report_progress()

        job = UploadJob(
            delivery.id,
            archive.relpath.rpartition(b"/")[2],
            fd,
            archive.fingerprint,
            template_values(replace(archive, drop=drop.label), archive.host, drop.label_pattern),
            on_alive=report_progress if circuit.state is CircuitState.PROBING else self.watchdog.alive,
            on_idle=self.watchdog.idle,
            unconfirmed_digest=delivery.unconfirmed_digest,
            known_digests=delivery.known_digests,
            is_being_written=partial(is_being_written, fd),
            open_path=partial(drop.folder.open, archive.relpath),
        )
        self._progress = _Progress(job, datetime.now(UTC), self._attempt_number)
        try:
            outcome = self._uploader.upload(job)
        finally:
            self._progress = None
        if isinstance(outcome, Delivered):
            outcome = replace(outcome, fingerprint=job.confirmed)
        return _refine_outcome(outcome, fd, drop, delivery), job.sent_bytes, job.address

    def _finish(self, delivery: Delivery, attempts: list[Attempt]) -> None:
        outcome = attempts[-1].outcome
        self._queue.circuit.record_outcome(outcome)
        now = self._queue.ledger.now()
        transition = next_step(delivery, outcome, now, self._queue.destination.retry_policy, random.random())
        self.watchdog.idle()  # `submit` waits while the recorder waits for a full disk
        self._submit(ClaimResult(delivery, tuple(attempts), transition))
        self.watchdog.alive()

    def _log_failure(self, delivery: Delivery, number: int, attempt: Attempt) -> None:
        outcome = attempt.outcome
        if not isinstance(outcome, Deferred) or outcome.reason is Reason.STOPPED:
            return
        self._queue.log.emit(
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
            address=attempt.address or None,
            duration_s=attempt.duration,
        )


def short_attempts(
    attempt: Callable[[], Outcome], stop: threading.Event, may_repeat: Callable[[], bool] = lambda: True
) -> None:
    """Call `attempt` up to three times, with waits below 2 s, while its outcome may pass in a moment.

    `may_repeat` is asked after each of them: another worker may have paused the destination.
    """

    def sleep(seconds: float) -> None:
        if stop.wait(seconds):
            raise _StoppingError

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_MAX_SHORT_ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=2),
        retry=tenacity.retry_if_result(lambda outcome: _is_retried_immediately(outcome) and may_repeat()),
        retry_error_callback=lambda _state: None,
        sleep=sleep,
    )
    try:
        retrying(attempt)
    except _StoppingError:
        return


class _StoppingError(Exception):
    """The stop event ended the wait; if `sleep` just returned, tenacity would make one more attempt."""


def _is_retried_immediately(outcome: Outcome) -> bool:
    return isinstance(outcome, Deferred) and rule_of(outcome.reason).retry_immediately


def _is_not_a_file(drop: Drop, relpath: bytes) -> bool:
    """Return whether a path that can't be opened is a link, folder or device: the archive is gone then."""
    try:
        return not stat.S_ISREG(drop.folder.stat(relpath).st_mode)
    except OSError:
        return False


def _missing(delivery: Delivery, drop: Drop, error: str) -> Outcome:
    """Return the outcome for a file that was not found: only the second time in a row it counts as removed.

    Somebody may have renamed it for a moment.
    """
    if delivery.was_missing:
        return Superseded(error, missing=True)
    wait_time, digest = drop.config.rescan_every, delivery.unconfirmed_digest
    return Deferred(Reason.MISSING, error, retry_after=wait_time, unconfirmed_digest=digest)


def _refine_outcome(outcome: Outcome, fd: int, drop: Drop, delivery: Delivery) -> Outcome:
    """Return the outcome of an upload; for a changed file, determine whether it was removed."""
    try:
        if not isinstance(outcome, Superseded) or os.fstat(fd).st_nlink > 0:
            return outcome
        drop.folder.stat(delivery.archive.relpath)
    except (FileNotFoundError, NotADirectoryError):
        return _missing(delivery, drop, "the file was removed during the upload")
    except OSError:
        pass  # a filesystem that is gone, or the intake logs it when it checks the path again
    return outcome
