"""The recorder: commits how deliveries ended, many in one transaction, and has the files disposed of."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from backupd.core.errors import LedgerError
from backupd.core.model import Deferred, Delivered, DeliveryState, Superseded
from backupd.delivery.disposition import Disposition
from backupd.ledger.port import ClaimResult, CompletedArchive, DispositionResult, Ledger
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.thread_watchdog import ThreadWatchdog

_MOST_AT_ONCE = 256

_PAGE = 64
"""Archives that are looked at in one go for what is still to be disposed of, with a commit for each."""

_MOMENT = 1.0
"""Seconds in which a recorder that records makes room for one more."""

_TRY_AGAIN = 30.0
"""Seconds between attempts to dispose of files that could not be."""


RecheckFile = Callable[[str, bytes], None]
"""Called with a drop's name and a path in it that is worth a look."""


class _Look:
    """Asks to look for what is to be disposed of."""


@dataclass(slots=True)
class Tally:
    """What ended since last asked, for the heartbeat."""

    delivered: int = 0
    delivered_bytes: int = 0
    rejected: int = 0


class Recorder:
    """Takes ended claims from all workers; `run` is the body of its thread.

    The commit comes first: only what is durably recorded is reported, and only then a file is touched.
    It begins with what an earlier daemon had settled, a page at a time between what ends meanwhile.
    """

    def __init__(self, ledger: Ledger, disposal: Disposition, log: EventLog, look_again: RecheckFile) -> None:
        self._ledger = ledger
        self._disposal = disposal
        self._look_again = look_again
        self._log = log
        self._queue: queue.Queue[ClaimResult | _Look | None] = queue.Queue(_MOST_AT_ONCE)
        self._lock = threading.Lock()
        self._tally = Tally()
        self._leftover = True
        self._next_try = 0.0
        self._after: int | None = None
        """The archive up to which this round has looked at what is due; None between rounds."""
        self._done: list[DispositionResult] = []
        self._still_due: list[int] = []
        """What became of files, as far as the ledger does not have it yet."""
        self.watchdog = ThreadWatchdog("recorder")
        self.last_delivered: datetime | None = None
        """When this daemon saw an archive delivered last."""

    def submit(self, finished: ClaimResult) -> None:
        """Hand an ended claim over; waits while the recorder is far behind."""
        self._queue.put(finished)

    def recheck_dispositions(self) -> None:
        """Have what was settled by others than `run` disposed of; only `run` does that, so never twice."""
        self._queue.put(_Look())

    def finish(self) -> None:
        """Have `run` end once everything handed over so far is recorded."""
        with suppress(queue.Full):  # as the ledger can't be written: `abandon` ends it then
            self._queue.put(None, timeout=_MOMENT)

    def pop_tally(self) -> Tally:
        """Return what ended since last asked."""
        with self._lock:
            tally, self._tally = self._tally, Tally()
        return tally

    def run(self, abandon: threading.Event) -> None:
        """Record until `finish`; where the ledger can't be written it is tried again until `abandon`."""
        done = False
        while not done:
            self.watchdog.idle()
            batch, done = self._take()
            self.watchdog.alive()
            if batch and not self._record(batch, abandon):
                return
            if self._after is None and self._leftover and time.monotonic() >= self._next_try:
                self._leftover, self._after = False, 0
            if self._after is not None:
                self._see_to_due(self._after)

    def _take(self) -> tuple[list[ClaimResult], bool]:
        batch: list[ClaimResult] = []
        try:
            more = self._after is not None or (self._leftover and self._next_try == 0.0)
            item = self._queue.get_nowait() if more else self._queue.get(timeout=_TRY_AGAIN)
            while item is not None:
                if isinstance(item, _Look):
                    self._leftover, self._next_try = True, 0.0
                else:
                    batch.append(item)
                if len(batch) >= _MOST_AT_ONCE:
                    return batch, False
                item = self._queue.get_nowait()
        except queue.Empty:
            return batch, False
        return batch, True

    def _record(self, batch: list[ClaimResult], abandon: threading.Event) -> bool:
        wait = 0.5
        while True:
            try:
                settled = self._ledger.record(batch, datetime.now(UTC))
                break
            except LedgerError as error:
                self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)
                self.watchdog.idle()
                if abandon.wait(wait):
                    return False
                self.watchdog.alive()
                wait = min(wait * 2, 30.0)
        for finished in batch:
            self._tell(finished)
        self._dispose(settled)
        return True

    def _dispose(self, settled: list[CompletedArchive]) -> None:
        if not settled:
            return
        with self._lock:
            for one in settled:
                if one.already_logged:
                    continue
                if one.state is DeliveryState.DELIVERED:
                    self._tally.delivered += 1
                    self.last_delivered = datetime.now(UTC)
                    self._tally.delivered_bytes += one.archive.fingerprint.size
                else:
                    self._tally.rejected += 1
        done, still_due = self._disposal.dispose(settled, self.watchdog.alive)
        if still_due:
            self._leftover, self._next_try = True, time.monotonic() + _TRY_AGAIN
        self._done += done
        self._still_due += still_due
        self._note()

    def _note(self) -> None:
        try:
            self._ledger.record_dispositions(self._done, self._still_due, datetime.now(UTC))
        except LedgerError as error:
            self._put_off(error)
        else:
            self._done, self._still_due = [], []

    def _see_to_due(self, after: int) -> None:
        """Dispose of a page of what is due."""
        if self._done or self._still_due:
            self._note()
            if self._after is None:
                return
        try:
            page = self._ledger.pending_dispositions(after, _PAGE)
        except LedgerError as error:
            self._put_off(error)
            return
        self._after = page[-1].archive.id if len(page) == _PAGE else None
        self._dispose(page)

    def _put_off(self, error: LedgerError) -> None:
        self._after = None
        self._leftover, self._next_try = True, time.monotonic() + _TRY_AGAIN
        self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)

    def _tell(self, finished: ClaimResult) -> None:
        delivery, step, last = finished.delivery, finished.transition, finished.attempts[-1]
        about = {
            "drop": delivery.archive.drop,
            "archive": delivery.archive.relpath,
            "destination": delivery.destination,
            "delivery_id": delivery.id,
        }
        match step.outcome:
            case Delivered(digest=digest, receipt=receipt, verified=verified):
                size, seconds = delivery.archive.fingerprint.size, last.duration.total_seconds()
                self._log.emit(
                    events.DELIVERY_VERIFIED,
                    exc_info=None,
                    **about,
                    size_bytes=size,
                    digest=digest,
                    attempt=delivery.attempts + len(finished.attempts),
                    http_status=receipt.http_status,
                    verified=verified,
                    duration_s=seconds,
                    bytes_per_s=round(size / seconds) if seconds > 0 else None,
                )
            case Deferred(reason=reason):
                self._log.emit(
                    events.DELIVERY_DEFERRED, exc_info=None, **about, reason=reason, retry_at=step.due_at
                )
            case Superseded(error=error, missing=missing):
                event = events.ARCHIVE_MISSING if missing else events.ARCHIVE_SUPERSEDED
                size = delivery.archive.fingerprint.size
                self._log.emit(event, exc_info=None, **about, size_bytes=size, error=error)
                self._look_again(delivery.archive.drop, delivery.archive.relpath)
            case _:
                pass  # a rejection is told for the archive as a whole
