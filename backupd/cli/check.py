"""`backupd check`: the configuration, the files it names, and a handshake with every destination."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from backupd.cli.options import BAD_CONFIG, DEFAULT_CONFIG, UNAVAILABLE, AsJson, ConfigPath
from backupd.cli.output import print_json, print_table
from backupd.config.problem import Problem

if TYPE_CHECKING:
    from backupd.upload.probe import Probe


def check(
    config: ConfigPath = DEFAULT_CONFIG,
    offline: Annotated[bool, typer.Option("--offline", help="Don't connect to the destinations.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the configuration, folders, keys and certificates, and shake hands with every destination.

    Nothing is uploaded. Ends with 78 for a configuration that can't work, 69 for a destination that
    would not take an archive now.
    """
    from backupd.assembly import probe_all  # noqa: PLC0415
    from backupd.config.loading import load  # noqa: PLC0415
    from backupd.config.preflight import preflight  # noqa: PLC0415

    loaded = load(config)
    problems = preflight(loaded, datetime.now(UTC))
    probes = [] if offline else probe_all(loaded)
    if as_json:
        print_json({"problems": problems, "destinations": probes})
    else:
        _print(problems, probes, offline=offline)
    if any(problem.fatal for problem in problems):
        raise typer.Exit(BAD_CONFIG)
    if any(probe.reason for probe in probes):
        raise typer.Exit(UNAVAILABLE)


def _print(problems: list[Problem], probes: list[Probe], *, offline: bool) -> None:
    for problem in problems:
        typer.echo(f"{'failed' if problem.fatal else 'warning'}: {problem}")
    if not problems:
        typer.echo("configuration, folders, keys and certificates: ok")
    if offline:
        return
    rows = [
        (
            p.destination,
            "failed" if p.reason else "ok",
            p.tls,
            p.detail,
            p.reason,
            p.hint,
            f"{p.took_s:.2f} s",
        )
        for p in probes
    ]
    print_table(("destination", "verdict", "TLS", "answer", "reason", "what to do", "took"), rows)
