"""Selection of a drop folder's finished files: eligible, readable, closed, and unchanged for `stable_for`."""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import suppress

from backupd.core.archive_formats import Damage
from backupd.core.eligibility import COMPANION_SUFFIXES, Ineligible
from backupd.core.filesystems import default_stable_for
from backupd.core.model import fingerprint_of, may_have_content_of
from backupd.core.policy import Reason
from backupd.core.stability import Stability, StabilityTracker
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.earlier_folders import EarlierFolder
from backupd.dropfolder.filesystem import is_being_written
from backupd.dropfolder.folder import close_descriptor
from backupd.intake.problem_list import ProblemList
from backupd.ledger.port import FileCandidate
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

NO_ROOM = "no_room"
"""The reason for a file that waits because its filesystem has no room left."""

_UNREADABLE = "unreadable"
"""The reason for a file or directory that can't be read."""

_ERRORS_OF_THE_PROCESS = frozenset([errno.EMFILE, errno.ENFILE, errno.ENOMEM])

_UNFINISHED_PROBLEM_AFTER = 3600.0
"""Seconds after which a file that is still being written to is a problem."""

_BROKEN_OFF_AFTER = 86400.0
"""Seconds without a change after which an upload has broken off.

Then a temporary name is a problem, and a file with a companion is sent and listed as suspicious.
"""

_AMBIGUOUS_NOTES = b".st"
"""The suffix of the notes of axel about a download; without that file it may be a program of a controller."""

_ERRORS = {
    Ineligible.TEMPORARY: "it has had the name of an unfinished file for a day",
    Ineligible.EXCLUDED: "it matches `exclude`, or has a name that is never that of a backup",
    Ineligible.CHECKSUM: "it is a checksum file, which is read together with its archive",
    Ineligible.NOT_INCLUDED: "its name matches no pattern of `include`",
    Ineligible.OWN_NAME: "it has the name of `sent_dir` or `rejected_dir`",
    Ineligible.SUBFOLDER: "it is a folder that is not empty, and `recursive` is false",
    Ineligible.SYMLINK: "it is a symbolic link",
    Ineligible.SPECIAL: "it is not a regular file",
    Ineligible.TOO_SMALL: "it is smaller than `min_size`",
    Ineligible.TOO_LARGE: "it is larger than `max_size`",
}

_HINTS = {
    Ineligible.TEMPORARY: "remove it if its upload broke off, rename it if it is a backup, or `exclude` it",
    Ineligible.EXCLUDED: "rename it, or change `exclude`, if it is a backup",
    Ineligible.CHECKSUM: 'set `checksum_file = "off"` to send it as an archive of its own',
    Ineligible.NOT_INCLUDED: "add it to `include` if it is a backup, or to `exclude` to stop this warning",
    Ineligible.OWN_NAME: "rename it: archives are moved into a folder with this name",
    Ineligible.SUBFOLDER: "set `recursive = true` to send the files in it, or `exclude` the folder",
    Ineligible.SYMLINK: "links are not followed; write the file itself into the drop folder",
    Ineligible.SPECIAL: "only regular files are delivered; remove it from the drop folder",
    Ineligible.TOO_SMALL: "check the backup job of the device, or lower `min_size`",
    Ineligible.TOO_LARGE: "raise `max_size` if it is a backup",
}


_UNFINISHED = (
    "it has been written to, held open for writing, or had a companion such as NAME.part for an hour"
)
UNFINISHED_HINT = (
    "`fuser -v FILE` shows the writing process; the file is sent once it is closed, has been unchanged for"
    " `stable_for`, and its companion is gone or has been unchanged for a day"
)
_BROKEN_OFF = "a companion of an unfinished upload, such as NAME.part, has been beside it for a day"
_NO_ROOM = "its filesystem has no room left, so that the file may be cut off"
_NO_ROOM_HINT = (
    "free some space (`df -h FILE`): the file is sent once there is room, or once it has not been written to"
    " for `inspect_grace`, and is then listed as suspicious"
)


def explain(why: Ineligible) -> tuple[str, str]:
    """Return the error and the hint for a file that is not an archive now."""
    error = "it has the name of an unfinished file" if why is Ineligible.TEMPORARY else _ERRORS[why]
    return error, _HINTS[why]


