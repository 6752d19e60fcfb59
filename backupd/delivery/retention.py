"""Removing sent archives whose time has come: by age, by number, and where the disk gets full."""

from __future__ import annotations

import errno
import heapq
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from backupd.core.errors import LedgerError
from backupd.core.names import as_text
from backupd.core.retention_policy import Expiry, RetentionPolicy, series_of, smallest_prefix
from backupd.dropfolder.checksums import remove_checksum_files
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import DropFolder
from backupd.dropfolder.move import is_expected_file, remove_archive, remove_receipt_file
from backupd.ledger.sent_index import RemovalReason, SentArchive, SentIndex
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.thread_watchdog import ThreadWatchdog


@dataclass(frozen=True, slots=True)
class LowSpace:
    """A disk with too little room, and the drops that are to give some; sizes are bytes."""

    device: int
    drops: tuple[str, ...]
    path: str
    free: int
    needed: int

    @property
    def bytes_short(self) -> int:
        """Return how much is to become free."""
        return self.needed - self.free


class DiskSpace:
    """Measures the disks, and tells of those that are full: once, and again while it lasts."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._told: dict[int, datetime] = {}

    def low_filesystems(self, drops: Mapping[str, tuple[DropFolder, RetentionPolicy]]) -> list[LowSpace]:
        """Return the disks on which less is free than the drops there ask for."""
        disks: dict[int, dict[str, tuple[DropFolder, RetentionPolicy]]] = {}
        for name, (folder, order) in drops.items():
            if order.min_free:
                disks.setdefault(os.fstat(folder.fileno()).st_dev, {})[name] = folder, order
        found = [short for device, members in disks.items() if (short := _measured(device, members))]
        lacking = {short.device for short in found}
        self._told = {device: when for device, when in self._told.items() if device in lacking}
        return found

    def log_low_space(self, short: LowSpace, now: datetime, every: timedelta) -> None:
        """Tell that a disk stays short of room."""
        told = self._told.get(short.device)
        if told is not None and timedelta(0) <= now - told < every:  # the clock may have been set back
            return
        self._told[short.device] = now
        self._log.emit(
            events.DISK_LOW,
            drop=short.drops[0],
            path=short.path,
            free_bytes=short.free,
            min_free_bytes=short.needed,
            error="less than `min_free` is free, and no sent archive is known that could be removed",
            hint="make room on that filesystem, or enlarge it: once it is full, backups can't be dropped",
        )


def _measured(device: int, members: Mapping[str, tuple[DropFolder, RetentionPolicy]]) -> LowSpace | None:
    folder = next(iter(members.values()))[0]
    try:
        status = os.fstatvfs(folder.fileno())
    except OSError:
        return None  # the intake tells of a folder that can't be used
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    needs = {name: o.min_free.of(total) for name, (_, o) in members.items() if o.min_free}
    lacking = tuple(name for name, need in needs.items() if need > free)
    return LowSpace(device, lacking, folder.path, free, max(needs.values())) if lacking else None


_EVERY = 60.0
"""Seconds between looks; sooner where archives are kept for less."""

_SOON = 0.05
"""Seconds between the batches of much work, in which others get the disk."""

_ANEW = timedelta(days=1)
"""After which all is looked at once more: a clock may have been set back."""

ZERO = timedelta(0)

_MOST = 64
"""Archives that are looked at, and removed, at a time."""


@dataclass(frozen=True, slots=True)
class RetentionScope:
    """All drops by name, and how often a full disk is logged again."""

    by_drop: Mapping[str, Drop]
    log_every: timedelta


@dataclass(slots=True)
class _Progress:
    """How far a drop's archives were looked at under an order."""

    order: RetentionPolicy
    begun: datetime
    last: SentArchive | None = None


