"""`backupd status`: the state of the daemon, its drops, destinations, devices and certificates."""

from __future__ import annotations

import dataclasses
import io
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import closing, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from backupd.cli.options import DEFAULT_CONFIG, AsJson, ConfigPath
from backupd.cli.output import print_json, print_line, print_table, relative_time
from backupd.config.load import load
from backupd.config.types import parse_duration
from backupd.core.certificate_life import CertificateState
from backupd.core.errors import BackupdError, LedgerError, UsageError
from backupd.core.health import Alarm, HealthLevel, HealthLimits, alarms, hold_text, plugin_line
from backupd.core.names import printable
from backupd.core.snapshot import (
    CertificateSnapshot,
    DestinationSnapshot,
    DropSnapshot,
    OverdueDevice,
    Snapshot,
    Upload,
)
from backupd.core.units import human_duration, human_size
from backupd.ledger.factory import open_history

_WATCH_INTERVAL = 2.0
"""Seconds between two refreshes of `--watch`."""

_MAX_OVERDUE = 20
"""Overdue devices that are listed; `--json` has all."""

_LEVEL_STYLES = {
    HealthLevel.OK: "green",
    HealthLevel.WARNING: "yellow",
    HealthLevel.CRITICAL: "bold red",
}

_CERTIFICATE_STYLES = {
    CertificateState.VALID: "green",
    CertificateState.EXPIRING: "yellow",
    CertificateState.CRITICAL: "bold red",
    CertificateState.EXPIRED: "bold red",
}


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The status of a daemon; `daemon_pid` is None if it does not run, `snapshot` if none has ever run.

    `age` is the time since the snapshot was taken.
    """

    daemon_pid: int | None
    age: timedelta | None
    alarms: list[Alarm]
    snapshot: Snapshot | None

    @property
    def level(self) -> HealthLevel:
        """Return the level of the most serious alarm."""
        return max((alarm.level for alarm in self.alarms), default=HealthLevel.OK)


def status(
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every 2 s, until Ctrl-C.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Print one line for Nagios or Icinga and exit with 0, 1, 2 or 3.")
    ] = False,
    warning_age: Annotated[
        str,
        typer.Option(metavar="TIME", help="With --check: warn if the oldest pending archive is this old."),
    ] = "1h",
    critical_age: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="With --check: critical if the oldest pending archive is this old, or a pause this long.",
        ),
    ] = "6h",
) -> None:
    """Show what needs a person, uploads under way, and each drop, destination and certificate.

    With --check, these are critical: the daemon does not run or hangs, a drop folder cannot be used, or a
    certificate expires within `certificate_critical`. These are warnings: a paused destination, a rejected
    archive, a file with a problem, an overdue device, `backupd pause` without an end, or a certificate that
    expires within `certificate_warning`.
    """
    if check and (watch or as_json):
        raise UsageError("--check prints one line", "leave --watch and --json out")
    if check:
        raise typer.Exit(_check(config, warning_age, critical_age))
    if not watch:
        _print_status(collect_status(config, HealthLimits()), as_json=as_json)
        return
    with suppress(KeyboardInterrupt):
        while True:
            try:
                daemon_status = collect_status(config, HealthLimits())
            except LedgerError as error:  # it may be held for a moment, or not exist yet
                sys.stderr.write(f"backupd: {error}\n")
            else:
                if sys.stdout.isatty() and not as_json:
                    _fill_screen(daemon_status)
                else:
                    _print_status(daemon_status, as_json=as_json)
            sys.stdout.flush()
            time.sleep(_WATCH_INTERVAL)


class _Screen(io.StringIO):
    """Collects what is printed for a terminal."""

    def isatty(self) -> bool:
        return True


def _fill_screen(found: DaemonStatus) -> None:
    """Print the status on an empty screen; its end is cut off if it is longer, as the worst is first."""
    with redirect_stdout(_Screen()) as screen:
        _print_status(found, as_json=False)
    lines, room = screen.getvalue().splitlines(), shutil.get_terminal_size().lines - 1
    if len(lines) > room:
        cut = len(lines) - room + 1
        lines = [*lines[: room - 1], f"and {cut} more lines; `backupd status` prints all"]
    sys.stdout.write("\x1b[H\x1b[2J" + "\n".join(lines) + "\n")


def collect_status(config: Path, limits: HealthLimits) -> DaemonStatus:
    """Return the status of the daemon that runs with a configuration file.

    Raises ConfigError for an unusable configuration, LedgerError for a missing or unreadable ledger.
    """
    with closing(open_history(load(config))) as history:
        pid, snapshots = history.daemon_pid(), history.snapshots()
    host, now = socket.gethostname(), datetime.now(UTC)
    snapshot = next((each for each in snapshots if each.host == host), snapshots[0] if snapshots else None)
    found = alarms(snapshot, now, limits, is_running=pid is not None)
    return DaemonStatus(pid, snapshot.age(now) if snapshot else None, found, snapshot)


def _check(config: Path, warning_age: str, critical_age: str) -> HealthLevel:
    try:
        try:
            limits = HealthLimits(parse_duration(warning_age), parse_duration(critical_age))
        except ValueError as error:
            raise UsageError(f"--warning-age, --critical-age: {error}") from error
        found = collect_status(config, limits)
        level, line = plugin_line(found.snapshot, found.alarms, datetime.now(UTC), limits)
    except BackupdError as error:
        level, line = HealthLevel.UNKNOWN, f"UNKNOWN - {error.message} ({error.hint})"
    typer.echo(printable(" ".join(line.split())))  # one line, however narrow the terminal is
    return level


def _print_status(found: DaemonStatus, *, as_json: bool) -> None:
    snapshot = found.snapshot
    if as_json:
        fields = dataclasses.fields(Snapshot)
        state = {f.name: getattr(snapshot, f.name) if snapshot else _empty(f) for f in fields}
        head = {"daemon_pid": found.daemon_pid, "age_s": found.age, "level": found.level.name.lower()}
        rows = [{**_as_dict(alarm), "level": alarm.level.name.lower()} for alarm in found.alarms]
        certificates = {"certificates": list(map(_certificate, snapshot.certificates))} if snapshot else {}
        print_json({**head, "alarms": rows, **state, **certificates})
        return
    _print_daemon(found)
    for alarm in found.alarms:
        _print_alarm(alarm)
    if snapshot is None:
        return
    if snapshot.problems:
        print_line("`backupd list --problems` lists each file with a problem")
    for pause in snapshot.holds:
        if pause.until is not None:  # one without an end is an alarm
            print_line(hold_text(pause), "yellow")
    _print_uploads(snapshot.uploads)
    _print_drops(snapshot.drops)
    _print_destinations(snapshot.destinations)
    _print_overdue(snapshot.overdue)
    _print_certificates(snapshot.certificates)


def _empty(field: dataclasses.Field[object]) -> object:
    """Return the value of a field of the snapshot before the first one was taken."""
    return () if field.default == () else None


def _certificate(certificate: CertificateSnapshot) -> dict[str, object]:
    return {
        "destination": certificate.destination,
        "role": certificate.role,
        "path": certificate.path,
        "expires_at": certificate.expires_at,
        "days_left": certificate.life.days_left,
        "state": certificate.life.state,
    }


def _as_dict(alarm: Alarm) -> dict[str, object]:
    return {field.name: getattr(alarm, field.name) for field in dataclasses.fields(alarm)}


def _print_daemon(found: DaemonStatus) -> None:
    snapshot = found.snapshot
    where = f"backupd {snapshot.version} on {snapshot.host}" if snapshot else "backupd"
    age = f"state of {human_duration(found.age)} ago" if found.age is not None else "no state yet"
    if found.daemon_pid is None:
        print_line(f"{where}: NOT RUNNING; {age}", "bold red")
    elif snapshot is None or any(alarm.subject == "hung" for alarm in found.alarms):
        print_line(f"{where}: process {found.daemon_pid} HANGS; {age}", "bold red")
    else:
        uptime = human_duration(datetime.now(UTC) - snapshot.started_at)
        print_line(f"{where}: running for {uptime} as process {found.daemon_pid}; {age}", "green")
    if not found.alarms:
        print_line("nothing needs attention", "green")


def _print_alarm(alarm: Alarm) -> None:
    print_line(f"{alarm.level.name}: {alarm.text}", _LEVEL_STYLES[alarm.level])
    if alarm.detail:
        print_line(f"  {alarm.detail}")
    if alarm.hint:
        print_line(f"  hint: {alarm.hint}")


def _print_uploads(uploads: Sequence[Upload]) -> None:
    rows = [
        (u.archive, u.destination, f"{u.percent} %", human_size(u.size_bytes),
         f"{human_size(u.bytes_per_s)}/s", "-" if u.seconds_left is None else human_duration(u.seconds_left))
        for u in uploads
    ]  # fmt: skip
    if rows:
        print_table(("uploading", "to", "sent", "of", "rate", "left"), rows, shortened=["uploading"])


def _print_drops(drops: Sequence[DropSnapshot]) -> None:
    rows = [
        (d.name, d.path, _observer(d), _pending(d), d.last or "-", relative_time(d.last_at)) for d in drops
    ]
    headings = ("drop", "path", "observer", "pending", "last archive", "queued")
    print_table(headings, rows, shortened=["path", "last archive"])
    if any(drop.fault or drop.blind_spot for drop in drops):
        print_line("")
    for drop in drops:
        if drop.fault:
            print_line(f"{drop.name}: events are missing ({drop.fault}); scans find new files", "yellow")
        if drop.blind_spot:
            print_line(f"{drop.name}: {drop.blind_spot}; see `backupd check`")


def _pending(queue: DropSnapshot | DestinationSnapshot) -> str:
    return f"{queue.pending} ({human_size(queue.pending_bytes)})" if queue.pending else "0"


def _observer(drop: DropSnapshot) -> str:
    """Return how the daemon notices changes of a folder at the moment."""
    if drop.held is not None:
        return "held"
    if not drop.is_configured:
        return "removed"
    return "scans" if drop.fault else drop.observer or "-"


def _print_destinations(destinations: Sequence[DestinationSnapshot]) -> None:
    rows = [
        (d.name, _state(d), _pending(d), relative_time(d.oldest), d.rejected, relative_time(d.last_delivered),
         _next_retry(d))
        for d in destinations
    ]  # fmt: skip
    headings = ("destination", "state", "pending", "oldest", "rejected", "delivered", "retry")
    print_table(headings, rows, shortened=["destination"])


def _next_retry(destination: DestinationSnapshot) -> str:
    if not destination.is_paused or destination.until is None or destination.held is not None:
        return ""
    return relative_time(destination.until) if destination.until > datetime.now(UTC) else "now"


def _state(destination: DestinationSnapshot) -> str:
    if destination.held is not None:
        return "held"
    return destination.circuit or "removed"


def _print_overdue(devices: Sequence[OverdueDevice]) -> None:
    rows = [(d.drop, d.device, relative_time(d.last_at)) for d in devices[:_MAX_OVERDUE]]
    if rows:
        print_table(("overdue in", "device", "last backup"), rows, shortened=["device"])
    if len(devices) > _MAX_OVERDUE:
        print_line(f"and {len(devices) - _MAX_OVERDUE} more; see `backupd status --json`")


def _print_certificates(certificates: Sequence[CertificateSnapshot]) -> None:
    if certificates:
        print_line("")
    for each in certificates:
        state, role = each.life.state, "" if each.role == "client" else f"{each.role} "
        left = "EXPIRED" if state is CertificateState.EXPIRED else f"{each.life} left"
        path = f" ({each.path})" if each.path else ""
        style = _CERTIFICATE_STYLES[state]
        print_line(f"{role}certificate of {each.destination}: {left}{path}", style)
