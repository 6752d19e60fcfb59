"""The intake of one drop folder: reads events, scans, and queues each finished file in the ledger."""

from __future__ import annotations

import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from watchdog.events import FileModifiedEvent, FileSystemEvent
from watchdog.observers.api import EventQueue

from backupd.core.drop_problem import DropState
from backupd.core.errors import LedgerError
from backupd.core.model import Fingerprint, fingerprint_of
from backupd.dropfolder.decompress import StoppedError
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.earlier_folders import EarlierFolders
from backupd.dropfolder.folder import walk
from backupd.intake.device_tracker import DeviceTracker
from backupd.intake.examiner import Examination, Examiner, ExaminerPool
from backupd.intake.problem_list import ProblemList
from backupd.intake.unfinished_files import UnfinishedFiles
from backupd.intake.watch_health import WatchHealth
from backupd.intake.watcher import WatchEndedEvent
from backupd.ledger.port import Cursor, EnqueueResult, FileCandidate, Ledger, content_key
from backupd.telemetry import events
from backupd.telemetry.log import EventLog, log_ledger_failure
from backupd.telemetry.thread_watchdog import ThreadWatchdog

_BATCH_SIZE = 500
"""Archives that are queued in one transaction, and events that are handled before the next check."""

_EVENT_TIMEOUT = 5.0
"""Seconds after which an event that has not arrived is lost."""

NotifyWorkers = Callable[[Sequence[str]], None]
"""Called with the names of the destinations that have new deliveries."""

OnDispositionsDue = Callable[[], None]
"""Called when dispositions are due: of rejected archives, or of delivered ones that reappeared."""


