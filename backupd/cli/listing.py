"""`backupd list` and `backupd show`: deliveries, with their attempts and receipts."""

from __future__ import annotations

from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, AsJson, ConfigPath
from backupd.cli.output import ago, print_json, print_table, size
from backupd.core.model import DeliveryState
from backupd.core.names import as_text, printable
from backupd.core.policy import Reason, rule_of
from backupd.ledger.history import AttemptRecord, DeliveryRecord, History


def list_deliveries(
    config: ConfigPath = DEFAULT_CONFIG,
    state: Annotated[DeliveryState | None, typer.Option(help="Only deliveries of this state.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List deliveries, newest first."""
    records = open_history(config).deliveries(state, limit)
    if as_json:
        print_json(records)
        return
    if not records:
        typer.echo("no deliveries yet" if state is None else f"no {state} deliveries")
        return
    rows = [
        (r.id[:8], r.state, r.archive.drop, as_text(r.archive.relpath), size(r.archive.fingerprint.size),
         r.destination, ago(r.archive.admitted_at), r.attempts, r.reason)
        for r in records
    ]  # fmt: skip
    print_table(
        ("id", "state", "drop", "archive", "size", "destination", "admitted", "attempts", "reason"), rows
    )
    if len(records) == limit:
        typer.echo(f"these are the newest {limit}; --limit shows more", err=True)


def show(
    delivery: Annotated[str, typer.Argument(metavar="ID", help="A delivery's id, or how it begins.")],
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Show a delivery with its attempts and its receipt."""
    history = open_history(config)
    record = history.delivery(delivery)
    attempts = history.attempts(record.id)
    if as_json:
        print_json({"delivery": record, "attempts": attempts})
        return
    _print_delivery(record)
    _print_attempts(attempts)
    if record.receipt:
        typer.echo(f"\nreceipt\n  {printable(record.receipt)}")


def open_history(config: ConfigPath) -> History:
    """Return the questions to the ledger of a configuration."""
    from backupd.config.loading import load  # noqa: PLC0415
    from backupd.ledger.database import open_for_reading  # noqa: PLC0415

    return History(open_for_reading(load(config).state_dir))


def _print_delivery(r: DeliveryRecord) -> None:
    facts = {
        "delivery": r.id,
        "state": r.state,
        "archive": f"{r.archive.drop}: {as_text(r.archive.relpath)}",
        "size": size(r.archive.fingerprint.size),
        "destination": r.destination,
        "admitted": f"{r.archive.admitted_at:%Y-%m-%d %H:%M:%S} UTC ({ago(r.archive.admitted_at)})",
        "ended": f"{r.ended_at:%Y-%m-%d %H:%M:%S} UTC ({ago(r.ended_at)})" if r.ended_at else None,
        "due": ago(r.due_at) if r.due_at else None,
        "digest": r.digest,
        "verified": {True: "yes", False: "no, the configuration asks for no receipt"}.get(r.verified is True)
        if r.verified is not None
        else None,
        "reason": r.reason,
        "error": r.error,
        "hint": _hint(r.reason),
        "moved to": as_text(r.disposed_to) if r.disposed_to else None,
    }
    for name, value in facts.items():
        if value is not None:
            typer.echo(f"{name:12} {printable(str(value))}")


def _hint(reason: str | None) -> str | None:
    try:
        return rule_of(Reason(reason or "")).hint
    except ValueError:
        return None  # none, or one that another version wrote


def _print_attempts(attempts: list[AttemptRecord]) -> None:
    if not attempts:
        return
    rows = [
        (a.number, f"{a.started_at:%Y-%m-%d %H:%M:%S}", f"{a.duration_s:.2f} s", size(a.sent), a.outcome,
         a.http_status, a.reason, a.error)
        for a in attempts
    ]  # fmt: skip
    print_table(("attempt", "started (UTC)", "took", "sent", "outcome", "status", "reason", "error"), rows)
