"""`backupd check`: the configuration, the files it names, and a handshake with every destination."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from backupd.cli.options import BAD_CONFIG, DEFAULT_CONFIG, UNAVAILABLE, AsJson, ConfigPath
from backupd.cli.output import print_json
from backupd.config.problem import Problem
from backupd.core.names import printable
from backupd.core.policy import Reason

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
        print_json({"problems": problems, "destinations": [_plain(probe) for probe in probes]})
    else:
        _print_problems(problems)
        for probe in probes:
            _print_probe(probe, loaded.destination[probe.destination].url)
    if any(problem.fatal for problem in problems):
        raise typer.Exit(BAD_CONFIG)
    if any(probe.reason for probe in probes):
        raise typer.Exit(UNAVAILABLE)


def _plain(probe: Probe) -> dict[str, object]:
    return {**dataclasses.asdict(probe), "hint": _hint(probe)}


def _print_problems(problems: list[Problem]) -> None:
    for problem in problems:
        typer.echo(f"{'failed' if problem.fatal else 'warning'}: {problem}")
    if not any(problem.fatal for problem in problems):
        typer.echo("ok: configuration, folders, keys and certificates")


def _print_probe(probe: Probe, url: str) -> None:
    where = f"destination.{probe.destination}: {url.partition('?')[0]}"
    if probe.reason is None:
        typer.echo(f"ok: {where}: {probe.tls or 'no TLS'}, {probe.detail}, in {probe.took_s:.2f} s")
        return
    typer.echo(f"failed: {where}: {printable(probe.detail)} ({probe.reason})")
    typer.echo(f"  hint: {_hint(probe)}")


def _hint(probe: Probe) -> str:
    match probe.reason:
        case Reason.LOCAL_FILES:
            return "mend the files it names: each has to be readable PEM, key and certificate a pair"
        case Reason.CONNECTION_LOST:  # many servers give no reason when they refuse a certificate
            return "the endpoint hung up: does it trust the CA of `cert`? its log may say"
        case _:
            return probe.hint
