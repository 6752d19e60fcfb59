"""The retention of sent archives: by age and number, and the oldest first if the disk is nearly full."""

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

ZERO = timedelta(0)


@dataclass(frozen=True, slots=True)
class LowSpace:
    """A filesystem with less free space than the `min_free` of some drops on it; sizes are bytes."""

    device: int
    drops: tuple[str, ...]
    path: str
    free_bytes: int
    min_free_bytes: int

    @property
    def missing_bytes(self) -> int:
        """Return how much has to be freed."""
        return self.min_free_bytes - self.free_bytes


class DiskSpace:
    """Measures the free space of the drops' filesystems, and logs which ones are low while that lasts."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._logged_at: dict[int, datetime] = {}
        """When each filesystem was last logged as low, by its device number."""

    def low_filesystems(self, drops: Mapping[str, Drop]) -> list[LowSpace]:
        """Return the filesystems on which less is free than the `min_free` of a drop there."""
        by_device: dict[int, dict[str, Drop]] = {}
        for name, drop in drops.items():
            if drop.retention.min_free:
                by_device.setdefault(os.fstat(drop.folder.fileno()).st_dev, {})[name] = drop
        found = [low for device, members in by_device.items() if (low := _measure(device, members))]
        devices = {low.device for low in found}
        self._logged_at = {device: when for device, when in self._logged_at.items() if device in devices}
        return found

    def log_low_space(self, low: LowSpace, now: datetime, every: timedelta) -> None:
        """Log that a filesystem is low on space, at most once in `every`."""
        logged_at = self._logged_at.get(low.device)
        if logged_at is not None and ZERO <= now - logged_at < every:  # below zero: the clock was set back
            return
        self._logged_at[low.device] = now
        self._log.emit(
            events.DISK_LOW,
            drop=low.drops[0],
            path=low.path,
            free_bytes=low.free_bytes,
            min_free_bytes=low.min_free_bytes,
            error="less than `min_free` is free, and there is no sent archive left to remove",
            hint=f"free space on that filesystem or enlarge it (`df -h {low.path}`); once it is full, devices"
            " cannot write their backups",
        )


def _measure(device: int, drops: Mapping[str, Drop]) -> LowSpace | None:
    folder = next(iter(drops.values())).folder
    try:
        status = os.fstatvfs(folder.fileno())
    except OSError:
        return None  # the intake logs a folder that cannot be read
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    min_free = {name: each.of(total) for name, drop in drops.items() if (each := drop.retention.min_free)}
    low = tuple(name for name, size in min_free.items() if size > free)
    return LowSpace(device, low, folder.path, free, max(min_free.values())) if low else None


_CHECK_EVERY = 60.0
"""Seconds between checks; fewer if archives are kept for a shorter time."""

_BATCH_PAUSE = 0.05
"""Seconds between two batches, in which other threads get the disk."""

_RECHECK_AFTER = timedelta(days=1)
"""Time after which all archives are checked again: the clock may have been set back."""

_BATCH_SIZE = 64
"""Archives that are checked, and removed, at a time."""


@dataclass(frozen=True, slots=True)
class RetentionScope:
    """All configured drops by name, and how often low disk space is logged."""

    drops: Mapping[str, Drop]
    log_every: timedelta


@dataclass(slots=True)
class _Progress:
    """How far the archives of a drop were checked by a policy."""

    policy: RetentionPolicy
    started_at: datetime
    last: SentArchive | None = None


class Retention:
    """Applies the retention policies of all drops; `run` is the body of its thread.

    `now` returns the time by which archives may be removed, `is_history_complete` whether the index has all
    sent archives of a drop. A removal is committed before the file is touched, so that one that a crash
    interrupts is finished. An archive that was checked is checked again only after its series has grown.
    """

    def __init__(
        self,
        open_index: Callable[[], SentIndex],
        scope: Callable[[], RetentionScope],
        log: EventLog,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        is_history_complete: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._open_index = open_index
        self._scope = scope
        self._log = log
        self._now = now
        self._is_history_complete = is_history_complete
        self._incomplete_since = 0.0
        """Since when free space has to wait for the history (monotonic); 0 if it need not."""
        self._index: SentIndex | None = None
        self._progress: dict[str, _Progress] = {}
        self._grown_series: dict[str, set[bytes]] = {}
        """The series of each drop that have new archives."""
        self._logged_failures: set[int] = set()
        """Ids of the archives for which a failed removal was logged."""
        self._disk_space = DiskSpace(log)
        self.stop = threading.Event()
        self.watchdog = ThreadWatchdog("retention")

    def run(self, stop: threading.Event) -> None:
        """Remove expired archives periodically until `stop` is set."""
        try:
            wait = 0.0
            while not stop.wait(wait):
                self.watchdog.alive()
                has_more = self.tick()
                wait = _BATCH_PAUSE if has_more else self._check_every()
                self.watchdog.idle()
        finally:
            if self._index is not None:
                self._index.close()

    def tick(self) -> bool:
        """Check and remove one batch; return whether there is more to do at once."""
        scope, now = self._scope(), self._now()
        drops = {name: drop for name, drop in scope.drops.items() if drop.retention != RetentionPolicy()}
        if not drops:
            return False
        try:
            index = self._index = self._index or self._open_index()
            ready = {
                name: drop
                for name, drop in drops.items()
                if _has_sent_dir(drop) and self._finish_removals(index, drop, now)
            }
            has_more = [self._expire(index, drop) for drop in ready.values() if drop.retention.expires]
            low_filesystems = self._disk_space.low_filesystems(drops)
            has_more += [self._free_space(index, low, ready, now, scope.log_every) for low in low_filesystems]
        except LedgerError as error:
            self._progress.clear()  # some checked archives may not have been removed
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)
            return False
        return any(has_more)

    def _check_every(self) -> float:
        policies = [drop.retention for drop in self._scope().drops.values()]
        shortest = min((p.keep_for.total_seconds() for p in policies if p.keep_for), default=_CHECK_EVERY)
        return min(max(shortest, 1.0), _CHECK_EVERY)

    def _expire(self, index: SentIndex, drop: Drop) -> bool:
        """Remove a batch of archives that are too old or too many; return whether there are more to check."""
        policy, grown, now = drop.retention, self._grown_series.setdefault(drop.name, set()), self._now()
        progress = self._progress.get(drop.name)
        if (
            progress is None
            or progress.policy != policy
            or not ZERO <= now - progress.started_at < _RECHECK_AFTER
        ):
            progress = self._progress[drop.name] = _Progress(policy, now)
        until = now - policy.keep_for if policy.keep_for else now
        found: dict[int, tuple[SentArchive, int]] = {}
        """Archives by their id, each with the number of newer ones in its series."""
        if policy.keep_last:
            if self._assign_series(index, drop, grown):
                return True  # the newest of a series are known only once all archives have one
            while grown and len(found) < _BATCH_SIZE:
                series = grown.pop()
                beyond = index.beyond_newest(drop.name, series, policy.keep_last, until, _BATCH_SIZE)
                found |= {sent.archive.id: (sent, policy.keep_last) for sent in beyond}
                if len(beyond) == _BATCH_SIZE:
                    grown.add(series)
        page = index.oldest(drop.name, progress.last, until, _BATCH_SIZE)
        for sent in page:
            newer = index.count_newer(sent, policy.keep_last) if policy.keep_last else 0
            found[sent.archive.id] = sent, newer
            progress.last = sent
        # the time after the queries: the clock is distrusted before old history is added to the ledger
        now = self._now()
        due = [
            (sent, expiry)
            for sent, newer in found.values()
            if (expiry := policy.expiry_reason(now - sent.moved_at, newer))
        ]
        if not all(_is_reachable(drop.folder, sent) for sent, _ in due):
            del self._progress[drop.name]  # checked again from the first one once it is mounted
            return False
        self._remove(index, drop, due, now)
        return bool(grown) or len(page) == _BATCH_SIZE

    def _assign_series(self, index: SentIndex, drop: Drop, grown: set[bytes]) -> bool:
        """Record the series of new archives and add them to `grown`; return whether there are more."""
        new = index.without_series(drop.name, _BATCH_SIZE)
        if new:
            pattern = drop.label_pattern
            series = {s.archive.id: series_of(s.archive.relpath, s.moved_to, pattern) for s in new}
            index.set_series(series)
            grown |= set(series.values())
        return len(new) == _BATCH_SIZE

    def _free_space(
        self,
        index: SentIndex,
        low: LowSpace,
        ready: Mapping[str, Drop],
        now: datetime,
        log_every: timedelta,
    ) -> bool:
        """Remove the oldest archives of all drops on a filesystem; return whether to go on at once."""
        if not all(map(self._is_history_complete, low.drops)):  # older archives may still be restored
            self._incomplete_since = self._incomplete_since or time.monotonic()
            if time.monotonic() - self._incomplete_since > _CHECK_EVERY:
                self._disk_space.log_low_space(low, now, log_every)
            return False
        self._incomplete_since = 0.0
        pages = [index.oldest(name, None, None, _BATCH_SIZE) for name in low.drops if name in ready]
        merged = heapq.merge(*pages, key=lambda sent: (sent.moved_at, sent.archive.id))
        oldest = [sent for sent in merged if _is_reachable(ready[sent.archive.drop].folder, sent)]
        oldest = oldest[:_BATCH_SIZE]
        sizes = [sent.archive.fingerprint.size for sent in oldest]
        chosen = oldest[: smallest_prefix(low.missing_bytes, sizes)]
        freed = 0
        for name in low.drops:
            due = [(sent, Expiry.DISK_LOW) for sent in chosen if sent.archive.drop == name]
            if due:
                freed += self._remove(index, ready[name], due, now)
        if not chosen:
            self._disk_space.log_low_space(low, now, log_every)
        # once enough was freed, wait: a filesystem may report it late
        return bool(chosen) and freed < low.missing_bytes

    def _finish_removals(self, index: SentIndex, drop: Drop, now: datetime) -> bool:
        """Finish interrupted removals; return False if a whole batch of them fails."""
        expiring = index.list_expiring(drop.name, _BATCH_SIZE)
        if not expiring:
            return True
        self._remove_files(index, drop, [(sent, None) for sent in expiring], now)
        return len(index.list_expiring(drop.name, _BATCH_SIZE)) < _BATCH_SIZE

    def _remove(
        self, index: SentIndex, drop: Drop, due: Sequence[tuple[SentArchive, Expiry]], now: datetime
    ) -> int:
        """Remove the archives of which the file is unchanged; return the bytes that were freed."""
        removed = {s.archive.id: reason for s, _ in due if (reason := _removed_otherwise(drop.folder, s))}
        unchanged = [(sent, expiry) for sent, expiry in due if sent.archive.id not in removed]
        if removed:
            index.record_removals(removed, now)
        if not unchanged:
            return 0
        index.mark_expiring([sent.archive.id for sent, _ in unchanged])
        return self._remove_files(index, drop, unchanged, now)

    def _remove_files(
        self,
        index: SentIndex,
        drop: Drop,
        due: Iterable[tuple[SentArchive, Expiry | None]],
        now: datetime,
    ) -> int:
        """Remove files that are marked as expiring; return the bytes that were freed."""
        folder = drop.folder
        removed: dict[int, RemovalReason] = {}
        changed_directories: set[bytes] = set()
        total = 0
        for sent, expiry in due:
            self.watchdog.alive()
            archive = sent.archive
            try:
                freed = remove_archive(folder, sent.moved_to, archive)
            except OSError as error:
                self._log_failed(sent, error)
                continue
            if freed is not None:
                with suppress(OSError):  # the archive is removed; a file that is left beside it does no harm
                    if drop.uses_checksum_files:
                        remove_checksum_files(folder, sent.moved_to)
                    remove_receipt_file(folder, sent.moved_to, archive, b"receipt")
            self._logged_failures.discard(archive.id)
            removed[archive.id] = RemovalReason.CHANGED if freed is None else RemovalReason.EXPIRED
            if freed is None:
                continue
            total += freed
            changed_directories.add(sent.moved_to.rpartition(b"/")[0])
            self._log.emit(
                events.ARCHIVE_EXPIRED,
                drop=archive.drop,
                archive=archive.relpath,
                path=os.path.join(os.fsencode(folder.path), sent.moved_to),
                size_bytes=archive.fingerprint.size,
                reason=expiry,
            )
        for directory in changed_directories:
            with suppress(OSError):  # after a power loss the file may be back, but it was delivered
                folder.sync(directory)
        if removed:
            index.record_removals(removed, now)
        return total

    def _log_failed(self, sent: SentArchive, error: OSError) -> None:
        if sent.archive.id in self._logged_failures:
            return
        self._logged_failures.add(sent.archive.id)
        self._log.emit(
            events.DISPOSITION_FAILED,
            drop=sent.archive.drop,
            archive=sent.archive.relpath,
            error=f"{as_text(sent.moved_to)} can't be removed ({os.strerror(error.errno or errno.EIO)})",
            hint="give the daemon's user write permission to `sent_dir` and its folders, or remove the file",
        )


def _has_sent_dir(drop: Drop) -> bool:
    """Return whether `sent_dir` exists; if it does not, its filesystem may not be mounted."""
    try:
        with drop.folder.directory(drop.sent_dir):
            return True
    except OSError:
        return False


def _removed_otherwise(folder: DropFolder, sent: SentArchive) -> RemovalReason | None:
    """Return why the file of an archive is not in `sent_dir` any more; None if it is, unchanged."""
    try:
        is_unchanged = is_expected_file(folder.stat(sent.moved_to), sent.archive.fingerprint)
    except (FileNotFoundError, NotADirectoryError):
        return RemovalReason.MISSING
    except OSError:
        return None  # the removal fails with the same error and logs it
    return None if is_unchanged else RemovalReason.CHANGED


def _is_reachable(folder: DropFolder, sent: SentArchive) -> bool:
    return not folder.is_unmounted(sent.archive.folder_inode)
