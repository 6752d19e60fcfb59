"""`backupd status`: the state of the daemon, its drops, destinations, devices and certificates."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, AsJson, ConfigPath
from backupd.cli.output import print_json, print_line, print_table, relative_time
from backupd.config.certificate_files import first_to_renew
from backupd.config.files import certificate_limits
from backupd.config.load import load
from backupd.config.models import Config
from backupd.config.types import parse_duration
from backupd.core.certificate_life import CertificateLife, CertificateState
from backupd.core.drop_problem import DropState, ProblemCount
from backupd.core.errors import BackupdError, UsageError
from backupd.core.health import HealthFacts, HealthLevel, HealthLimits, plugin_line
from backupd.core.names import as_text
from backupd.core.policy import Reason
from backupd.core.units import human_duration, human_size
from backupd.ledger.factory import open_history
from backupd.ledger.history import DestinationRecord, DropRecord, History

_WATCH_INTERVAL = 2.0
"""Seconds between two refreshes of `--watch`."""

_CERTIFICATE_STYLES = {
    CertificateState.VALID: "green",
    CertificateState.EXPIRING: "yellow",
    CertificateState.CRITICAL: "bold red",
    CertificateState.EXPIRED: "bold red",
}


@dataclass(frozen=True, slots=True)
class DropStatus:
    """A drop, its folder, how the daemon notices changes in it, and its archives in the ledger.

    `state` is None until the daemon has opened the folder, and for one with pending archives that is no drop
    folder any more.
    """

    name: str
    path: Path
    state: DropState | None
    record: DropRecord


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """The certificate of a destination, its chain and its token endpoint that needs a renewal first."""

    destination: str
    path: Path
    days_left: int
    expires_at: datetime
    state: CertificateState
    life: CertificateLife


@dataclass(frozen=True, slots=True)
class OverdueDevice:
    """A device that has not sent a backup within its expected interval; `last_at` is None if it never did."""

    drop: str
    device: str
    last_at: datetime | None


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The status of a daemon and its queue; `daemon_pid` is None if it does not run."""

    daemon_pid: int | None
    drops: list[DropStatus]
    destinations: list[DestinationRecord]
    rejected: int
    certificates: list[CertificateStatus]
    overdue: list[OverdueDevice]
    problems: list[ProblemCount]


def status(
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every 2 s, until Ctrl-C.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Print one line for Nagios or Icinga and exit with 0, 1, 2 or 3.")
    ] = False,
    warning_age: Annotated[
        str,
        typer.Option(metavar="TIME", help="With --check: warn if the oldest pending archive is this old."),
    ] = "1h",
    critical_age: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="With --check: critical if the oldest pending archive is this old, or a pause this long.",
        ),
    ] = "6h",
) -> None:
    """Show the backlog and state of each drop and destination, rejected archives and certificates.

    With --check, these are critical: the daemon does not run, a drop folder cannot be used, or a certificate
    expires within `certificate_critical`. These are warnings: a paused destination, a rejected archive, a
    file with a problem, an overdue device, or a certificate that expires within `certificate_warning`.
    """
    if check and (watch or as_json):
        raise UsageError("--check prints one line", "leave --watch and --json out")
    if check:
        raise typer.Exit(_check(config, warning_age, critical_age))
    if not watch:
        _print_status(collect_status(config), as_json=as_json)
        return
    with suppress(KeyboardInterrupt):
        while True:
            daemon_status = collect_status(config)
            if sys.stdout.isatty() and not as_json:
                sys.stdout.write("\x1b[H\x1b[2J")
            _print_status(daemon_status, as_json=as_json)
            sys.stdout.flush()
            time.sleep(_WATCH_INTERVAL)


def collect_status(config: Path) -> DaemonStatus:
    """Return the status of the daemon that runs with a configuration file.

    Raises ConfigError for an unusable configuration, LedgerError for a missing or unreadable ledger.
    """
    loaded, now = load(config), datetime.now(UTC)
    with closing(open_history(loaded)) as history:
        # archives may be pending for a destination that was removed from the configuration
        names = dict.fromkeys([*loaded.destination, *history.destinations_pending()])
        states = {state.drop: state for state in history.drop_states()}
        return DaemonStatus(
            history.daemon_pid(),
            [
                *(
                    DropStatus(name, drop.path, states.get(name), history.drop(name))
                    for name, drop in loaded.drop.items()
                ),
                *(
                    DropStatus(name, Path(backlog.path or "?"), None, history.drop(name))
                    for name, backlog in history.pending_drops().items()
                    if name not in loaded.drop
                ),
            ],
            [history.destination(name) for name in names],
            history.count_quarantined(),
            list(_certificates(loaded, now)),
            _overdue_devices(loaded, history, now),
            history.problem_counts(),
        )


def health_facts(daemon_status: DaemonStatus, now: datetime) -> HealthFacts:
    """Return the facts that `--check` compares with its limits."""
    oldest = min((d.oldest for d in daemon_status.destinations if d.oldest), default=None)
    return HealthFacts(
        daemon_status.daemon_pid is not None,
        sum(d.pending for d in daemon_status.destinations),
        sum(d.pending_bytes for d in daemon_status.destinations),
        None if oldest is None else now - oldest,
        daemon_status.rejected,
        {
            d.name: now - (d.since or now)
            for d in daemon_status.destinations
            if d.circuit not in (None, "working")
        },
        {d.name for d in daemon_status.destinations if d.reason == Reason.LOCAL_FILES},
        {c.destination: c.life for c in daemon_status.certificates},
        [f"{d.device or 'all'} ({d.drop})" for d in daemon_status.overdue],
        daemon_status.problems,
    )


