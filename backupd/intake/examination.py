"""Archives under examination, between finished and admitted: are they whole, are they what was meant.

Here and not before each upload: an archive is read once more for all of its destinations and attempts, what
was examined is what is sent (the fingerprint holds that), and whatever is found is told before any request.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from dataclasses import replace

from backupd.config.models import DropConfig
from backupd.core.checksum import LISTS, archive_of
from backupd.core.inspection import Finding
from backupd.core.model import Rejected, fingerprint_of
from backupd.core.policy import Reason
from backupd.drop.checksum import digest_of, stated_beside
from backupd.drop.folder import DropFolder
from backupd.drop.walk import Complaint
from backupd.intake.found import MISSING, UNUSABLE, Found, compare
from backupd.intake.turns import Case, Steps, Turns
from backupd.ledger.port import Sighting
from backupd.ops import events
from backupd.ops.log import EventLog

_SLICE = 0.05
"""Seconds that the intake's thread is kept from other files."""

_LONGEST = 600.0
"""Seconds of work after which an archive is not inspected further, and after which its digest is given up."""


class _GoneError(Exception):
    """The file is not there any more, or has changed: it will be looked at anew."""


class Examination:
    """Takes sightings, works on them a slice at a time, and returns those to be admitted or rejected.

    `complain` is told of files that can't be read; the rescan tries those again.
    """

    def __init__(
        self, name: str, config: DropConfig, folder: DropFolder, log: EventLog, complain: Complaint
    ) -> None:
        self._drop = name
        self._config = config
        self._folder = folder
        self._log = log
        self._complain = complain
        self._required = config.checksum_file == "required"
        self._grace = config.inspect_grace.total_seconds()
        self._patience = min(self._grace, config.rescan_every.total_seconds())
        self._cases: dict[bytes, Case] = {}
        self._turns = Turns()
        self._held: dict[bytes, Case] = {}

    def __len__(self) -> int:
        return len(self._cases)

    def __contains__(self, relpath: object) -> bool:
        return relpath in self._cases

    def close(self) -> None:
        """Give up what is under way."""
        for case in self._turns.active:
            if case.steps is not None:
                case.steps.close()

    def take(self, sighting: Sighting) -> bool:
        """Take a finished file; False if this drop's files are not examined."""
        if self._config.inspect == "off" and self._config.checksum_file == "off":
            return False
        case = self._cases.get(sighting.relpath)
        if case is not None and case.sighting == sighting:
            self._hasten(case)
            return True
        if case is not None:
            self._drop_case(case)
        self._cases[sighting.relpath] = Case(sighting, time.monotonic())
        self._turns.add(self._cases[sighting.relpath])
        return True

    def noticed(self, relpath: bytes) -> None:
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

    def work(self) -> list[Sighting]:
        """Go on for a moment; return what can be told now, the rejected ones marked as such."""
        done: list[Sighting] = []
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

    def _hasten(self, case: Case) -> None:
        relpath = case.sighting.relpath
        if self._held.pop(relpath, None) is not None:
            self._turns.add(case)
        else:
            case.again = True  # its checksum file may have changed since it was read

    def _drop_case(self, case: Case) -> None:
        relpath = case.sighting.relpath
        if case.steps is not None:
            case.steps.close()
        self._turns.drop(case)
        self._held.pop(relpath, None)
        self._cases.pop(relpath, None)

    def _step(self, case: Case) -> Sighting | None:
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

    def _examine(self, case: Case) -> Steps:
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
            found = None if case.damage is None else Found(case.damage.reason, case.damage.error)
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

    def _compare(self, case: Case, fd: int) -> Generator[None, None, Found | None]:
        sighting = case.sighting
        stated = stated_beside(self._folder, sighting.relpath)
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
                return Found(UNUSABLE, f"its {algorithm} took longer than {_LONGEST:g} s of work")
        return compare(stated, case.digests, required=self._required)

    def _inspect(self, case: Case, fd: int) -> Generator[None, None, Finding | None]:
        from backupd.drop.inspect import LimitReachedError, inspect  # noqa: PLC0415 -- few drops inspect

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
                    found: Finding | None = stop.value
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
            size=sighting.fingerprint.size,
            error=why,
        )
        return None

    def _judge(self, case: Case, found: Found | None) -> Sighting | None:
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

    def _hold(self, case: Case, found: Found, now: float) -> None:
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
            size=sighting.fingerprint.size,
            reason=found.reason,
            error=found.error,
            hint=found.hint,
        )
