"""The devices that send archives: which ones are overdue, and which archives have an unusual size."""

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
    overdue_and_recovered,
    overdue_by,
    relative_change,
)
from backupd.core.model import Archive
from backupd.core.names import TextTemplate, template_values
from backupd.dropfolder.drop import Drop
from backupd.ledger.port import DeviceLedger, FileCandidate, TrackedDevice
from backupd.telemetry import events
from backupd.telemetry.log import EventLog


class DeviceTracker:
    """Tracks the devices of all drops; `tick` is called at each heartbeat.

    A report stays in the ledger until it is logged: a crash in between logs it twice, never not at all.
    """

    def __init__(self, ledger: DeviceLedger, log: EventLog) -> None:
        self._tracked_drops: Mapping[str, _TrackedDrop] = {}
        self._ledger = ledger
        self._log = log
        self._host = socket.gethostname()
        self._reporting = threading.Lock()
        self._postponed: Mapping[str, Drop] | None = None
        """The drops to configure before the next archive is queued."""
        self.overdue = 0
        """The number of devices that were overdue at the last tick."""

    def configure(self, drops: Mapping[str, Drop], now: datetime) -> None:
        """Apply the `expect` tables of all drops; call it before any archive of these is queued.

        Raises LedgerError, and changes nothing, if the ledger cannot be written.
        """
        tracked = {name: drop for name, drop in drops.items() if drop.tracks_devices}
        tracked_drops = {name: _TrackedDrop.of(drop) for name, drop in tracked.items()}
        self._ledger.set_expectations(
            {name: _expectation(drop.config) for name, drop in tracked.items()}, now
        )
        self._tracked_drops, self._postponed = tracked_drops, None

    def postpone(self, drops: Mapping[str, Drop]) -> None:
        """Configure these drops later, before the next archive is queued."""
        self._postponed = drops

    def with_devices(self, candidates: Sequence[FileCandidate], now: datetime) -> list[FileCandidate]:
        """Return the candidates together with the devices that sent them; raises LedgerError."""
        if self._postponed is not None:
            self.configure(self._postponed, now)
        if not self._tracked_drops:
            return [*candidates]
        return [replace(each, tracked=self._tracked_device(each, now)) for each in candidates]

    def device_of(self, archive: Archive) -> str | None:
        """Return the device that sent an archive; None if the devices of its drop are not tracked."""
        tracked = self._tracked_drops.get(archive.drop)
        if tracked is None:
            return None
        return device_of(tracked.device_template, template_values(archive, self._host, tracked.label_pattern))

    def tick(self, now: datetime) -> None:
        """Log the overdue and recovered devices, and unusual sizes that an earlier run has not logged."""
        overdue, recovered = overdue_and_recovered(self._ledger.possibly_overdue(now), now)
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
        """Log each archive of unusual size, once."""
        with self._reporting:
            unusual = self._ledger.unusual_archives()
            for archive in unusual:
                self._log.emit(
                    events.ARCHIVE_UNUSUAL_SIZE,
                    drop=archive.drop,
                    archive=archive.relpath,
                    device=archive.device or None,
                    size_bytes=archive.size_bytes,
                    median_size_bytes=archive.median_size_bytes,
                    change_ratio=relative_change(archive.size_bytes, archive.median_size_bytes),
                )
            if unusual:
                self._ledger.mark_reported(unusual)

    def _tracked_device(self, candidate: FileCandidate, now: datetime) -> TrackedDevice | None:
        tracked = self._tracked_drops.get(candidate.drop)
        if tracked is None:
            return None
        device = self.device_of(Archive(0, candidate.drop, candidate.relpath, candidate.fingerprint, now))
        return None if device is None else TrackedDevice(device, tracked.size_alarm)


@dataclass(frozen=True, slots=True)
class _TrackedDrop:
    """The settings of a drop that decide which device sent an archive, and which sizes are unusual."""

    device_template: TextTemplate | None
    label_pattern: re.Pattern[str] | None
    size_alarm: float | None

    @classmethod
    def of(cls, drop: Drop) -> _TrackedDrop:
        by = drop.config.expect.by
        return cls(TextTemplate.parse(by) if by else None, drop.label_pattern, drop.config.size_alarm)


def _expectation(config: DropConfig) -> DeviceExpectation:
    return DeviceExpectation(config.expect.every, config.expect.by, config.expect.devices)
