"""Restores the history of a new ledger from the receipt files in `sent_dir` and `rejected_dir`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

from backupd.core.errors import LedgerError
from backupd.core.model import Archive, DeliveryState
from backupd.core.policy import Reason
from backupd.delivery.stored_folder import NotReachableError, ReadProblems, StoredFolder
from backupd.dropfolder.drop import Drop
from backupd.ledger.sent_index import RestoredArchive, SentIndex
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.thread_watchdog import ThreadWatchdog

_CHECK_EVERY = 5.0
"""Seconds between checks for new folders: `sent_dir` is created with the first sent archive."""

_PAGE_SIZE = 64
"""Archives that are restored in one transaction."""

_PAGE_PAUSE = 0.02
"""Seconds between two pages, in which other threads get the disk and the ledger."""

_RETRY_AFTER_PROBLEMS = 3600.0
"""Seconds until a folder with unreadable files is scanned again."""

_RETRY_AFTER_LEDGER_FAILURE = 60.0
"""Seconds until the folders are scanned again after the ledger failed."""

_REJECTED_BY_INTAKE = {Reason.TRUNCATED, Reason.DAMAGED, Reason.CHECKSUM_MISMATCH}
"""Reasons of archives that never counted as an archive of their device."""


class HistoryRestorer:
    """Adds the archives in `sent_dir` and `rejected_dir` to a new ledger; `run` is the body of its thread.

    Archives that the ledger has are left as they are. `device_of` returns the device of an archive, if its
    drop's devices are tracked, and `history_start` the time before which no history is kept.
    `distrust_clock_since` is called with the oldest time of a page before it is restored, so that a wrong
    clock cannot make the retention remove these archives.
    """

    def __init__(
        self,
        open_index: Callable[[], SentIndex],
        drops: Mapping[str, Drop],
        device_of: Callable[[Archive], str | None],
        history_start: Callable[[], datetime],
        distrust_clock_since: Callable[[datetime], None],
        log: EventLog,
    ) -> None:
        self._open_index = open_index
        self._drops = drops
        self._device_of = device_of
        self._history_start = history_start
        self._distrust_clock_since = distrust_clock_since
        self._log = log
        self._started_ns = time.time_ns()
        self._restored: set[bytes] = set()
        """Paths of the folders that are restored completely."""
        self._scanned: set[bytes] = set()
        """Paths of the folders that were scanned at least once."""
        self._logged_problems: set[bytes] = set()
        """Paths of the folders of which problems were logged."""
        self._retry_at: dict[bytes, float] = {}
        """When to scan a folder again that failed, by its path (monotonic)."""
        self.watchdog = ThreadWatchdog("history restorer")

    def run(self, stop: threading.Event) -> None:
        """Restore each folder once it exists, until `stop` is set."""
        wait = 0.0
        while not stop.wait(wait):
            self.watchdog.alive()
            self.scan(stop)
            self.watchdog.idle()
            wait = _CHECK_EVERY

    def scan(self, stop: threading.Event) -> None:
        """Scan each folder that exists and is not restored yet."""
        folders = [folder for folder in self._folders() if self._is_due(folder) and folder.exists()]
        if not folders:
            return
        try:
            index = self._open_index()
            try:
                for folder in folders:
                    if index.is_restored(folder.drop, folder.top) or self._restore(index, folder, stop):
                        self._restored.add(folder.path)
                    if not stop.is_set():
                        self._scanned.add(folder.path)
            finally:
                index.close()
        except LedgerError as error:
            retry_at = time.monotonic() + _RETRY_AFTER_LEDGER_FAILURE
            self._retry_at |= {folder.path: retry_at for folder in folders}
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)

    def has_scanned(self, drop: str) -> bool:
        """Return whether all existing folders of a drop were scanned; safe to call from any thread."""
        folders = [folder for folder in self._folders() if folder.drop == drop]
        return all(folder.path in self._scanned or not folder.exists() for folder in folders)

    def _is_due(self, folder: StoredFolder) -> bool:
        if folder.path in self._restored:
            return False
        return time.monotonic() >= self._retry_at.get(folder.path, 0.0)

    def _folders(self) -> Iterator[StoredFolder]:
        for name, drop in [*self._drops.items()]:
            yield StoredFolder(name, drop.folder, drop.sent_dir, DeliveryState.DELIVERED, b"receipt")
            yield StoredFolder(name, drop.folder, drop.rejected_dir, DeliveryState.REJECTED, b"reason")

    def _restore(self, index: SentIndex, folder: StoredFolder, stop: threading.Event) -> bool:
        """Restore the archives of a folder; return False if it has to be scanned again."""

        def should_continue() -> bool:
            self.watchdog.alive()
            return not stop.is_set()

        problems = ReadProblems()
        files = folder.files(should_continue, problems)
        restored = unknown = 0
        first_id = index.lowest_id() - len(files)
        for first in range(0, len(files), _PAGE_SIZE):
            page: list[RestoredArchive] = []
            for archive_id, file in enumerate(files[first : first + _PAGE_SIZE], first_id + first):
                self.watchdog.alive()
                try:
                    archive = self._read(folder, file.relpath, archive_id)
                except NotReachableError as error:
                    problems.add(str(error))
                    continue
                page += [archive] if archive else []
                # the recorder may still have to write the receipt file of a newer one
                unknown += archive is None and file.ctime_ns < self._started_ns
            restored += self._restore_page(index, page)
            if stop.wait(_PAGE_PAUSE):
                return False
        if stop.is_set():
            return False
        if restored or (unknown and not problems.count):
            self._log.emit(
                events.LEDGER_RESTORED,
                drop=folder.drop,
                path=folder.path,
                restored_archives=restored,
                unknown_files=unknown,
            )
        if problems.count:
            self._retry_at[folder.path] = time.monotonic() + _RETRY_AFTER_PROBLEMS
            self._log_problems(folder, problems)
            return False
        index.mark_restored(folder.drop, folder.top)
        return True

    def _read(self, folder: StoredFolder, relpath: bytes, archive_id: int) -> RestoredArchive | None:
        found = folder.read_archive(relpath)
        if found is None:
            return None
        completed, moved_at = found
        is_of_device = not {result.reason for result in completed.results} & _REJECTED_BY_INTAKE
        device = self._device_of(completed.archive) if is_of_device else None
        return RestoredArchive(archive_id, completed, relpath, moved_at, device)

    def _restore_page(self, index: SentIndex, page: list[RestoredArchive]) -> int:
        page = index.unknown(page)
        if page:
            self._distrust_clock_since(min(archive.moved_at for archive in page))
        start = self._history_start()
        kept = [archive for archive in page if archive.moved_at >= start]
        return index.restore(kept) if kept else 0

    def _log_problems(self, folder: StoredFolder, problems: ReadProblems) -> None:
        if folder.path in self._logged_problems:
            return
        self._logged_problems.add(folder.path)
        self._log.emit(
            events.LEDGER_INCOMPLETE,
            drop=folder.drop,
            path=folder.path,
            error=f"{problems.count} files or folders cannot be used now, the first is {problems.first}",
            hint="fix or remove these files; backupd neither lists nor expires files without a receipt file",
        )
