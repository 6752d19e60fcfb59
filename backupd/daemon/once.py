"""The end of `backupd run --once`: when nothing is left to do, and the exit code."""

from __future__ import annotations

import time
from datetime import timedelta

from backupd.core.circuit import CircuitState
from backupd.core.drop_problem import SUSPICIOUS
from backupd.core.eligibility import Ineligible
from backupd.core.errors import PENDING, REJECTED, UNAVAILABLE, LedgerError
from backupd.daemon.runtime import Runtime
from backupd.telemetry.thread_watchdog import HUNG_AFTER

CHECK_EVERY = 0.1
"""Seconds between two checks whether something is left to do."""

_CHECKS = 3
"""Checks in a row that must find nothing: an event or result is between two threads for a moment."""

_NOT_PENDING = frozenset((*Ineligible, SUSPICIOUS, "earlier_folder"))
"""Reasons of problems with files that are not to be sent, or were sent already."""


class OnceRun:
    """Decides when a daemon that runs once has done everything that it can do now.

    `timeout` limits the time until then, from the creation of this object on.
    """

    def __init__(self, runtime: Runtime, timeout: timedelta) -> None:
        self._runtime = runtime
        self._until = time.monotonic() + timeout.total_seconds()
        self._found_nothing = 0
        """How many checks in a row have found nothing to do."""

    def is_over(self) -> bool:
        """Return whether nothing is left to do, or the time is over; call it every `CHECK_EVERY` seconds."""
        self._found_nothing = self._found_nothing + 1 if self._is_idle() else 0
        return self._is_done or time.monotonic() >= self._until

    @property
    def _is_done(self) -> bool:
        return self._found_nothing >= _CHECKS

    def _is_idle(self) -> bool:
        """Return whether no file is scanned, examined, uploaded, moved or removed, or will become stable.

        The parts are asked in the order in which a file passes them.
        """
        for drop in self._runtime.drops.values():
            is_hung = any(watchdog.age() > HUNG_AFTER for watchdog in drop.watchdogs)
            if not is_hung and not drop.intake.is_settled:
                return False
        destinations, recorder = self._runtime.destinations.values(), self._runtime.recorder
        are_settled = all(each.is_settled for each in destinations) and recorder.is_settled
        return are_settled and self._runtime.retention.is_settled

    def exit_code(self) -> int:
        """Return the exit code, once the uploads have ended and before the ledger is closed.

        It is that of a rejected archive, else of an unavailable destination with pending deliveries, else of
        anything else that waits: deliveries, files to be moved, and files that are unfinished or unreadable.
        """
        runtime = self._runtime
        if runtime.recorder.rejected:
            return REJECTED
        try:
            waiting = {name for name, backlog in runtime.ledger.backlog().items() if backlog.pending}
            dispositions = runtime.ledger.count_pending_dispositions()
            problems = {problem.reason for problem in runtime.ledger.problem_counts()}
        except LedgerError:
            return UNAVAILABLE
        if any(runtime.circuits[n].state is not CircuitState.WORKING for n in waiting & {*runtime.circuits}):
            return UNAVAILABLE
        unfinished = any(drop.intake.unfinished_files for drop in runtime.drops.values())
        if waiting or dispositions or unfinished or problems - _NOT_PENDING or not self._is_done:
            return PENDING
        return 0
