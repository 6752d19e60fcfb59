"""The problems of one drop folder, kept in the ledger for as long as they last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from backupd.core.archive_formats import Damage
from backupd.core.drop_problem import (
    NOT_ANSWERING,
    NOT_CONFIGURED,
    NOT_LISTED,
    NOT_MOVED,
    SUSPICIOUS,
    DropProblem,
)
from backupd.core.policy import Reason

_MAX_LISTED = 10_000
"""Problems that are listed one by one; further ones are only counted. The limit bounds memory and ledger."""


_NOT_FROM_SCANS = frozenset((NOT_ANSWERING, NOT_CONFIGURED, NOT_MOVED, SUSPICIOUS, Reason.FAILS_ALONE))
"""Reasons of problems that last until something else than a scan ends them."""

_SUSPICIOUS_HINT = (
    "check the backup job of the device, and have it send another backup; this one is listed for 7 days, or"
    " until an archive of the same name looks whole"
)


class ProblemStore(Protocol):
    """The part of the ledger that stores problems; see `Ledger`."""

    def problems(self, drop: str | None = None) -> list[DropProblem]:
        """See `Ledger.problems`."""
        ...

    def save_problems(self, found: Sequence[DropProblem], solved: Sequence[DropProblem]) -> None:
        """See `Ledger.save_problems`."""
        ...


class ProblemList:
    """The files of one drop that will not be sent as things are, and the folder itself while it fails.

    Each scan finds the lasting problems again; the others are forgotten at its end. For the thread of the
    drop's intake.
    """

    def __init__(self, drop: str, ledger: ProblemStore) -> None:
        self._drop = drop
        self._ledger = ledger
        self._problems: dict[bytes, DropProblem] = {}
        """The listed problems by path, empty for the folder; a file has one at a time."""
        self._earlier: dict[bytes, dict[str, DropProblem]] = {}
        """Those of an earlier run by path and reason, until a scan of this run has not found them."""
        self._replaced: dict[bytes, dict[str, DropProblem]] = {}
        """Those that a listed path had before its present one, by reason: they are not new if they return."""
        self._found: set[bytes] = set()
        """The listed paths with a problem that was found since the scan began."""
        self._unlisted = 0
        """Problems that were found since the last scan ended and are not listed."""
        self._suspicious: dict[bytes, DropProblem] = {}
        """The problems of queued archives that look damaged, by path, the oldest first."""
        self._changed: dict[tuple[bytes, str], DropProblem] = {}
        """Problems that the ledger doesn't have yet, by path and reason."""
        self._solved: list[DropProblem] = []
        """Problems that the ledger still has, unless they have come back."""

    @property
    def is_full(self) -> bool:
        """Whether further problems are not listed."""
        return len(self._problems) - (b"" in self._problems) >= _MAX_LISTED

    def __contains__(self, relpath: object) -> bool:
        return relpath in self._problems

    def reason(self, relpath: bytes) -> str:
        """Return the reason of the problem of a path that scans find again, empty if it has none."""
        known = self._problems.get(relpath)
        return known.reason if known else ""

    def load(self) -> None:
        """Read the problems of an earlier run, which keep their age; raises LedgerError."""
        problems = self._ledger.problems(self._drop)
        self._earlier = {}
        for problem in problems:
            if problem.reason not in _NOT_FROM_SCANS:
                self._earlier.setdefault(problem.relpath, {})[problem.reason] = problem
        self._suspicious = {p.relpath: p for p in problems if p.reason == SUSPICIOUS}

    def earlier(self, relpath: bytes, reason: str) -> DropProblem | None:
        """Return the problem that a file had in an earlier run, unless this run has found it already."""
        return self._earlier.get(relpath, {}).get(reason)

    def add(self, relpath: bytes, reason: str, error: str, hint: str, size: int | None = None) -> bool:
        """Add a problem, or confirm it; return whether it is new in this run.

        A path with several problems in turn keeps the age of each, and none of them is new again.
        """
        known = self._problems.get(relpath)
        if known is None and self.is_full:
            self._unlisted += 1
            return False
        self._found.add(relpath)
        if known is not None and known.reason == reason:
            return False
        if known is not None:
            self._solve(known)
            self._replaced.setdefault(relpath, {})[known.reason] = known
        returned = self._replaced.get(relpath, {}).pop(reason, None)
        earlier = returned or self._earlier.get(relpath, {}).pop(reason, None)
        since = earlier.since if earlier else datetime.now(UTC)
        self._set(DropProblem(self._drop, relpath, reason, since, error, hint, size))
        return returned is None

    def remove(self, relpath: bytes) -> None:
        """Remove the problem of a path, if it has one."""
        self._solve(self._problems.pop(relpath, None))
        self._replaced.pop(relpath, None)

    def remove_all(self, relpath: bytes) -> None:
        """Remove the problem of a path, and those of an earlier run: its file is in the ledger."""
        self.remove(relpath)
        self._solved += self._earlier.pop(relpath, {}).values()

    def archive_queued(self, relpath: bytes, suspicion: Damage | None, size: int) -> None:
        """Add or remove the problem of an archive that is queued with or without a suspicion.

        It lasts for `SUSPICIOUS_FOR`, wherever the file is, or until another archive of this name is queued.
        """
        self._solve(self._suspicious.pop(relpath, None))
        if suspicion is None:
            return
        if len(self._suspicious) >= _MAX_LISTED:
            self._solve(self._suspicious.pop(next(iter(self._suspicious))))
        error = f"it was queued although it looks {suspicion.reason}: {suspicion.error}"
        problem = DropProblem(
            self._drop, relpath, SUSPICIOUS, datetime.now(UTC), error, _SUSPICIOUS_HINT, size
        )
        self._suspicious[relpath] = self._changed[relpath, SUSPICIOUS] = problem

    def recheck(self, relpath: bytes, check: Callable[[], None]) -> None:
        """Call `check`, and remove the problem of a path unless it is found again."""
        self._found.discard(relpath)
        check()
        if relpath not in self._found:
            self.remove(relpath)

    def scan_started(self) -> None:
        """Begin to note which problems are found."""
        self._found.clear()

    def scan_ended(self, is_examined: Callable[[bytes], bool]) -> None:
        """Forget the problems that a complete scan has not found.

        `is_examined` returns whether the file of a path is checked again later, independently of scans.
        """
        for relpath in [path for path in self._problems if path not in self._found]:
            if not is_examined(relpath):
                self.remove(relpath)
        for relpath in [path for path in self._earlier if not is_examined(path)]:
            self._solved += self._earlier.pop(relpath).values()
        if self._unlisted:
            self._set(self._not_listed(self._unlisted))
        self._unlisted = 0

    def save(self) -> None:
        """Write what has changed to the ledger; raises LedgerError, and a later call repeats it."""
        if not self._changed and not self._solved:
            return
        lasting = {(p.relpath, p.reason) for p in [*self._problems.values(), *self._suspicious.values()]}
        solved = [p for p in self._solved if (p.relpath, p.reason) not in lasting]
        self._ledger.save_problems([*self._changed.values()], solved)
        self._changed, self._solved = {}, []

    def _set(self, problem: DropProblem) -> None:
        self._problems[problem.relpath] = self._changed[problem.relpath, problem.reason] = problem

    def _solve(self, problem: DropProblem | None) -> None:
        if problem is not None:
            self._changed.pop((problem.relpath, problem.reason), None)
            self._solved.append(problem)

    def _not_listed(self, files: int) -> DropProblem:
        """Return the problem that stands for those beyond the limit."""
        return DropProblem(
            self._drop,
            b"",
            NOT_LISTED,
            datetime.now(UTC),
            f"{files} further files have problems",
            "solve the listed ones, or `exclude` them; the others are listed then",
            files=files,
        )
