"""`backupd status`: what is pending, paused and rejected, and how long certificates last."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509

from backupd.cli.options import DEFAULT_CONFIG, AsJson, ConfigPath
from backupd.cli.output import ago, print_json, print_table, say
from backupd.config.load import load
from backupd.config.models import Config
from backupd.config.types import parse_duration
from backupd.core.errors import BackupdError, UsageError
from backupd.core.health import HealthFacts, HealthLevel, HealthLimits, plugin_line
from backupd.core.names import as_text
from backupd.core.units import human_size
from backupd.dropfolder.filesystem import filesystem_of, is_remote
from backupd.ledger.sqlite.connection import daemon_pid, open_for_reading
from backupd.ledger.sqlite.queries import DestinationRecord, DropRecord, LedgerQueries


@dataclasses.dataclass(frozen=True, slots=True)
class CertificateStatus:
    """A client certificate and the days it still lasts."""

    destination: str
    path: Path
    days_left: int


@dataclasses.dataclass(frozen=True, slots=True)
class DropStatus:
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
class DaemonStatus:
    """How things stand; `daemon_pid` None where none runs."""

    daemon_pid: int | None
    drops: list[DropStatus]
    destinations: list[DestinationRecord]
    rejected: int
    certificates: list[CertificateStatus]
    overdue: list[OverdueDevice]


def collect_status(config: Path) -> DaemonStatus:
    """Return how things stand with the daemon of a configuration file."""
    loaded = load(config)
    pid = daemon_pid(loaded.state_dir)
    with closing(LedgerQueries(open_for_reading(loaded.state_dir))) as history:
        # one that is configured no more may have archives waiting for it
        names = dict.fromkeys([*loaded.destination, *history.destinations_pending()])
        return DaemonStatus(
            pid,
            [
                DropStatus(name, drop.path, _observer(drop.path, drop.observer), history.drop(name))
                for name, drop in loaded.drop.items()
            ],
            [history.destination(name) for name in names],
            history.count_quarantined(),
            list(_certificates(loaded)),
            overdue_devices(loaded, history, datetime.now(UTC)),
        )


def overdue_devices(config: Config, history: LedgerQueries, now: datetime) -> list[OverdueDevice]:
    """Return the devices whose backup should have come by now."""
    found = [d for d in history.devices(now) if d.overdue and d.drop in config.drop]
    return [OverdueDevice(d.drop, d.device, d.last_at) for d in found]


def health_facts(standing: DaemonStatus, now: datetime) -> HealthFacts:
    """Return what a monitoring system is told of."""
    oldest = min((d.oldest for d in standing.destinations if d.oldest), default=None)
    return HealthFacts(
        standing.daemon_pid is not None,
        sum(d.pending for d in standing.destinations),
        sum(d.pending_bytes for d in standing.destinations),
        None if oldest is None else now - oldest,
        standing.rejected,
        {d.name: now - (d.since or now) for d in standing.destinations if d.circuit not in (None, "working")},
        {c.destination: c.days_left for c in standing.certificates},
        [f"{d.device or 'all'} ({d.drop})" for d in standing.overdue],
    )


def _observer(path: Path, wanted: str) -> str:
    """Return how the daemon notices changes of a folder: `auto` decides by the filesystem."""
    if wanted != "auto":
        return wanted
    try:
        return "polling" if is_remote(filesystem_of(str(path))) else "inotify"
    except OSError:
        return "unknown"


def _certificates(config: Config) -> Iterator[CertificateStatus]:

    for name, destination in config.destination.items():
        if destination.cert is None:
            continue
        try:
            certificate = x509.load_pem_x509_certificate(destination.cert.read_bytes())
        except (OSError, ValueError):
            continue  # `check` is the command that explains files
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        yield CertificateStatus(name, destination.cert, left.days)


_EVERY = 2.0
"""Seconds between two looks of `--watch`."""


def status(
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every 2 s, until Ctrl-C.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Print one line for Nagios or Icinga; ends with 0, 1, 2 or 3.")
    ] = False,
    warning_age: Annotated[
        str, typer.Option(help="With --check: age of the oldest pending archive that is a warning.")
    ] = "1h",
    critical_age: Annotated[
        str, typer.Option(help="With --check: the age, or length of a pause, that is critical.")
    ] = "6h",
) -> None:
    """Show how things stand: backlog of drops and destinations, gates, rejected archives, certificates.

    With --check, a daemon that does not run is critical; a paused destination, a rejected archive, an
    overdue device and a certificate with fewer than 14 days are warnings, with fewer than 3 critical.
    """
    if check and (watch or as_json):
        raise UsageError("--check prints one line", "leave --watch and --json out")
    if check:
        raise typer.Exit(_check(config, warning_age, critical_age))
    if not watch:
        _show(collect_status(config), as_json=as_json)
        return
    with suppress(KeyboardInterrupt):
        while True:
            standing = collect_status(config)
            if sys.stdout.isatty() and not as_json:
                sys.stdout.write("\x1b[H\x1b[2J")
            _show(standing, as_json=as_json)
            sys.stdout.flush()
            time.sleep(_EVERY)


def _check(config: Path, warning_age: str, critical_age: str) -> HealthLevel:

    try:
        try:
            limits = HealthLimits(parse_duration(warning_age), parse_duration(critical_age))
        except ValueError as error:
            raise UsageError(f"--warning-age, --critical-age: {error}") from error
        level, line = plugin_line(health_facts(collect_status(config), datetime.now(UTC)), limits)
    except BackupdError as error:
        level, line = HealthLevel.UNKNOWN, f"UNKNOWN - {error.message} ({error.hint})"
    say(" ".join(line.split()))
    return level


def _show(standing: DaemonStatus, *, as_json: bool) -> None:
    if as_json:
        print_json(standing)
        return
    if standing.daemon_pid:
        say(f"daemon: running as process {standing.daemon_pid}", "green")
    else:
        say("daemon: NOT RUNNING; this is how it left things", "bold red")
        say("  hint: start it with `systemctl start backupd`, or `backupd run`")
    _print_drops(standing.drops)
    _print_destinations(standing.destinations)
    if standing.rejected:
        noun = "archive" if standing.rejected == 1 else "archives"
        say(f"rejected: {standing.rejected} {noun}; see `backupd list --state rejected`", "bold red")
    print_overdue(standing.overdue)
    for certificate in standing.certificates:
        _print_certificate(certificate)


def _print_drops(drops: list[DropStatus]) -> None:
    rows = [
        (d.name, d.path, d.observer, d.record.pending, human_size(d.record.pending_bytes),
         ago(d.record.oldest), as_text(d.record.last) if d.record.last else "-", ago(d.record.last_at))
        for d in drops
    ]  # fmt: skip
    print_table(("drop", "path", "observer", "pending", "bytes", "oldest", "last archive", "noticed"), rows)


def _print_destinations(records: list[DestinationRecord]) -> None:
    rows = [
        (r.name, r.circuit or "working", r.pending, human_size(r.pending_bytes), ago(r.oldest), r.rejected,
         ago(r.last_delivered), _why_paused(r))
        for r in records
    ]  # fmt: skip
    headings = (
        "destination",
        "state",
        "pending",
        "bytes",
        "oldest",
        "rejected",
        "last delivered",
        "why paused",
    )
    print_table(headings, rows)


def _why_paused(r: DestinationRecord) -> str:
    if not r.reason:
        return ""
    soon = ago(r.until) if r.until and r.until > datetime.now(UTC) else "any moment"
    return f"{r.reason}: {r.error} (for {ago(r.since).removesuffix(' ago')}; next try {soon})"


def print_overdue(devices: list[OverdueDevice]) -> None:
    """Print the devices whose backup should have come by now."""
    if not devices:
        return
    rows = [(d.drop, d.device, ago(d.last_at)) for d in devices]
    print_table(("overdue in", "device", "last backup"), rows)


def _print_certificate(certificate: CertificateStatus) -> None:
    days = certificate.days_left
    style = "bold red" if days < _DAYS[1] else "yellow" if days < _DAYS[0] else "green"
    left = f"{days} days left" if days >= 0 else "EXPIRED"
    say(f"certificate of {certificate.destination}: {left} ({certificate.path})", style)


_DAYS = (14, 3)
