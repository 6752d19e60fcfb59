"""One drop folder's intake: events and scans in, pending deliveries out."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from backupd.core.errors import LedgerError
from backupd.core.model import fingerprint_of
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import walk
from backupd.intake.candidates import Candidates
from backupd.intake.device_tracker import DeviceTracker
from backupd.intake.examiner import Examiner
from backupd.intake.watch_health import WatchHealth
from backupd.ledger.port import FileCandidate, KnownFiles, Ledger, content_key
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.thread_watchdog import ThreadWatchdog

_BATCH = 500
"""Archives admitted in one transaction."""

_SURELY_MISSED = 5.0
"""Seconds after which an event that has not come will not come."""

NotifyWorkers = Callable[[Sequence[str]], None]

OnRejected = Callable[[], None]
"""Called when archives were rejected at once, so that the ledger has files to dispose of."""


@dataclass(frozen=True, slots=True)
class _Notice:
    path: bytes
    is_directory: bool


class Intake:
    """Watches one drop folder; `run` is the body of its thread.

    Everything it remembers can be found again by a scan; nothing is lost with it.
    """

    def __init__(
        self,
        drop: Drop,
        ledger: Ledger,
        log: EventLog,
        wake: NotifyWorkers,
        settled: OnRejected,
        freshness: DeviceTracker | None = None,
    ) -> None:
        self.name = drop.name
        self._config = drop.config
        self._destinations = drop.destinations
        self._folder = drop.folder
        self._ledger = ledger
        self._log = log
        self._wake = wake
        self._freshness = freshness or DeviceTracker(ledger, log)
        self._settled = settled
        self._prefix = os.fsencode(drop.config.path).rstrip(b"/") + b"/"
        self._notices: queue.SimpleQueue[_Notice | None] = queue.SimpleQueue()
        self._candidates = Candidates(drop, log)
        self._examination = Examiner(drop, log, self._candidates.log_unreadable)
        self._skip = frozenset((drop.sent_dir, drop.rejected_dir))
        self._sight = WatchHealth(drop, log, self._notice, self._ignores)
        self._batch: list[FileCandidate] = []
        self._failing = False
        self._unadmitted: set[int] = set()
        self._noted: tuple[int, int] | None = None
        """Which directory the ledger was told that the folder is: its device and inode."""
        self.ready = threading.Event()
        self.watchdog = ThreadWatchdog(f"intake of {drop.name}")

    def run(self, stop: threading.Event) -> None:
        """Take in archives until told to stop; `poke` ends a wait."""
        self._sight.open()
        next_scan = time.monotonic()
        try:
            while not stop.is_set():
                self.watchdog.alive()
                now = time.monotonic()
                if self._sight.has_missed_events() or now >= next_scan:
                    proven = self._sight.check()
                    self.register_folder()
                    self._scan(b"", stop, prove=proven and self.ready.is_set())
                    next_scan = time.monotonic() + self._sight.scan_every()
                    self.ready.set()
                self._look_again()
                self._batch += self._examination.run_slice()
                self._admit()
                self._wait(next_scan)
        finally:
            self._examination.close()
            self.watchdog.idle()
            self._sight.close()

    def register_folder(self) -> None:
        """Have the ledger know which directory this is, before anything in it is looked for."""
        status = os.fstat(self._folder.fileno())
        here = status.st_dev, status.st_ino
        if here == self._noted:
            return
        try:
            self._ledger.register_folder(self.name, *here)
        except LedgerError as error:
            self._ledger_failed(error)
        else:
            self._noted = here

    def wake(self) -> None:
        """End a wait, to look at the stop event."""
        self._notices.put(None)

    def recheck(self, relpath: bytes) -> None:
        """Ask for a look at a path, as an event would."""
        self._notices.put(_Notice(os.fsencode(self._config.path) + b"/" + relpath, is_directory=False))

    @property
    def is_degraded(self) -> bool:
        """Whether no events come from the folder, or it can't be read."""
        return self._sight.is_degraded

    def _notice(self, path: bytes, is_directory: bool) -> None:
        self._sight.event_received()
        if path != self._prefix:
            self._notices.put(_Notice(path, is_directory))

    def _wait(self, next_scan: float) -> None:
        dues = (self._candidates.next_due(), self._examination.next_due())
        until = min([next_scan, *(due for due in dues if due is not None)])
        timeout = max(until - time.monotonic(), 0.0)
        try:
            self.watchdog.idle()
            notice = self._notices.get(timeout=min(timeout, self._sight.patience()))
            self.watchdog.alive()
            self._take(notice)
            for _ in range(_BATCH):
                self._take(self._notices.get_nowait())
        except queue.Empty:
            pass

    def _take(self, notice: _Notice | None) -> None:
        if notice is None or not notice.path.startswith(self._prefix):
            return
        relpath = notice.path[len(self._prefix) :]
        if self._is_skipped(relpath + b"/" if notice.is_directory else relpath):
            return
        if notice.is_directory:
            if self._config.recursive:
                self._scan(relpath, None, prove=False)
            return
        self._examination.recheck(relpath)
        self._look(relpath)

    def _ignores(self, directory: bytes) -> bool:
        """Tell whether nothing in a directory, given by its absolute path, is looked at."""
        return self._is_skipped(directory[len(self._prefix) :] + b"/")

    def _is_skipped(self, relpath: bytes) -> bool:
        directories = relpath.split(b"/")[:-1]
        if any(part.startswith(b".") for part in directories):
            return True
        return any(relpath == skip or relpath.startswith(skip + b"/") for skip in self._skip)

    def _look(self, relpath: bytes, status: os.stat_result | None = None) -> None:
        sighting = self._candidates.check(relpath, time.monotonic(), status)
        if sighting is not None and not self._examination.add(sighting):
            self._batch.append(sighting)
            if len(self._batch) >= _BATCH:
                self._admit()

    def _look_again(self) -> None:
        for relpath in self._candidates.due(time.monotonic()):
            self._look(relpath)

    def _scan(self, below: bytes, stop: threading.Event | None, *, prove: bool) -> None:
        started, found, missed = time.monotonic(), 0, None
        try:
            known = self._ledger.known_files(self.name, below)
        except LedgerError as error:
            self._ledger_failed(error)
            return

        def go_on() -> bool:
            self.watchdog.alive()
            return stop is None or not stop.is_set()

        for relpath, status in walk(
            self._folder, below, self._skip, self._complain, recursive=self._config.recursive, go_on=go_on
        ):
            found += 1
            if not go_on():
                break
            if content_key(relpath, fingerprint_of(status)) in known.content_keys:
                continue
            if prove and missed is None and self._was_missed(relpath, status, known):
                missed = relpath
            self._look(relpath, status)
        if not go_on():
            return
        if missed is not None and self._notices.empty():
            self._sight.missed_event(missed)
        self._log.emit(
            events.DROP_SCANNED,
            drop=self.name,
            found_files=found,
            unfinished_files=len(self._candidates) + len(self._examination),
            duration_s=time.monotonic() - started,
        )

    def _was_missed(self, relpath: bytes, status: os.stat_result, known: KnownFiles) -> bool:
        """Tell whether an event should long have told of this file: the proof that the watcher sees."""
        if time.time() - status.st_ctime <= _SURELY_MISSED:
            return False
        path = hash(relpath)
        if path in known.paths or path in self._unadmitted or relpath in self._examination:
            return False
        return self._candidates.is_new(relpath)

    def _complain(self, relpath: bytes, error: OSError) -> None:
        if not relpath:
            self._sight.root_failed(error)
        else:
            self._candidates.log_unreadable(relpath, error)

    def _admit(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        try:
            now = datetime.now(UTC)
            admission = self._ledger.enqueue(
                self._freshness.with_devices(batch, now), self._destinations, now
            )
        except LedgerError as error:
            self._unadmitted |= {hash(sighting.relpath) for sighting in batch}
            self._ledger_failed(error)
            return
        self._failing = False
        self._unadmitted -= {hash(sighting.relpath) for sighting in batch}
        for archive in admission.superseded:
            self._log.emit(
                events.ARCHIVE_SUPERSEDED,
                drop=self.name,
                archive=archive.relpath,
                size_bytes=archive.fingerprint.size,
                error="replaced before it was sent",
            )
        for archive in admission.queued:
            self._log.emit(
                events.ARCHIVE_QUEUED,
                drop=self.name,
                archive=archive.relpath,
                size_bytes=archive.fingerprint.size,
                destinations=self._destinations,
            )
        if admission.queued:
            self._wake(self._destinations)
        if admission.rejected or admission.reappeared:
            self._settled()
        if admission.has_unusual_size:
            with suppress(LedgerError):  # the next tick says it
                self._freshness.log_unusual_sizes()

    def _ledger_failed(self, error: LedgerError) -> None:
        """Say so, once: the files stay where they are, and the next rescan tries again."""
        if not self._failing:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)
        self._failing = True
