"""Periodic work apart from deliveries: the host's clock, overdue devices, and old history."""

from __future__ import annotations

import math
import shlex
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from backupd.core.clock_skew import ZERO, ClockSkew
from backupd.core.drop_problem import (
    NOT_ANSWERING,
    NOT_CONFIGURED,
    SUSPICIOUS,
    SUSPICIOUS_FOR,
    DropProblem,
)
from backupd.core.errors import LedgerError, LedgerHeldError
from backupd.core.folder_place import label_of
from backupd.core.snapshot import OperatorPause
from backupd.daemon.runtime import Runtime
from backupd.intake.device_tracker import DeviceTracker
from backupd.ledger.port import Backlog, ClockReading, DeviceLedger, DropBacklog
from backupd.telemetry import events
from backupd.telemetry.log import EventLog, log_ledger_failure
from backupd.telemetry.thread_watchdog import HUNG_AFTER

_MIN_STEP = timedelta(seconds=1)
"""Steps of the clock below this size are ignored: NTP adjusts the clock all the time."""


class HostClock:
    """Detects when the host's clock is set; safe to use from several threads.

    A host that slept has not set its clock. `last` is the reading that was saved before the start: whether
    the host was off since then or its clock is wrong cannot be known, so that time is distrusted like a step.
    """

    def __init__(self, last: ClockReading | None = None) -> None:
        self._lock = threading.Lock()
        self._offset = _offset()
        self._skew = ClockSkew()
        if last is not None:
            boot = _since_boot()
            before = ClockSkew(last.ahead, boot + last.remaining)
            self._skew = before.after(datetime.now(UTC) - last.seen_at, boot)

    def step(self) -> timedelta:
        """Return by how much the clock was set since the last call; negative if it was set back."""
        with self._lock:
            before, self._offset = self._offset, _offset()
            step = self._offset - before
            if abs(step) < _MIN_STEP:
                return ZERO
            self._skew = self._skew.after(step, _since_boot())
            return step

    def trusted_now(self) -> datetime:
        """Return the time without the steps that are distrusted; archives are removed by this time."""
        with self._lock:
            now = datetime.now(UTC)
            undetected = _offset() - self._offset  # of a step since the last call of `step`
            return now - self._skew.at(_since_boot()) - max(undetected, ZERO)

    def reading(self) -> ClockReading:
        """Return the reading to be saved for the next start."""
        with self._lock:
            now, boot = datetime.now(UTC), _since_boot()
            undetected = _offset() - self._offset  # left out, so that the next start detects it
            remaining = max(self._skew.until - boot, ZERO)
            return ClockReading(now - max(undetected, ZERO), self._skew.at(boot), remaining)


def _since_boot() -> timedelta:
    return timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME))


def _offset() -> timedelta:
    """Return the difference between the host's clock and the time since boot, which is never set."""
    return timedelta(seconds=time.time()) - _since_boot()


_PRUNE_BATCH_SIZE = 200
"""Archives that are deleted in one transaction; the other threads wait a few milliseconds for it."""

_MAX_PRUNE_TIME = 0.2
"""Seconds of one tick; what is left is deleted at the next one."""


class HistoryPruning:
    """Deletes old history from the ledger; `tick` is called at each heartbeat."""

    def __init__(self, ledger: DeviceLedger) -> None:
        self._ledger = ledger

    def tick(self, before: datetime) -> None:
        """Delete archives that ended before a time, for as long as a tick may take."""
        until = time.monotonic() + _MAX_PRUNE_TIME
        while self._ledger.prune(before, _PRUNE_BATCH_SIZE) == _PRUNE_BATCH_SIZE:
            if time.monotonic() >= until:
                return


_SAVE_CLOCK_EVERY = 60.0
"""Seconds between two saved readings; after a crash the clock is distrusted for this much longer."""


def _removed_drop(name: str, backlog: DropBacklog, since: datetime) -> DropProblem:
    """Return the problem of the archives in a folder of which the drop was removed, or has another folder."""
    path, label = backlog.path or "its folder", label_of(name)
    hint = (
        "configure a drop with this path again, under any name, until they are delivered; or give them up:"
        f" `backupd forget --drop {shlex.quote(name)}`"
    )
    if label != name:
        hint = (
            f"they are delivered from there, but new files in it are not: move these to the folder of"
            f" {label}; or {hint}"
        )
    error = f"{_number(backlog.archives)} in {path}, which is no longer a drop folder"
    return DropProblem(name, b"", NOT_CONFIGURED, since, error, hint, files=backlog.archives)


