"""Selection of a drop folder's finished files: eligible, readable, closed, and unchanged for `stable_for`."""

from __future__ import annotations

import errno
import math
import os
import stat

from backupd.core.eligibility import Eligibility, Ineligible, Patterns
from backupd.core.model import fingerprint_of
from backupd.core.stability import StabilityTracker
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.filesystem import is_being_written
from backupd.ledger.port import FileCandidate
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

_MAX_LOGGED_FILES = 100_000
"""Ignored files that are remembered as logged; the limit bounds the memory."""

_UNFINISHED_WARNING_AFTER = 3600.0
"""Seconds after which a file that is still being written to is logged."""

_ERRORS = {
    Ineligible.NOT_INCLUDED: "its name matches no pattern of `include`",
    Ineligible.SYMLINK: "it is a symbolic link",
    Ineligible.SPECIAL: "it is not a regular file",
    Ineligible.TOO_SMALL: "it is smaller than `min_size`",
    Ineligible.TOO_LARGE: "it is larger than `max_size`",
}

_HINTS = {
    Ineligible.NOT_INCLUDED: "add it to `include` if it is a backup, or to `exclude` to stop this warning",
    Ineligible.SYMLINK: "links are not followed; write the file itself into the drop folder",
    Ineligible.SPECIAL: "only regular files are delivered; remove it from the drop folder",
    Ineligible.TOO_SMALL: "check the backup job of the device, or lower `min_size`",
    Ineligible.TOO_LARGE: "raise `max_size` if it is a backup",
}


