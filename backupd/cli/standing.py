"""How things stand with a daemon, taken together from its lock, its ledger and the files it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from backupd.core.health import Facts
from backupd.ledger.history import History
from backupd.ledger.records import DestinationRecord, DropRecord

if TYPE_CHECKING:
    from backupd.config.models import Config


@dataclasses.dataclass(frozen=True, slots=True)
class CertificateAge:
    """A client certificate and the days it still lasts."""

    destination: str
    path: Path
    days_left: int


@dataclasses.dataclass(frozen=True, slots=True)
class DropStanding:
    """A drop folder, how changes in it are noticed, and how things stand with it."""

    name: str
    path: Path
    observer: str
    record: DropRecord


@dataclasses.dataclass(frozen=True, slots=True)
class OverdueDevice:
    """A device whose backup should have come by now; `last_at` is None if there never was one."""

    drop: str
    device: str
    last_at: datetime | None


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """How things stand; `daemon_pid` None where none runs."""

    daemon_pid: int | None
    drops: list[DropStanding]
    destinations: list[DestinationRecord]
    rejected: int
    certificates: list[CertificateAge]
    overdue: list[OverdueDevice]


def take_stock(config: Path) -> Standing:
    """Return how things stand with the daemon of a configuration file."""
    from backupd.config.loading import load  # noqa: PLC0415
    from backupd.ledger.database import daemon_pid, open_for_reading  # noqa: PLC0415

    loaded = load(config)
    pid = daemon_pid(loaded.state_dir)
    with closing(History(open_for_reading(loaded.state_dir))) as history:
        # one that is configured no more may have archives waiting for it
        names = dict.fromkeys([*loaded.destination, *history.destinations_pending()])
        return Standing(
            pid,
            [
                DropStanding(name, drop.path, _observer(drop.path, drop.observer), history.drop(name))
                for name, drop in loaded.drop.items()
            ],
            [history.destination(name) for name in names],
            history.quarantined(),
            list(_certificates(loaded)),
            overdue_devices(loaded, history, datetime.now(UTC)),
        )


def overdue_devices(config: Config, history: History, now: datetime) -> list[OverdueDevice]:
    """Return the devices whose backup should have come by now."""
    found = [d for d in history.devices(now) if d.overdue and d.drop in config.drop]
    return [OverdueDevice(d.drop, d.device, d.last_at) for d in found]


def facts_of(standing: Standing, now: datetime) -> Facts:
    """Return what a monitoring system is told of."""
    oldest = min((d.oldest for d in standing.destinations if d.oldest), default=None)
    return Facts(
        standing.daemon_pid is not None,
        sum(d.pending for d in standing.destinations),
        sum(d.pending_bytes for d in standing.destinations),
        None if oldest is None else now - oldest,
        standing.rejected,
        {d.name: now - (d.since or now) for d in standing.destinations if d.gate not in (None, "open")},
        {c.destination: c.days_left for c in standing.certificates},
        [f"{d.device or 'all'} ({d.drop})" for d in standing.overdue],
    )


def _observer(path: Path, wanted: str) -> str:
    """Return how the daemon notices changes of a folder: `auto` decides by the filesystem."""
    from backupd.drop.mounts import filesystem_of, is_remote  # noqa: PLC0415

    if wanted != "auto":
        return wanted
    try:
        return "polling" if is_remote(filesystem_of(str(path))) else "inotify"
    except OSError:
        return "unknown"


def _certificates(config: Config) -> Iterator[CertificateAge]:
    from cryptography import x509  # noqa: PLC0415

    for name, destination in config.destination.items():
        if destination.cert is None:
            continue
        try:
            certificate = x509.load_pem_x509_certificate(destination.cert.read_bytes())
        except (OSError, ValueError):
            continue  # `check` is the command that explains files
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        yield CertificateAge(name, destination.cert, left.days)
