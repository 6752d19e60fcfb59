"""The heartbeat: logs the state of the daemon and of each destination, at the start and periodically."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import datetime

from backupd.core.errors import LedgerError
from backupd.core.snapshot import DestinationSnapshot, DropSnapshot, Snapshot
from backupd.delivery.recorder import Recorder
from backupd.ledger.port import Ledger
from backupd.telemetry import events
from backupd.telemetry.log import EventLog


class Heartbeat:
    """Logs snapshots of the state; `started` is the monotonic time of the daemon's start."""

    def __init__(self, ledger: Ledger, recorder: Recorder, log: EventLog, started: float) -> None:
        self._recorder = recorder
        self._log = log
        self._started = self._last = started
        self._problems: set[tuple[str, str]] = set()
        """The drops and reasons of the problems that were logged last, before that of the last run."""
        with suppress(LedgerError):
            self._problems = {(each.drop, each.reason) for each in ledger.problem_counts()}
        self._logged_removed: set[str] = set()
        """Names of the removed destinations that were logged to have pending archives."""

    def log(self, snapshot: Snapshot, degraded_drops: int) -> None:
        """Log a heartbeat, and a line for each destination and problem.

        `degraded_drops` is the number of drops without events.
        """
        now, destinations = snapshot.taken_at, snapshot.destinations
        certificates = {each.destination: each for each in snapshot.certificates if each.role == "client"}
        tally, seconds = self._recorder.pop_tally(), self._since_last()
        self._log.emit(
            events.DAEMON_HEARTBEAT,
            uptime_s=self._last - self._started,
            heartbeat_every_s=snapshot.heartbeat_every,
            pending=snapshot.pending,
            pending_by_destination={each.name: each.pending for each in destinations},
            pending_bytes=snapshot.pending_bytes,
            oldest_s=_age(snapshot, now),
            oldest_s_by_destination={each.name: _age(each, now) for each in destinations},
            in_flight=len(snapshot.uploads),
            circuit_by_destination={each.name: each.circuit for each in destinations if each.circuit},
            delivered=tally.delivered,
            delivered_bytes=tally.delivered_bytes,
            rejected=tally.rejected,
            bytes_per_s=round(tally.delivered_bytes / seconds),
            archives_per_s=tally.delivered / seconds,
            quarantined=snapshot.rejected,
            days_left_by_destination={name: each.life.days_left for name, each in certificates.items()}
            or None,
            overdue_devices=len(snapshot.overdue),
            degraded_drops=degraded_drops,
            problems=sum(each.files for each in snapshot.problems),
            memory_bytes=snapshot.memory_bytes,
            open_files=snapshot.open_files,
            open_files_limit=snapshot.open_files_limit,
        )
        for each in destinations:
            if each.circuit is None:
                self._log_removed(each)
            certificate = certificates.get(each.name)
            self._log.emit(
                events.DESTINATION_STATUS,
                destination=each.name,
                circuit=each.circuit,
                pending=each.pending,
                pending_bytes=each.pending_bytes,
                oldest_s=_age(each, now),
                days_left=certificate.life.days_left if certificate else None,
                certificate_state=certificate.life.state if certificate else None,
                expires_at=certificate.expires_at if certificate else None,
            )
        self._log_problems(snapshot)

    def _log_problems(self, snapshot: Snapshot) -> None:
        current = {(each.drop, each.reason) for each in snapshot.problems}
        for drop, reason in sorted(self._problems - current):
            self._log.emit(events.DROP_PROBLEM_SOLVED, drop=drop, reason=reason, problems=0)
        for each in snapshot.problems:
            self._log.emit(
                events.DROP_PROBLEM,
                drop=each.drop,
                reason=each.reason,
                problems=each.files,
                problem_age_s=max((snapshot.taken_at - each.since).total_seconds(), 0.0),
                archive=each.example or None,
                error=each.error,
                hint=each.hint,
            )
        self._problems = current

    def _log_removed(self, destination: DestinationSnapshot) -> None:
        """Log, once, that archives are pending for a destination that is no longer configured."""
        name = destination.name
        if name not in self._logged_removed:
            self._log.emit(
                events.CONFIG_WARNING,
                path=f"destination.{name}",
                error=f"{destination.pending} archives are pending for it, but it is no longer configured",
                hint="add the destination back until its queue is empty; or give up these deliveries:"
                f" `backupd forget --destination {name}`",
            )
        self._logged_removed.add(name)

    def _since_last(self) -> float:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return max(seconds, 0.001)


def _age(queue: Snapshot | DropSnapshot | DestinationSnapshot, now: datetime) -> float:
    """Return the age in seconds of the oldest pending archive; 0 if there is none."""
    return max((now - queue.oldest).total_seconds(), 0.0) if queue.oldest else 0.0
