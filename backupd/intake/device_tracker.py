"""Who sends what: the devices behind the archives, when one falls silent, and sizes that are not as usual."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from backupd.config.models import DropConfig
from backupd.core.devices import (
    DeviceExpectation,
    device_of,
    newly_overdue_and_recovered,
    overdue_by,
    relative_change,
)
from backupd.core.model import Archive
from backupd.core.names import TextTemplate, template_values
from backupd.dropfolder.drop import Drop
from backupd.ledger.port import DeviceLedger, FileCandidate, TrackedDevice
from backupd.telemetry import events
from backupd.telemetry.log import EventLog


@dataclass(frozen=True, slots=True)
class _Rule:
    by: TextTemplate | None
    pattern: re.Pattern[str] | None
    size_alarm: float | None


class DeviceTracker:
    """Knows the devices of all drops; `tick` is called at each heartbeat.

    What is to be said stands in the ledger until it was said: an end in between says it again, never not.
    """

    def __init__(self, ledger: DeviceLedger, log: EventLog) -> None:
        self._rules: Mapping[str, _Rule] = {}
        self._ledger = ledger
        self._log = log
        self._host = socket.gethostname()
        self._saying = threading.Lock()
        self.overdue = 0
        """How many devices were overdue at the last tick."""

    def configure(self, drops: Mapping[str, Drop], now: datetime) -> None:
        """Take over what a configuration expects; to be called before anything is admitted by it.

        Raises LedgerError, and changes nothing, where the ledger can't be written.
        """
        tracked = {name: drop for name, drop in drops.items() if _is_tracked(drop.config)}
        rules = {name: _rule(drop) for name, drop in tracked.items()}
        self._ledger.set_expectations(
            {name: _expectation(drop.config) for name, drop in tracked.items()}, now
        )
        self._rules = rules

    def with_devices(self, sightings: Sequence[FileCandidate], now: datetime) -> list[FileCandidate]:
        """Return sightings with the devices that they come from."""
        return [replace(s, tracked=self._tracked(s, now)) for s in sightings] if self._rules else [*sightings]

    def device_of(self, archive: Archive) -> str | None:
        """Return the device that an archive comes from, where its drop's devices are of interest."""
        rule = self._rules.get(archive.drop)
        return (
            None if rule is None else device_of(rule.by, template_values(archive, self._host, rule.pattern))
        )

    def tick(self, now: datetime) -> None:
        """Say what is overdue, what has recovered, and what a killed daemon left unsaid of sizes."""
        overdue, recovered = newly_overdue_and_recovered(self._ledger.possibly_overdue(now), now)
        for device in overdue:
            self._log.emit(
                events.DROP_OVERDUE,
                drop=device.drop,
                device=device.name or None,
                last_at=device.last_at,
                overdue_s=overdue_by(device, now),
            )
        for device in recovered:
            self._log.emit(
                events.DROP_RECOVERED, drop=device.drop, device=device.name or None, last_at=device.last_at
            )
        self._ledger.record_alarms(overdue, recovered)
        self.overdue = len(overdue)
        self.log_unusual_sizes()

    def log_unusual_sizes(self) -> None:
        """Say of each archive of unusual size that it is, once."""
        with self._saying:
            found = self._ledger.unusual_archives()
            for one in found:
                self._log.emit(
                    events.ARCHIVE_UNUSUAL_SIZE,
                    drop=one.drop,
                    archive=one.relpath,
                    device=one.device or None,
                    size_bytes=one.size_bytes,
                    median_size_bytes=one.median_size_bytes,
                    change_ratio=relative_change(one.size_bytes, one.median_size_bytes),
                )
            if found:
                self._ledger.mark_reported(found)

    def _tracked(self, s: FileCandidate, now: datetime) -> TrackedDevice | None:
        rule = self._rules.get(s.drop)
        if rule is None:
            return None
        device = self.device_of(Archive(0, s.drop, s.relpath, s.fingerprint, now))
        return None if device is None else TrackedDevice(device, rule.size_alarm)


def _is_tracked(config: DropConfig) -> bool:
    return config.expect.every is not None or config.size_alarm is not None


def _rule(drop: Drop) -> _Rule:
    by = drop.config.expect.by
    return _Rule(TextTemplate.parse(by) if by else None, drop.label_pattern, drop.config.size_alarm)


def _expectation(config: DropConfig) -> DeviceExpectation:
    return DeviceExpectation(config.expect.every, config.expect.by, config.expect.devices)
