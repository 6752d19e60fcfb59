"""`backupd list`: deliveries, found by id, state, drop, destination, device, time, name and digest."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Annotated

import typer

from backupd.cli.options import (
    DEFAULT_CONFIG,
    AsJson,
    ConfigPath,
    DropName,
    Since,
    configured_name,
    parse_time,
)
from backupd.cli.output import print_csv, print_json, print_line, print_table, relative_time
from backupd.cli.selection import SomeSelected, parse_selector
from backupd.config.load import load
from backupd.config.models import Config
from backupd.core.drop_problem import DropProblem
from backupd.core.errors import UsageError
from backupd.core.model import DeliveryState
from backupd.core.names import as_text
from backupd.core.units import human_size
from backupd.ledger.factory import open_history
from backupd.ledger.history import DeliveryRecord, Search


def list_deliveries(
    selectors: SomeSelected = None,
    config: ConfigPath = DEFAULT_CONFIG,
    state: Annotated[
        DeliveryState | None,
        typer.Option(metavar="STATE", help=f"Only deliveries in this state: {', '.join(DeliveryState)}."),
    ] = None,
    drop: DropName = "",
    destination: Annotated[
        str, typer.Option(metavar="NAME", help="Only deliveries to this destination.")
    ] = "",
    device: Annotated[str, typer.Option(metavar="NAME", help="Short for --label device=NAME.")] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Only archives with this value for a named group of the drop's label_pattern.",
        ),
    ] = None,
    since: Since = "",
    until: Annotated[
        str, typer.Option(metavar="TIME", help="Only archives before then, in the form of --since.")
    ] = "",
    name: Annotated[
        str, typer.Option(metavar="GLOB", help='Only archives with a matching name, such as "*.cfg".')
    ] = "",
    limit: Annotated[
        int,
        typer.Option("--limit", "-n", metavar="NUMBER", min=1, help="The maximum number of deliveries."),
    ] = 50,
    problems: Annotated[
        bool,
        typer.Option(
            "--problems", help="List the files that will not be sent or moved, or look truncated, instead."
        ),
    ] = False,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for spreadsheets.")] = False,
) -> None:
    """List deliveries, newest first, or files with problems, oldest first.

    --since and --until compare the time at which the archive was queued. In CSV, a text that a spreadsheet
    would take for a formula, such as the name "=1.cfg", gets an apostrophe before it; JSON has exact names.
    """
    if as_json and as_csv:
        raise UsageError("--json and --csv contradict each other", "leave one of them out")
    output = Format.JSON if as_json else Format.CSV if as_csv else Format.TEXT
    loaded, now = load(config), datetime.now(UTC)
    history = open_history(loaded)
    # archives may be pending for drops and destinations that were removed from the configuration
    drops = [*dict.fromkeys([*loaded.drop, *history.pending_drops()])]
    destinations = [*dict.fromkeys([*loaded.destination, *history.destinations_pending()])]
    if problems:
        if any((selectors, state, destination, device, label, since, until, name)):
            raise UsageError(
                "--problems lists files without a delivery", "combine it with --drop and --limit"
            )
        found = history.problems(configured_name("--drop", drop, drops), limit)
        _print_problems(loaded, found, output)
        if len(found) == limit:
            typer.echo(f"the oldest {limit} problems; --limit shows more", err=True)
        return
    labels = [*(label or ()), *([f"device={device}"] if device else ())]
    search = Search(
        state,
        configured_name("--drop", drop, drops),
        configured_name("--destination", destination, destinations),
        parse_time("--since", since, now),
        parse_time("--until", until, now),
        name,
        dict(_parse_label(loaded, text) for text in labels),
        {n: re.compile(d.label_pattern) for n, d in loaded.drop.items() if d.label_pattern} if labels else {},
        tuple(parse_selector(loaded, text) for text in selectors or ()),
    )
    records = history.find(search, limit)
    _print_records(records, output, search)
    if len(records) == limit:
        typer.echo(f"the newest {limit} deliveries; --limit shows more", err=True)


class Format(Enum):
    """How the found deliveries or problems are printed."""

    TEXT = auto()
    JSON = auto()
    CSV = auto()


def _print_records(records: list[DeliveryRecord], output: Format, search: Search) -> None:
    if output is Format.JSON:
        print_json(records)
    elif output is Format.CSV:
        rows = [
            (r.id, r.state, r.archive.id, r.archive.drop, r.archive.relpath, r.archive.fingerprint.size,
             r.archive.queued_at, r.destination, r.attempts, r.due_at, r.ended_at, r.reason, r.error,
             r.http_status, r.digest, r.verified, r.disposed_to)
            for r in records
        ]  # fmt: skip
        print_csv(_CSV_HEADINGS, rows)
    elif records:
        _print_table(records)
    else:
        is_filtered = search != Search(search.state)
        none = "no deliveries yet" if search.state is None else f"no {search.state} deliveries"
        typer.echo("no matching deliveries" if is_filtered else none)


_CSV_HEADINGS = (
    "id", "state", "archive", "drop", "path", "size_bytes", "queued_at", "destination", "attempts", "due_at",
    "ended_at", "reason", "error", "http_status", "digest", "verified", "disposed_to",
)  # fmt: skip


def _print_table(records: list[DeliveryRecord]) -> None:
    rows = [
        (r.id[:8], r.state, r.archive.drop, as_text(r.archive.relpath),
         human_size(r.archive.fingerprint.size), r.destination, relative_time(r.archive.queued_at),
         r.attempts, r.reason)
        for r in records
    ]  # fmt: skip
    headings = ("id", "state", "drop", "archive", "size", "destination", "queued", "attempts", "reason")
    if print_table(headings, rows, shortened=["archive"], omitted=("attempts", "reason")):
        return
    by_reason: dict[str, list[str]] = {}
    for record in records:
        if record.reason:
            by_reason.setdefault(record.reason, []).append(record.id[:8])
    if by_reason:
        typer.echo()
    for reason, ids in by_reason.items():
        print_line(f"{reason}: {', '.join(ids)}")


def _print_problems(config: Config, problems: Sequence[DropProblem], output: Format) -> None:
    if output is Format.JSON:
        print_json(problems)
        return
    if output is Format.CSV:
        headings = ("drop", "path", "reason", "since", "size_bytes", "files", "error", "hint")
        rows = [
            (p.drop, p.relpath, p.reason, p.since, p.size_bytes, p.files, p.error, p.hint) for p in problems
        ]
        print_csv(headings, rows)
        return
    if not problems:
        typer.echo("no problems: every file is delivered or on its way")
    for problem in problems:
        drop = config.drop.get(problem.drop)
        path = os.path.join(os.fsencode(drop.path), problem.relpath) if drop else problem.relpath
        size = "" if problem.size_bytes is None else f", {human_size(problem.size_bytes)}"
        print_line(f"{as_text(path)}  ({problem.drop}{size})", "bold")
        print_line(f"  {problem.reason}, found {relative_time(problem.since)}: {problem.error}")
        print_line(f"  hint: {problem.hint}")


def _parse_label(config: Config, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    patterns = [re.compile(d.label_pattern) for d in config.drop.values() if d.label_pattern]
    groups = {group for pattern in patterns for group in pattern.groupindex}
    if not equals:
        raise UsageError(f"--label: expected KEY=VALUE, got {text!r}", "such as `--label site=north`")
    if key not in groups:
        raise UsageError(
            f"--label: no label_pattern has a group named {key!r}",
            f"there are: {', '.join(sorted(groups))}" if groups else "set `label_pattern` for a drop",
        )
    return key, value