def _certificates(config: Config, now: datetime) -> Iterator[CertificateStatus]:
    """Yield the readable client certificates; `backupd check` reports the others."""
    limits = certificate_limits(config)
    for name, destination in config.destination.items():
        if (first := first_to_renew(destination, limits, now)) is not None:
            path, validity = first
            life = limits.life(validity, now)
            yield CertificateStatus(name, path, life.days_left, validity.ends, life.state, life)


def _overdue_devices(config: Config, history: History, now: datetime) -> list[OverdueDevice]:
    overdue = [d for d in history.devices(now) if d.overdue and d.drop in config.drop]
    return [OverdueDevice(d.drop, d.device, d.last_at) for d in overdue]


def _check(config: Path, warning_age: str, critical_age: str) -> HealthLevel:
    try:
        try:
            limits = HealthLimits(parse_duration(warning_age), parse_duration(critical_age))
        except ValueError as error:
            raise UsageError(f"--warning-age, --critical-age: {error}") from error
        level, line = plugin_line(health_facts(collect_status(config), datetime.now(UTC)), limits)
    except BackupdError as error:
        level, line = HealthLevel.UNKNOWN, f"UNKNOWN - {error.message} ({error.hint})"
    print_line(" ".join(line.split()))
    return level


def _print_status(daemon_status: DaemonStatus, *, as_json: bool) -> None:
    if as_json:
        print_json(daemon_status)
        return
    if daemon_status.daemon_pid:
        print_line(f"daemon: running as process {daemon_status.daemon_pid}", "green")
    else:
        print_line("daemon: NOT RUNNING; the state below is the last one it recorded", "bold red")
        print_line("  hint: start it with `systemctl start backupd`, or `backupd run`")
    _print_drops(daemon_status.drops)
    _print_destinations(daemon_status.destinations)
    if daemon_status.rejected:
        noun = "archive" if daemon_status.rejected == 1 else "archives"
        print_line(
            f"rejected: {daemon_status.rejected} {noun}; see `backupd list --state rejected`", "bold red"
        )
    _print_problems(daemon_status.problems)
    _print_overdue(daemon_status.overdue)
    for certificate in daemon_status.certificates:
        _print_certificate(certificate)


def _print_drops(drops: list[DropStatus]) -> None:
    rows = [
        (d.name, d.path, _observer(d.state), d.record.pending, human_size(d.record.pending_bytes),
         relative_time(d.record.oldest), as_text(d.record.last) if d.record.last else "-",
         relative_time(d.record.last_at))
        for d in drops
    ]  # fmt: skip
    print_table(("drop", "path", "observer", "pending", "bytes", "oldest", "last archive", "queued"), rows)
    for drop in drops:
        if drop.state and drop.state.fault:
            print_line(
                f"{drop.name}: events are missing ({drop.state.fault}); scans find new files", "yellow"
            )
        if drop.state and drop.state.blind_spot:
            print_line(f"{drop.name}: {drop.state.blind_spot}; see `backupd check`")


def _observer(state: DropState | None) -> str:
    """Return how the daemon notices changes of a folder at the moment."""
    if state is None:
        return "-"
    return "scans" if state.fault else state.observer


def _print_destinations(records: list[DestinationRecord]) -> None:
    rows = [
        (r.name, r.circuit or "working", r.pending, human_size(r.pending_bytes), relative_time(r.oldest),
         r.rejected, relative_time(r.last_delivered))
        for r in records
    ]  # fmt: skip
    print_table(("destination", "state", "pending", "bytes", "oldest", "rejected", "last delivered"), rows)
    for record in records:
        if record.reason:
            _print_pause(record)


def _print_pause(record: DestinationRecord) -> None:
    now = datetime.now(UTC)
    duration = human_duration(now - record.since) if record.since else "-"
    retry = relative_time(record.until) if record.until and record.until > now else "at any moment"
    print_line(f"{record.circuit}: {record.name}: {record.reason}: {record.error}", "bold red")
    print_line(f"  for {duration}; next retry {retry}")


def _print_problems(problems: list[ProblemCount]) -> None:
    if not problems:
        return
    rows = [
        (p.drop, p.reason, p.files, relative_time(p.since), as_text(p.example) or "the folder")
        for p in problems
    ]
    print_table(("problems in", "reason", "files", "oldest", "such as"), rows)
    print_line("see `backupd list --problems` for the cause and the remedy of each", "yellow")


def _print_overdue(devices: list[OverdueDevice]) -> None:
    if not devices:
        return
    rows = [(d.drop, d.device, relative_time(d.last_at)) for d in devices]
    print_table(("overdue in", "device", "last backup"), rows)


def _print_certificate(certificate: CertificateStatus) -> None:
    state = certificate.state
    left = "EXPIRED" if state is CertificateState.EXPIRED else f"{certificate.life} left"
    style = _CERTIFICATE_STYLES[state]
    print_line(f"certificate of {certificate.destination}: {left} ({certificate.path})", style)
