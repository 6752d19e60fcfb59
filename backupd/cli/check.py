"""`backupd check`: the configuration, the files it names, and a TLS handshake with every destination."""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from backupd.cli.dry_run import print_dry_run
from backupd.cli.options import DEFAULT_CONFIG, AsJson, ConfigPath
from backupd.cli.output import print_json
from backupd.cli.push import PushResult, push_file
from backupd.config.certificate_files import end_of
from backupd.config.files import certificate_limits, file_problems
from backupd.config.load import load
from backupd.config.models import Config, DestinationConfig
from backupd.config.problems import FileProblem
from backupd.config.time_limit import ANSWER_TIMEOUT, call_all
from backupd.core.certificate_life import CertificateLimits, CertificateState
from backupd.core.errors import BAD_CONFIG, UNAVAILABLE, LedgerError, UsageError
from backupd.core.names import as_text, printable
from backupd.core.units import human_duration, machine_time
from backupd.daemon.hook_runner import unknown_events
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.earlier_folders import find_earlier_folders
from backupd.dropfolder.filesystem import blind_spot, filesystem_of
from backupd.dropfolder.folder import DropFolder, FolderInUseError
from backupd.ledger.factory import open_history
from backupd.upload.base import ProbeResult
from backupd.upload.registry import probe_all

_MAX_WIDTH = 100
"""Characters in a line about a destination; a server certificate may have hundreds of names."""

_NAME_WIDTH = 21

_BLIND_SPOT_HINT = (
    "let writers rename finished files into the folder, or write checksum files; else a file counts as"
    " finished once it is unchanged for `stable_for`"
)

_MIN_WALK_TIME = 0.5
"""Seconds for which folders are walked at least, however long their examination took before."""


