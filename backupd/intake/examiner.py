"""Examination of finished files before they are queued: damage and checksums.

It takes place here, not before each upload, because the result holds for all destinations and attempts: the
fingerprint guarantees that the uploaded content is the examined one. Damage is logged before any request.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from backupd.core.archive_formats import Damage
from backupd.core.checksum import DIRECTORY_CHECKSUM_FILES, archive_name_of
from backupd.core.model import Digest, Rejected, fingerprint_of
from backupd.core.names import as_text
from backupd.core.policy import Reason
from backupd.dropfolder.checksums import StatedDigests, digest_of, read_checksum_files
from backupd.dropfolder.decompress import LimitReachedError
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import OnUnreadable
from backupd.dropfolder.inspect import inspect
from backupd.ledger.port import FileCandidate
from backupd.telemetry import events
from backupd.telemetry.log import EventLog

MISSING, UNUSABLE = "checksum_missing", "checksum_unusable"
"""Reasons for which a file is held, but never rejected."""

_HINTS = {
    Reason.CHECKSUM_MISMATCH: "copy the archive and its checksum file again; it is rejected unless one of"
    " them changes within `inspect_grace`",
    MISSING: 'write its checksum file beside it, or set `checksum_file` to "auto"',
    UNUSABLE: 'expected a small file of "HASH  NAME"; with "auto" it is sent unchecked after `inspect_grace`',
}

_DAMAGE_HINT = "check the backup job of the device; it is rejected unless it changes within `inspect_grace`"


@dataclass(frozen=True, slots=True)
class HoldReason:
    """Why a file is not queued: `reason` is `MISSING`, `UNUSABLE` or a `Reason` of the failure policy."""

    reason: str
    error: str

    @property
    def hint(self) -> str:
        """Return how to fix it while the file is held."""
        return _HINTS.get(self.reason, _DAMAGE_HINT)


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


ExaminationSteps = Generator[None, None, HoldReason | None]
"""An examination in small steps; returns why the file is not queued, None if it is."""

_MAX_ACTIVE_JOBS = 4
"""Jobs that are worked on in turns, so that a large archive does not delay the others."""

_LARGE_BYTES = 64 * 1024 * 1024
"""Size above which an archive counts as large; one active job is always kept free for smaller ones."""


@dataclass(slots=True, eq=False)
class ExaminerJob:
    """The examination of one content; finished parts of it are kept for later rounds.

    `added_at` and `due` are monotonic times, `work_time` the seconds spent on the current part.
    """

    candidate: FileCandidate
    added_at: float
    inspected: bool = False
    damage: Damage | None = None
    digests: dict[str, Digest] = field(default_factory=dict)
    steps: ExaminationSteps | None = None
    work_time: float = 0.0
    due: float = 0.0
    logged_reasons: set[str] = field(default_factory=set)
    must_repeat: bool = False
    """Whether a checksum file may have changed after it was read."""

    @property
    def is_large(self) -> bool:
        """Whether its examination takes long."""
        return self.candidate.fingerprint.size > _LARGE_BYTES


class ExaminerQueue:
    """The jobs that are worked on, in `active`, and two queues of waiting ones: small and large."""

    def __init__(self) -> None:
        self.active: deque[ExaminerJob] = deque()
        self._small: dict[bytes, ExaminerJob] = {}
        self._large: dict[bytes, ExaminerJob] = {}

    def __bool__(self) -> bool:
        return bool(self.active or self._small or self._large)

    def add(self, job: ExaminerJob) -> None:
        """Append a job to the waiting ones."""
        self._queue_of(job)[job.candidate.relpath] = job

    def remove(self, job: ExaminerJob) -> None:
        """Remove a job, whether it is active or waiting."""
        with suppress(ValueError):
            self.active.remove(job)
        self._queue_of(job).pop(job.candidate.relpath, None)

    def activate(self) -> list[ExaminerJob]:
        """Activate and return waiting jobs up to the limit; large ones get at least one place, never all."""
        activated = []
        while len(self.active) < _MAX_ACTIVE_JOBS and (queue := self._next_queue()):
            job = queue.pop(next(iter(queue)))
            self.active.append(job)
            activated.append(job)
        return activated

    def _next_queue(self) -> dict[bytes, ExaminerJob]:
        large = sum(job.is_large for job in self.active)
        if self._large and (not large or (not self._small and large < _MAX_ACTIVE_JOBS - 1)):
            return self._large
        return self._small

    def _queue_of(self, job: ExaminerJob) -> dict[bytes, ExaminerJob]:
        return self._large if job.is_large else self._small


_SLICE_TIME = 0.05
"""Seconds of one slice, during which the intake's thread handles no other file."""

