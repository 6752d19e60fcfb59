"""`backupd show`: one archive with its deliveries, attempts and receipts."""

from __future__ import annotations

import itertools
import os
from datetime import UTC, datetime
from functools import partial

import typer

from backupd.cli.options import DEFAULT_CONFIG, AsJson, ConfigPath
from backupd.cli.output import print_json, print_line, print_table, relative_time
from backupd.cli.selection import Selected, select
from backupd.config.load import load
from backupd.config.models import DropConfig
from backupd.config.time_limit import call
from backupd.core.model import DeliveryState
from backupd.core.names import as_text, printable
from backupd.core.policy import Reason, rule_of
from backupd.core.units import human_size, local_time
from backupd.ledger.factory import open_history
from backupd.ledger.history import ArchiveRecord, AttemptRecord, DeliveryRecord


def show(
    selector: Selected,
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Show the history of an archive: its state, and each delivery with its attempts and its receipt.

    Of several archives with the same path, the newest one is shown.
    """
    loaded = load(config)
    history = open_history(loaded)
    selection = select(history, loaded, selector)
    selected, archive = selection.delivery, history.archive(selection.archive_id)
    deliveries = [selected] if selected else []
    deliveries += [d for d in selection.deliveries if selected is None or d.id != selected.id]
    attempts = {d.id: history.attempts(d.id) for d in deliveries}
    if as_json:
        all_deliveries = [{"delivery": d, "attempts": attempts[d.id]} for d in deliveries]
        first = {"delivery": selected, "attempts": attempts[selected.id]} if selected else {}
        print_json({**first, "archive": archive, "deliveries": all_deliveries})
        return
    _print_archive(archive, loaded.drop.get(archive.archive.drop))
    for delivery in deliveries:
        typer.echo()
        _print_delivery(delivery)
        _print_attempts(attempts[delivery.id])
        if delivery.receipt:
            typer.echo(f"\nreceipt\n  {printable(delivery.receipt)}")
    if selection.older:
        noun = "archive" if selection.older == 1 else "archives"
        typer.echo(f"\nthis is the newest; `backupd list {selector}` shows {selection.older} older {noun}")


def _print_archive(record: ArchiveRecord, drop: DropConfig | None) -> None:
    moved_to = as_text(record.disposed_to) if record.disposed_to else None
    if drop and record.disposed_to:
        moved_to = f"{moved_to}{_absence(os.path.join(os.fsencode(drop.path), record.disposed_to))}"
    _print_facts(
        {
            "archive": f"@{record.archive.id} {record.archive.drop}: {as_text(record.archive.relpath)}",
            "size": human_size(record.archive.fingerprint.size),
            "queued": _format_time(record.archive.queued_at),
            "state": record.state,
            "moved to": "nowhere: the file was missing" if record.missing else moved_to,
            "disposed": _format_time(record.disposed_at),
        }
    )


def _absence(path: bytes) -> str:
    """Return a remark if a file is not at a path, or can't be reached; else an empty text."""
    try:
        call(partial(os.lstat, path))
    except (FileNotFoundError, NotADirectoryError):
        return " (no longer there)"
    except OSError as error:
        return f" (can't be reached: {error.strerror})"
    return ""


def _print_delivery(record: DeliveryRecord) -> None:
    verified = {True: "yes", False: "no, the configuration requires no receipt"}
    _print_facts(
        {
            "delivery": record.id,
            "state": record.state,
            "destination": record.destination,
            "ended": _format_time(record.ended_at),
            "due": _due(record),
            "digest": record.digest,
            "verified": None if record.verified is None else verified[record.verified],
            "reason": record.reason,
            "error": record.error,
            "hint": _hint(record.reason),
        }
    )


def _due(record: DeliveryRecord) -> str | None:
    """Return when a pending delivery is due; None for others."""
    if record.state is not DeliveryState.PENDING or record.due_at is None:
        return None
    if record.due_at > datetime.now(UTC):
        return relative_time(record.due_at)
    return "now; it waits for its destination (`backupd status`) or for a worker"


def _print_attempts(attempts: list[AttemptRecord]) -> None:
    if not attempts:
        return
    rows = [
        (a.number, local_time(a.started_at), f"{a.duration_s:.2f} s", human_size(a.sent_bytes), a.outcome,
         a.http_status, a.reason, a.error)
        for a in attempts
    ]  # fmt: skip
    headings = ("attempt", "started", "took", "sent", "outcome", "status", "reason", "error")
    if not print_table(headings, rows, omitted=("reason", "error")):
        typer.echo()
        for (reason, error), group in itertools.groupby(attempts, lambda a: (a.reason, a.error)):
            numbers = [a.number for a in group]
            if reason:
                which = f" {numbers[0]}" if len(numbers) == 1 else f"s {numbers[0]}-{numbers[-1]}"
                print_line(f"attempt{which}: {reason}: {error}")


def _print_facts(facts: dict[str, str | None]) -> None:
    for name, value in facts.items():
        if value is not None:
            typer.echo(f"{name:12} {printable(value)}")


def _format_time(time: datetime | None) -> str | None:
    return f"{local_time(time)} ({relative_time(time)})" if time else None


def _hint(reason: str | None) -> str | None:
    try:
        return rule_of(Reason(reason or "")).hint
    except ValueError:
        return None  # the delivery has no reason, or another version of backupd wrote it
