"""`backupd status`: what is pending, paused and rejected, and how long certificates last."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, AsJson, ConfigPath
from backupd.cli.output import ago, print_json, print_table, say, size
from backupd.cli.standing import CertificateAge, DropStanding, OverdueDevice, Standing, facts_of, take_stock
from backupd.core.errors import BackupdError, UsageError
from backupd.core.health import Level, Limits, plugin_line
from backupd.core.names import as_text
from backupd.ledger.records import DestinationRecord

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
        _show(take_stock(config), as_json=as_json)
        return
    with suppress(KeyboardInterrupt):
        while True:
            standing = take_stock(config)
            if sys.stdout.isatty() and not as_json:
                sys.stdout.write("\x1b[H\x1b[2J")
            _show(standing, as_json=as_json)
            sys.stdout.flush()
            time.sleep(_EVERY)


def _check(config: Path, warning_age: str, critical_age: str) -> Level:
    from backupd.config.quantities import parse_duration  # noqa: PLC0415

    try:
        try:
            limits = Limits(parse_duration(warning_age), parse_duration(critical_age))
        except ValueError as error:
            raise UsageError(f"--warning-age, --critical-age: {error}") from error
        level, line = plugin_line(facts_of(take_stock(config), datetime.now(UTC)), limits)
    except BackupdError as error:
        level, line = Level.UNKNOWN, f"UNKNOWN - {error.message} ({error.hint})"
    say(" ".join(line.split()))
    return level


def _show(standing: Standing, *, as_json: bool) -> None:
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


def _print_drops(drops: list[DropStanding]) -> None:
    rows = [
        (d.name, d.path, d.observer, d.record.pending, size(d.record.pending_bytes), ago(d.record.oldest),
         as_text(d.record.last) if d.record.last else "-", ago(d.record.last_at))
        for d in drops
    ]  # fmt: skip
    print_table(("drop", "path", "observer", "pending", "bytes", "oldest", "last archive", "noticed"), rows)


def _print_destinations(records: list[DestinationRecord]) -> None:
    rows = [
        (r.name, r.gate or "open", r.pending, size(r.pending_bytes), ago(r.oldest), r.rejected,
         ago(r.last_delivered), _why_paused(r))
        for r in records
    ]  # fmt: skip
    headings = (
        "destination",
        "gate",
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


def _print_certificate(certificate: CertificateAge) -> None:
    days = certificate.days_left
    style = "bold red" if days < _DAYS[1] else "yellow" if days < _DAYS[0] else "green"
    left = f"{days} days left" if days >= 0 else "EXPIRED"
    say(f"certificate of {certificate.destination}: {left} ({certificate.path})", style)


_DAYS = (14, 3)
