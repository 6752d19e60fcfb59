"""Takes the snapshots of the daemon's state: the one record that commands, metrics and notifications read."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from backupd import __version__
from backupd.core.circuit import Circuit, CircuitState
from backupd.core.devices import overdue_by
from backupd.core.drop_problem import ProblemCount
from backupd.core.errors import LedgerError, LedgerHeldError
from backupd.core.names import as_text
from backupd.core.policy import rule_of
from backupd.core.snapshot import (
    MAX_INTERVAL,
    DaemonProblem,
    DestinationSnapshot,
    DropSnapshot,
    OverdueDevice,
    ProblemSnapshot,
    Snapshot,
)
from backupd.daemon.certificates import Certificates
from backupd.daemon.runtime import Runtime
from backupd.ledger.port import Backlog, QueueState
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.process_stats import process_stats

REFRESH_EVERY = 1.0
"""Seconds between two snapshots while something changes."""

_MIN_PAUSE = 100.0
"""Durations of a snapshot until the next one: a long queue takes long to be counted."""

_MAX_HELD = 10.0
"""Seconds for which another process may hold the ledger before that is a problem."""

_EMPTY = Backlog(0, 0, None)

_WITHOUT_CHANGE = frozenset(
    event.name for event in (events.DAEMON_HEARTBEAT, events.DESTINATION_STATUS, events.DROP_PROBLEM)
)
"""Events that are made from a snapshot, and so don't require a new one."""

_LEDGER = "ledger"


