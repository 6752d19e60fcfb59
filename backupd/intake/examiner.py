"""Examination of finished files before they are queued: damage and checksums.

It takes place here, not before each upload, because the result holds for all destinations and attempts: the
fingerprint guarantees that the uploaded content is the examined one. Damage is logged before any request.

The `Examiner` of a drop, in the thread of its intake, decides which files are examined and when; the
`ExaminerThread`s of its `ExaminerPool` read them.
"""

from __future__ import annotations

import itertools
import math
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from backupd.core.archive_formats import Damage, Note
from backupd.core.checksum import DIRECTORY_CHECKSUM_FILES, archive_name_of
from backupd.core.model import Digest, Rejected, fingerprint_of, may_have_content_of
from backupd.core.names import as_text
from backupd.core.policy import Reason
from backupd.dropfolder.checksums import StatedDigests, read_checksum_files
from backupd.dropfolder.content import digest_of
from backupd.dropfolder.decompress import ShouldStop, StoppedError, UninspectableError
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import OnUnreadable, close_descriptor
from backupd.dropfolder.inspect import inspect
from backupd.intake.problem_list import ProblemList
from backupd.ledger.port import FileCandidate, UndecidedFile
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.thread_watchdog import ThreadWatchdog

MISSING, UNUSABLE = "checksum_missing", "checksum_unusable"
"""Reasons for which a file is held, but never rejected."""

_HINTS = {
    Reason.CHECKSUM_MISMATCH: "copy the archive and its checksum file again; it is rejected unless one of"
    " them changes within `inspect_grace`",
    MISSING: 'write its checksum file beside it, or set `checksum_file` to "auto"',
    UNUSABLE: 'expected a small file of "HASH  NAME"; with "auto" it is sent unchecked after `inspect_grace`',
}

_DAMAGE_HINTS = {
    "deliver": "check the backup job of the device; it is sent as it is if it has not changed by the end of"
    " `inspect_grace`",
    "reject": "check the backup job of the device; it is rejected unless it changes within `inspect_grace`",
}


@dataclass(frozen=True, slots=True)
class HoldReason:
    """Why a file is not queued: `reason` is `MISSING`, `UNUSABLE` or a `Reason` of the failure policy."""

    reason: str
    error: str

    @property
    def is_damage(self) -> bool:
        """Return whether the file looks truncated or damaged."""
        return self.reason not in _HINTS


def compare_digests(
    stated: StatedDigests, digests: Mapping[str, Digest], *, required: bool
) -> HoldReason | None:
    """Compare the digests in checksum files with those of the archive, keyed by algorithm.

    Returns None if they match, or if there is no checksum file and none is `required`.
    """
    for file, digest in stated.digests.items():
        actual = digests[digest.algorithm]
        if actual != digest:
            error = f"{as_text(file)} states {digest}, but the archive has {actual}"
            return HoldReason(Reason.CHECKSUM_MISMATCH, error)
    if stated.digests:
        return None
    for file, why in stated.unusable.items():
        return HoldReason(UNUSABLE, f"{as_text(file)} cannot be used: {why}")
    return HoldReason(MISSING, "it has no checksum file") if required else None


_ROUNDS = (0.25, 2.0)
"""Seconds after which the first and the second round of an examination end if another one waits.

The next round starts over; the third one takes place in the thread for costly archives, until its end.
"""

_LARGE_BYTES = 64 * 1024 * 1024
"""Size above which an archive has its second round in that thread."""

_TOUCHED_ALGORITHM = "sha256"
"""The algorithm of the digests by which a touched file is compared with itself."""

_MAX_LOG_AFTER = 60.0
"""Seconds after which, at the latest, a held file is a problem; from then on its grace survives a restart."""

_MAX_TIME = 600.0
"""Seconds after which the inspection, or the digest, of an archive is abandoned."""


Task = Callable[[ShouldStop], None]
"""Ends soon after the function that it is called with returns True."""


