"""`backupd check`: the configuration, the files it names, and a handshake with every destination."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

import typer

from backupd.cli.options import BAD_CONFIG, DEFAULT_CONFIG, UNAVAILABLE, AsJson, ConfigPath
from backupd.cli.output import print_json
from backupd.config.files import file_problems
from backupd.config.load import load
from backupd.config.models import DestinationConfig
from backupd.config.problems import FileProblem
from backupd.core.names import printable
from backupd.core.units import human_duration
from backupd.upload.http.probe import ProbeResult, probe_all


def check(
    config: ConfigPath = DEFAULT_CONFIG,
    offline: Annotated[bool, typer.Option("--offline", help="Don't connect to the destinations.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the configuration, folders, keys and certificates, and shake hands with every destination.

    Nothing is uploaded. Ends with 78 for a configuration that can't work, 69 for a destination that
    would not take an archive now.
    """
    loaded = load(config)
    problems = file_problems(loaded, datetime.now(UTC))
    probes = [] if offline else probe_all(loaded.destination)
    if as_json:
        print_json({"problems": problems, "destinations": [_plain(probe) for probe in probes]})
    else:
        _print_problems(problems)
        for probe in probes:
            _print_probe(probe, loaded.destination[probe.destination])
    if any(problem.fatal for problem in problems):
        raise typer.Exit(BAD_CONFIG)
    if any(probe.reason for probe in probes):
        raise typer.Exit(UNAVAILABLE)


def _plain(probe: ProbeResult) -> dict[str, object]:
    fields = dataclasses.asdict(probe)
    del fields["advice"]
    return {**fields, "hint": probe.hint}


def _print_problems(problems: list[FileProblem]) -> None:
    for problem in problems:
        typer.echo(f"{'failed' if problem.fatal else 'warning'}: {problem}")
    if not any(problem.fatal for problem in problems):
        typer.echo("ok: configuration, folders, keys and certificates")


def _print_probe(probe: ProbeResult, destination: DestinationConfig) -> None:
    where = f"destination.{probe.destination}: {destination.url.partition('?')[0]}"
    if probe.reason is None:
        typer.echo(f"ok: {where}: {probe.tls or 'no TLS'}, {probe.detail}, in {probe.took_s:.2f} s")
    else:
        typer.echo(f"failed: {where}: {printable(probe.detail)} ({probe.reason})")
        typer.echo(f"  hint: {probe.hint}")
    for name, said in _facts(probe, destination):
        line = f"  {name:{_NAME_WIDTH}}{printable(said)}"
        typer.echo(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…")
    if probe.clock_is_off:
        typer.echo("  hint: set the clock that is wrong; certificates and tokens depend on it")


_WIDTH = 100
_NAME_WIDTH = 21


def _facts(probe: ProbeResult, destination: DestinationConfig) -> Iterator[tuple[str, str]]:
    if probe.http_version:
        yield "connection", " ".join(part for part in (probe.tls, probe.http_version) if part)
    if probe.server_days_left is not None:
        days = probe.server_days_left
        left = f"{days} days left" if days >= 0 else f"expired {-days} days ago"
        yield "its certificate", f"{left}, for {', '.join(probe.server_names) or 'no name'}"
        yield "issued by", probe.server_issuer or "nobody"
    if probe.certificate_required is not None:
        yield "our certificate", "required" if probe.certificate_required else "not required"
    if probe.signed_in is not None:
        scheme = destination.auth.type if destination.auth.type != "none" else "headers"
        yield "sign-in", f"{scheme}: {'not refused' if probe.signed_in else 'refused'}"
    if probe.clock_ahead_s is not None:
        yield "its clock", _clock(probe.clock_ahead_s)


def _clock(ahead: float) -> str:
    if abs(ahead) < 2:  # the field has whole seconds
        return "as ours"
    return f"{human_duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} ours"