_MAX_WORK_TIME = 600.0
"""Seconds of work after which the inspection, or the digest, of an archive is abandoned."""


class _AbandonedError(Exception):
    """The file is gone, has changed or can't be read; an event or the next scan brings it again."""


class Examiner:
    """Examines candidates in short slices and returns those that can be queued.

    `on_unreadable` receives the files that can't be read; they are retried at the next rescan.
    """

    def __init__(self, drop: Drop, log: EventLog, on_unreadable: OnUnreadable) -> None:
        config = drop.config
        self._drop = drop.name
        self._config = config
        self._folder = drop.folder
        self._log = log
        self._on_unreadable = on_unreadable
        self._required = config.checksum_file == "required"
        self._grace = config.inspect_grace.total_seconds()
        self._log_after = min(self._grace, config.rescan_every.total_seconds())
        """Seconds after which a held file is logged."""
        self._jobs: dict[bytes, ExaminerJob] = {}
        """Every job by its path: those in the queue and those on hold."""
        self._queue = ExaminerQueue()
        self._on_hold: dict[bytes, ExaminerJob] = {}
        """The jobs that wait for a change of the file or of its checksum file."""

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, relpath: object) -> bool:
        return relpath in self._jobs

    def add(self, candidate: FileCandidate) -> bool:
        """Accept a finished file; return False if this drop's files are not examined."""
        if self._config.inspect == "off" and self._config.checksum_file == "off":
            return False
        job = self._jobs.get(candidate.relpath)
        if job is not None and job.candidate == candidate:
            self._examine_again(job)
            return True
        if job is not None:
            self._remove(job)
        self._jobs[candidate.relpath] = ExaminerJob(candidate, time.monotonic())
        self._queue.add(self._jobs[candidate.relpath])
        return True

    def recheck(self, relpath: bytes) -> None:
        """If a path is a checksum file, examine again the held archives that it applies to."""
        if not self._on_hold:
            return
        parent, slash, name = relpath.rpartition(b"/")
        if name in DIRECTORY_CHECKSUM_FILES:
            for job in [job for path, job in self._on_hold.items() if path.rpartition(b"/")[0] == parent]:
                self._examine_again(job)
        elif (archive := archive_name_of(name)) is not None:
            held = self._on_hold.get(parent + slash + archive)
            if held is not None:
                self._examine_again(held)

    def next_due(self) -> float | None:
        """Return the monotonic time at which there is work, or None."""
        if self._queue:
            return 0.0
        return min((job.due for job in self._on_hold.values()), default=None)

    def run_slice(self) -> list[FileCandidate]:
        """Work for one slice of time; return the files that are done, `rejected` set on the damaged ones."""
        done: list[FileCandidate] = []
        now = time.monotonic()
        for job in [job for job in self._on_hold.values() if job.due <= now]:
            self._examine_again(job)
        until = now + _SLICE_TIME
        while now < until and self._queue:
            for job in self._queue.activate():
                job.steps, job.must_repeat = self._examine(job), False
            candidate = self._run_step(self._queue.active.popleft())
            if candidate is not None:
                done.append(candidate)
            now = time.monotonic()
        return done

    def close(self) -> None:
        """Abandon all active jobs and close their files."""
        for job in self._queue.active:
            if job.steps is not None:
                job.steps.close()

    def _examine_again(self, job: ExaminerJob) -> None:
        if self._on_hold.pop(job.candidate.relpath, None) is not None:
            self._queue.add(job)
        else:
            job.must_repeat = True  # its checksum file may have changed after it was read

    def _remove(self, job: ExaminerJob) -> None:
        relpath = job.candidate.relpath
        if job.steps is not None:
            job.steps.close()
        self._queue.remove(job)
        self._on_hold.pop(relpath, None)
        self._jobs.pop(relpath, None)

    def _run_step(self, job: ExaminerJob) -> FileCandidate | None:
        started = time.monotonic()
        try:
            if job.steps is not None:
                next(job.steps)
        except StopIteration as stop:
            job.steps = None
            return self._decide(job, stop.value)
        except _AbandonedError:
            job.steps = None
            self._remove(job)
            return None
        job.work_time += time.monotonic() - started
        self._queue.active.append(job)
        return None

    def _examine(self, job: ExaminerJob) -> ExaminationSteps:
        candidate = job.candidate
        try:
            fd = self._folder.open(candidate.relpath)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._on_unreadable(candidate.relpath, error)
            raise _AbandonedError from error
        try:
            if fingerprint_of(os.fstat(fd)) != candidate.fingerprint:
                raise _AbandonedError
            if self._config.inspect != "off" and not job.inspected:
                job.damage = yield from self._inspect(job, fd)
                job.inspected = True
            found = None if job.damage is None else HoldReason(job.damage.reason, job.damage.error)
            if found is None and self._config.checksum_file != "off":
                found = yield from self._compare(job, fd)
            if fingerprint_of(os.fstat(fd)) != candidate.fingerprint:
                raise _AbandonedError
        except OSError as error:
            self._on_unreadable(candidate.relpath, error)
            raise _AbandonedError from error
        finally:
            os.close(fd)
        return found

    def _inspect(self, job: ExaminerJob, fd: int) -> Generator[None, None, Damage | None]:
        candidate = job.candidate
        name = candidate.relpath.rpartition(b"/")[2]
        steps = inspect(fd, candidate.fingerprint.size, name, full=self._config.inspect == "full")
        job.work_time = 0.0
        why = f"the inspection took longer than {_MAX_WORK_TIME:g} s"
        try:
            while job.work_time < _MAX_WORK_TIME:
                try:
                    next(steps)
                except StopIteration as stop:
                    found: Damage | None = stop.value
                    return found
                yield
        except LimitReachedError as error:
            why = str(error)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 -- a bug must cost neither the archive nor the daemon
            self._log.emit(events.DAEMON_FAILED, error=repr(error), exc_info=error)
            why = repr(error)
        self._log.emit(
            events.INSPECTION_ENDED,
            drop=self._drop,
            archive=candidate.relpath,
            size_bytes=candidate.fingerprint.size,
            error=why,
        )
        return None

    def _compare(self, job: ExaminerJob, fd: int) -> ExaminationSteps:
        candidate = job.candidate
        stated = read_checksum_files(self._folder, candidate.relpath)
        for algorithm in {digest.algorithm for digest in stated.digests.values()} - set(job.digests):
            steps = digest_of(fd, candidate.fingerprint.size, algorithm)
            job.work_time = 0.0
            while job.work_time < _MAX_WORK_TIME:
                try:
                    next(steps)
                except StopIteration as stop:
                    job.digests[algorithm] = stop.value
                    break
                yield
            else:
                return HoldReason(UNUSABLE, f"its {algorithm} took longer than {_MAX_WORK_TIME:g} s")
        return compare_digests(stated, job.digests, required=self._required)

    def _decide(self, job: ExaminerJob, found: HoldReason | None) -> FileCandidate | None:
        """Return the file if it is to be queued or rejected; None if it is held or examined again."""
        candidate, now = job.candidate, time.monotonic()
        in_grace = now < job.added_at + self._grace
        if job.must_repeat:
            self._queue.add(job)
            return None
        if found is None or (found.reason == UNUSABLE and not self._required and not in_grace):
            self._remove(job)
            return candidate
        if found.reason in (MISSING, UNUSABLE) or in_grace:
            self._hold(job, found, now)
            return None
        self._remove(job)
        return replace(candidate, rejected=Rejected(Reason(found.reason), found.error))

    def _hold(self, job: ExaminerJob, found: HoldReason, now: float) -> None:
        """Keep a file back until the next rescan or the end of its grace, and log why, once."""
        candidate, grace_end = job.candidate, job.added_at + self._grace
        job.due = now + self._config.rescan_every.total_seconds()
        if now < grace_end:
            job.due = min(job.due, grace_end)
        self._on_hold[candidate.relpath] = job
        if now < job.added_at + self._log_after or found.reason in job.logged_reasons:
            return
        job.logged_reasons.add(found.reason)
        self._log.emit(
            events.ARCHIVE_WAITING,
            drop=self._drop,
            archive=candidate.relpath,
            size_bytes=candidate.fingerprint.size,
            reason=found.reason,
            error=found.error,
            hint=found.hint,
        )
