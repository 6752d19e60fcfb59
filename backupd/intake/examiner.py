"""Archives under examination, between finished and admitted: are they whole, are they what was meant.

Here and not before each upload: an archive is read once more for all of its destinations and attempts, what
was examined is what is sent (the fingerprint holds that), and whatever is found is told before any request.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from backupd.core.archive_formats import Damage
from backupd.core.checksum import LISTS, archive_of
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
"""Reasons to wait that are none to reject an archive."""

_HINTS = {
    Reason.CHECKSUM_MISMATCH: "it is rejected if neither of the two changes within `inspect_grace`",
    MISSING: 'put its checksum file beside it, or set `checksum_file` to "auto"',
    UNUSABLE: 'expected a small file of "HASH  NAME"; "auto" does without after `inspect_grace`',
}


@dataclass(frozen=True, slots=True)
class HoldReason:
    """Why a file is not to be admitted: one of the policy's reasons, or a reason to wait."""

    reason: str
    error: str

    @property
    def hint(self) -> str:
        """What to do about it while it waits."""
        other = "look at the device; it is rejected if it does not change within `inspect_grace`"
        return _HINTS.get(self.reason, other)


def compare_digests(
    stated: StatedDigests, digests: Mapping[str, Digest], *, required: bool
) -> HoldReason | None:
    """Compare what checksum files state with an archive's digests by algorithm."""
    for file, digest in stated.digests.items():
        found = digests[digest.algorithm]
        if found != digest:
            return HoldReason(Reason.CHECKSUM_MISMATCH, f"{as_text(file)} states {digest}, but it is {found}")
    if stated.digests:
        return None
    for file, why in stated.unusable.items():
        return HoldReason(UNUSABLE, f"{as_text(file)} is of no use: {why}")
    return HoldReason(MISSING, "there is no checksum file for it") if required else None


_AT_ONCE = 4
"""Archives that take turns, so that a large one does not keep the others waiting."""

_LARGE = 64 * 1024 * 1024
"""Bytes of an archive that takes its time; one turn is kept for those that do not."""

Steps = Generator[None, None, HoldReason | None]


@dataclass(slots=True, eq=False)
class ExaminerJob:
    """One content under examination; what was found out about it need not be found out again."""

    sighting: FileCandidate
    since: float
    inspected: bool = False
    damage: Damage | None = None
    digests: dict[str, Digest] = field(default_factory=dict)
    steps: Steps | None = None
    worked: float = 0.0
    due: float = 0.0
    said: set[str] = field(default_factory=set)
    again: bool = False

    @property
    def is_large(self) -> bool:
        """Whether it takes its time."""
        return self.sighting.fingerprint.size > _LARGE


class ExaminerQueue:
    """The cases that have a turn, in `active`, and those that wait for one, each kind in its order."""

    def __init__(self) -> None:
        self.active: deque[ExaminerJob] = deque()
        self._small: dict[bytes, ExaminerJob] = {}
        self._large: dict[bytes, ExaminerJob] = {}

    def __bool__(self) -> bool:
        return bool(self.active or self._small or self._large)

    def add(self, case: ExaminerJob) -> None:
        """Have a case wait for its turn."""
        self._queue_of(case)[case.sighting.relpath] = case

    def drop(self, case: ExaminerJob) -> None:
        """Forget a case, wherever it is."""
        with suppress(ValueError):
            self.active.remove(case)
        self._queue_of(case).pop(case.sighting.relpath, None)

    def begin(self) -> list[ExaminerJob]:
        """Give the free turns away, one at least to a large case and never all; return whose they are."""
        begun = []
        while len(self.active) < _AT_ONCE and (queue := self._next()):
            case = queue.pop(next(iter(queue)))
            self.active.append(case)
            begun.append(case)
        return begun

    def _next(self) -> dict[bytes, ExaminerJob]:
        large = sum(case.is_large for case in self.active)
        if self._large and (not large or (not self._small and large < _AT_ONCE - 1)):
            return self._large
        return self._small

    def _queue_of(self, case: ExaminerJob) -> dict[bytes, ExaminerJob]:
        return self._large if case.is_large else self._small


_SLICE = 0.05
"""Seconds that the intake's thread is kept from other files."""

_LONGEST = 600.0
"""Seconds of work after which an archive is not inspected further, and after which its digest is given up."""


class _GoneError(Exception):
    """The file is not there any more, or has changed: it will be looked at anew."""


