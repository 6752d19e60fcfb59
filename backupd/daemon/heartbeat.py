"""How things stand, told at the start and ever after: an alarm must not end because the daemon began anew."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime

from backupd.core.errors import LedgerError
from backupd.delivery.circuit_breaker import CircuitBreaker
from backupd.delivery.recorder import Recorder
from backupd.ledger.port import Backlog, Ledger
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.process_stats import process_stats

_NOTHING = Backlog(0, 0, None)


class Heartbeat:
    """Gathers how things stand and logs it; `began` is the monotonic time of the daemon's start."""

    def __init__(self, ledger: Ledger, recorder: Recorder, log: EventLog, began: float) -> None:
        self._ledger = ledger
        self._recorder = recorder
        self._log = log
        self._began = self._last = began
        self._removed: set[str] = set()

    def log(
        self,
        gates: Mapping[str, CircuitBreaker],
        in_flight: int,
        days_left: Mapping[str, int] | None = None,
        overdue: int | None = None,
        blind: int | None = None,
    ) -> None:
        """Log a heartbeat, and a line for each destination.

        `days_left` are those of the destinations' client certificates, `overdue` counts the drops from which
        nothing came for too long, `blind` those that only a scan looks at; what is not known is left out.
        """
        try:
            backlog = self._ledger.backlog()
            quarantined = self._ledger.count_quarantined()
        except LedgerError as error:
            self._log.emit(events.LEDGER_FAILED, error=error.message, hint=error.hint)
            return
        now = datetime.now(UTC)
        days_left = days_left or {}
        mine = {name: backlog.get(name, _NOTHING) for name in [*gates, *backlog]}
        ages = {name: _age(one, now) for name, one in mine.items()}
        tally, process, seconds = self._recorder.pop_tally(), process_stats(), self._since_last()
        self._log.emit(
            events.DAEMON_HEARTBEAT,
            uptime_s=self._last - self._began,
            pending=sum(one.pending for one in backlog.values()),
            pending_by_destination={name: one.pending for name, one in mine.items()},
            pending_bytes=sum(one.pending_bytes for one in backlog.values()),
            oldest_s=max(_age(one, now) for one in [*backlog.values(), _NOTHING]),
            oldest_s_by_destination=ages,
            in_flight=in_flight,
            circuit_by_destination={name: gate.state for name, gate in gates.items()},
            delivered=tally.delivered,
            delivered_bytes=tally.delivered_bytes,
            rejected=tally.rejected,
            bytes_per_s=round(tally.delivered_bytes / seconds),
            archives_per_s=tally.delivered / seconds,
            quarantined=quarantined,
            days_left_by_destination=days_left or None,
            overdue_devices=overdue,
            degraded_drops=blind,
            memory_bytes=process.memory_bytes,
            open_files=process.open_files,
            open_files_limit=process.open_files_limit,
        )
        for name, one in mine.items():
            if name not in gates:
                self._tell_of_removed(name, one)
            self._log.emit(
                events.DESTINATION_STATUS,
                destination=name,
                circuit=gates[name].state if name in gates else None,
                pending=one.pending,
                pending_bytes=one.pending_bytes,
                oldest_s=ages[name],
                days_left=days_left.get(name),
            )

    def _tell_of_removed(self, name: str, backlog: Backlog) -> None:
        """Say, once, that archives wait for a destination that is configured no more."""
        if name not in self._removed:
            self._log.emit(
                events.CONFIG_WARNING,
                path=f"destination.{name}",
                error=f"{backlog.pending} archives are pending for it, and it is configured no more",
                hint="configure it again, until they are delivered; they stay in their drop folders",
            )
        self._removed.add(name)

    def _since_last(self) -> float:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return max(seconds, 0.001)


def _age(backlog: Backlog, now: datetime) -> float:
    """Return the age in seconds of the oldest pending archive; 0 where none is."""
    return max((now - backlog.oldest).total_seconds(), 0.0) if backlog.oldest else 0.0
