"""Files on their way to be archives: eligible, readable, unchanged for long enough, and closed."""

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

_MOST_SAID = 100_000
"""How many ignored files are remembered, so that memory has a bound in a folder full of them."""

_LONG = 3600.0
"""Seconds after which it is said that a file is not finished yet."""

_HINTS = {
    Ineligible.NOT_INCLUDED: "add it to `include` if it is a backup, or to `exclude` to be rid of this line",
    Ineligible.SYMLINK: "links are not followed; drop the file itself",
    Ineligible.SPECIAL: "only regular files are archives",
    Ineligible.TOO_SMALL: "an empty backup is no backup; see the device, or lower `min_size`",
    Ineligible.TOO_LARGE: "raise `max_size` if it is a backup",
}


class Candidates:
    """Decides, look by look, which files of a drop are finished archives."""

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
        self._said: set[int] = set()
        self._complained: set[int] = set()
        self._since: dict[bytes, float] = {}
        """When each file that is not finished was seen first; infinity once that was said."""
        self._is_full = False
        """Whether there are more files that are no archives than are remembered; that is said, too."""

    def __len__(self) -> int:
        return len(self._tracker)

    def next_due(self) -> float | None:
        """Return the monotonic time at which `due` has something, or None."""
        return self._tracker.next_due()

    def due(self, now: float) -> list[bytes]:
        """Return the paths that are worth another look."""
        return self._tracker.due(now)

    def check(self, relpath: bytes, now: float, status: os.stat_result | None = None) -> FileCandidate | None:
        """Look at a file; return it once it is a finished archive. What is none is said once."""
        why = self._eligibility.of_name(relpath)
        if why is Ineligible.NOT_INCLUDED:
            self._ignore(relpath, why)
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
        sighting = self._settle(relpath, status, now)
        if relpath in self._tracker:
            self._mind_how_long(relpath, status.st_size, now)
        else:
            self._since.pop(relpath, None)
        return sighting

    def _forget(self, relpath: bytes) -> None:
        self._tracker.forget(relpath)
        self._since.pop(relpath, None)

    def _mind_how_long(self, relpath: bytes, size: int, now: float) -> None:
        """Say, once, that a file is not finished for long: it would wait without a word for ever."""
        if now - self._since.setdefault(relpath, now) < _LONG:
            return
        self._since[relpath] = math.inf
        self._log.emit(
            events.ARCHIVE_WAITING,
            drop=self._drop,
            archive=relpath,
            size_bytes=size,
            reason="unfinished",
            error="it has been written to, or held open for writing, for an hour",
            hint="see who writes it (`fuser`); it is sent once it is closed and stays as it is",
        )

    def is_new(self, relpath: bytes) -> bool:
        """Tell whether a path would be a candidate that was never looked at."""
        known = hash(relpath) in self._said or hash(relpath) in self._complained
        if known or self._is_full or self._eligibility.of_name(relpath) is not None:
            return False
        return relpath not in self._tracker

    def _settle(self, relpath: bytes, status: os.stat_result, now: float) -> FileCandidate | None:
        if stat.S_ISDIR(status.st_mode):
            self._tracker.forget(relpath)
            return None
        if not self._tracker.observe(relpath, fingerprint_of(status), now):
            return None
        why = self._eligibility.of_file(status.st_mode, status.st_size)
        if why is not None:
            self._ignore(relpath, why, size=status.st_size)
            return None
        try:
            fd = self._folder.open(relpath)
            try:
                opened, is_written = fingerprint_of(os.fstat(fd)), is_being_written(fd)
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
        self._said.discard(hash(relpath))
        self._complained.discard(hash(relpath))
        return FileCandidate(self._drop, relpath, opened)

    def _ignore(self, relpath: bytes, why: Ineligible, size: int | None = None) -> None:
        """Say, once, that something is no archive; of too many of them say no more than that."""
        if hash(relpath) in self._said:
            return
        if len(self._said) < _MOST_SAID:
            self._said.add(hash(relpath))
            self._say(relpath, reason=why, hint=_HINTS.get(why), size=size)
        elif not self._is_full:
            self._is_full = True
            error = f"more than {_MOST_SAID} files here are no archives; further ones are not told"
            self._say(relpath, reason="too_many", error=error, hint="clear the folder, or `exclude` them")

    def log_unreadable(self, relpath: bytes, error: OSError) -> None:
        """Say, once, that something can't be read."""
        if hash(relpath) in self._complained:
            return
        if len(self._complained) >= _MOST_SAID:
            self._complained.clear()
        self._complained.add(hash(relpath))
        hint = "give the daemon's user read permission; it is tried again at each rescan"
        if error.errno == errno.EAGAIN:
            hint = "its owner holds a write lease on it; it is tried again at each rescan"
        if error.errno == errno.ENAMETOOLONG:
            hint = "no path of 4096 bytes or more is looked at; put it nearer to the drop folder"
        self._say(relpath, reason="unreadable", error=error.strerror, hint=hint)

    def _say(
        self,
        relpath: bytes,
        *,
        reason: str,
        hint: str | None,
        error: str | None = None,
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
