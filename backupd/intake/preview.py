"""What the intake would do with each file in a drop folder now: `backupd check --dry-run`."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from backupd.core.drop_problem import DropProblem
from backupd.core.filesystems import default_stable_for
from backupd.core.model import Archive, DeliveryState, may_have_content_of
from backupd.core.units import human_duration
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.earlier_folders import EarlierFolders
from backupd.dropfolder.filesystem import mounts_of
from backupd.dropfolder.folder import walk
from backupd.intake.examiner import Examination, Examiner, ExaminerPool, ExaminerThread, Task
from backupd.intake.problem_list import ProblemList
from backupd.intake.unfinished_files import NO_ROOM, UNFINISHED_HINT, UnfinishedFiles, explain
from backupd.ledger.port import FileCandidate
from backupd.telemetry.events import Event
from backupd.telemetry.log import EventLog


class Verdict(StrEnum):
    """What happens to a file; `waits` is one that is not sent yet, and `queued` one that the ledger has."""

    SENT = "sent"
    QUEUED = "queued"
    DELIVERED = "delivered"
    WAITS = "waits"
    REJECTED = "rejected"
    NOT_SENT = "not sent"


@dataclass(frozen=True, slots=True)
class PreviewedFile:
    """A file, or a folder that is not entered, and what the intake would do with it.

    `reason`, `error` and `hint` are empty if nothing is special. `size_bytes` is None for a folder.
    """

    drop: str
    relpath: bytes
    size_bytes: int | None
    verdict: Verdict
    reason: str = ""
    error: str = ""
    hint: str = ""


class Preview:
    """Judges the files of one drop with the parts of its intake.

    `known` are the archives with an entry in the ledger, and their states, by path. `problems` are those in
    the ledger: a file that was held back before keeps its grace. `on_file` is called for each file.
    """

    def __init__(
        self,
        drop: Drop,
        known: Mapping[bytes, tuple[Archive, DeliveryState]],
        problems: Sequence[DropProblem],
        on_file: Callable[[], None],
    ) -> None:
        self._drop = drop
        self._known = known
        self._on_file = on_file
        self._problems = _FoundProblems(drop.name, problems)
        self._problems.load()
        log = _NoLog()
        self._unfinished_files = UnfinishedFiles(drop, self._problems, log)
        configured = drop.config.stable_for
        self._stable_for = _default_stable_for(drop) if configured is None else configured.total_seconds()
        self._unfinished_files.stable_for = self._stable_for
        self._examined: list[Examination] = []
        pool = ExaminerPool(drop.name)
        pool.quick = pool.slow = _InThisThread(drop.name)
        add_unreadable = self._unfinished_files.add_unreadable
        self._examiner = Examiner(drop, log, pool, self._examined.append, add_unreadable, self._problems)

    def files(self) -> Iterator[PreviewedFile]:
        """Yield all files, by path; raises OSError if the drop folder can't be read."""
        earlier = EarlierFolders(self._drop)
        found: dict[bytes, os.stat_result] = {}
        for relpath, status in walk(self._drop.folder, b"", earlier.skips, self._on_unreadable):
            folder = earlier.containing(relpath)
            if folder is not None:
                self._unfinished_files.add_earlier_folder(relpath, folder)
                continue
            found[relpath] = status
            self._unfinished_files.check(relpath, 0.0, status)
        for relpath in sorted({*found, *self._problems.found}):
            self._on_file()
            judged = self._judge(relpath, found.get(relpath))
            if judged is not None:
                yield judged

    def _on_unreadable(self, relpath: bytes, error: OSError) -> None:
        if not relpath:
            raise error
        self._unfinished_files.add_unreadable(relpath, error)

    def _judge(self, relpath: bytes, status: os.stat_result | None) -> PreviewedFile | None:
        """Return the verdict on a file that was checked once; None for a folder that is ignored."""
        is_folder = status is None or stat.S_ISDIR(status.st_mode)
        size = None if status is None or is_folder else status.st_size
        # as if it had been unchanged since the first check
        candidate = self._unfinished_files.check(relpath, self._stable_for + 1) if status else None
        if candidate is not None:
            return self._judge_candidate(candidate)
        if relpath in self._problems.found:
            return self._with_problem(relpath, size)
        if relpath in self._unfinished_files and status is not None:
            return self._unfinished(relpath, status)
        eligibility = self._drop.eligibility
        why = eligibility.of_directory(relpath) if is_folder else eligibility.of_name(relpath)
        if why is None:
            return None
        return PreviewedFile(self._drop.name, relpath, size, Verdict.NOT_SENT, why, *explain(why))

    def _judge_candidate(self, candidate: FileCandidate) -> PreviewedFile:
        relpath, size = candidate.relpath, candidate.fingerprint.size
        known = self._known.get(relpath)
        if known is not None and may_have_content_of(candidate.fingerprint, known[0].fingerprint):
            is_delivered = known[1] is DeliveryState.DELIVERED
            verdict = Verdict.DELIVERED if is_delivered else Verdict.QUEUED
            return PreviewedFile(self._drop.name, relpath, size, verdict)
        changed_at = max(candidate.fingerprint.mtime_ns, candidate.fingerprint.ctime_ns) / 1e9
        if 0 <= time.time() - changed_at < self._stable_for:
            return self._not_stable(relpath, size)
        finished: FileCandidate | None = candidate
        if self._examiner.add(candidate):
            finished = None
            while self._examined:  # an examination that was interrupted is appended once more
                finished = self._examiner.finish(self._examined.pop())
        if finished is None:
            self._examiner.add_held()
            if relpath in self._problems.found:
                return self._with_problem(relpath, size)
            return self._not_stable(relpath, size)
        if finished.rejected is not None:
            why, verdict = finished.rejected, Verdict.REJECTED
            return PreviewedFile(self._drop.name, relpath, size, verdict, why.reason, why.error)
        if finished.suspicion is not None:
            doubt = finished.suspicion
            return PreviewedFile(self._drop.name, relpath, size, Verdict.SENT, doubt.reason, doubt.error)
        return PreviewedFile(self._drop.name, relpath, size, Verdict.SENT)

    def _with_problem(self, relpath: bytes, size: int | None) -> PreviewedFile:
        reason, error, hint = self._problems.found[relpath]
        waits = reason == NO_ROOM or relpath in self._examiner
        verdict = Verdict.WAITS if waits else Verdict.NOT_SENT
        return PreviewedFile(self._drop.name, relpath, size, verdict, reason, error, hint)

    def _unfinished(self, relpath: bytes, status: os.stat_result) -> PreviewedFile:
        if 0 <= time.time() - max(status.st_mtime, status.st_ctime) < self._stable_for:
            return self._not_stable(relpath, status.st_size)
        error = "a writer has it open, or a companion such as NAME.part is beside it"
        waits = Verdict.WAITS
        return PreviewedFile(
            self._drop.name, relpath, status.st_size, waits, "unfinished", error, UNFINISHED_HINT
        )

    def _not_stable(self, relpath: bytes, size: int) -> PreviewedFile:
        error = f"it was changed less than `stable_for` ({human_duration(self._stable_for)}) ago"
        hint = "it is sent once it has been unchanged for `stable_for`"
        return PreviewedFile(self._drop.name, relpath, size, Verdict.WAITS, "not_stable", error, hint)