class Retention:
    """Keeps what is ordered of sent archives; `run` is the body of its thread.

    `now` is a time by which archives may be removed, `is_known` tells whether a drop's sent ones are known.
    A removal is committed before a file is touched, so that one which a crash cuts short is finished.
    What is looked at once is looked at again only when something newer comes to its series.
    """

    def __init__(
        self,
        open_shelf: Callable[[], SentIndex],
        stocks: Callable[[], RetentionScope],
        log: EventLog,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        is_known: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._open_shelf = open_shelf
        self._stocks = stocks
        self._log = log
        self._now = now
        self._is_known = is_known
        self._lacking_since = 0.0
        """Since when some sent archives are not known (monotonic); 0: all are."""
        self._opened: SentIndex | None = None
        self._progress: dict[str, _Progress] = {}
        self._grown: dict[str, set[bytes]] = {}
        self._complained: set[int] = set()
        self._room = DiskSpace(log)
        self.stop = threading.Event()
        self.watchdog = ThreadWatchdog("keeper of sent archives")

    def run(self, stop: threading.Event) -> None:
        """Look every so often until told to stop."""
        try:
            wait = 0.0
            while not stop.wait(wait):
                self.watchdog.alive()
                more = self.tick()
                wait = _SOON if more else self._patience()
                self.watchdog.idle()
        finally:
            if self._opened is not None:
                self._opened.close()

    def tick(self) -> bool:
        """Do a batch of what is due; return whether there is more to do at once."""
        stocks, now = self._stocks(), self._now()
        wanted = {n: s for n, s in stocks.by_drop.items() if s.retention != RetentionPolicy()}
        if not wanted:
            return False
        try:
            shelf = self._opened = self._opened or self._open_shelf()
            able = {n: s for n, s in wanted.items() if _is_there(s) and self._finish_begun(shelf, n, s, now)}
            more = [self._by_rule(shelf, n, s) for n, s in able.items() if s.retention.expires]
            shortages = self._room.low_filesystems({n: (s.folder, s.retention) for n, s in wanted.items()})
            more += [self._make_room(shelf, short, able, now, stocks.log_every) for short in shortages]
        except LedgerError as error:
            self._progress.clear()  # what was looked at may not have been seen to
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)
            return False
        return any(more)

    def _patience(self) -> float:
        orders = [stock.retention for stock in self._stocks().by_drop.values()]
        shortest = min((o.keep_for.total_seconds() for o in orders if o.keep_for), default=_EVERY)
        return min(max(shortest, 1.0), _EVERY)

    def _by_rule(self, shelf: SentIndex, drop: str, stock: Drop) -> bool:
        """Remove what is too old or too many; return whether there is more to look at."""
        order, grown, now = stock.retention, self._grown.setdefault(drop, set()), self._now()
        progress = self._progress.get(drop)
        if progress is None or progress.order != order or not ZERO <= now - progress.begun < _ANEW:
            progress = self._progress[drop] = _Progress(order, now)
        until = now - order.keep_for if order.keep_for else now
        found: dict[int, tuple[SentArchive, int]] = {}
        if order.keep_last:
            if self._sort(shelf, drop, stock, grown):
                return True  # who is among the last is known once all are sorted
            while grown and len(found) < _MOST:
                beyond = shelf.beyond_newest(drop, series := grown.pop(), order.keep_last, until, _MOST)
                found |= {kept.archive.id: (kept, order.keep_last) for kept in beyond}
                if len(beyond) == _MOST:
                    grown.add(series)
        page = shelf.oldest(drop, progress.last, until, _MOST)
        for kept in page:
            found[kept.archive.id] = kept, shelf.count_newer(kept, order.keep_last) if order.keep_last else 0
            progress.last = kept
        now = self._now()  # after the look: the clock is doubted before an old history comes into the ledger
        due = [(k, e) for k, newer in found.values() if (e := order.expiry_reason(now - k.moved_at, newer))]
        if not all(_is_within_reach(stock.folder, kept) for kept, _ in due):
            del self._progress[drop]  # once its filesystem is back, all is looked at again
            return False
        self._remove(shelf, stock, due, now)
        return bool(grown) or len(page) == _MOST

    def _sort(self, shelf: SentIndex, drop: str, stock: Drop, grown: set[bytes]) -> bool:
        """Note the series of what is new; return whether there is more of it."""
        fresh = shelf.without_series(drop, _MOST)
        if fresh:
            pattern = stock.label_pattern
            series = {k.archive.id: series_of(k.archive.relpath, k.moved_to, pattern) for k in fresh}
            shelf.set_series(series)
            grown |= set(series.values())
        return len(fresh) == _MOST

    def _make_room(
        self,
        shelf: SentIndex,
        short: LowSpace,
        able: Mapping[str, Drop],
        now: datetime,
        tell_every: timedelta,
    ) -> bool:
        """Remove the oldest of all drops on a disk that is short of room; return whether to go on."""
        if not all(map(self._is_known, short.drops)):  # the oldest may be among those that come back
            self._lacking_since = self._lacking_since or time.monotonic()
            if time.monotonic() - self._lacking_since > _EVERY:
                self._room.log_low_space(short, now, tell_every)
            return False
        self._lacking_since = 0.0
        pages = [shelf.oldest(name, None, None, _MOST) for name in short.drops if name in able]
        merged = heapq.merge(*pages, key=lambda k: (k.moved_at, k.archive.id))
        oldest = [k for k in merged if _is_within_reach(able[k.archive.drop].folder, k)][:_MOST]
        chosen = oldest[: smallest_prefix(short.bytes_short, [k.archive.fingerprint.size for k in oldest])]
        freed = 0
        for name in short.drops:
            mine = [(k, Expiry.DISK_LOW) for k in chosen if k.archive.drop == name]
            if mine:
                freed += self._remove(shelf, able[name], mine, now)
        if not chosen:
            self._room.log_low_space(short, now, tell_every)
        return bool(chosen) and freed < short.bytes_short  # what was freed may show only after a while

    def _finish_begun(self, shelf: SentIndex, drop: str, stock: Drop, now: datetime) -> bool:
        """Finish removals that were begun; return False where that many fail that more should not begin."""
        begun = shelf.list_expiring(drop, _MOST)
        if not begun:
            return True
        self._take_away(shelf, stock, [(kept, None) for kept in begun], now)
        return len(shelf.list_expiring(drop, _MOST)) < _MOST

    def _remove(
        self, shelf: SentIndex, stock: Drop, due: Sequence[tuple[SentArchive, Expiry]], now: datetime
    ) -> int:
        """Remove what is still as it was put away; return the bytes that were freed."""
        left = {k.archive.id: removal for k, _ in due if (removal := _left(stock.folder, k))}
        ours = [(k, e) for k, e in due if k.archive.id not in left]
        if left:
            shelf.record_removals(left, now)
        if not ours:
            return 0
        shelf.mark_expiring([k.archive.id for k, _ in ours])
        return self._take_away(shelf, stock, ours, now)

    def _take_away(
        self,
        shelf: SentIndex,
        stock: Drop,
        due: Iterable[tuple[SentArchive, Expiry | None]],
        now: datetime,
    ) -> int:
        folder = stock.folder
        done: dict[int, RemovalReason] = {}
        touched: set[bytes] = set()
        total = 0
        for kept, expiry in due:
            self.watchdog.alive()
            archive = kept.archive
            try:
                freed = remove_archive(folder, kept.moved_to, archive)
            except OSError as error:
                self._complain(kept, error)
                continue
            if freed is not None:
                with suppress(OSError):  # the archive is gone; what is left beside it harms nobody
                    if stock.uses_checksum_files:
                        remove_checksum_files(folder, kept.moved_to)
                    remove_receipt_file(folder, kept.moved_to, archive, b"receipt")
            self._complained.discard(archive.id)
            done[archive.id] = RemovalReason.CHANGED if freed is None else RemovalReason.EXPIRED
            if freed is None:
                continue
            total += freed
            touched.add(kept.moved_to.rpartition(b"/")[0])
            self._log.emit(
                events.ARCHIVE_EXPIRED,
                drop=archive.drop,
                archive=archive.relpath,
                path=os.path.join(os.fsencode(folder.path), kept.moved_to),
                size_bytes=archive.fingerprint.size,
                reason=expiry,
            )
        for directory in touched:
            _sync(folder, directory)
        if done:
            shelf.record_removals(done, now)
        return total

    def _complain(self, kept: SentArchive, error: OSError) -> None:
        if kept.archive.id in self._complained:
            return
        self._complained.add(kept.archive.id)
        self._log.emit(
            events.DISPOSITION_FAILED,
            drop=kept.archive.drop,
            archive=kept.archive.relpath,
            error=f"{as_text(kept.moved_to)} can't be removed ({os.strerror(error.errno or errno.EIO)})",
            hint="give the daemon's user write permission to `sent_dir`, or remove the file",
        )


def _is_there(stock: Drop) -> bool:
    """Tell whether there is a `sent_dir`: without, the filesystem may not be mounted now."""
    try:
        with stock.folder.directory(stock.sent_dir):
            return True
    except OSError:
        return False


def _left(folder: DropFolder, kept: SentArchive) -> RemovalReason | None:
    """Return what became of a file that is no longer as it was put away, or None."""
    try:
        return None if is_expected_file(folder.stat(kept.moved_to), kept.archive.fingerprint) else RemovalReason.CHANGED
    except (FileNotFoundError, NotADirectoryError):
        return RemovalReason.GONE
    except OSError:
        return None  # the attempt to remove it will tell


def _is_within_reach(folder: DropFolder, kept: SentArchive) -> bool:
    return not folder.is_unreachable(kept.moved_to, kept.archive.fingerprint.device)


def _sync(folder: DropFolder, directory: bytes) -> None:
    with suppress(OSError):  # after a power cut it may be there again; it was delivered all the same
        folder.sync(directory)
