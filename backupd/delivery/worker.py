"""A worker: claim, upload, hand over for the record; one of a few for a destination."""

from __future__ import annotations

import os
import random
import re
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from backupd.core.errors import LedgerError
from backupd.core.labels import variables
from backupd.core.model import Attempt, Deferred, Delivery, Outcome, Superseded
from backupd.core.policy import Reason, rule_of
from backupd.core.step import Patience, Priority, next_step
from backupd.delivery.attempts import short_attempts
from backupd.delivery.gate import SharedGate
from backupd.delivery.wakeup import Wakeup
from backupd.drop.folder import DropFolder
from backupd.ledger.port import Finished, Ledger
from backupd.ops import events
from backupd.ops.log import EventLog
from backupd.ops.pulse import Pulse
from backupd.upload.port import Cargo, Uploader

_IDLE = 5.0
"""Seconds after which a worker looks at the ledger unasked: another process may have put something there."""

_CLAIMS = 16
"""Deliveries that are claimed in one transaction."""


@dataclass(frozen=True, slots=True)
class Source:
    """A drop folder that archives are read from, and how its paths yield labels."""

    folder: DropFolder
    label_pattern: re.Pattern[str] | None = None


@dataclass(slots=True)
class Lane:
    """What the workers of one destination share."""

    destination: str
    ledger: Ledger
    gate: SharedGate
    patience: Patience
    priority: Priority
    wakeup: Wakeup
    sources: Mapping[str, Source]
    log: EventLog
    host: str = field(default_factory=socket.gethostname)
    _claimed: deque[Delivery] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def claim(self) -> Delivery | None:
        """Return the delivery that goes first, or None; small ones are claimed a few at a time."""
        with self._lock:
            if not self._claimed:
                now = datetime.now(UTC)
                self._claimed += self.ledger.claim(self.destination, now, self.priority, _CLAIMS)
            return self._claimed.popleft() if self._claimed else None

    def give_back(self) -> None:
        """Make pending again what was claimed and not begun, for whoever comes after."""
        with self._lock, suppress(LedgerError):  # they are still here then, and go before all others
            if self._claimed:
                self.ledger.release_claims([delivery.id for delivery in self._claimed])
                self._claimed.clear()


class Worker:
    """Brings deliveries to one destination, one at a time; `run` is the body of its thread."""

    def __init__(self, lane: Lane, uploader: Uploader, hand_over: Callable[[Finished], None]) -> None:
        self._lane = lane
        self._uploader = uploader
        self._hand_over = hand_over
        self.pulse = Pulse(f"worker of {lane.destination}")
        self.current: Delivery | None = None

    def run(self, stop: threading.Event) -> None:
        """Deliver until told to stop; what is claimed then is still carried to its end."""
        try:
            while not stop.is_set():
                self.pulse.beat()
                heard = self._lane.wakeup.heard()
                if not self._one(stop):
                    patience = self._patience()
                    self.pulse.rest()
                    self._lane.wakeup.wait(heard, patience)
        finally:
            self._lane.give_back()
            self.pulse.rest()
            self._uploader.close()

    def _one(self, stop: threading.Event) -> bool:
        """Carry one delivery to its end; return False where there is nothing to do now."""
        lane = self._lane
        if not lane.gate.enter():
            lane.give_back()  # nobody knows for how long
            return False
        delivery = None
        try:
            delivery = lane.claim()
        except LedgerError as error:
            lane.log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)
        if delivery is None:
            lane.gate.leave()
            return False
        self.current = delivery
        attempts = self.attempt(delivery, stop)
        self._finish(delivery, attempts)
        self.current = None
        return True

    def _patience(self) -> float:
        """Return for how many seconds there is nothing to do."""
        shut = self._lane.gate.wait()
        if shut != 0.0:
            return _IDLE if shut is None else shut
        try:
            due = self._lane.ledger.next_due(self._lane.destination)
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
                delivery = replace(delivery, unknown=outcome.unknown)
            return outcome

        short_attempts(once, stop)
        return attempts

    def _upload(self, delivery: Delivery) -> Attempt:
        self.pulse.beat()
        started_at, began = datetime.now(UTC), time.monotonic()
        outcome, sent = self._open_and_upload(delivery)
        duration = timedelta(seconds=time.monotonic() - began)
        return Attempt(started_at, duration, sent, outcome)

    def _open_and_upload(self, delivery: Delivery) -> tuple[Outcome, int]:
        archive = delivery.archive
        source = self._lane.sources.get(archive.drop)
        if source is None:
            return Superseded(f"no drop named {archive.drop} is configured any more"), 0
        try:
            fd = source.folder.open(archive.relpath)
        except (FileNotFoundError, NotADirectoryError):
            return Superseded("the file is gone", gone=True), 0
        except OSError as error:
            if _is_something_else(source, archive.relpath):
                return Superseded("something that is no file has its name", gone=True), 0
            return Deferred(Reason.UNREADABLE, error.strerror or str(error), unknown=delivery.unknown), 0
        try:
            cargo = Cargo(
                delivery.id,
                archive.relpath.rpartition(b"/")[2],
                fd,
                archive.fingerprint,
                variables(archive, self._lane.host, source.label_pattern),
                alive=self.pulse.beat,
                resting=self.pulse.rest,
                unknown=delivery.unknown,
            )
            return _seen_again(self._uploader.upload(cargo), fd, source, archive.relpath), cargo.sent
        except Exception as error:  # noqa: BLE001 -- a bug must cost neither the archive nor the worker
            self._lane.log.emit(events.DAEMON_FAILED, error=repr(error), exc_info=error)
            return Deferred(Reason.INTERNAL, repr(error), unknown=delivery.unknown), 0
        finally:
            os.close(fd)

    def _finish(self, delivery: Delivery, attempts: list[Attempt]) -> None:
        outcome = attempts[-1].outcome
        self._lane.gate.report(outcome)
        now = datetime.now(UTC)
        step = next_step(delivery, outcome, now, self._lane.patience, random.random())
        self.pulse.rest()  # the recorder may be waiting for room on the disk
        self._hand_over(Finished(delivery, tuple(attempts), step))
        self.pulse.beat()

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
            sent=attempt.sent,
            duration_s=attempt.duration,
        )


def _is_something_else(source: Source, relpath: bytes) -> bool:
    """Tell whether what can't be opened is a link, a folder or a device: the archive itself is gone."""
    try:
        return not stat.S_ISREG(source.folder.stat(relpath).st_mode)
    except OSError:
        return False


def _seen_again(outcome: Outcome, fd: int, source: Source, relpath: bytes) -> Outcome:
    """Return the outcome; of a file that changed while it was read this tells whether it was removed."""
    if not isinstance(outcome, Superseded) or os.fstat(fd).st_nlink > 0:
        return outcome
    try:
        source.folder.stat(relpath)
    except (FileNotFoundError, NotADirectoryError):
        return replace(outcome, error="the file was removed while it was sent", gone=True)
    except OSError:
        pass  # whoever looks at it next will say so
    return outcome
