"""The recorder: commits the results of deliveries, many in one transaction, then disposes of the files."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from backupd.core.drop_problem import NOT_MOVED, DropProblem
from backupd.core.errors import LedgerError
from backupd.core.model import Deferred, Delivered, DeliveryState, Superseded
from backupd.delivery.disposition import Disposition
from backupd.ledger.port import ClaimResult, CompletedArchive, DispositionResult, Ledger
from backupd.telemetry import events
from backupd.telemetry.log import EventLog, log_ledger_failure
from backupd.telemetry.thread_watchdog import HUNG_AFTER, ThreadWatchdog

_MAX_BATCH = 256
"""Results that are committed in one transaction, and that wait in the queue."""

_PAGE_SIZE = 64
"""Pending dispositions that are read, handled and committed at a time."""

_FINISH_TIMEOUT = 1.0
"""Seconds in which a recorder that can write to the ledger frees a place in its queue."""

_RETRY_EVERY = 30.0
"""Seconds between attempts to dispose of files for which it failed."""

_FIRST_COMMIT_WAIT, _MAX_COMMIT_WAIT = 0.5, 30.0
"""Seconds between attempts to commit to a ledger that fails; each wait is twice the one before."""


@dataclass(slots=True)
class _Run:
    """One run of the recorder's thread; `hangs_in` is the drop in which it hangs, once another took over."""

    hangs_in: str | None = None


RecheckFile = Callable[[str, bytes], None]
"""Called with the name of a drop and the relative path of a file that the intake has to check again."""


@dataclass(slots=True)
class Tally:
    """The archives that were completed since the last heartbeat."""

    delivered: int = 0
    delivered_bytes: int = 0
    rejected: int = 0