def _removed_destination(name: str, backlog: Backlog, since: datetime) -> DropProblem:
    """Return the problem of the archives that are pending for a destination that was removed."""
    error = f"{_number(backlog.pending)} for the destination {name}, which is no longer configured"
    hint = (
        "configure this destination again until they are delivered; or give them up:"
        f" `backupd forget --destination {shlex.quote(name)}`"
    )
    subject = f"destination:{name}"
    return DropProblem(subject, b"", NOT_CONFIGURED, since, error, hint, files=backlog.pending)


def _number(archives: int) -> str:
    return f"{archives} archive{'' if archives == 1 else 's'} wait{'s' if archives == 1 else ''}"


def _log_held(log: EventLog, pause: OperatorPause) -> None:
    hint = f"`backupd resume {shlex.quote(pause.name)}` ends it"
    name, user, note = pause.name, pause.by or None, pause.note or None
    if pause.kind == "drop":
        log.emit(events.DROP_HELD, drop=name, user=user, until=pause.until, note=note, hint=hint)
    else:
        log.emit(
            events.DESTINATION_HELD, destination=name, user=user, until=pause.until, note=note, hint=hint
        )


def _log_released(log: EventLog, pause: OperatorPause) -> None:
    if pause.kind == "drop":
        log.emit(events.DROP_RELEASED, drop=pause.name)
    else:
        log.emit(events.DESTINATION_RELEASED, destination=pause.name)


