"""`backupd list` and `backupd show`: deliveries, with their attempts and receipts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, AsJson, ConfigPath
from backupd.cli.output import ago, known, matcher, print_json, print_table, time_of
from backupd.config.load import load
from backupd.config.models import Config
from backupd.core.errors import UsageError
from backupd.core.model import DeliveryState
from backupd.core.names import as_text, printable
from backupd.core.policy import Reason, rule_of
from backupd.core.units import human_size
from backupd.ledger.sqlite.connection import open_for_reading
from backupd.ledger.sqlite.queries import ArchiveRecord, AttemptRecord, DeliveryRecord, LedgerQueries, Search

DropName = Annotated[str, typer.Option("--drop", help="Only of this drop.")]
Since = Annotated[
    str, typer.Option("--since", help='Only since then: "7d" for so long ago, or a date and time.')
]


def list_deliveries(
    config: ConfigPath = DEFAULT_CONFIG,
    state: Annotated[DeliveryState | None, typer.Option(help="Only deliveries of this state.")] = None,
    drop: DropName = "",
    destination: Annotated[str, typer.Option(help="Only to this destination.")] = "",
    device: Annotated[str, typer.Option(help="Short for `--label device=…`.")] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only what a group of the drop's label_pattern matches so."),
    ] = None,
    since: Since = "",
    until: Annotated[str, typer.Option(help="Only before then, written like --since.")] = "",
    name: Annotated[str, typer.Option(metavar="GLOB", help="Only archives whose name fits.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List deliveries, newest first; times are those at which the archives were noticed."""
    loaded, history = open_history(config)
    now = datetime.now(UTC)
    search = Search(
        state,
        known("--drop", drop, list(loaded.drop)),
        known("--destination", destination, list(loaded.destination)),
        time_of("--since", since, now),
        time_of("--until", until, now),
    )
    labels = [*(label or ()), *([f"device={device}"] if device else ())]
    records = history.find(search, matcher(loaded, name, labels), limit)
    if as_json:
        print_json(records)
        return
    if not records:
        every = search == Search(state) and not labels and not name
        none = "no deliveries yet" if state is None else f"no {state} deliveries"
        typer.echo(none if every else "no deliveries like that")
        return
    rows = [
        (r.id[:8], r.state, r.archive.drop, as_text(r.archive.relpath),
         human_size(r.archive.fingerprint.size), r.destination, ago(r.archive.queued_at), r.attempts, r.reason)
        for r in records
    ]  # fmt: skip
    print_table(
        ("id", "state", "drop", "archive", "size", "destination", "admitted", "attempts", "reason"), rows
    )
    if len(records) == limit:
        typer.echo(f"these are the newest {limit}; --limit shows more", err=True)


def show(
    ident: Annotated[
        str,
        typer.Argument(metavar="ID", help="A delivery's id, or how it begins; or @ and an archive's number."),
    ],
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Show the whole story of an archive: what became of it, each delivery, its attempts and its receipt."""
    _, history = open_history(config)
    asked = None if ident.startswith("@") else history.delivery(ident)
    record = history.archive(asked.archive.id if asked else _number(ident))
    deliveries = [asked] if asked else []
    deliveries += [d for d in history.deliveries_of(record.archive.id) if asked is None or d.id != asked.id]
    attempts = {d.id: history.attempts(d.id) for d in deliveries}
    if as_json:
        story = [{"delivery": d, "attempts": attempts[d.id]} for d in deliveries]
        first = {"delivery": asked, "attempts": attempts[asked.id]} if asked else {}
        print_json({**first, "archive": record, "deliveries": story})
        return
    _print_archive(record)
    for delivery in deliveries:
        typer.echo()
        _print_delivery(delivery)
        _print_attempts(attempts[delivery.id])
        if delivery.receipt:
            typer.echo(f"receipt\n  {printable(delivery.receipt)}")


def _number(ident: str) -> int:
    if not ident[1:].removeprefix("-").isdecimal() or len(ident) > 18:
        raise UsageError(f"expected @ and the number of an archive, got {ident!r}", "such as `show @17`")
    return int(ident[1:])


def open_history(config: ConfigPath) -> tuple[Config, LedgerQueries]:
    """Return a configuration and the questions to its ledger."""
    loaded = load(config)
    return loaded, LedgerQueries(open_for_reading(loaded.state_dir))


def _print_archive(r: ArchiveRecord) -> None:
    left = {
        "expired": "removed",
        "expiring": "being removed",
        "gone": "found gone",
        "changed": "found changed",
    }
    _print_facts(
        {
            "archive": f"@{r.archive.id} {r.archive.drop}: {as_text(r.archive.relpath)}",
            "size": human_size(r.archive.fingerprint.size),
            "admitted": _moment(r.archive.queued_at),
            "became": r.state,
            "moved to": as_text(r.disposed_to) if r.disposed_to else None,
            "disposed": _moment(r.disposed_at),
            left.get(r.removal or "", "removal"): (_moment(r.removed_at) or "now") if r.removal else None,
        }
    )


def _print_delivery(r: DeliveryRecord) -> None:
    verified = {True: "yes", False: "no, the configuration asks for no receipt"}
    _print_facts(
        {
            "delivery": r.id,
            "state": r.state,
            "destination": r.destination,
            "ended": _moment(r.ended_at),
            "due": ago(r.due_at) if r.due_at else None,
            "digest": r.digest,
            "verified": None if r.verified is None else verified[r.verified],
            "reason": r.reason,
            "error": r.error,
            "hint": _hint(r.reason),
        }
    )


def _print_facts(facts: dict[str, str | None]) -> None:
    for name, value in facts.items():
        if value is not None:
            typer.echo(f"{name:12} {printable(value)}")


def _moment(time: datetime | None) -> str | None:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC ({ago(time)})" if time else None


def _hint(reason: str | None) -> str | None:
    try:
        return rule_of(Reason(reason or "")).hint
    except ValueError:
        return None  # none, or one that another version wrote


def _print_attempts(attempts: list[AttemptRecord]) -> None:
    if not attempts:
        return
    rows = [
        (a.number, f"{a.started_at:%Y-%m-%d %H:%M:%S}", f"{a.duration_s:.2f} s", human_size(a.sent_bytes),
         a.outcome, a.http_status, a.reason, a.error)
        for a in attempts
    ]  # fmt: skip
    print_table(("attempt", "started (UTC)", "took", "sent", "outcome", "status", "reason", "error"), rows)
