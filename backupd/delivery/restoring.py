"""Reading the history of a ledger that was begun anew from the records beside archives."""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple

from backupd.core.checksum import is_checksum_name
from backupd.core.errors import LedgerError
from backupd.core.model import Archive, DeliveryState, fingerprint_of
from backupd.core.names import NAME_MAX, as_text, free_names, record_name
from backupd.core.policy import Reason
from backupd.delivery import record
from backupd.delivery.disposal import Rule
from backupd.delivery.record import Record
from backupd.drop.folder import DropFolder
from backupd.drop.walk import walk
from backupd.ledger.shelf import Restored, Shelf
from backupd.ops import events
from backupd.ops.log import EventLog
from backupd.ops.pulse import Pulse

_EVERY = 5.0
"""Seconds between looks for folders that are still to come, which they do with the first archive."""

_PAGE = 256
"""Archives that are noted in one go, fewer where their records are large."""

_PAGE_BYTES = 1024 * 1024
"""Of their receipts."""

_AFTER_PROBLEMS = 600.0
"""Seconds until a folder is looked through again that could not be all seen."""

_AFTER_FAILURE = 60.0
"""Seconds until it is tried again after the ledger failed."""

_PAUSE = 0.02
"""Seconds between two pages, in which others get the disk and the ledger."""

_MOST = 100
"""Records beside an archive that are read, and names that it may have got, for others that had its own."""

_RECORD = re.compile(rb"\.(receipt|reason)(-\d+)?\.json$")
_NEVER_ARRIVED = {Reason.TRUNCATED, Reason.DAMAGED, Reason.CHECKSUM_MISMATCH}
"""Why an archive was rejected before it counted as one of its device."""

_ANOTHERS = {errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG}
"""What opening a record fails with that is none of ours; all else may be different at the next look."""


class _NotNowError(Exception):
    """Something can't be read, or believed, now."""


class _File(NamedTuple):
    """A file that was put away; files sort by the time of that, nanoseconds since the epoch."""

    ctime_ns: int
    relpath: bytes


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder of a drop, and what is beside the archives that lie there for a state."""

    drop: str
    folder: DropFolder
    top: bytes
    state: DeliveryState
    kind: bytes

    @property
    def path(self) -> bytes:
        return os.path.join(os.fsencode(self.folder.path), self.top)


class Restorer:
    """Has a new ledger know what lies in `sent_dir` and `rejected_dir`; `run` is the body of its thread.

    What a ledger knows stays as it is. `device_of` returns the device of an archive, if it is of interest.
    """

    def __init__(
        self,
        open_shelf: Callable[[], Shelf],
        rules: Mapping[str, Rule],
        device_of: Callable[[Archive], str | None],
        log: EventLog,
    ) -> None:
        self._open_shelf = open_shelf
        self._rules = rules
        self._device_of = device_of
        self._log = log
        self._done: set[tuple[str, bytes]] = set()
        self._said: set[tuple[str, bytes]] = set()
        self._again: dict[tuple[str, bytes], float] = {}
        """When to look again where it failed (monotonic)."""
        self.pulse = Pulse("restorer of history")

    def run(self, stop: threading.Event) -> None:
        """Look for folders that the ledger's history lacks until told to stop."""
        wait = 0.0
        while not stop.wait(wait):
            self.pulse.beat()
            self.look(stop)
            self.pulse.rest()
            wait = _EVERY

    def look(self, stop: threading.Event) -> None:
        """Look through each folder that is there and for which that was not done yet, as far as it can be."""
        there = [place for place in self._places() if self._is_due(place) and _is_there(place)]
        if not there:
            return
        try:
            shelf = self._open_shelf()
            try:
                for place in there:
                    if shelf.is_restored(place.drop, place.top) or self._restore(shelf, place, stop):
                        self._done.add((place.drop, place.top))
            finally:
                shelf.close()
        except LedgerError as error:
            for place in there:
                self._again[place.drop, place.top] = time.monotonic() + _AFTER_FAILURE
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)

    def _is_due(self, place: _Place) -> bool:
        key = place.drop, place.top
        return key not in self._done and time.monotonic() >= self._again.get(key, 0.0)

    def _places(self) -> Iterator[_Place]:
        for drop, rule in [*self._rules.items()]:
            yield _Place(drop, rule.folder, rule.sent_dir, DeliveryState.DELIVERED, b"receipt")
            yield _Place(drop, rule.folder, rule.rejected_dir, DeliveryState.REJECTED, b"reason")

    def _restore(self, shelf: Shelf, place: _Place, stop: threading.Event) -> bool:
        """Return whether all was done that can be."""
        problems: list[str] = []
        restored = unknown = 0
        for page in self._pages(place, stop, problems):
            found = [one for _, one in page if one is not None]
            restored += shelf.restore(found)
            unknown += sum(one is None and not _goes_along(relpath) for relpath, one in page)
            if stop.wait(_PAUSE):
                return False
        if stop.is_set():
            return False
        if restored or (unknown and not problems):
            self._log.emit(
                events.LEDGER_RESTORED, drop=place.drop, path=place.path, restored=restored, unknown=unknown
            )
        if problems:
            self._complain(place, problems)
            return False
        shelf.note_restored(place.drop, place.top)
        return True

    def _complain(self, place: _Place, problems: list[str]) -> None:
        self._again[place.drop, place.top] = time.monotonic() + _AFTER_PROBLEMS
        if (place.drop, place.top) in self._said:
            return
        self._said.add((place.drop, place.top))
        self._log.emit(
            events.LEDGER_INCOMPLETE,
            drop=place.drop,
            path=place.path,
            error=f"{len(problems)} can't be read or believed now, such as {problems[0]}",
            hint="see to these, or remove them; until it has seen all, backupd removes nothing there in time",
        )

    def _pages(
        self, place: _Place, stop: threading.Event, problems: list[str]
    ) -> Iterator[list[tuple[bytes, Restored | None]]]:
        """Yield the files of a place with what is known of them, the latest first."""
        page: list[tuple[bytes, Restored | None]] = []
        size = 0
        for file in sorted(self._files(place, stop, problems), reverse=True):
            if stop.is_set():
                return
            self.pulse.beat()
            try:
                one = self._read(place, file.relpath)
            except _NotNowError as error:
                problems.append(str(error))
                continue
            page.append((file.relpath, one))
            size += 0 if one is None else sum(len(e.receipt or "") for e in one.settled.endings)
            if len(page) == _PAGE or size > _PAGE_BYTES:
                yield page
                page, size = [], 0
        yield page

    def _files(self, place: _Place, stop: threading.Event, problems: list[str]) -> Iterator[_File]:
        def complain(path: bytes, error: OSError) -> None:
            if error.errno != errno.ENAMETOOLONG:  # so deep nothing was ever put away
                problems.append(f"{as_text(path)} ({error.strerror})")

        for relpath, status in walk(place.folder, place.top, frozenset(), complain, recursive=True):
            self.pulse.beat()
            if stop.is_set():
                return
            if stat.S_ISREG(status.st_mode):
                yield _File(status.st_ctime_ns, relpath)

    def _read(self, place: _Place, relpath: bytes) -> Restored | None:
        """Return what the latest record that can be of a file tells of it."""
        try:
            status = place.folder.stat(relpath)
            fitting = [r for r in _records(place, relpath) if _can_be_of(r, place, status)]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _NotNowError(f"{as_text(relpath)} ({error.strerror})") from error
        told = [(r, dropped) for r in fitting if (dropped := _dropped_as(r, relpath[len(place.top) + 1 :]))]
        now, put_away = datetime.now(UTC), datetime.fromtimestamp(status.st_ctime, UTC)
        if told and put_away > now:
            raise _NotNowError(f"{as_text(relpath)} (it is of the future: the clock may be wrong)")
        told = [each for each in told if each[0].ended_at <= now]
        if not told:
            return None
        latest, dropped = max(told, key=lambda each: each[0].ended_at)
        archive = Archive(0, place.drop, dropped, fingerprint_of(status), latest.admitted_at)
        settled = latest.settled(archive)
        arrived = not {ending.reason for ending in settled.endings} & _NEVER_ARRIVED
        # it was put away no later than the kernel has it, which a restore of the files sets anew
        since = min(latest.ended_at, put_away)
        return Restored(settled, relpath, since, self._device_of(archive) if arrived else None)