class Monitor:
    """Takes snapshots, saves them in the ledger and passes them to the listeners.

    `latest` is the last one. The listeners are called in the main thread and must not block.
    """

    def __init__(self, runtime: Runtime, certificates: Certificates, log: EventLog) -> None:
        self._runtime = runtime
        self._certificates = certificates
        self._host = socket.gethostname()
        self._started_at = datetime.now(UTC)
        self._problems: dict[str, DaemonProblem] = {}
        self._lock = threading.Lock()
        self._has_changed = False
        self._next_refresh = 0.0
        self._foreign_version = 0
        self._taken_at = 0.0
        """When the last snapshot was taken (monotonic)."""
        self._saved_at = time.monotonic()
        self.is_ready = False
        """Whether every drop folder has been scanned since the start; set by the daemon."""
        self.latest: Snapshot | None = None
        self.listeners: list[Callable[[Snapshot], None]] = []
        log.listeners.append(self._note_change)

    def report(self, subject: str, error: str, hint: str = "") -> None:
        """Add a problem of the daemon itself, until it is solved; safe to call from any thread."""
        with self._lock:
            before = self._problems.get(subject)
            since = before.since if before else datetime.now(UTC)
            self._problems[subject] = DaemonProblem(subject, since, error, hint)
            self._has_changed |= self._problems[subject] != before

    def solve(self, subject: str) -> None:
        """Remove a problem of the daemon itself, if there is one; safe to call from any thread."""
        with self._lock:
            self._has_changed |= self._problems.pop(subject, None) is not None

    def refresh(self) -> None:
        """Take a snapshot if something may have changed since the last one."""
        if time.monotonic() < self._next_refresh:
            return
        is_uploading = self.latest is not None and (self.latest.uploads or self._runtime.in_flight)
        with suppress(LedgerError):  # the heartbeat logs it
            is_old = time.monotonic() >= self._taken_at + MAX_INTERVAL.total_seconds()
            if self._has_changed or is_uploading or is_old or self._has_foreign_changes():
                self.take()

    def take(self) -> Snapshot:
        """Take a snapshot now; raises LedgerError after it was passed on, if the ledger cannot be used."""
        self._has_changed = False
        taken_at, started = datetime.now(UTC), time.monotonic()
        self._taken_at = started
        failure = None
        try:
            self._has_foreign_changes()
            snapshot = self._from_ledger()
        except LedgerError as error:
            failure = error
            self.report(_LEDGER, error.message, error.hint)
            snapshot = self.latest or self._blank()
        snapshot = self._with_process(snapshot, taken_at)
        if failure is None:
            self._save(snapshot)
        self.latest = snapshot = replace(snapshot, daemon_problems=self._daemon_problems())
        for listener in self.listeners:
            listener(snapshot)
        self._next_refresh = time.monotonic() + _MIN_PAUSE * (time.monotonic() - started)
        if failure is not None:
            raise failure
        return snapshot

    def _save(self, snapshot: Snapshot) -> None:
        """Save a snapshot; a failure is a problem, unless another process holds the ledger for a moment."""
        others = tuple(problem for problem in self._daemon_problems() if problem.subject != _LEDGER)
        try:
            self._runtime.ledger.check_storage()
            self._runtime.ledger.save_snapshot(replace(snapshot, daemon_problems=others))
        except LedgerError as error:
            is_held = isinstance(error, LedgerHeldError)
            if not is_held or time.monotonic() > self._saved_at + _MAX_HELD:
                self.report(_LEDGER, error.message, error.hint)
        else:
            self._saved_at = time.monotonic()
            self.solve(_LEDGER)

    def _has_foreign_changes(self) -> bool:
        """Return whether another process has written to the ledger since the last call."""
        before, self._foreign_version = self._foreign_version, self._runtime.ledger.foreign_version()
        return self._foreign_version != before

    def _note_change(self, event: events.Event, _values: Mapping[str, Any]) -> None:
        if event.level != "debug" and event.name not in _WITHOUT_CHANGE:
            self._has_changed = True

    def _daemon_problems(self) -> tuple[DaemonProblem, ...]:
        with self._lock:
            return tuple(sorted(self._problems.values(), key=lambda problem: problem.subject))

    def _blank(self) -> Snapshot:
        """Return a snapshot without anything that the ledger knows."""
        config = self._runtime.config
        return Snapshot(
            datetime.now(UTC),
            self._host,
            __version__,
            os.getpid(),
            self._started_at,
            config.heartbeat_every,
            self.is_ready,
        )

    def _with_process(self, snapshot: Snapshot, taken_at: datetime) -> Snapshot:
        """Return a snapshot with the current uploads, certificates and figures of the process."""
        now, process = datetime.now(UTC), process_stats()
        return replace(
            snapshot,
            taken_at=taken_at,
            is_ready=self.is_ready,
            heartbeat_every=self._runtime.config.heartbeat_every,
            uploads=tuple(
                upload for worker in self._runtime.workers if (upload := worker.upload(now)) is not None
            ),
            certificates=tuple(self._certificates.snapshots()),
            memory_bytes=process.memory_bytes,
            open_files=process.open_files,
            open_files_limit=process.open_files_limit,
        )

    def _from_ledger(self) -> Snapshot:
        ledger, config = self._runtime.ledger, self._runtime.config
        queues = ledger.queue_state(list(config.drop), list(config.destination))
        now = ledger.now()
        overdue = [
            OverdueDevice(device.drop, device.name, device.last_at, now - late)
            for device in ledger.possibly_overdue(now)
            if device.drop in config.drop and (late := overdue_by(device, now)) is not None
        ]
        return replace(
            self._blank(),
            drops=tuple(self._drops(queues)),
            destinations=tuple(self._destinations(queues)),
            rejected=queues.quarantined,
            problems=tuple(map(_problem, ledger.problem_counts())),
            devices=ledger.count_devices(),
            overdue=tuple(overdue),
        )

    def _drops(self, queues: QueueState) -> list[DropSnapshot]:
        """Return the configured drops, then earlier folders with archives that wait."""
        ledger, config = self._runtime.ledger, self._runtime.config
        states = {state.drop: state for state in ledger.drop_states()}
        drops = []
        for name, drop in config.drop.items():
            backlog, newest, state = queues.drops.get(name, _EMPTY), queues.newest.get(name), states.get(name)
            drops.append(
                DropSnapshot(
                    name,
                    str(drop.path),
                    backlog.pending,
                    backlog.pending_bytes,
                    backlog.oldest,
                    as_text(newest.relpath) if newest else None,
                    newest.queued_at if newest else None,
                    state.observer if state else "",
                    state.filesystem if state else "",
                    state.fault if state else "",
                    state.blind_spot if state else "",
                    held=self._runtime.pauses.of("drop", name),
                )
            )
        removed = ledger.pending_drops() if queues.drops.keys() - config.drop.keys() else {}
        drops += [
            DropSnapshot(name, backlog.path or "?", waiting.pending, waiting.pending_bytes, waiting.oldest,
                         is_configured=False)
            for name, backlog in removed.items()
            if name not in config.drop
            for waiting in [queues.drops.get(name, _EMPTY)]
        ]  # fmt: skip
        return drops

    def _destinations(self, queues: QueueState) -> list[DestinationSnapshot]:
        """Return the configured destinations, then removed ones with archives that wait."""
        config, running = self._runtime.config, self._runtime.destinations
        destinations = []
        for name in dict.fromkeys([*config.destination, *queues.destinations]):
            backlog = queues.destinations.get(name, _EMPTY)
            queue = DestinationSnapshot(
                name,
                config.destination[name].address if name in config.destination else "",
                backlog.pending,
                backlog.pending_bytes,
                backlog.oldest,
                queues.rejected.get(name, 0),
                queues.last_delivered.get(name),
                held=self._runtime.pauses.of("destination", name),
            )
            if name in running:
                queue = _with_circuit(queue, running[name].circuit.circuit, running[name].circuit.error)
            destinations.append(queue)
        return destinations


def _with_circuit(queue: DestinationSnapshot, circuit: Circuit, error: str | None) -> DestinationSnapshot:
    if circuit.state is CircuitState.WORKING or circuit.reason is None:
        return replace(queue, circuit=circuit.state)
    return replace(
        queue,
        circuit=circuit.state,
        reason=circuit.reason,
        error=error,
        hint=rule_of(circuit.reason).hint,
        since=circuit.since,
        until=circuit.until,
    )


def _problem(count: ProblemCount) -> ProblemSnapshot:
    example = as_text(count.example)
    return ProblemSnapshot(
        count.drop, count.reason, count.files, count.since, example, count.error, count.hint
    )