class Examiner:
    """Takes sightings, works on them a slice at a time, and returns those to be admitted or rejected.

    `complain` is told of files that can't be read; the rescan tries those again.
    """

    def __init__(self, drop: Drop, log: EventLog, complain: OnUnreadable) -> None:
        config = drop.config
        self._drop = drop.name
        self._config = config
        self._folder = drop.folder
        self._log = log
        self._complain = complain
        self._required = config.checksum_file == "required"
        self._grace = config.inspect_grace.total_seconds()
        self._patience = min(self._grace, config.rescan_every.total_seconds())
        self._cases: dict[bytes, ExaminerJob] = {}
        self._turns = ExaminerQueue()
        self._held: dict[bytes, ExaminerJob] = {}

    def __len__(self) -> int:
        return len(self._cases)

    def __contains__(self, relpath: object) -> bool:
        return relpath in self._cases

    def close(self) -> None:
        """Give up what is under way."""
        for case in self._turns.active:
            if case.steps is not None:
                case.steps.close()

    def add(self, sighting: FileCandidate) -> bool:
        """Take a finished file; False if this drop's files are not examined."""
        if self._config.inspect == "off" and self._config.checksum_file == "off":
            return False
        case = self._cases.get(sighting.relpath)
        if case is not None and case.sighting == sighting:
            self._hasten(case)
            return True
        if case is not None:
            self._drop_case(case)
        self._cases[sighting.relpath] = ExaminerJob(sighting, time.monotonic())
        self._turns.add(self._cases[sighting.relpath])
        return True

    def recheck(self, relpath: bytes) -> None:
        """Look again at whatever waits for a checksum file, if that is what a path is."""
        if not self._held:
            return
        parent, slash, name = relpath.rpartition(b"/")
        if name in LISTS:
            for case in [c for r, c in self._held.items() if r.rpartition(b"/")[0] == parent]:
                self._hasten(case)
        elif (archive := archive_of(name)) is not None:
            held = self._held.get(parent + slash + archive)
            if held is not None:
                self._hasten(held)

    def next_due(self) -> float | None:
        """Return the monotonic time at which there is work, or None."""
        if self._turns:
            return 0.0
        return min((case.due for case in self._held.values()), default=None)

    def run_slice(self) -> list[FileCandidate]:
        """Go on for a moment; return what can be told now, the rejected ones marked as such."""
        done: list[FileCandidate] = []
        now = time.monotonic()
        for case in [case for case in self._held.values() if case.due <= now]:
            self._hasten(case)
        until = now + _SLICE
        while now < until and self._turns:
            for case in self._turns.begin():
                case.steps, case.again = self._examine(case), False
            sighting = self._step(self._turns.active.popleft())
            if sighting is not None:
                done.append(sighting)
            now = time.monotonic()
        return done

    def _hasten(self, case: ExaminerJob) -> None:
        relpath = case.sighting.relpath
        if self._held.pop(relpath, None) is not None:
            self._turns.add(case)
        else:
            case.again = True  # its checksum file may have changed since it was read

    def _drop_case(self, case: ExaminerJob) -> None:
        relpath = case.sighting.relpath
        if case.steps is not None:
            case.steps.close()
        self._turns.drop(case)
        self._held.pop(relpath, None)
        self._cases.pop(relpath, None)

    def _step(self, case: ExaminerJob) -> FileCandidate | None:
        began = time.monotonic()
        try:
            if case.steps is not None:
                next(case.steps)
        except StopIteration as stop:
            case.steps = None
            return self._judge(case, stop.value)
        except _GoneError:
            case.steps = None
            self._drop_case(case)
            return None
        case.worked += time.monotonic() - began
        self._turns.active.append(case)
        return None

    def _examine(self, case: ExaminerJob) -> Steps:
        """Return why a file is not to be admitted, None if it is."""
        sighting = case.sighting
        try:
            fd = self._folder.open(sighting.relpath)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._complain(sighting.relpath, error)
            raise _GoneError from error
        try:
            if fingerprint_of(os.fstat(fd)) != sighting.fingerprint:
                raise _GoneError
            if self._config.inspect != "off" and not case.inspected:
                case.damage = yield from self._inspect(case, fd)
                case.inspected = True
            found = None if case.damage is None else HoldReason(case.damage.reason, case.damage.error)
            if found is None and self._config.checksum_file != "off":
                found = yield from self._compare(case, fd)
            if fingerprint_of(os.fstat(fd)) != sighting.fingerprint:
                raise _GoneError
        except OSError as error:
            self._complain(sighting.relpath, error)
            raise _GoneError from error
        finally:
            os.close(fd)
        return found

    def _compare(self, case: ExaminerJob, fd: int) -> Generator[None, None, HoldReason | None]:
        sighting = case.sighting
        stated = read_checksum_files(self._folder, sighting.relpath)
        for algorithm in {digest.algorithm for digest in stated.digests.values()} - set(case.digests):
            steps = digest_of(fd, sighting.fingerprint.size, algorithm)
            case.worked = 0.0
            while case.worked < _LONGEST:
                try:
                    next(steps)
                except StopIteration as stop:
                    case.digests[algorithm] = stop.value
                    break
                yield
            else:
                return HoldReason(UNUSABLE, f"its {algorithm} took longer than {_LONGEST:g} s of work")
        return compare_digests(stated, case.digests, required=self._required)

    def _inspect(self, case: ExaminerJob, fd: int) -> Generator[None, None, Damage | None]:

        sighting = case.sighting
        name = sighting.relpath.rpartition(b"/")[2]
        steps = inspect(fd, sighting.fingerprint.size, name, full=self._config.inspect == "full")
        case.worked = 0.0
        why = f"it took longer than {_LONGEST:g} s of work"
        try:
            while case.worked < _LONGEST:
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
            archive=sighting.relpath,
            size_bytes=sighting.fingerprint.size,
            error=why,
        )
        return None

    def _judge(self, case: ExaminerJob, found: HoldReason | None) -> FileCandidate | None:
        sighting, now = case.sighting, time.monotonic()
        patient = now < case.since + self._grace
        if case.again:
            self._turns.add(case)
            return None
        if found is None or (found.reason == UNUSABLE and not self._required and not patient):
            self._drop_case(case)
            return sighting
        if found.reason in (MISSING, UNUSABLE) or patient:
            self._hold(case, found, now)
            return None
        self._drop_case(case)
        return replace(sighting, rejected=Rejected(Reason(found.reason), found.error))

    def _hold(self, case: ExaminerJob, found: HoldReason, now: float) -> None:
        sighting, end = case.sighting, case.since + self._grace
        case.due = now + self._config.rescan_every.total_seconds()
        if now < end:
            case.due = min(case.due, end)
        self._held[sighting.relpath] = case
        if now < case.since + self._patience or found.reason in case.said:
            return
        case.said.add(found.reason)
        self._log.emit(
            events.ARCHIVE_WAITING,
            drop=self._drop,
            archive=sighting.relpath,
            size_bytes=sighting.fingerprint.size,
            reason=found.reason,
            error=found.error,
            hint=found.hint,
        )