def check(
    config: ConfigPath = DEFAULT_CONFIG,
    offline: Annotated[bool, typer.Option("--offline", help="Do not connect to the destinations.")] = False,
    send: Annotated[
        bool, typer.Option("--send", help="Deliver a small test archive to every destination.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List which files would be sent now, which not, and why.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check the configuration, folders, keys and certificates, and the connection to every destination.

    Connecting includes the TLS handshake and the sign-in. Nothing is uploaded without --send. Exits with 78
    if the daemon can't run with the configuration, 69 if a destination would not accept an archive now.
    """
    if offline and send:
        raise UsageError("--offline and --send contradict each other", "leave one of them out")
    if dry_run and (offline or send):
        raise UsageError("--dry-run never connects", "leave --offline and --send out")
    if dry_run:
        print_dry_run(load(config), as_json=as_json)
        return
    loaded, until = load(config), time.monotonic() + ANSWER_TIMEOUT
    problems = [*file_problems(loaded, datetime.now(UTC)), *unknown_events(loaded)]
    problems += _drop_folder_problems(loaded, max(until, time.monotonic() + _MIN_WALK_TIME))
    probes = [] if offline else probe_all(loaded.destination)
    problems += _expiring_servers(probes, certificate_limits(loaded))
    sent = {probe.destination: _send_test_archive(loaded, probe) for probe in probes} if send else {}
    probes = [_with_proof(probe, sent.get(probe.destination)) for probe in probes]
    if as_json:
        print_json(
            {
                "problems": problems,
                "destinations": [_as_dict(probe) for probe in probes],
                **({"sent": [result for result in sent.values() if result]} if send else {}),
            }
        )
    else:
        _print_problems(problems)
        for probe in probes:
            _print_probe(probe, loaded.destination[probe.destination], sent.get(probe.destination))
    if any(problem.fatal for problem in problems):
        raise typer.Exit(BAD_CONFIG)
    if any(probe.reason for probe in probes) or any(r and r.outcome != "delivered" for r in sent.values()):
        raise typer.Exit(UNAVAILABLE)


def _expiring_servers(probes: list[ProbeResult], limits: CertificateLimits) -> Iterator[FileProblem]:
    """Yield a warning for each destination with a certificate that expires soon."""
    now = datetime.now(UTC)
    for probe in probes:
        validity = probe.server_validity
        if validity is None:
            continue
        life = limits.life(validity, now)
        if life.state in (CertificateState.EXPIRING, CertificateState.CRITICAL):
            message = f"the destination's certificate expires {end_of(validity, life)}"
            hint = "ask the operator of the destination to renew it before then"
            yield FileProblem(f"destination.{probe.destination}", message, hint, fatal=False)


def _send_test_archive(config: Config, probe: ProbeResult) -> PushResult | None:
    """Deliver a small archive as the daemon would, unless no request reaches the destination.

    A status that refuses the probe is no reason: an endpoint may permit nothing but uploads.
    """
    if probe.reason is not None and probe.http_status is None:
        return None
    now, host = datetime.now(UTC), socket.gethostname()
    try:
        with tempfile.TemporaryDirectory(prefix="backupd-") as folder:
            file = Path(folder) / f"backupd-check-{now:%Y%m%dT%H%M%SZ}.txt"
            file.write_text(f"A test archive of `backupd check --send` on {host} at {machine_time(now)}.\n")
            return push_file(file, probe.destination, config)
    except OSError as error:
        hint = "free some space there, or name another folder: TMPDIR=/var/tmp backupd check --send"
        raise UsageError(f"no test archive can be written: {error}", hint) from error


def _with_proof(probe: ProbeResult, sent: PushResult | None) -> ProbeResult:
    """Return a result in which a delivered archive outweighs a status to the probe."""
    is_delivered = sent is not None and sent.outcome == "delivered"
    return dataclasses.replace(probe, reason=None, is_proven=False) if is_delivered else probe


def _drop_folder_problems(config: Config, until: float) -> list[FileProblem]:
    """Return the problems in the drop folders, as far as they are found until a monotonic time."""
    found: dict[str, list[FileProblem]] = {name: [] for name in config.drop}
    daemon_pid = None
    with suppress(LedgerError), closing(open_history(config)) as history:
        daemon_pid = history.daemon_pid()

    def examine(name: str) -> None:
        with suppress(OSError), closing(DropFolder(str(config.drop[name].path))) as folder:
            if unseen := blind_spot(folder.fileno(), filesystem_of(folder.path)):
                where, message = f"drop.{name}.path", f"{folder.path}: {unseen}"
                found[name].append(FileProblem(where, message, _BLIND_SPOT_HINT, fatal=False))
            drop = Drop.of(name, config.drop[name], folder, ())
            holder = folder.lock_holder()
            if holder is not None and (daemon_pid is None or holder not in (0, daemon_pid)):
                error = FolderInUseError(folder.path, holder)
                message = f"{folder.path}: {error.strerror}"
                found[name].append(
                    FileProblem(f"drop.{name}.path", message, error.hint, fatal=True, prevents_start=False)
                )
            for each in find_earlier_folders(drop, lambda: time.monotonic() < until):
                path = os.path.join(folder.path, as_text(each.relpath))
                where, message = f"drop.{name}.{each.key}", f"{path}: {each.error}"
                found[name].append(FileProblem(where, message, each.hint(drop), fatal=False))

    call_all({name: partial(examine, name) for name in found}, until - time.monotonic())
    return [problem for name in config.drop for problem in found[name]]


def _as_dict(probe: ProbeResult) -> dict[str, object]:
    fields = dataclasses.asdict(probe)
    del fields["advice"], fields["sign_in_scheme"], fields["server_validity"]
    return {**fields, "hint": probe.hint}


def _print_problems(problems: list[FileProblem]) -> None:
    for problem in problems:
        typer.echo(f"{'failed' if problem.fatal else 'warning'}: {problem}")
    if not any(problem.fatal for problem in problems):
        typer.echo("ok: configuration, folders, keys and certificates")


def _print_probe(probe: ProbeResult, destination: DestinationConfig, sent: PushResult | None) -> None:
    where = f"destination.{probe.destination}: {destination.address}"
    tls = f"{probe.tls or 'no TLS'}, " if probe.http_version else ""
    if probe.reason is None and probe.is_proven:
        typer.echo(f"ok: {where}: {tls}{printable(probe.detail)}, in {probe.took_s:.2f} s")
    elif probe.reason is None:
        typer.echo(f"connected: {where}: {tls}{printable(probe.detail)}, in {probe.took_s:.2f} s")
        if sent is None:
            typer.echo("  an upload could not be tried without sending; `backupd check --send` does")
    else:
        typer.echo(f"failed: {where}: {printable(probe.detail)} ({probe.reason})")
        if sent is None:  # else it has a hint itself
            typer.echo(f"  hint: {probe.hint}")
    if sent is not None:
        _print_sent(sent)
    for name, value in _facts(probe):
        line = f"  {name:{_NAME_WIDTH}}{printable(value)}"
        typer.echo(line if len(line) <= _MAX_WIDTH else f"{line[: _MAX_WIDTH - 1]}…")
    if probe.clock_is_off:
        typer.echo("  hint: set the clock that is wrong; certificates and tokens depend on it")


def _print_sent(sent: PushResult) -> None:
    if sent.outcome != "delivered":
        verdict = "may have been stored" if sent.may_be_stored else "was not stored"
        typer.echo(f"  failed: {sent.file} {verdict}: {printable(sent.error or '')} ({sent.reason})")
        if sent.hint:
            typer.echo(f"  hint: {sent.hint}")
        return
    proof = "and its receipt matches" if sent.verified else "and states no digest"
    typer.echo(f"  ok: {sent.file} was sent: the destination responded {sent.http_status}, {proof}")
    if sent.response:
        typer.echo(f"  {'response':{_NAME_WIDTH}}{printable(sent.response)}"[:_MAX_WIDTH])


def _facts(probe: ProbeResult) -> Iterator[tuple[str, str]]:
    """Yield the name and value of each fact that the probe found."""
    if probe.http_version:
        yield "connection", " ".join(part for part in (probe.tls, probe.http_version) if part)
    if probe.server_days_left is not None:
        days = probe.server_days_left
        left = f"{days} days left" if days >= 0 else f"expired {-days} days ago"
        yield "server certificate", f"{left}, for {', '.join(probe.server_names) or 'no host name'}"
        yield "issued by", probe.server_issuer or "an issuer without a name"
    if probe.certificate_required is not None:
        yield "client certificate", "required" if probe.certificate_required else "not required"
    if probe.signed_in is not None:
        yield "sign-in", f"{probe.sign_in_scheme}: {'not refused' if probe.signed_in else 'refused'}"
    if probe.clock_ahead_s is not None:
        yield "server clock", _clock_difference(probe.clock_ahead_s)


def _clock_difference(ahead_s: float) -> str:
    if abs(ahead_s) < 2:  # the Date header field has whole seconds
        return "same as this host's"
    return f"{human_duration(abs(ahead_s))} {'ahead of' if ahead_s > 0 else 'behind'} this host's"