class Intake:
    """Queues the finished files of one drop folder in the ledger; `run` is the body of its thread.

    All of its state in memory is rebuilt by a scan.
    """

    def __init__(
        self,
        drop: Drop,
        ledger: Ledger,
        log: EventLog,
        examiner_pool: ExaminerPool,
        notify_workers: NotifyWorkers,
        on_dispositions_due: OnDispositionsDue,
        device_tracker: DeviceTracker | None = None,
    ) -> None:
        self.name = drop.name
        self._config = drop.config
        self._destinations = drop.destinations
        self._folder = drop.folder
        self._ledger = ledger
        self._log = log
        self._notify_workers = notify_workers
        self._on_dispositions_due = on_dispositions_due
        self._device_tracker = device_tracker or DeviceTracker(ledger, log)
        self._events = EventQueue()
        """Pairs of an event and its watch, and examinations, to be handled; None ends a wait."""
        self._problems = ProblemList(drop.name, ledger)
        self._unfinished_files = UnfinishedFiles(drop, self._problems, log)
        self._examiner = Examiner(
            drop,
            log,
            examiner_pool,
            self._events.put,
            self._unfinished_files.add_unreadable,
            self._problems,
        )
        self._earlier_folders = EarlierFolders(drop)
        self._watch_health = WatchHealth(drop, self._problems, log, self._events, self._resume_deliveries)
        self._saved_state: DropState | None = None
        """The state of the drop that the ledger has from this run."""
        self._next_scan = 0.0
        """When the next scan is due (monotonic)."""
        self._batch: list[FileCandidate] = []
        """Finished files that are queued by the next transaction."""
        self._known: dict[int, int] = {}
        """Content keys of the files with an entry in the ledger, by the hashes of their paths."""
        self._known_cursor: Cursor = ()
        """The position up to which `_known` has the changes of the ledger."""
        self._ledger_failing = False
        self._not_enqueued: set[int] = set()
        """Hashes of the paths of finished files that the ledger could not queue."""
        self.ready = threading.Event()
        self.is_settled = False
        """Whether every file that a scan found is queued, or waits for a change of something else."""
        self.watchdog = ThreadWatchdog(f"intake of {drop.name}", may_hang=True)

    @property
    def is_degraded(self) -> bool:
        """Whether the folder can't be read, or brings no events."""
        return self._watch_health.is_degraded

    @property
    def unfinished_files(self) -> int:
        """Return the number of files that are not finished, held back, or could not be queued."""
        return len(self._unfinished_files) + len(self._examiner) + len(self._not_enqueued)

    def run(self, stop: threading.Event) -> None:
        """Queue finished files until `stop` is set; call `wake` after setting it."""
        self._watch_health.open()
        with suppress(LedgerError):  # their ages start again
            self._problems.load()
        try:
            while not stop.is_set():
                self.watchdog.alive()
                try:
                    self._work(stop)
                except OSError as error:  # of a call for which no other answer is known
                    self._watch_health.root_failed(error)
                    self._next_scan = time.monotonic() + self._watch_health.scan_every()
                self._save_state()
                self.is_settled = self._has_settled()
                self._wait()
            self._examiner.add_held()
            self._save_state()
        finally:
            self._examiner.close()
            self.watchdog.idle()
            self._watch_health.close()

    def _work(self, stop: threading.Event) -> None:
        """Scan if a scan is due, and check, examine and queue what is due."""
        if time.monotonic() >= self._next_scan:
            watched = self._watch_health.check_and_restart()
            self._unfinished_files.stable_for = self._watch_health.stable_for
            self._scan(b"", stop, detect_lost_events=watched and self.ready.is_set())
            self._next_scan = time.monotonic() + self._watch_health.scan_every()
            self.ready.set()
        self._check_due()
        self._examiner.examine_due()
        self._enqueue()

    def _has_settled(self) -> bool:
        if self._watch_health.root_is_failing:
            return True  # that is a problem, and tried again later
        is_busy = self._batch or self._unfinished_files.is_waiting() or self._examiner.is_examining()
        return self.ready.is_set() and not is_busy and self._events.empty()

    def wake(self) -> None:
        """End a wait, so that the thread checks its stop event."""
        self._events.put(None)

    def recheck(self, relpath: bytes) -> None:
        """Have a path checked, as an event would."""
        self._events.put((FileModifiedEvent(relpath), None))

    def _resume_deliveries(self) -> None:
        """Have the workers and the recorder go on with the folder, which they leave alone while it fails."""
        self._notify_workers(self._destinations)
        self._on_dispositions_due()

    def _wait(self) -> None:
        """Wait for an event until something is due, and handle the events that have arrived."""
        due_times = (self._unfinished_files.next_due(), self._examiner.next_due())
        until = min([self._next_scan, *(due for due in due_times if due is not None)])
        try:
            self.watchdog.idle()
            item = self._events.get(timeout=max(until - time.monotonic(), 0.0))
            self.is_settled = False
            self.watchdog.alive()
            self._handle(item)
            for _ in range(_BATCH_SIZE):
                self._handle(self._events.get_nowait())
        except queue.Empty:
            pass

    def _handle(self, item: tuple[FileSystemEvent, object] | Examination | None) -> None:
        if isinstance(item, Examination):
            candidate = self._examiner.finish(item)
            if candidate is not None and candidate.touched:
                self._unfinished_files.hold_touched(candidate, time.monotonic())
            elif candidate is not None:
                self._batch.append(candidate)
            elif isinstance(item.result, StoppedError) and item.candidate.relpath not in self._examiner:
                self._check(item.candidate.relpath)  # it has changed; of its metadata there is no event
        elif item is not None:
            self._handle_event(item[0])

    def _handle_event(self, event: FileSystemEvent) -> None:
        relpath = os.fsencode(event.src_path)
        if isinstance(event, WatchEndedEvent):
            self._next_scan = time.monotonic()
        elif event.is_directory:
            self._problems.recheck(relpath, lambda: self._scan(relpath, None, detect_lost_events=False))
        else:
            self._examiner.recheck(relpath)
            self._check(relpath)

    def _check(self, relpath: bytes, status: os.stat_result | None = None) -> None:
        earlier = self._earlier_folders.containing(relpath)
        if earlier is not None:
            self._unfinished_files.add_earlier_folder(relpath, earlier)
            return
        candidate = self._unfinished_files.check(relpath, time.monotonic(), status)
        if candidate is None or self._is_known(relpath, candidate.fingerprint):
            return
        is_examined = self._examiner.add(candidate)
        if is_examined:
            return
        self._batch.append(candidate)
        if len(self._batch) >= _BATCH_SIZE:
            self._enqueue()

    def _check_due(self) -> None:
        for relpath in self._unfinished_files.due(time.monotonic()):
            self._check(relpath)

    def _scan(self, below: bytes, stop: threading.Event | None, *, detect_lost_events: bool) -> None:
        """Check the files below a directory, except those that the ledger knows."""
        started, found, lost = time.monotonic(), 0, None
        self._enqueue()  # or the scan takes the files that are about to be queued for new ones
        if not self._may_scan(below):
            return

        def should_continue() -> bool:
            self.watchdog.alive()
            return stop is None or not stop.is_set()

        if not below:
            self._problems.scan_started()
            self._earlier_folders.clear()
        for relpath, status in walk(
            self._folder,
            below,
            self._earlier_folders.skips,
            self._on_unreadable,
            should_continue,
        ):
            if not should_continue():
                break
            if stat.S_ISDIR(status.st_mode):  # it is not entered, and a temporary name may be a problem
                self._check(relpath, status)
                continue
            found += 1
            if self._is_known(relpath, fingerprint_of(status)):
                continue
            if detect_lost_events and lost is None and self._is_event_lost(relpath, status):
                lost = relpath
            self._check(relpath, status)
        if should_continue():
            self._end_scan(below, lost, found, time.monotonic() - started)

    def _may_scan(self, below: bytes) -> bool:
        """Return whether no other session scans this folder, and it is known what the ledger has of it.

        An earlier `sent_dir` is added to the problems and not scanned.
        """
        if below and self._earlier_folders.skips(below):
            self._check(below)
            return False
        try:
            if not self._ledger.stewardship((self.name,)):
                return False
            self._update_known()
        except LedgerError as error:
            self._log_ledger_failure(error)
            return False
        return True

    def _end_scan(self, below: bytes, lost: bytes | None, found: int, duration: float) -> None:
        """Draw the conclusions of a complete scan; `lost` is a file for which no event arrived, if any."""
        if not below and not self._watch_health.root_is_failing:
            self._problems.scan_ended(
                lambda relpath: relpath in self._unfinished_files or relpath in self._examiner
            )
        if lost is not None and not self._has_waiting_events():
            self._watch_health.lost_event(lost)
        self._log.emit(
            events.DROP_SCANNED,
            drop=self.name,
            found_files=found,
            unfinished_files=len(self._unfinished_files) + len(self._examiner),
            duration_s=duration,
        )

    def _has_waiting_events(self) -> bool:
        """Return whether events of paths have not been handled; examinations and wake-ups do not count."""
        waiting = [self._events.get_nowait() for _ in range(self._events.qsize())]
        for item in waiting:
            self._events.put(item)
        return any(isinstance(item, tuple) for item in waiting)

    def _update_known(self) -> None:
        changes = self._ledger.known_since(self.name, self._known_cursor)
        for path in changes.removed:
            self._known.pop(path, None)
        self._known.update(changes.added)
        self._known_cursor = changes.cursor

    def _is_known(self, relpath: bytes, fingerprint: Fingerprint) -> bool:
        return self._known.get(hash(relpath)) == content_key(relpath, fingerprint)

    def _is_event_lost(self, relpath: bytes, status: os.stat_result) -> bool:
        """Return whether the event of a file is lost: the file is new, and older than the time-out."""
        if time.time() - status.st_ctime <= _EVENT_TIMEOUT:
            return False
        path = hash(relpath)
        if path in self._known or path in self._not_enqueued or relpath in self._examiner:
            return False
        return self._unfinished_files.is_new(relpath) and self._watch_health.expects_event(relpath)

    def _on_unreadable(self, relpath: bytes, error: OSError) -> None:
        if not relpath:
            self._watch_health.root_failed(error)
        else:
            self._unfinished_files.add_unreadable(relpath, error)

    def _enqueue(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        for candidate in batch:
            size = candidate.fingerprint.size
            self._problems.archive_queued(candidate.relpath, candidate.suspicion, size)
        try:
            self._problems.save()  # first, so that no crash leaves a suspicious archive that is not listed
            now = self._ledger.now()
            result = self._ledger.enqueue(
                self._device_tracker.with_devices(batch, now), self._destinations, now
            )
        except LedgerError as error:
            self._not_enqueued |= {hash(candidate.relpath) for candidate in batch}
            self._log_ledger_failure(error)
            return
        for candidate in batch:
            self._problems.remove_all(candidate.relpath)
        self._ledger_failing = False
        self._not_enqueued -= {hash(candidate.relpath) for candidate in batch}
        # an event may come for a file that a scan has found: it is not examined a second time
        self._known |= {hash(a.relpath): content_key(a.relpath, a.fingerprint) for a in result.queued}
        for undecided in result.undecided:
            self._examiner.add_digests(undecided)
        self._log_enqueued(batch, result)
        if result.queued:
            self._notify_workers(self._destinations)
        if result.rejected or result.reappeared:
            self._on_dispositions_due()
        if result.has_unusual_size:
            with suppress(LedgerError):  # logged at the next heartbeat instead
                self._device_tracker.log_unusual_sizes()

    def _log_enqueued(self, batch: Sequence[FileCandidate], result: EnqueueResult) -> None:
        for archive in result.superseded:
            self._log.emit(
                events.ARCHIVE_SUPERSEDED,
                drop=self.name,
                archive=archive.relpath,
                size_bytes=archive.fingerprint.size,
                error="replaced before it was uploaded",
            )
        for archive in result.queued:
            self._log.emit(
                events.ARCHIVE_QUEUED,
                drop=self.name,
                archive=archive.relpath,
                size_bytes=archive.fingerprint.size,
                destinations=self._destinations,
            )
        queued = {archive.relpath for archive in result.queued}
        for candidate in batch:
            if candidate.suspicion is not None and candidate.relpath in queued:
                self._log.emit(
                    events.ARCHIVE_SUSPICIOUS,
                    drop=self.name,
                    archive=candidate.relpath,
                    size_bytes=candidate.fingerprint.size,
                    reason=candidate.suspicion.reason,
                    error=candidate.suspicion.error,
                    hint="check the backup job of the device, and have it send another backup",
                )

    def _save_state(self) -> None:
        """Write to the ledger what has changed in the state of the drop and in its problems."""
        state = self._watch_health.state
        try:
            self._problems.save()
            if state is not None and state != self._saved_state:
                self._ledger.save_drop_state(state)
                self._saved_state = state
        except LedgerError as error:
            self._log_ledger_failure(error)

    def _log_ledger_failure(self, error: LedgerError) -> None:
        """Log, once, that the ledger failed; the files stay in place and the next rescan retries them."""
        if not self._ledger_failing:
            log_ledger_failure(self._log, error)
        self._ledger_failing = True
