"""`backupd list`: deliveries, found by state, drop, destination, device, time and name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
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
from backupd.cli.output import print_json, print_line, print_table, relative_time
from backupd.config.load import load
from backupd.config.models import Config
from backupd.core.drop_problem import DropProblem
from backupd.core.errors import UsageError
from backupd.core.model import DeliveryState
from backupd.core.names import as_text
from backupd.core.units import human_size
from backupd.ledger.factory import open_history
from backupd.ledger.history import Search


def list_deliveries(
    config: ConfigPath = DEFAULT_CONFIG,
    state: Annotated[DeliveryState | None, typer.Option(help="Only deliveries in this state.")] = None,
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
        int, typer.Option("--limit", "-n", min=1, help="The maximum number of deliveries.")
    ] = 50,
    problems: Annotated[
        bool,
        typer.Option(
            "--problems", help="List the files that will not be sent or moved, or look truncated, instead."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List deliveries, newest first, or files with problems, oldest first.

    --since and --until compare the time at which the archive was queued.
    """
    loaded, now = load(config), datetime.now(UTC)
    history = open_history(loaded)
    # archives may be pending for drops and destinations that were removed from the configuration
    drops = [*dict.fromkeys([*loaded.drop, *history.pending_drops()])]
    destinations = [*dict.fromkeys([*loaded.destination, *history.destinations_pending()])]
    if problems:
        if any((state, destination, device, label, since, until, name)):
            raise UsageError(
                "--problems lists files without a delivery", "combine it with --drop and --limit"
            )
        found = history.problems(configured_name("--drop", drop, drops), limit)
        _print_problems(loaded, found, as_json=as_json)
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
    )
    records = history.find(search, limit)
    if as_json:
        print_json(records)
        return
    if not records:
        is_filtered = search != Search(state)
        none = "no deliveries yet" if state is None else f"no {state} deliveries"
        typer.echo("no matching deliveries" if is_filtered else none)
        return
    rows = [
        (r.id[:8], r.state, r.archive.drop, as_text(r.archive.relpath),
         human_size(r.archive.fingerprint.size), r.destination, relative_time(r.archive.queued_at),
         r.attempts, r.reason)
        for r in records
    ]  # fmt: skip
    print_table(
        ("id", "state", "drop", "archive", "size", "destination", "queued", "attempts", "reason"), rows
    )
    if len(records) == limit:
        typer.echo(f"the newest {limit} deliveries; --limit shows more", err=True)


def _print_problems(config: Config, problems: Sequence[DropProblem], *, as_json: bool) -> None:
    if as_json:
        print_json(problems)
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