def _default_stable_for(drop: Drop) -> float:
    try:
        return default_stable_for(mounts_of(drop.folder.path))
    except OSError:
        return default_stable_for()


class _FoundProblems(ProblemList):
    """The problems that were found, without limit, by path; the ledger stays as it is."""

    def __init__(self, drop: str, problems: Sequence[DropProblem]) -> None:
        super().__init__(drop, _ReadOnly(problems))
        self.found: dict[bytes, tuple[str, str, str]] = {}

    def add(self, relpath: bytes, reason: str, error: str, hint: str, size: int | None = None) -> bool:  # noqa: ARG002
        """Note a problem of a path; see `ProblemList.add`."""
        self.found[relpath] = (reason, error, hint)
        return True


@dataclass(frozen=True, slots=True)
class _ReadOnly:
    """The problems of a drop that the ledger has."""

    stored: Sequence[DropProblem]

    def problems(self, drop: str | None = None) -> list[DropProblem]:  # noqa: ARG002 -- of one drop
        """Return them."""
        return list(self.stored)

    def save_problems(self, found: Sequence[DropProblem], solved: Sequence[DropProblem]) -> None:
        """Save nothing."""


class _InThisThread(ExaminerThread):
    """Runs each task when it is submitted."""

    def submit(self, task: Task, number_of_rounds: int) -> None:  # noqa: ARG002 -- no other task waits
        """Run a task to its end."""
        task(lambda: False)


class _NoLog(EventLog):
    """Logs nothing."""

    def __init__(self) -> None:
        return

    def emit(self, event: Event, *, exc_info: BaseException | None = None, **keys: object) -> None:
        """Drop an event."""