class Housekeeping:
    """Logs overdue devices and prunes the history; `tick` is called at each heartbeat.

    `check_clock` and `renew_session` are called every few seconds.
    """

    def __init__(
        self, runtime: Runtime, log: EventLog, device_tracker: DeviceTracker, clock: HostClock
    ) -> None:
        self._clock = clock
        self._runtime = runtime
        self._log = log
        self._device_tracker = device_tracker
        self._pruning = HistoryPruning(runtime.ledger)
        self._hung: dict[str, DropProblem] = {}
        """The problems of the drops with a filesystem that does not answer, by their names."""
        self._has_removed = True
        """Whether the ledger may have problems of archives for which something is no longer configured."""
        self._clock_saved_at = -math.inf
        """When the reading of the clock was saved last (monotonic)."""

    def tick(self) -> None:
        """Do the work of one heartbeat; a ledger that fails is logged and retried at each one."""
        now = self._runtime.ledger.now()
        try:
            self._device_tracker.tick(now)
            self._pruning.tick(self._clock.trusted_now() - self._runtime.config.keep_history_for)
            self._check_removed()
            if self._runtime.ledger.count_pending_dispositions():  # a command may have ended their deliveries
                self._runtime.recorder.recheck_dispositions(wait=False)
            self._runtime.ledger.check_storage()
            self._forget_suspicious()
        except LedgerError as error:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)

    def bring_forward(self, *, now: bool = False) -> None:
        """Limit the wait of each pending delivery to `retry.max`, which only a wrong clock can exceed.

        With `now`, none of them waits. Raises LedgerError if the ledger cannot be written.
        """
        current = self._runtime.ledger.now()
        for name, destination in self._runtime.config.destination.items():
            self._runtime.ledger.bring_forward(name, current if now else current + destination.retry.max)

    def forget_removed_drops(self) -> None:
        """Forget the problems of drops that are no longer configured, and of hangs in an earlier run.

        Drops and destinations with archives that still wait keep theirs.
        """
        with self.logged_failures():
            ledger = self._runtime.ledger
            problems = ledger.problems()
            removed = {p.drop for p in problems if p.reason == NOT_CONFIGURED}
            ledger.forget_drops({*self._runtime.config.drop, *ledger.pending_drops(), *removed})
            hung = [p for p in problems if p.reason == NOT_ANSWERING and p.drop not in self._hung]
            ledger.save_problems([], hung)

    def _check_removed(self) -> None:
        """Save which archives wait in a folder that is no drop folder now, or for a removed destination."""
        ledger, config, now = self._runtime.ledger, self._runtime.config, datetime.now(UTC)
        drops = {n: b for n, b in ledger.pending_drops().items() if n not in config.drop}
        destinations = {n: b for n, b in ledger.backlog().items() if n not in config.destination}
        found = [_removed_drop(name, backlog, now) for name, backlog in drops.items()]
        found += [_removed_destination(name, backlog, now) for name, backlog in destinations.items()]
        if not found and not self._has_removed:
            return
        known = {p.drop: p for p in ledger.problems() if p.reason == NOT_CONFIGURED}
        ended = known.keys() - {problem.drop for problem in found}
        found = [replace(p, since=known[p.drop].since) if p.drop in known else p for p in found]
        ledger.save_problems(found, [known[name] for name in ended])
        self._has_removed = bool(found)

    def _forget_suspicious(self) -> None:
        """End the problems of archives that were queued, although they look damaged, too long ago."""
        before = self._clock.trusted_now() - SUSPICIOUS_FOR
        ledger = self._runtime.ledger
        if any(each.reason == SUSPICIOUS and each.since < before for each in ledger.problem_counts()):
            old = [p for p in ledger.problems() if p.reason == SUSPICIOUS and p.since < before]
            ledger.save_problems([], old)

    def apply_pauses(self) -> None:
        """Begin and end the pauses that people have requested since the last call, and log them."""
        with self.logged_failures():
            began, ended = self._runtime.pauses.replace(self._runtime.ledger.pauses())
            for pause in began:
                _log_held(self._log, pause)
            for pause in ended:
                _log_released(self._log, pause)
            if ended:
                with suppress(LedgerHeldError):  # they are over whether they are deleted or not
                    self._runtime.ledger.delete_ended_pauses(datetime.now(UTC))
                for running in self._runtime.destinations.values():
                    running.notifier.notify()

    def check_drops(self) -> None:
        """Save which drops have a filesystem that does not answer, and which one answers again."""
        for name, running in self._runtime.drops.items():
            seconds = max(watchdog.age() for watchdog in running.watchdogs)
            if seconds > HUNG_AFTER:
                running.drop.folder.is_usable = False
                self._add_hung(name, datetime.now(UTC) - timedelta(seconds=seconds))
            elif name in self._hung and running.intake.ready.is_set():
                with self.logged_failures():
                    self._runtime.ledger.save_problems([], [self._hung[name]])
                    del self._hung[name]

    def take_over(self, silent: Collection[str]) -> None:
        """Save which drops did not answer when the files were examined, and keep those of an earlier run.

        Each is a problem until its first scan has ended.
        """
        with self.logged_failures():
            known = [p for p in self._runtime.ledger.problems() if p.reason == NOT_ANSWERING]
            self._hung = {p.drop: p for p in known if p.drop in self._runtime.drops} | self._hung
        for name in self._runtime.drops.keys() & set(silent):  # the file may have been edited since
            self._add_hung(name, datetime.now(UTC))

    def _add_hung(self, name: str, since: datetime) -> None:
        if name in self._hung:
            return
        path = self._runtime.drops[name].drop.folder.path
        error = "its filesystem does not answer"
        hint = f"check its file server or disk: `findmnt -T {path}`, `dmesg -T`"
        problem = DropProblem(name, b"", NOT_ANSWERING, since, error, hint)
        with self.logged_failures():
            self._runtime.ledger.save_problems([problem], [])
            self._hung[name] = problem

    def save_clock(self) -> None:
        """Save the reading of the clock for the next start; called periodically and at the end."""
        self._clock_saved_at = time.monotonic()
        # another process may hold the ledger; the next reading is saved instead
        with self.logged_failures(), suppress(LedgerHeldError):
            self._runtime.ledger.save_clock_reading(self._clock.reading())

    def renew_session(self) -> int:
        """Keep the claims of this session; return the number of released claims of sessions that are over."""
        try:
            self._runtime.ledger.renew()
            return self._runtime.ledger.reap()
        except LedgerError as error:
            log_ledger_failure(self._log, error)
            return 0

    @contextmanager
    def logged_failures(self) -> Iterator[None]:
        """Log a ledger that fails in the block, and go on after it."""
        try:
            yield
        except LedgerError as error:
            log_ledger_failure(self._log, error)

    def check_clock(self) -> None:
        """Check whether the clock was set; if so, log it and correct the times that depend on it."""
        step = self._clock.step()
        if step != ZERO or time.monotonic() - self._clock_saved_at > _SAVE_CLOCK_EVERY:
            self.save_clock()
        if step == ZERO:
            return
        self._log.emit(
            events.CLOCK_STEPPED,
            step_s=step,
            hint="check the host's clock with `timedatectl`; for a day, retention ignores this step"
            if step > ZERO
            else "check the host's clock with `timedatectl`; deliveries are retried no later than planned",
        )
        if step > ZERO:
            return
        for circuit in self._runtime.circuits.values():
            circuit.shift_earlier(-step)
        with self.logged_failures():
            self.bring_forward()
            drops = {name: running.drop for name, running in self._runtime.drops.items()}
            self._device_tracker.configure(drops, self._runtime.ledger.now())