class Recorder:
    """Receives the results of all workers; `run` is the body of its thread.

    The commit comes first: a result is logged, and the file touched, only once it is durable. Pending
    dispositions of an earlier run are handled page by page between the results of the workers.
    """

    def __init__(
        self, ledger: Ledger, disposition: Disposition, log: EventLog, recheck_file: RecheckFile
    ) -> None:
        self._ledger = ledger
        self._disposition = disposition
        self._recheck_file = recheck_file
        self._log = log
        self._queue: queue.Queue[ClaimResult | _RecheckDispositions | None] = queue.Queue(_MAX_BATCH)
        """Results to record; None ends `run`."""
        self._lock = threading.Lock()
        self._tally = Tally()
        self._has_pending = True
        """Whether the ledger may have pending dispositions, to be handled from `_next_round` on."""
        self._next_round = 0.0
        """When the next round of pending dispositions may start (monotonic)."""
        self._after_id: int | None = None
        """The id of the last archive that this round has handled; None between rounds."""
        self._done: list[DispositionResult] = []
        """Dispositions that are not committed yet."""
        self._still_due: list[int] = []
        """Ids of the archives with a failed disposition, which is not committed yet."""
        self._terms: dict[str, int] = {}
        """The terms of the stewardship in which these dispositions were made, by drop."""
        self._problems: dict[tuple[str, bytes], DropProblem] = {}
        """The problems with dispositions that the ledger has, by drop and path."""
        self._run = _Run()
        self.watchdog = ThreadWatchdog("recorder")
        self.last_delivered: datetime | None = None
        """When the last archive was delivered since the start of the daemon."""
        self.rejected = 0
        """The archives that were rejected since the start of the daemon."""
        self._unhandled = 0
        """The results that were submitted and are not handled yet."""

    def submit(self, result: ClaimResult) -> None:
        """Queue the result of a claim; wait while the queue is full."""
        with self._lock:
            self._unhandled += 1
        self._queue.put(result)

    @property
    def is_settled(self) -> bool:
        """Return whether every result is recorded, and no disposition waits except those that failed."""
        is_disposing = self._after_id is not None or (self._has_pending and self._next_round == 0.0)
        return self._unhandled == 0 and not is_disposing

    def recheck_dispositions(self, *, drops_renamed: bool = False, wait: bool = True) -> None:
        """Have `run` handle the pending dispositions that were added to the ledger, or got another drop.

        Without `wait`, nothing is done if the queue is full.
        """
        with suppress(queue.Full):
            self._queue.put(_RecheckDispositions(drops_renamed), block=wait)

    def finish(self) -> None:
        """Have `run` return once everything that was submitted is recorded."""
        with suppress(queue.Full):  # the ledger cannot be written; `abandon` ends `run` then
            self._queue.put(None, timeout=_FINISH_TIMEOUT)

    def pop_tally(self) -> Tally:
        """Return the numbers since the last call, and start from zero."""
        with self._lock:
            tally, self._tally = self._tally, Tally()
        return tally

    def run(self, abandon: threading.Event) -> None:
        """Record until `finish`; a commit that fails is retried until `abandon` is set."""
        is_finished = False
        run = self._run
        self._load_problems()
        while not is_finished:
            if run.hangs_in is not None:
                self._disposition.left_alone.discard(run.hangs_in)
                self.recheck_dispositions(wait=False)
                return
            self.watchdog.idle()
            batch, is_finished = self._next_batch()
            self.watchdog.alive()
            if batch and not self._record(batch, abandon):
                return
            if self._after_id is None and self._has_pending and time.monotonic() >= self._next_round:
                self._has_pending, self._after_id = False, 0
            if self._after_id is not None:
                self._dispose_of_page(self._after_id, abandon)
            with self._lock:
                self._unhandled -= len(batch)

    def replace_hung(self) -> bool:
        """Return whether `run` hangs with a drop folder; the caller starts another thread for it then.

        The folder is not used again before it answers. The earlier call ends if it ever returns, and its
        dispositions are repeated: files that it has moved are found.
        """
        hangs_in = self._disposition.in_drop
        if hangs_in is None or self.watchdog.age() <= HUNG_AFTER:
            return False
        with self._lock:
            self._run.hangs_in = hangs_in
            self._disposition.left_alone.add(hangs_in)
            self._disposition.in_drop = None
            self._run = _Run()
            self._after_id, self._has_pending, self._next_round = None, True, 0.0
        self.watchdog.may_hang = True
        self.watchdog = ThreadWatchdog("recorder")
        return True

    def _load_problems(self) -> None:
        with suppress(LedgerError):  # their ages start again
            problems = self._ledger.problems()
            self._problems = {(p.drop, p.relpath): p for p in problems if p.reason == NOT_MOVED}

    def _next_batch(self) -> tuple[list[ClaimResult], bool]:
        """Return the queued results, and whether to finish after them; wait if there is no other work."""
        batch: list[ClaimResult] = []
        try:
            is_busy = self._after_id is not None or (self._has_pending and self._next_round == 0.0)
            item = self._queue.get_nowait() if is_busy else self._queue.get(timeout=_RETRY_EVERY)
            while item is not None:
                if isinstance(item, _RecheckDispositions):
                    if item.drops_renamed:
                        self._load_problems()
                    self._has_pending, self._next_round = True, 0.0
                else:
                    batch.append(item)
                if len(batch) >= _MAX_BATCH:
                    return batch, False
                item = self._queue.get_nowait()
        except queue.Empty:
            return batch, False
        return batch, True

    def _record(self, batch: list[ClaimResult], abandon: threading.Event) -> bool:
        """Commit the results, log them and dispose of the files; return False if abandoned."""
        wait = _FIRST_COMMIT_WAIT
        while True:
            try:
                recorded = self._ledger.record(batch, self._ledger.now())
                break
            except LedgerError as error:
                log_ledger_failure(self._log, error)
                self.watchdog.idle()
                if abandon.wait(wait):
                    return False
                self.watchdog.alive()
                wait = min(wait * 2, _MAX_COMMIT_WAIT)
        replaced = {result.delivery.id: result for result in recorded.superseded}
        for result in batch:
            if result not in recorded.lost:  # a lost result is that of the session which has the claim now
                self._log_result(replaced.get(result.delivery.id, result))
        self._dispose(recorded.completed, abandon)
        return True

    def _dispose(self, completed: Sequence[CompletedArchive], abandon: threading.Event) -> None:
        if not completed:
            return
        try:
            terms = self._ledger.stewardship({one.archive.drop for one in completed})
        except LedgerError as error:
            self._postpone_round(error)
            return
        own = [one for one in completed if one.archive.drop in terms]
        with self._lock:
            for one in own:
                if one.already_logged:
                    continue
                if one.state is DeliveryState.DELIVERED:
                    self._tally.delivered += 1
                    self.last_delivered = datetime.now(UTC)
                    self._tally.delivered_bytes += one.archive.fingerprint.size
                else:
                    self._tally.rejected += 1
                    self.rejected += 1

        run = self._run

        def should_stop() -> bool:
            if run.hangs_in is not None:
                return True
            self.watchdog.alive()
            return abandon.is_set()

        done, still_due = self._disposition.dispose(own, should_stop, lambda: not self._queue.empty())
        with self._lock:
            if run.hangs_in is not None:
                return  # the thread that took over repeats it
            if still_due:
                self._has_pending, self._next_round = True, time.monotonic() + _RETRY_EVERY
            self._done += done
            self._still_due += still_due
            self._terms.update(terms)
        self._save_problems(own, {result.archive_id for result in done})
        self._commit_dispositions()

    def _commit_dispositions(self) -> None:
        try:
            self._ledger.record_dispositions(self._done, self._still_due, self._terms, self._ledger.now())
        except LedgerError as error:
            self._postpone_round(error)
        else:
            self._done, self._still_due, self._terms = [], [], {}

    def _save_problems(self, completed: Sequence[CompletedArchive], done: Collection[int]) -> None:
        """Write to the ledger which of these files have a problem, and which of those done have none."""
        now = {
            (one.archive.drop, one.archive.relpath): self._disposition.problems.get(one.archive.id)
            for one in completed
        }
        found = {key: problem for key, problem in now.items() if problem and key not in self._problems}
        keys = {(one.archive.drop, one.archive.relpath) for one in completed if one.archive.id in done}
        solved = [self._problems[key] for key in keys if key in self._problems and not now[key]]
        if not found and not solved:
            return
        try:
            self._ledger.save_problems([*found.values()], solved)
        except LedgerError as error:
            log_ledger_failure(self._log, error)
            return
        self._problems.update(found)
        for problem in solved:
            del self._problems[problem.drop, problem.relpath]

    def _dispose_of_page(self, after_id: int, abandon: threading.Event) -> None:
        """Handle one page of the pending dispositions."""
        if self._done or self._still_due:
            self._commit_dispositions()
            if self._after_id is None:
                return
        try:
            page = self._ledger.pending_dispositions(after_id, _PAGE_SIZE)
        except LedgerError as error:
            self._postpone_round(error)
            return
        self._after_id = page[-1].archive.id if len(page) == _PAGE_SIZE else None
        self._dispose(page, abandon)

    def _postpone_round(self, error: LedgerError) -> None:
        self._after_id = None
        self._has_pending, self._next_round = True, time.monotonic() + _RETRY_EVERY
        log_ledger_failure(self._log, error)

    def _log_result(self, result: ClaimResult) -> None:
        delivery, transition, last = result.delivery, result.transition, result.attempts[-1]
        keys = {
            "drop": delivery.archive.drop,
            "archive": delivery.archive.relpath,
            "destination": delivery.destination,
            "delivery_id": delivery.id,
        }
        match transition.outcome:
            case Delivered(digest=digest, receipt=receipt, verified=verified):
                size, seconds = delivery.archive.fingerprint.size, last.duration.total_seconds()
                self._log.emit(
                    events.DELIVERY_VERIFIED,
                    exc_info=None,
                    **keys,
                    size_bytes=size,
                    digest=digest,
                    attempt=delivery.attempts + len(result.attempts),
                    http_status=receipt.http_status,
                    address=last.address or None,
                    verified=verified,
                    duration_s=seconds,
                    bytes_per_s=round(size / seconds) if seconds > 0 else None,
                )
            case Deferred(reason=reason):
                self._log.emit(
                    events.DELIVERY_DEFERRED, exc_info=None, **keys, reason=reason, retry_at=transition.due_at
                )
            case Superseded(error=error, missing=missing):
                event = events.ARCHIVE_MISSING if missing else events.ARCHIVE_SUPERSEDED
                size = delivery.archive.fingerprint.size
                self._log.emit(event, exc_info=None, **keys, size_bytes=size, error=error)
                self._recheck_file(delivery.archive.drop, delivery.archive.relpath)
            case _:
                pass  # a rejection is logged once for the archive, by its disposition


@dataclass(frozen=True, slots=True)
class _RecheckDispositions:
    """A request in the recorder's queue to handle pending dispositions."""

    drops_renamed: bool
