"""The heartbeat: logs the state of the daemon and of each destination, at the start and periodically."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from backupd.core.certificate_life import CertificateLife
from backupd.core.drop_problem import ProblemCount
from backupd.core.errors import LedgerError
from backupd.delivery.circuit_breaker import CircuitBreaker
from backupd.delivery.recorder import Recorder
from backupd.ledger.port import Backlog, Ledger
from backupd.telemetry import events
from backupd.telemetry.log import EventLog, log_ledger_failure
from backupd.telemetry.process_stats import process_stats

_EMPTY = Backlog(0, 0, None)


class Heartbeat:
    """Collects and logs the state; `started` is the monotonic time of the daemon's start."""

    def __init__(self, ledger: Ledger, recorder: Recorder, log: EventLog, started: float) -> None:
        self._ledger = ledger
        self._recorder = recorder
        self._log = log
        self._started = self._last = started
        self._problems: set[tuple[str, str]] = set()
        """The drops and reasons of the problems that were logged last, before that of the last run."""
        with suppress(LedgerError):
            self._problems = {(each.drop, each.reason) for each in ledger.problem_counts()}
        self._logged_removed: set[str] = set()
        """Names of the removed destinations that were logged to have pending archives."""

    def log(
        self,
        circuits: Mapping[str, CircuitBreaker],
        in_flight: int,
        certificates: Mapping[str, CertificateLife] | None = None,
        overdue_devices: int | None = None,
        degraded_drops: int | None = None,
    ) -> None:
        """Log a heartbeat, and a line for each destination.

        `certificates` are the client certificates of the destinations. Values that are None are left out.
        """
        try:
            backlog = self._ledger.backlog()
            quarantined = self._ledger.count_quarantined()
            problems = self._ledger.problem_counts()
        except LedgerError as error:
            log_ledger_failure(self._log, error)
            return
        now = datetime.now(UTC)
        certificates = certificates or {}
        by_destination = {name: backlog.get(name, _EMPTY) for name in [*circuits, *backlog]}
        ages = {name: _age(each, now) for name, each in by_destination.items()}
        tally, process, seconds = self._recorder.pop_tally(), process_stats(), self._since_last()
        self._log.emit(
            events.DAEMON_HEARTBEAT,
            uptime_s=self._last - self._started,
            pending=sum(each.pending for each in backlog.values()),
            pending_by_destination={name: each.pending for name, each in by_destination.items()},
            pending_bytes=sum(each.pending_bytes for each in backlog.values()),
            oldest_s=max(_age(each, now) for each in [*backlog.values(), _EMPTY]),
            oldest_s_by_destination=ages,
            in_flight=in_flight,
            circuit_by_destination={name: circuit.state for name, circuit in circuits.items()},
            delivered=tally.delivered,
            delivered_bytes=tally.delivered_bytes,
            rejected=tally.rejected,
            bytes_per_s=round(tally.delivered_bytes / seconds),
            archives_per_s=tally.delivered / seconds,
            quarantined=quarantined,
            days_left_by_destination={name: life.days_left for name, life in certificates.items()} or None,
            overdue_devices=overdue_devices,
            degraded_drops=degraded_drops,
            problems=sum(each.files for each in problems),
            memory_bytes=process.memory_bytes,
            open_files=process.open_files,
            open_files_limit=process.open_files_limit,
        )
        for name, each in by_destination.items():
            if name not in circuits:
                self._log_removed(name, each)
            life = certificates.get(name)
            self._log.emit(
                events.DESTINATION_STATUS,
                destination=name,
                circuit=circuits[name].state if name in circuits else None,
                pending=each.pending,
                pending_bytes=each.pending_bytes,
                oldest_s=ages[name],
                days_left=life.days_left if life else None,
                certificate_state=life.state if life else None,
            )

        self._log_problems(problems, now)

    def _log_problems(self, problems: Sequence[ProblemCount], now: datetime) -> None:
        current = {(each.drop, each.reason) for each in problems}
        for drop, reason in sorted(self._problems - current):
            self._log.emit(events.DROP_PROBLEM_SOLVED, drop=drop, reason=reason, problems=0)
        for each in problems:
            self._log.emit(
                events.DROP_PROBLEM,
                drop=each.drop,
                reason=each.reason,
                problems=each.files,
                problem_age_s=max((now - each.since).total_seconds(), 0.0),
                archive=each.example or None,
                error=each.error,
                hint=each.hint,
            )
        self._problems = current

    def _log_removed(self, name: str, backlog: Backlog) -> None:
        """Log, once, that archives are pending for a destination that is no longer configured."""
        if name not in self._logged_removed:
            self._log.emit(
                events.CONFIG_WARNING,
                path=f"destination.{name}",
                error=f"{backlog.pending} archives are pending for it, but it is no longer configured",
                hint="add the destination back until its queue is empty; or give up these deliveries:"
                f" `backupd forget --destination {name}`",
            )
        self._logged_removed.add(name)

    def _since_last(self) -> float:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return max(seconds, 0.001)


def _age(backlog: Backlog, now: datetime) -> float:
    """Return the age in seconds of the oldest pending archive; 0 if there is none."""
    return max((now - backlog.oldest).total_seconds(), 0.0) if backlog.oldest else 0.0
