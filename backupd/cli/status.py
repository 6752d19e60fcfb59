"""`backupd status`: what is pending, paused and rejected, and how long certificates last."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from backupd.cli.options import DEFAULT_CONFIG, AsJson, ConfigPath
from backupd.cli.output import ago, print_json, print_table, size
from backupd.ledger.history import DestinationRecord, History

if TYPE_CHECKING:
    from backupd.config.models import Config


@dataclasses.dataclass(frozen=True, slots=True)
class CertificateAge:
    """A client certificate and the days it still lasts."""

    destination: str
    path: Path
    days_left: int


def status(config: ConfigPath = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Show how things stand: backlog and gate of each destination, rejected archives, certificates."""
    from backupd.config.loading import load  # noqa: PLC0415
    from backupd.ledger.database import daemon_pid, open_for_reading  # noqa: PLC0415

    loaded = load(config)
    pid = daemon_pid(loaded.state_dir)
    history = History(open_for_reading(loaded.state_dir))
    destinations = [history.destination(name) for name in loaded.destination]
    certificates = list(_certificates(loaded))
    if as_json:
        print_json({"daemon_pid": pid, "destinations": destinations, "certificates": certificates})
        return
    if pid:
        typer.echo(f"daemon: running as process {pid}")
    else:
        typer.echo("daemon: NOT RUNNING; this is how it left things")
        typer.echo("  hint: start it with `systemctl start backupd`, or `backupd run`")
    _print_destinations(destinations)
    for certificate in certificates:
        left = f"{certificate.days_left} days left" if certificate.days_left >= 0 else "EXPIRED"
        typer.echo(f"certificate of {certificate.destination}: {left} ({certificate.path})")


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