class ExaminerThread:
    """The queue of one thread of the pool; `run` is the body of the thread.

    Tasks of an earlier round go first, and those of one round in their order. A task that has had its time,
    the seconds in `_ROUNDS`, is stopped as soon as another one waits.
    """

    def __init__(self, name: str) -> None:
        self.watchdog = ThreadWatchdog(name, may_hang=True)
        self._tasks: queue.PriorityQueue[tuple[int, int, Task | None]] = queue.PriorityQueue()
        """Tasks that wait, each with its round and a number; None ends a wait."""
        self._numbers = itertools.count()

    def submit(self, task: Task, number_of_rounds: int) -> None:
        """Append a task that has had this number of rounds."""
        self._tasks.put((number_of_rounds, next(self._numbers), task))

    def wake(self) -> None:
        """End a wait, so that the thread checks its stop event."""
        self._tasks.put((0, next(self._numbers), None))

    def run(self, stop: threading.Event) -> None:
        """Run the tasks in their order until `stop` is set; call `wake` after setting it."""

        def should_stop() -> bool:
            self.watchdog.alive()
            return stop.is_set() or (time.monotonic() >= until and not self._tasks.empty())

        while not stop.is_set():
            rounds, _, task = self._tasks.get()
            if task is not None:
                self.watchdog.alive()
                until = time.monotonic() + (_ROUNDS[rounds] if rounds < len(_ROUNDS) else math.inf)
                task(should_stop)
                self.watchdog.idle()


class ExaminerPool:
    """The two threads that examine the archives of one drop: one for costly archives, one for all others.

    An archive is costly if its examination takes long: it is large, or made to be costly. Which one is shows
    only while it is examined. Another drop has threads of its own, as a read may hang with its filesystem.
    """

    def __init__(self, drop: str) -> None:
        self.quick = ExaminerThread(f"examiner of {drop}")
        self.slow = ExaminerThread(f"examiner of costly archives of {drop}")
        self.threads = (self.quick, self.slow)

    def wake(self) -> None:
        """End the waits of both threads, so that they check their stop event."""
        for thread in self.threads:
            thread.wake()


@dataclass(slots=True, eq=False)
class Examination:
    """The examination of one content, in one or more rounds; finished parts are kept for later rounds.

    `added_at`, at which the grace begins, and `due` are monotonic times. `result` is that of the last round:
    why the file is not queued, the error that ended the round, or None if the file is to be queued.
    """

    candidate: FileCandidate
    added_at: float
    interrupted: int = 0
    """How often a round ended because another examination waited."""
    algorithms: frozenset[str] = frozenset()
    """The algorithms of the digests to calculate."""
    only_digests: bool = False
    """Whether the content was examined before."""
    inspected: bool = False
    finding: Damage | Note | None = None
    digests: dict[str, Digest] = field(default_factory=dict)
    result: HoldReason | OSError | StoppedError | None = None
    due: float = 0.0
    must_repeat: bool = False
    """Whether a checksum file may have changed after it was read."""


