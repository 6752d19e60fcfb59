"""The retention of sent archives: by age and number, and the oldest first if the disk is nearly full.

`sent_dir` is walked, and its receipt files say which files are sent archives. Nothing about it is stored.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from backupd.core.errors import LedgerError
from backupd.core.retention_policy import (
    Expiry,
    RetentionPolicy,
    SentFile,
    newest_of_series,
    series_of,
    smallest_prefix,
)
from backupd.delivery.past_devices import DeviceOf, past_devices
from backupd.delivery.receipt_file import (
    MAX_CLOCK_SKEW,
    FoundReceipt,
    SkippedFiles,
    StoredFolder,
    file_time,
)
from backupd.dropfolder.checksums import remove_checksum_files
from backupd.dropfolder.drop import Drop
from backupd.ledger.port import Ledger
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
                with suppress(OSError):  # the intake logs a folder that cannot be read
                    by_device.setdefault(os.fstat(drop.folder.fileno()).st_dev, {})[name] = drop
        found = [low for device, members in by_device.items() if (low := _measure(device, members))]
        devices = {low.device for low in found}
        self._logged_at = {device: when for device, when in self._logged_at.items() if device in devices}
        return found

    def log_low_space(self, low: LowSpace, now: datetime, every: timedelta, skipped: SkippedFiles) -> None:
        """Log that a filesystem is low on space, and which files were skipped, at most once in `every`."""
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
            error="less than `min_free` is free, and there is no sent archive left to remove"
            + (f"; skipped: {skipped}" if skipped.total else ""),
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


_WALK_EVERY = timedelta(hours=1)
"""Time between two walks; less if archives are kept for less than ten times as long."""

_CHECK_SPACE_EVERY = 60.0
"""Seconds between two checks of the free space."""

_BATCH_SIZE = 64
"""Archives that are removed before their directories are synced."""

_BATCH_PAUSE = 0.05
"""Seconds between two batches, in which other threads get the disk."""

_DISPOSITION_TIME = timedelta(hours=1)
"""Time in which a file that was moved gets its receipt file; only older ones are reported as unknown."""

_WITHOUT_RECEIPT = "without a valid receipt file"


@dataclass(frozen=True, slots=True)
class RetentionScope:
    """All configured drops by name, and how often low disk space is logged."""

    drops: Mapping[str, Drop]
    log_every: timedelta


class Retention:
    """Applies the retention policies of all drops; `run` is the body of its thread.

    `now` returns the time by which archives may be removed. A file is removed only if a receipt file beside
    it matches its path, size and state. The file is removed first: a receipt file that a crash leaves
    alone is removed by the next walk, while a file without one would stay.
    """

    def __init__(
        self,
        ledger: Ledger,
        scope: Callable[[], RetentionScope],
        device_of: DeviceOf,
        log: EventLog,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._ledger = ledger
        self._scope = scope
        self._device_of = device_of
        self._log = log
        self._now = now
        self._policies: dict[str, RetentionPolicy] = {}
        self._next_walk = 0.0
        """When `apply` is due (monotonic)."""
        self._learned: set[str] = set()
        """Names of the drops with devices that the ledger knows from earlier archives."""
        self._disk_space = DiskSpace(log)
        self.is_settled = False
        """Whether `run` has applied the policies once."""
        self.stop = threading.Event()
        self.watchdog = ThreadWatchdog("retention")

    def run(self, stop: threading.Event) -> None:
        """Walk `sent_dir` at once and then periodically, and while space is short, until `stop` is set."""
        wait = 0.0
        while not stop.wait(wait):
            self.watchdog.alive()
            policies = {name: drop.retention for name, drop in self._scope().drops.items()}
            if time.monotonic() >= self._next_walk or policies != self._policies:
                self._policies = policies
                self.apply()
                self._next_walk = time.monotonic() + _walk_every(policies.values())
            else:
                self.free_space()
            self.watchdog.idle()
            self.is_settled = True
            wait = max(min(self._next_walk - time.monotonic(), _CHECK_SPACE_EVERY), 0.0)

    def apply(self) -> None:
        """Remove what is too old or too many, then free space where it is short."""
        drops = self._scope().drops
        try:
            for drop in drops.values():
                self._learn_devices(drop)  # before the last archive of a device is removed
            self._check_quarantine(drops)
        except LedgerError as error:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)
        for drop in drops.values():
            if drop.retention.expires:
                self._expire(drop)
        self.free_space()

    def free_space(self) -> None:
        """Remove the oldest archives of all drops on each filesystem with less than `min_free`."""
        scope = self._scope()
        for low in self._disk_space.low_filesystems(scope.drops):
            drops, skipped = {name: scope.drops[name] for name in low.drops}, SkippedFiles()
            oldest = sorted(file for drop in drops.values() for file in self._sent_files(drop, skipped))
            freed = self._remove(oldest, Expiry.DISK_LOW, drops, skipped, low.missing_bytes)
            if freed < low.missing_bytes and not self.stop.is_set():
                self._disk_space.log_low_space(low, self._now(), scope.log_every, skipped)

    def _expire(self, drop: Drop) -> None:
        """Remove the archives of a drop that are too old or too many."""
        policy, now, skipped = drop.retention, self._now(), SkippedFiles()
        files: Iterable[SentFile] = self._sent_files(drop, skipped)
        newest: set[bytes] = set()
        if policy.keep_last is not None:
            files = list(files)
            newest = newest_of_series(files, policy.keep_last)
        due = sorted(
            f for f in files if policy.expiry_reason(now - f.moved_at, is_among_newest=f.relpath in newest)
        )
        reason = Expiry.TOO_MANY if policy.keep_for is None else Expiry.TOO_OLD
        self._remove(due, reason, {drop.name: drop}, skipped)
        if skipped.total:
            self._log.emit(
                events.RETENTION_SKIPPED,
                drop=drop.name,
                path=os.path.join(os.fsencode(drop.folder.path), drop.sent_dir),
                skipped_files=skipped.total,
                error=str(skipped),
                hint="remove these files or fix their permissions; files with a time in the future count from"
                " now on if you `touch` them and their receipt files",
            )

    def _sent_files(self, drop: Drop, skipped: SkippedFiles) -> Iterator[SentFile]:
        """Yield the archives in `sent_dir` by the names and times of files; no file is read.

        The time of the move is the change time, or the earlier one at which the receipt file was written: a
        copy of the folder preserves that.
        """
        sent, now = StoredFolder.of_sent(drop), datetime.now(UTC)
        if not drop.folder.is_in_place():
            return  # not mounted, or renamed; the intake opens what is there now
        for file in sent.files(skipped.add_unreadable, self._should_continue):
            status, receipt = file.status, file.receipt_status
            if receipt is None:
                if _is_older(status, now - _DISPOSITION_TIME):
                    skipped.add(_WITHOUT_RECEIPT, file.relpath)
                continue
            written_ns = receipt.st_mtime_ns
            moved_at = file_time(min(written_ns, status.st_ctime_ns) if status else written_ns)
            if moved_at > now + MAX_CLOCK_SKEW:
                skipped.add("with a time in the future", file.relpath)
                continue
            yield SentFile(
                moved_at,
                file.relpath,
                drop.name,
                status.st_size if status else 0,
                status.st_mtime_ns if status else written_ns,
                series_of(file.relpath, sent.below(file.relpath), drop.label_pattern),
                b"" if status else file.receipt_path,
            )

    def _remove(
        self,
        files: Sequence[SentFile],
        reason: Expiry,
        drops: Mapping[str, Drop],
        skipped: SkippedFiles,
        needed: int | None = None,
    ) -> int:
        """Remove files in their order, until `needed` bytes are free if given; return the freed bytes."""
        freed = start = 0
        while start < len(files) and (needed is None or freed < needed) and not self.stop.is_set():
            batch = files[start : start + _BATCH_SIZE]
            if needed is not None:
                batch = batch[: smallest_prefix(needed - freed, [file.size for file in batch])]
            start += len(batch)
            freed += self._remove_batch(batch, reason, drops, skipped)
            self.stop.wait(_BATCH_PAUSE)
        return freed

    def _remove_batch(
        self, batch: Sequence[SentFile], reason: Expiry, drops: Mapping[str, Drop], skipped: SkippedFiles
    ) -> int:
        """Remove the archives, sync their directories, then remove their receipt files."""
        freed = 0
        removed: list[tuple[SentFile, Drop, FoundReceipt]] = []
        for file in batch:
            self.watchdog.alive()
            drop = drops[file.drop]
            try:
                found, size = self._remove_archive(file, drop, reason, skipped)
            except FileNotFoundError:
                continue  # another program has removed it
            except OSError as error:
                skipped.add(f"that cannot be removed ({error.strerror})", file.relpath)
                continue
            freed += size
            if found is not None:
                removed.append((file, drop, found))
        for name, directory in {(file.drop, file.relpath.rpartition(b"/")[0]) for file, _, _ in removed}:
            with suppress(OSError):  # after a power loss an archive may be back, but it was delivered
                drops[name].folder.sync(directory)
        for file, drop, found in removed:
            with suppress(OSError):  # the next walk removes a receipt file that is left
                if drop.uses_checksum_files:
                    remove_checksum_files(drop.folder, file.relpath)
                drop.folder.unlink(found.path)
            self._log.emit(
                events.ARCHIVE_EXPIRED,
                drop=drop.name,
                archive=found.original_path,
                path=os.path.join(os.fsencode(drop.folder.path), file.receipt_path or file.relpath),
                size_bytes=file.size,
                reason=reason,
            )
        return freed

    def _remove_archive(
        self, file: SentFile, drop: Drop, reason: Expiry, skipped: SkippedFiles
    ) -> tuple[FoundReceipt | None, int]:
        """Remove an archive if its receipt file confirms that; return that file and the freed bytes."""
        sent, folder = StoredFolder.of_sent(drop), drop.folder
        if file.receipt_path:
            found = sent.lone_receipt(file.relpath, file.receipt_path)
            if found is None:
                skipped.add("without an archive or a valid content", file.receipt_path)
            return found, 0
        status = folder.stat(file.relpath)
        found = sent.receipt(file.relpath, status)
        if found is None:
            skipped.add(_WITHOUT_RECEIPT, file.relpath)
            return None, 0
        keep_for = drop.retention.keep_for
        if reason is Expiry.TOO_OLD and keep_for and self._now() - found.receipt.moved_at(status) <= keep_for:
            return None, 0
        folder.unlink(file.relpath)
        return found, status.st_blocks * 512 if status.st_nlink == 1 else 0

    def _learn_devices(self, drop: Drop) -> None:
        """Have a new ledger learn when each device of a drop last sent an archive."""
        if drop.name in self._learned:
            return
        if not self._ledger.knows_devices(drop.name):
            skipped = SkippedFiles()
            devices = past_devices(drop, self._device_of, skipped, self._should_continue)
            if skipped.total:
                self._log.emit(
                    events.LEDGER_INCOMPLETE,
                    drop=drop.name,
                    path=drop.folder.path,
                    error=str(skipped),
                    hint="fix or remove these files, or set the clock of this host; tried again in an hour",
                )
            if devices is None or skipped.total or self.stop.is_set():
                return  # a part of them would be wrong: a device with a later archive would look overdue
            self._ledger.learn_devices(drop.name, devices)
        self._learned.add(drop.name)

    def _check_quarantine(self, drops: Mapping[str, Drop]) -> None:
        """Report that `rejected_dir` has more files than the ledger knows, as after the loss of a ledger."""
        before = datetime.now(UTC) - _DISPOSITION_TIME
        paths = []
        for drop in drops.values():
            rejected, skipped = StoredFolder.of_rejected(drop), SkippedFiles()
            files = rejected.files(skipped.add_unreadable, self._should_continue)
            paths += [
                os.path.join(os.fsencode(drop.folder.path), file.relpath)
                for file in files
                if _is_older(file.status, before)
            ]
        unknown = len(paths) - self._ledger.count_quarantined()
        if unknown > 0:
            self._log.emit(
                events.ARCHIVE_UNKNOWN,
                path=paths[0].rpartition(b"/")[0],
                unknown_files=unknown,
                hint="`backupd list --state rejected` lists what `backupd retry` can put back; move the other"
                " files back into the drop folder to send them again, or remove them",
            )

    def _should_continue(self) -> bool:
        self.watchdog.alive()
        return not self.stop.is_set()


def _is_older(status: os.stat_result | None, time: datetime) -> bool:
    return status is not None and file_time(status.st_ctime_ns) < time


def _walk_every(policies: Iterable[RetentionPolicy]) -> float:
    """Return the seconds between two walks: an archive is kept at most a tenth longer than `keep_for`."""
    shortest = min((p.keep_for / 10 for p in policies if p.keep_for), default=_WALK_EVERY)
    return max(min(shortest, _WALK_EVERY).total_seconds(), 1.0)
