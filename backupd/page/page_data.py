"""Collects the data of the page from the ledger."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from backupd.config.models import Config
from backupd.core.device_matrix import CalendarDay, DeviceRow, device_matrix
from backupd.core.devices import Device
from backupd.core.health import Alarm, HealthLimits, alarms
from backupd.core.snapshot import HourThroughput, Snapshot
from backupd.ledger.history import DeliveryRecord, History, Search

DAYS = 30
"""The default number of days in the matrix."""

MAX_DAYS = 366
"""The largest number of days in the matrix."""

HOURS = 24
"""The number of hours of the throughput."""

ARCHIVES = 20
"""The number of archives that are listed."""

_MAX_LOOK_BACK = 35
"""The largest number of days before the matrix that show when the first archive in it was due."""


@dataclass(frozen=True, slots=True)
class PageData:
    """The data of the page at the time `now`.

    `snapshot` is the last state of the daemon, None if no daemon has used the ledger. `is_running` is whether
    the daemon's process exists. `alarms` begin with the most serious one. `archives` are the deliveries of
    the last archives, the newest first. `calendar` has the days of the `rows`, the oldest first.
    `ledger_error` is why only the state is known, empty if the ledger could be read.
    """

    now: datetime
    snapshot: Snapshot | None = None
    is_running: bool = True
    alarms: Sequence[Alarm] = ()
    throughput: Sequence[HourThroughput] = ()
    calendar: Sequence[CalendarDay] = ()
    rows: Sequence[DeviceRow] = ()
    archives: Sequence[DeliveryRecord] = ()
    ledger_error: str = ""


def collect_page_data(
    history: History, config: Config, now: datetime, days: int = DAYS, latest: Snapshot | None = None
) -> PageData:
    """Return the data of the page; raises LedgerError if the ledger can't be read.

    `latest` is the state in the memory of a running daemon: it may be unable to write it to the ledger.
    """
    host, snapshots = socket.gethostname(), history.snapshots()
    snapshot = next((each for each in snapshots if each.host == host), snapshots[0] if snapshots else None)
    snapshot = latest or snapshot
    is_running = latest is not None or history.daemon_pid() is not None
    devices = [device for device in history.tracked_devices() if device.drop in config.drop]
    calendar = local_days(now, days)
    known_from = now - config.keep_history_for
    first = {drop: max(at, known_from) for drop, at in history.first_queued(list(config.drop)).items()}
    return PageData(
        now,
        snapshot,
        is_running,
        alarms(snapshot, now, HealthLimits(), is_running=is_running),
        history.throughput(list(config.destination), first_hour(now)),
        calendar,
        device_matrix(
            devices,
            history.device_days(list(config.drop), local_days(now, days + _look_back(devices))),
            calendar,
            now,
            first,
        ),
        _last_archives(history, len(config.destination)),
    )


def page_data_without_ledger(latest: Snapshot | None, error: str, now: datetime) -> PageData:
    """Return what a running daemon can show of its last state while the ledger can't be read."""
    return PageData(now, latest, True, alarms(latest, now, HealthLimits()), ledger_error=error)


def _last_archives(history: History, destinations: int) -> list[DeliveryRecord]:
    """Return all deliveries of the last archives, the newest archive first."""
    found = history.find(Search(), ARCHIVES * max(destinations, 1))
    newest = list(dict.fromkeys(record.archive.id for record in found))[:ARCHIVES]
    return [record for record in found if record.archive.id in newest]


def first_hour(now: datetime) -> datetime:
    """Return the begin of the first of the hours that the throughput is shown for."""
    return now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=HOURS - 1)


def local_days(now: datetime, count: int) -> list[CalendarDay]:
    """Return the last `count` days of the host's time zone until today, the oldest first."""
    today, one = now.astimezone().date(), timedelta(days=1)
    dates = (today - number * one for number in reversed(range(count)))
    return [CalendarDay(day.isoformat(), _midnight(day), _midnight(day + one)) for day in dates]


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time()).astimezone().astimezone(UTC)


def _look_back(devices: Sequence[Device]) -> int:
    """Return the number of days before the matrix in which the archive before the first one in it may be."""
    longest = max((device.every for device in devices if device.every), default=timedelta(0))
    return min(math.ceil(longest / timedelta(days=1)), _MAX_LOOK_BACK)