class UnfinishedFiles:
    """The files of one drop that are not finished yet; `check` decides when a file becomes an archive.

    A file that cannot become one goes to `problems`.
    """

    def __init__(self, drop: Drop, problems: ProblemList, log: EventLog) -> None:
        config = drop.config
        self._drop = drop.name
        self._whole_drop = drop
        self._folder = drop.folder
        self._log = log
        self._eligibility = drop.eligibility
        self._is_recursive = config.recursive
        self._own_names = frozenset((drop.sent_dir, drop.rejected_dir))
        self._tracker = StabilityTracker(
            default_stable_for() if config.stable_for is None else config.stable_for.total_seconds()
        )
        self._grace = config.inspect_grace.total_seconds()
        self._problems = problems
        self._unfinished_since: dict[bytes, float] = {}
        """When each unfinished file was seen first, or last without room for it (monotonic)."""

    def __len__(self) -> int:
        return len(self._tracker)

    def __contains__(self, relpath: object) -> bool:
        return relpath in self._tracker

    @property
    def stable_for(self) -> float:
        """The seconds for which a file must be unchanged."""
        return self._tracker.stable_for

    @stable_for.setter
    def stable_for(self, seconds: float) -> None:
        self._tracker.stable_for = seconds

    def is_waiting(self) -> bool:
        """Return whether a file is to become stable; not one that a writer has open, or with a companion."""
        return self._tracker.is_waiting()

    def next_due(self) -> float | None:
        """Return the monotonic time at which the next file has to be checked, or None."""
        return self._tracker.next_due()

    def due(self, now: float) -> list[bytes]:
        """Return the paths of the files that have to be checked again at the monotonic time `now`."""
        return self._tracker.due(now)

    def check(self, relpath: bytes, now: float, status: os.stat_result | None = None) -> FileCandidate | None:
        """Return the file as a candidate if it is finished, else None.

        `now` is monotonic. `status` is the file's current status, if the caller has it.
        """
        why = self._eligibility.of_name(relpath)
        if why is None and relpath in self._own_names:
            why = Ineligible.OWN_NAME
        if why in (Ineligible.EXCLUDED, Ineligible.CHECKSUM):
            return None
        try:
            status = status or self._folder.stat(relpath)
        except (FileNotFoundError, NotADirectoryError):
            self._forget(relpath)
            self._problems.remove(relpath)
            return None
        except OSError as error:
            self._forget(relpath)
            self.add_unreadable(relpath, error)
            return None
        if why is None and relpath.endswith(_AMBIGUOUS_NOTES) and self._has_download(relpath):
            why = Ineligible.TEMPORARY
        if why is Ineligible.TEMPORARY:
            if _seconds_unchanged(status) >= _BROKEN_OFF_AFTER:
                self._add_ineligible(relpath, why, status.st_size)
            return None
        if stat.S_ISDIR(status.st_mode) and not self._is_recursive:
            self._tracker.forget(relpath)
            self._check_subfolder(relpath, status)
            return None
        candidate = self._check_finished(relpath, status, now, why)
        is_unfinished = relpath in self._tracker or (candidate is not None and candidate.touched)
        if is_unfinished and why is None:
            self._check_age(relpath, status.st_size, now)
        else:
            self._unfinished_since.pop(relpath, None)
        return candidate

    def hold_touched(self, candidate: FileCandidate, now: float) -> None:
        """Have a file wait again that was touched while it waited; `candidate` has its digest."""
        self._tracker.hold(candidate.relpath, candidate.fingerprint, now, *candidate.digests)

    def is_new(self, relpath: bytes) -> bool:
        """Return whether a path is eligible by its name and was never checked before.

        The names of `_AMBIGUOUS_NOTES` do not count: they become eligible when another file is gone.
        """
        if relpath in self._problems or self._problems.is_full or relpath in self._tracker:
            return False
        return not relpath.endswith(_AMBIGUOUS_NOTES) and self._eligibility.of_name(relpath) is None

    def add_unreadable(self, relpath: bytes, error: OSError) -> None:
        """Add a file or directory that can't be read to the problems.

        Not while the drop folder itself can't be read, as on a mount that died: that is one problem, which
        the next scan finds, and afterwards it finds the files again.
        """
        if self._problems.reason(relpath) != _UNREADABLE and not self._is_folder_readable():
            return
        hint = "see `dmesg` and `findmnt -T FILE`; retried at each rescan"
        if error.errno in (errno.EACCES, errno.EPERM):
            hint = "give the daemon's user read permission (chmod, setfacl); retried at each rescan"
        if error.errno == errno.EAGAIN:
            hint = "its owner holds a write lease on it; retried at each rescan"
        if error.errno in _ERRORS_OF_THE_PROCESS:
            hint = "give the daemon more descriptors (LimitNOFILE) or memory; retried at each rescan"
        if error.errno == errno.ENAMETOOLONG:
            hint = "move it nearer to the drop folder: paths of 4096 bytes or more are not read"
        self._add(relpath, _UNREADABLE, error.strerror or str(error), hint)

    def add_earlier_folder(self, relpath: bytes, found: EarlierFolder) -> None:
        """Add an earlier `sent_dir` or `rejected_dir` to the problems; `relpath` is in it."""
        self._forget(relpath)
        hint = found.hint(self._whole_drop)
        self._add(found.relpath, "earlier_folder", found.error, hint)

    def _is_folder_readable(self) -> bool:
        try:
            self._folder.check_readable()
        except OSError as error:
            return error.errno in _ERRORS_OF_THE_PROCESS
        return True

    def _forget(self, relpath: bytes) -> None:
        self._tracker.forget(relpath)
        self._unfinished_since.pop(relpath, None)

    def _check_finished(
        self, relpath: bytes, status: os.stat_result, now: float, why: Ineligible | None
    ) -> FileCandidate | None:
        if stat.S_ISDIR(status.st_mode):
            self._tracker.forget(relpath)
            return None
        if why is not None and relpath in self._problems:
            self._add_ineligible(relpath, why, status.st_size)
            return None
        digest = self._tracker.digest_of(relpath)
        stability = self._tracker.observe(relpath, fingerprint_of(status), now)
        if stability is Stability.WAITING:
            return None
        why = why or self._eligibility.of_file(status.st_mode, status.st_size)
        if why is not None:
            self._add_ineligible(relpath, why, status.st_size)
            return None
        try:
            fd = self._folder.open(relpath)
            try:
                opened, is_written = fingerprint_of(os.fstat(fd)), is_being_written(fd)
                has_room = _has_room(fd)
                folder_id = self._folder.id()
            finally:
                close_descriptor(fd)
            companion_age = self._companion_age(relpath)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.add_unreadable(relpath, error)
            return None
        has_companion = companion_age is not None and companion_age < _BROKEN_OFF_AFTER
        if is_written or has_companion or not may_have_content_of(opened, fingerprint_of(status)):
            self._tracker.hold(relpath, opened, now)
            return None
        if not has_room and _seconds_since(status.st_mtime) < self._grace:
            self._unfinished_since[relpath] = now  # so that the two problems do not replace each other
            self._add(relpath, NO_ROOM, _NO_ROOM, _NO_ROOM_HINT, status.st_size, waits=True)
            self._tracker.hold(relpath, opened, now)
            return None
        why_suspicious = None if companion_age is None else _BROKEN_OFF
        if not has_room:
            why_suspicious = _NO_ROOM
        is_touched = stability is Stability.TOUCHED or opened != fingerprint_of(status)
        return FileCandidate(
            self._drop,
            relpath,
            opened,
            folder_id=folder_id,
            suspicion=Damage(Reason.TRUNCATED, why_suspicious) if why_suspicious else None,
            digests=(digest,) if is_touched and digest else (),
            touched=is_touched,
        )

    def _check_subfolder(self, relpath: bytes, status: os.stat_result) -> None:
        """Add a folder that is not entered to the problems, unless it is empty or has an own one."""
        if any((name + b"/").startswith(relpath + b"/") for name in self._own_names):
            return
        with suppress(OSError), self._folder.directory(relpath) as fd, os.scandir(fd) as entries:
            if next(entries, None) is None:
                return
        self._add_ineligible(relpath, Ineligible.SUBFOLDER, status.st_size)

    def _check_age(self, relpath: bytes, size: int, now: float) -> None:
        """Add a file that has not been finished for an hour to the problems: it may never be."""
        if now - self._unfinished_since.setdefault(relpath, now) < _UNFINISHED_PROBLEM_AFTER:
            return
        self._add(relpath, "unfinished", _UNFINISHED, UNFINISHED_HINT, size, waits=True)

    def _has_download(self, notes: bytes) -> bool:
        """Return whether the file exists that a file with the name of `_AMBIGUOUS_NOTES` is about."""
        with suppress(OSError):
            return stat.S_ISREG(self._folder.stat(notes.removesuffix(_AMBIGUOUS_NOTES)).st_mode)
        return False

    def _companion_age(self, relpath: bytes) -> float | None:
        """Return the seconds since the last change of the companions of a file, None if it has none."""
        ages: list[float] = []
        parent, _, name = relpath.rpartition(b"/")
        with self._folder.directory(parent) as directory:
            for suffix in COMPANION_SUFFIXES:
                with suppress(OSError):  # there is none, or its name would be too long
                    status = os.stat(name + suffix, dir_fd=directory, follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        ages.append(_seconds_unchanged(status))
        return min(ages, default=None)

    def _add_ineligible(self, relpath: bytes, why: Ineligible, size: int) -> None:
        self._add(relpath, why, _ERRORS[why], _HINTS[why], size)

    def _add(
        self,
        relpath: bytes,
        reason: str,
        error: str,
        hint: str,
        size: int | None = None,
        *,
        waits: bool = False,
    ) -> None:
        """Add a problem; log it once, as that of a file that waits or of one that is ignored."""
        event = events.ARCHIVE_WAITING if waits else events.ARCHIVE_IGNORED
        if self._problems.add(relpath, reason, error, hint, size):
            self._log.emit(
                event,
                drop=self._drop,
                archive=relpath,
                size_bytes=size,
                reason=reason,
                error=error,
                hint=hint,
            )


def _has_room(fd: int) -> bool:
    """Return whether writing to a file could succeed, as far as its filesystem reports its free space.

    True for a read-only filesystem: nothing is written there, and it never has free space.
    """
    status = os.fstatvfs(fd)
    return status.f_bavail > 0 or status.f_blocks == 0 or bool(status.f_flag & os.ST_RDONLY)


def _seconds_unchanged(status: os.stat_result) -> float:
    """Return the seconds since a file was changed, or got the time that it has."""
    return _seconds_since(max(status.st_mtime, status.st_ctime))


def _seconds_since(changed_at: float) -> float:
    """Return the age of a change; a time far in the future, of a wrong clock, counts as long ago."""
    return abs(time.time() - changed_at)
