"""Reading the history of a ledger that was begun anew from the records beside archives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

from backupd.core.errors import LedgerError
from backupd.core.model import Archive, DeliveryState
from backupd.core.policy import Reason
from backupd.delivery.place import NotReachableError, ReadProblems, StoredFolder
from backupd.dropfolder.drop import Drop
from backupd.ledger.sent_index import RestoredArchive, SentIndex
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.thread_watchdog import ThreadWatchdog

_EVERY = 5.0
"""Seconds between looks for folders that are still to come, which they do with the first archive."""

_PAGE = 64
"""Archives that are noted in one go."""

_PAUSE = 0.02
"""Seconds between two pages, in which others get the disk and the ledger."""

_AFTER_PROBLEMS = 3600.0
"""Seconds until a folder is looked through again that could not be all seen."""

_AFTER_FAILURE = 60.0
"""Seconds until it is tried again after the ledger failed."""

_NEVER_ARRIVED = {Reason.TRUNCATED, Reason.DAMAGED, Reason.CHECKSUM_MISMATCH}
"""Why an archive was rejected before it counted as one of its device."""


class HistoryRestorer:
    """Has a new ledger know what lies in `sent_dir` and `rejected_dir`; `run` is the body of its thread.

    What a ledger knows stays as it is. `device_of` returns the device of an archive, if it is of interest;
    `forgotten` the time before which no history is kept. `doubt_since` is told how old a history is before
    anything can be removed by it.
    """

    def __init__(
        self,
        open_shelf: Callable[[], SentIndex],
        drops: Mapping[str, Drop],
        device_of: Callable[[Archive], str | None],
        forgotten: Callable[[], datetime],
        doubt_since: Callable[[datetime], None],
        log: EventLog,
    ) -> None:
        self._open_shelf = open_shelf
        self._drops = drops
        self._device_of = device_of
        self._forgotten = forgotten
        self._doubt_since = doubt_since
        self._log = log
        self._began_ns = time.time_ns()
        self._done: set[bytes] = set()
        self._said: set[bytes] = set()
        self._looked: set[bytes] = set()
        self._again: dict[bytes, float] = {}
        """When to look again at a place where it failed, by its path (monotonic)."""
        self.watchdog = ThreadWatchdog("restorer of history")

    def run(self, stop: threading.Event) -> None:
        """Look for folders that the ledger's history lacks until told to stop."""
        wait = 0.0
        while not stop.wait(wait):
            self.watchdog.alive()
            self.scan(stop)
            self.watchdog.idle()
            wait = _EVERY

    def scan(self, stop: threading.Event) -> None:
        """Look through each folder that is there and for which that was not done yet, as far as it can be."""
        there = [place for place in self._places() if self._is_due(place) and place.is_there()]
        if not there:
            return
        try:
            shelf = self._open_shelf()
            try:
                for place in there:
                    if shelf.is_restored(place.drop, place.top) or self._restore(shelf, place, stop):
                        self._done.add(place.path)
                    if not stop.is_set():
                        self._looked.add(place.path)
            finally:
                shelf.close()
        except LedgerError as error:
            self._again |= {place.path: time.monotonic() + _AFTER_FAILURE for place in there}
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)

    def has_scanned(self, drop: str) -> bool:
        """Tell whether all that is there of a drop is known, as far as it can be; from any thread."""
        places = [place for place in self._places() if place.drop == drop]
        return all(place.path in self._looked or not place.is_there() for place in places)

    def _is_due(self, place: StoredFolder) -> bool:
        return place.path not in self._done and time.monotonic() >= self._again.get(place.path, 0.0)

    def _places(self) -> Iterator[StoredFolder]:
        for name, drop in [*self._drops.items()]:
            yield StoredFolder(name, drop.folder, drop.sent_dir, DeliveryState.DELIVERED, b"receipt")
            yield StoredFolder(name, drop.folder, drop.rejected_dir, DeliveryState.REJECTED, b"reason")

    def _restore(self, shelf: SentIndex, place: StoredFolder, stop: threading.Event) -> bool:
        """Return whether all was done that can be."""

        def go_on() -> bool:
            self.watchdog.alive()
            return not stop.is_set()

        problems = ReadProblems()
        files = place.files(go_on, problems)
        restored = unknown = 0
        below = shelf.lowest_id() - len(files)
        for first in range(0, len(files), _PAGE):
            page: list[RestoredArchive] = []
            for ident, file in enumerate(files[first : first + _PAGE], below + first):
                self.watchdog.alive()
                try:
                    one = self._read(place, file.relpath, ident)
                except NotReachableError as error:
                    problems.add(str(error))
                    continue
                page += [one] if one else []
                unknown += one is None and file.ctime_ns < self._began_ns  # a newer one gets its record yet
            restored += self._note(shelf, page)
            if stop.wait(_PAUSE):
                return False
        if stop.is_set():
            return False
        if restored or (unknown and not problems.count):
            self._log.emit(
                events.LEDGER_RESTORED,
                drop=place.drop,
                path=place.path,
                restored_archives=restored,
                unknown_files=unknown,
            )
        if problems.count:
            self._complain(place, problems)
            return False
        shelf.mark_restored(place.drop, place.top)
        return True

    def _read(self, place: StoredFolder, relpath: bytes, ident: int) -> RestoredArchive | None:
        told = place.told(relpath)
        if told is None:
            return None
        settled, since = told
        arrived = not {ending.reason for ending in settled.results} & _NEVER_ARRIVED
        device = self._device_of(settled.archive) if arrived else None
        return RestoredArchive(ident, settled, relpath, since, device)

    def _note(self, shelf: SentIndex, page: list[RestoredArchive]) -> int:
        page = shelf.unknown(page)
        if page:
            self._doubt_since(min(one.moved_at for one in page))
        oldest = self._forgotten()
        kept = [one for one in page if one.moved_at >= oldest]
        return shelf.restore(kept) if kept else 0

    def _complain(self, place: StoredFolder, problems: ReadProblems) -> None:
        self._again[place.path] = time.monotonic() + _AFTER_PROBLEMS
        if place.path in self._said:
            return
        self._said.add(place.path)
        self._log.emit(
            events.LEDGER_INCOMPLETE,
            drop=place.drop,
            path=place.path,
            error=f"{problems.count} can't be read or believed now, such as {problems.first}",
            hint="see to these, or remove them: what backupd does not know it neither lists nor removes",
        )