def _is_there(place: _Place) -> bool:
    try:
        with place.folder.directory(place.top):
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # which a look at it will tell


def _records(place: _Place, relpath: bytes) -> Iterator[Record]:
    directory, _, name = relpath.rpartition(b"/")
    for number in range(1, _MOST):
        beside = directory + b"/" + record_name(name, place.kind, number)
        try:
            found = record.read(place.folder.read(beside, record.LARGEST + 1))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno not in _ANOTHERS:
                raise
            continue
        if found is not None:
            yield found


def _can_be_of(found: Record, place: _Place, status: os.stat_result) -> bool:
    """Tell whether a record is of a file, by its drop, size and state."""
    return (
        stat.S_ISREG(status.st_mode)
        and (found.drop, found.size) == (place.drop, status.st_size)
        and found.state is place.state
    )


def _goes_along(relpath: bytes) -> bool:
    """Tell whether a file is no archive: a record, a checksum file, or one that somebody hid."""
    name = relpath.rpartition(b"/")[2]
    is_hidden = name.startswith(b".") and not name.startswith(b".backupd-")
    return is_hidden or bool(_RECORD.search(name)) or is_checksum_name(name)


def _dropped_as(found: Record, lies: bytes) -> bytes | None:
    """Return the path that an archive had before it was put away; None where it can't lie there.

    Of one that was renamed, as its name was taken, what is no UTF-8 stays escaped.
    """
    if as_text(lies) == found.archive:
        return lies
    parent, slash, name = lies.rpartition(b"/")
    said_parent, said_slash, said = found.archive.rpartition("/")
    if said_parent + said_slash != as_text(parent + slash) or said[:1] in ("", ".") or "\0" in said:
        return None
    if len(said.encode()) > NAME_MAX:
        return None
    names = islice(free_names(said.encode(), found.admitted_at), _MOST)
    return parent + slash + said.encode() if as_text(name) in map(as_text, names) else None