class Examiner:
    """Has the finished files of one drop examined, and decides which of them can be queued.

    All methods are called by the intake's thread. `on_examined` is called by a thread of the pool, with an
    examination to pass to `finish`. `on_unreadable` receives the files that can't be read; they are retried
    at the next rescan.
    """

    def __init__(
        self,
        drop: Drop,
        log: EventLog,
        pool: ExaminerPool,
        on_examined: Callable[[Examination], None],
        on_unreadable: OnUnreadable,
        problems: ProblemList,
    ) -> None:
        config = drop.config
        self._drop = drop.name
        self._config = config
        self._folder = drop.folder
        self._log = log
        self._pool = pool
        self._on_examined = on_examined
        self._on_unreadable = on_unreadable
        self._problems = problems
        self._required = config.checksum_file == "required"
        self._grace = config.inspect_grace.total_seconds()
        self._log_after = min(self._grace, config.rescan_every.total_seconds(), _MAX_LOG_AFTER)
        """Seconds after which a held file is a problem."""
        self._closed = threading.Event()
        self._examinations: dict[bytes, Examination] = {}
        """Every examination by the path of its file: those in the pool and those on hold."""
        self._on_hold: dict[bytes, Examination] = {}
        """Those that wait for a change of the file or of its checksum file."""

    def __len__(self) -> int:
        return len(self._examinations)

    def is_examining(self) -> bool:
        """Return whether a file is being examined, or waits for that; not one that is on hold."""
        return len(self._examinations) > len(self._on_hold)

    def __contains__(self, relpath: object) -> bool:
        return relpath in self._examinations

    def add(self, candidate: FileCandidate) -> bool:
        """Accept a finished file; return False if it needs no examination."""
        relpath, added_at = candidate.relpath, time.monotonic()
        is_examined = self._config.inspect != "off" or self._config.checksum_file != "off"
        examination = self._examinations.get(relpath)
        if examination is not None:
            earlier = examination.candidate
            if earlier == candidate and is_examined:
                return True  # it is examined again when it is due, or when its checksum file changes
            if may_have_content_of(candidate.fingerprint, earlier.fingerprint):
                if relpath not in self._on_hold:
                    return True  # the file is being read; the next scan finds that its metadata has changed
                added_at = examination.added_at
        if not is_examined and not candidate.touched:
            return False
        algorithms = frozenset([_TOUCHED_ALGORITHM]) if candidate.touched else frozenset()
        self._start(Examination(candidate, added_at, algorithms=algorithms))
        return True

    def add_digests(self, undecided: UndecidedFile) -> None:
        """Accept a file that was examined before, to calculate digests of its content."""
        candidate = undecided.candidate
        if candidate.relpath not in self._examinations:
            self._start(
                Examination(
                    candidate,
                    time.monotonic(),
                    algorithms=undecided.algorithms,
                    only_digests=True,
                    digests={digest.algorithm: digest for digest in candidate.digests},
                )
            )

    def recheck(self, relpath: bytes) -> None:
        """If a path is a checksum file, examine again the archives that it applies to."""
        parent, slash, name = relpath.rpartition(b"/")
        if name in DIRECTORY_CHECKSUM_FILES:
            for path, examination in list(self._examinations.items()):
                if path.rpartition(b"/")[0] == parent:
                    self._examine_again(examination)
        elif (archive := archive_name_of(name)) is not None:
            affected = self._examinations.get(parent + slash + archive)
            if affected is not None:
                self._examine_again(affected)

    def next_due(self) -> float | None:
        """Return the monotonic time at which a file on hold is to be examined again, or None."""
        return min((examination.due for examination in self._on_hold.values()), default=None)

    def examine_due(self) -> None:
        """Examine again the files on hold that are due."""
        now = time.monotonic()
        for examination in [each for each in self._on_hold.values() if each.due <= now]:
            self._examine_again(examination)

    def finish(self, examination: Examination) -> FileCandidate | None:
        """Return an examined file if it is to be queued, else None.

        `suspicion` or `rejected` is set if it is damaged, as the drop is configured. None if it is held,
        examined again, unreadable, or has changed. It is `touched` if it is not stable yet, with the digest
        of its content.
        """
        candidate, result = examination.candidate, examination.result
        if self._examinations.get(candidate.relpath) is not examination:
            return None  # the file was replaced meanwhile
        if isinstance(result, StoppedError) and examination.interrupted < len(_ROUNDS):
            # others wait; if it ended because the file has changed, the next round ends at once
            is_large = candidate.fingerprint.size > _LARGE_BYTES
            examination.interrupted = len(_ROUNDS) if is_large else examination.interrupted + 1
            self._submit(examination)
            return None
        if not isinstance(result, Exception):
            if examination.must_repeat:
                self._submit(examination)
                return None
            if result is not None:
                self._resume_grace(examination, result)
                if self._is_held(examination, result):
                    self._hold(examination, result)
                    return None
        del self._examinations[candidate.relpath]
        if isinstance(result, OSError):
            self._on_unreadable(candidate.relpath, result)
        if isinstance(result, Exception):
            return None
        found = self._with_result(examination, result)
        if isinstance(examination.finding, Note) and not found.touched:
            self._log_note(candidate, examination.finding)
        return found

    def _with_result(self, examination: Examination, why: HoldReason | None) -> FileCandidate:
        """Return a file that is not held any longer, with its digests, and its suspicion or rejection."""
        candidate, digests = examination.candidate, examination.digests
        touched = candidate.touched and not _has_settled(examination)
        candidate = replace(candidate, digests=tuple(digests.values()), touched=False)
        if why is None or why.reason == UNUSABLE:
            digest = digests.get(_TOUCHED_ALGORITHM)
            return replace(candidate, digests=(digest,), touched=True) if touched and digest else candidate
        reason = Reason(why.reason)
        if why.is_damage and self._config.on_suspicious == "deliver":
            return replace(candidate, suspicion=Damage(reason, why.error))
        return replace(candidate, rejected=Rejected(reason, why.error))

    def close(self) -> None:
        """End all examinations of this drop; `on_examined` may still be called."""
        self._closed.set()

    def _start(self, examination: Examination) -> None:
        """Replace the examination of a path; that of an earlier content ends, as its file has changed."""
        self._on_hold.pop(examination.candidate.relpath, None)
        self._examinations[examination.candidate.relpath] = examination
        self._submit(examination)

    def _submit(self, examination: Examination) -> None:
        thread = self._pool.quick if examination.interrupted < len(_ROUNDS) else self._pool.slow
        thread.submit(partial(self._run, examination), examination.interrupted)

    def _examine_again(self, examination: Examination) -> None:
        if self._on_hold.pop(examination.candidate.relpath, None) is not None:
            self._submit(examination)
        else:
            examination.must_repeat = True

    def _resume_grace(self, examination: Examination, why: HoldReason) -> None:
        """Begin the grace of a file when an earlier run listed it as a problem, or when it was changed since.

        The change time shows the latter, as a program can restore the modification time.
        """
        fingerprint = examination.candidate.fingerprint
        earlier = self._problems.earlier(examination.candidate.relpath, why.reason)
        if earlier is not None and earlier.size_bytes == fingerprint.size:
            age = time.time() - max(earlier.since.timestamp(), fingerprint.ctime_ns / 1e9)
            examination.added_at = min(examination.added_at, time.monotonic() - age)

    def _is_held(self, examination: Examination, why: HoldReason) -> bool:
        """Return whether a file must wait: within its grace, or as long as a required digest is missing."""
        if time.monotonic() < examination.added_at + self._grace or why.reason == MISSING:
            return True
        return why.reason == UNUSABLE and self._required

    def _hold(self, examination: Examination, why: HoldReason) -> None:
        """Keep a file back for `rescan_every`, or until its grace ends; after a while it is a problem.

        Then it is examined less often, and many files not all at once. An event of a change ends the wait.
        """
        now = time.monotonic()
        ends = (examination.added_at + self._log_after, examination.added_at + self._grace)
        is_problem = now >= examination.added_at + self._log_after
        wait = self._config.rescan_every.total_seconds() * (random.uniform(1, 3) if is_problem else 1)
        examination.due = min([now + wait, *(end for end in ends if now < end)])
        self._on_hold[examination.candidate.relpath] = examination
        if is_problem:
            self._add_problem(examination.candidate, why)

    def add_held(self) -> None:
        """Add all files on hold to the problems, so that the next run of the daemon resumes their grace."""
        for examination in self._on_hold.values():
            if isinstance(examination.result, HoldReason):
                self._add_problem(examination.candidate, examination.result)

    def _add_problem(self, candidate: FileCandidate, why: HoldReason) -> None:
        size = candidate.fingerprint.size
        hint = _HINTS.get(why.reason, _DAMAGE_HINTS[self._config.on_suspicious])
        if not self._problems.add(candidate.relpath, why.reason, why.error, hint, size):
            return
        self._log.emit(
            events.ARCHIVE_WAITING,
            drop=self._drop,
            archive=candidate.relpath,
            size_bytes=size,
            reason=why.reason,
            error=why.error,
            hint=hint,
        )

    def _log_note(self, candidate: FileCandidate, note: Note) -> None:
        self._log.emit(
            events.INSPECTION_NOTED,
            drop=self._drop,
            archive=candidate.relpath,
            size_bytes=candidate.fingerprint.size,
            reason=note.reason,
            error=note.text,
        )

    def _run(self, examination: Examination, should_stop: ShouldStop) -> None:
        """Run one round of an examination; called by a thread of the pool."""
        examination.must_repeat = False
        try:
            examination.result = self._examine(examination, should_stop)
        except (OSError, StoppedError) as error:
            examination.result = error
        self._on_examined(examination)

    def _examine(self, examination: Examination, should_stop: ShouldStop) -> HoldReason | None:
        """Return why a file is not to be queued; raise StoppedError if it has changed or is gone."""
        candidate = examination.candidate
        try:
            fd = self._folder.open(candidate.relpath)
        except FileNotFoundError as error:
            raise StoppedError from error

        def must_stop() -> bool:
            if self._closed.is_set() or should_stop():
                return True
            status = os.fstat(fd)
            if status.st_nlink == 0:
                with suppress(OSError):
                    status = self._folder.stat(candidate.relpath)
            is_same = may_have_content_of(fingerprint_of(status), candidate.fingerprint)
            return not is_same or status.st_nlink == 0

        try:
            self._calculate(examination, fd, must_stop)
            if self._config.inspect != "off" and not examination.inspected and not examination.only_digests:
                examination.finding = self._inspect(candidate, fd, must_stop)
                examination.inspected = True
            why = None if examination.only_digests else self._reason_to_hold(examination, fd, must_stop)
            if must_stop():
                raise StoppedError
            if not self._is_content_in_place(candidate, fd, must_stop):
                examination.inspected, examination.digests = False, {}
                raise StoppedError
            return why
        finally:
            close_descriptor(fd)

    def _is_content_in_place(self, candidate: FileCandidate, fd: int, should_stop: ShouldStop) -> bool:
        """Return whether the path has the content that was examined, also if the file was replaced."""
        if os.fstat(fd).st_nlink > 0:
            return True
        try:
            replacement = self._folder.open(candidate.relpath)
        except FileNotFoundError:
            return False
        size, limited = candidate.fingerprint.size, _with_time_limit(should_stop)
        try:
            digests = {digest_of(each, size, _TOUCHED_ALGORITHM, limited) for each in (fd, replacement)}
            return len(digests) == 1
        except UninspectableError:
            return True  # as with every archive that takes too long to examine
        finally:
            close_descriptor(replacement)

    def _reason_to_hold(
        self, examination: Examination, fd: int, should_stop: ShouldStop
    ) -> HoldReason | None:
        """Compare a file with its checksum files; what differs from them is never sent."""
        why = damage = None
        if isinstance(examination.finding, Damage):
            damage = HoldReason(examination.finding.reason, examination.finding.error)
        if self._config.checksum_file != "off" and not (damage and self._config.on_suspicious == "reject"):
            why = self._compare(examination, fd, should_stop)
        if why is None or (why.reason == UNUSABLE and not self._required):
            why = damage or why
        return why

    def _calculate(self, examination: Examination, fd: int, should_stop: ShouldStop) -> None:
        """Calculate the digests that are wanted; the value of one that takes too long is empty."""
        size, digests = examination.candidate.fingerprint.size, examination.digests
        for algorithm in examination.algorithms - set(digests):
            try:
                digests[algorithm] = digest_of(fd, size, algorithm, _with_time_limit(should_stop))
            except UninspectableError:
                digests[algorithm] = Digest(algorithm, "")

    def _inspect(self, candidate: FileCandidate, fd: int, should_stop: ShouldStop) -> Damage | Note | None:
        size, name = candidate.fingerprint.size, candidate.relpath.rpartition(b"/")[2]
        full, limited = self._config.inspect == "full", _with_time_limit(should_stop)
        try:
            return inspect(fd, size, name, full=full, should_stop=limited)
        except UninspectableError as error:
            why = str(error)
        except (OSError, StoppedError):
            raise
        except Exception as error:  # noqa: BLE001 -- a bug must cost neither the archive nor the daemon
            self._log.emit(events.DAEMON_FAILED, error=repr(error), exc_info=error)
            why = repr(error)
        self._log.emit(
            events.INSPECTION_ENDED, drop=self._drop, archive=candidate.relpath, size_bytes=size, error=why
        )
        return None

    def _compare(self, examination: Examination, fd: int, should_stop: ShouldStop) -> HoldReason | None:
        candidate, digests = examination.candidate, examination.digests
        stated = read_checksum_files(self._folder, candidate.relpath)
        for algorithm in {digest.algorithm for digest in stated.digests.values()} - set(digests):
            limited = _with_time_limit(should_stop)
            try:
                digests[algorithm] = digest_of(fd, candidate.fingerprint.size, algorithm, limited)
            except UninspectableError as error:
                return HoldReason(UNUSABLE, f"its {algorithm} is not known: {error}")
        return compare_digests(stated, digests, required=self._required)


def _has_settled(examination: Examination) -> bool:
    """Return whether a touched file has the same content as when it was read before."""
    return examination.digests[_TOUCHED_ALGORITHM] in examination.candidate.digests


def _with_time_limit(should_stop: ShouldStop) -> ShouldStop:
    """Return a `should_stop` that raises UninspectableError once `_MAX_TIME` has passed from now on."""
    until = time.monotonic() + _MAX_TIME

    def limited() -> bool:
        if time.monotonic() >= until:
            raise UninspectableError(f"reading the archive takes longer than {_MAX_TIME:g} s")
        return should_stop()

    return limited