class UnfinishedFiles:
    """The files of one drop that are not finished yet; `check` decides when a file becomes an archive."""

    def __init__(self, drop: Drop, log: EventLog) -> None:
        config = drop.config
        self._drop = drop.name
        self._folder = drop.folder
        self._log = log
        self._eligibility = Eligibility(
            Patterns(config.include),
            Patterns(config.exclude),
            config.min_size,
            config.max_size,
            checksums=drop.uses_checksum_files,
        )
        self._tracker = StabilityTracker(config.stable_for.total_seconds())
        self._ignored: set[int] = set()
        """Hashes of the paths that were logged as ignored."""
        self._has_too_many_ignored = False
        """Whether `_ignored` is full; logged once."""
        self._unreadable: set[int] = set()
        """Hashes of the paths that were logged as unreadable."""
        self._unfinished_since: dict[bytes, float] = {}
        """When each unfinished file was seen first (monotonic); infinity once it was logged."""

    def __len__(self) -> int:
        return len(self._tracker)

    def next_due(self) -> float | None:
        """Return the monotonic time at which the next file has to be checked, or None."""
        return self._tracker.next_due()

    def due(self, now: float) -> list[bytes]:
        """Return the paths of the files that have to be checked again at the monotonic time `now`."""
        return self._tracker.due(now)

    def check(self, relpath: bytes, now: float, status: os.stat_result | None = None) -> FileCandidate | None:
        """Return the file as a candidate if it is finished, else None; log, once, why it is ignored.

        `now` is monotonic. `status` is the file's current status, if the caller has it.
        """
        why = self._eligibility.of_name(relpath)
        if why is Ineligible.NOT_INCLUDED:
            self._log_ineligible(relpath, why)
        if why is not None:
            return None
        try:
            status = status or self._folder.stat(relpath)
        except (FileNotFoundError, NotADirectoryError):
            self._forget(relpath)
            return None
        except OSError as error:
            self._forget(relpath)
            self.log_unreadable(relpath, error)
            return None
        candidate = self._check_finished(relpath, status, now)
        if relpath in self._tracker:
            self._log_unfinished(relpath, status.st_size, now)
        else:
            self._unfinished_since.pop(relpath, None)
        return candidate

    def is_new(self, relpath: bytes) -> bool:
        """Return whether a path is eligible by its name and was never checked before."""
        is_logged = hash(relpath) in self._ignored or hash(relpath) in self._unreadable
        if is_logged or self._has_too_many_ignored or self._eligibility.of_name(relpath) is not None:
            return False
        return relpath not in self._tracker

    def log_unreadable(self, relpath: bytes, error: OSError) -> None:
        """Log, once for each path, that it can't be read."""
        if hash(relpath) in self._unreadable:
            return
        if len(self._unreadable) >= _MAX_LOGGED_FILES:
            self._unreadable.clear()
        self._unreadable.add(hash(relpath))
        hint = "give the daemon's user read permission (chmod, setfacl); retried at each rescan"
        if error.errno == errno.EAGAIN:
            hint = "its owner holds a write lease on it; retried at each rescan"
        if error.errno == errno.ENAMETOOLONG:
            hint = "move it nearer to the drop folder: paths of 4096 bytes or more are not read"
        self._log_ignored(relpath, reason="unreadable", error=error.strerror, hint=hint)

    def _forget(self, relpath: bytes) -> None:
        self._tracker.forget(relpath)
        self._unfinished_since.pop(relpath, None)

    def _check_finished(self, relpath: bytes, status: os.stat_result, now: float) -> FileCandidate | None:
        if stat.S_ISDIR(status.st_mode):
            self._tracker.forget(relpath)
            return None
        if not self._tracker.observe(relpath, fingerprint_of(status), now):
            return None
        why = self._eligibility.of_file(status.st_mode, status.st_size)
        if why is not None:
            self._log_ineligible(relpath, why, size=status.st_size)
            return None
        try:
            fd = self._folder.open(relpath)
            try:
                opened, is_written = fingerprint_of(os.fstat(fd)), is_being_written(fd)
                folder_inode = self._folder.inode()
            finally:
                os.close(fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.log_unreadable(relpath, error)
            return None
        if is_written or opened != fingerprint_of(status):
            self._tracker.hold(relpath, opened, now)
            return None
        self._ignored.discard(hash(relpath))
        self._unreadable.discard(hash(relpath))
        return FileCandidate(self._drop, relpath, opened, folder_inode=folder_inode)

    def _log_unfinished(self, relpath: bytes, size: int, now: float) -> None:
        """Log, once, that a file has not been finished for an hour: it may never be."""
        if now - self._unfinished_since.setdefault(relpath, now) < _UNFINISHED_WARNING_AFTER:
            return
        self._unfinished_since[relpath] = math.inf
        self._log.emit(
            events.ARCHIVE_WAITING,
            drop=self._drop,
            archive=relpath,
            size_bytes=size,
            reason="unfinished",
            error="it has been written to or held open for writing for an hour",
            hint="`fuser -v FILE` shows the writing process; the file is sent once it is closed and has been"
            " unchanged for `stable_for`",
        )

    def _log_ineligible(self, relpath: bytes, why: Ineligible, size: int | None = None) -> None:
        """Log, once for each path, why a file is ignored, up to the limit of remembered paths."""
        if hash(relpath) in self._ignored:
            return
        if len(self._ignored) < _MAX_LOGGED_FILES:
            self._ignored.add(hash(relpath))
            self._log_ignored(relpath, reason=why, error=_ERRORS.get(why), hint=_HINTS.get(why), size=size)
        elif not self._has_too_many_ignored:
            self._has_too_many_ignored = True
            error = f"more than {_MAX_LOGGED_FILES} files are ignored; further ones are not logged"
            self._log_ignored(relpath, reason="too_many", error=error, hint="remove them, or `exclude` them")

    def _log_ignored(
        self,
        relpath: bytes,
        *,
        reason: str,
        error: str | None,
        hint: str | None,
        size: int | None = None,
    ) -> None:
        self._log.emit(
            events.ARCHIVE_IGNORED,
            drop=self._drop,
            archive=relpath,
            size_bytes=size,
            reason=reason,
            error=error,
            hint=hint,
        )
