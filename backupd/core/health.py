"""What needs a person: the alarms of a daemon's state, and the line of a monitoring plugin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum

from backupd.core.certificate_life import RENEW_HINTS, CertificateState
from backupd.core.policy import Reason
from backupd.core.snapshot import (
    CertificateSnapshot,
    DestinationSnapshot,
    OperatorPause,
    ProblemSnapshot,
    Snapshot,
)
from backupd.core.units import human_duration

_MAX_NAMES = 10
"""Overdue devices that an alarm names."""


class HealthLevel(IntEnum):
    """The exit codes of a monitoring plugin.

    Source: Monitoring Plugins Development Guidelines, "Plugin Return Codes".
    """

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


class AlarmKind(StrEnum):
    """What an alarm is about."""

    DAEMON = "daemon"
    BACKLOG = "backlog"
    PAUSED = "paused"
    REJECTED = "rejected"
    CERTIFICATE = "certificate"
    PROBLEM = "problem"
    OVERDUE = "overdue"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that needs a person.

    `subject` names what has the trouble within its kind, such as a destination, so that an alarm is the same
    one as long as kind and subject are. `text` is one sentence without a full stop, `detail` the error or an
    example, and `hint` the command or edit that fixes it. `since` is when it began, None if that is unknown.
    """

    level: HealthLevel
    kind: AlarmKind
    subject: str
    text: str
    hint: str = ""
    since: datetime | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """The ages of the oldest pending archive, or of a pause, from which on they are a warning or critical."""

    warning_age: timedelta = timedelta(hours=1)
    critical_age: timedelta = timedelta(hours=6)


def alarms(
    snapshot: Snapshot | None, now: datetime, limits: HealthLimits, *, is_running: bool = True
) -> list[Alarm]:
    """Return the alarms of a state at `now`, the most serious first.

    `is_running` is whether the daemon's process exists. Without a snapshot, no daemon has used the ledger.
    """
    found = [*_daemon_alarms(snapshot, now, is_running=is_running)]
    if snapshot is not None:
        found += _queue_alarms(snapshot, now, limits)
        found += (_problem_alarm(problem) for problem in snapshot.problems)
        found += _device_alarms(snapshot)
        found += (alarm for each in snapshot.certificates for alarm in _certificate_alarms(each))
        found += (_hold_alarm(pause) for pause in snapshot.holds if pause.until is None)
    return sorted(found, key=lambda alarm: -alarm.level)


def plugin_line(
    snapshot: Snapshot | None, found: Sequence[Alarm], now: datetime, limits: HealthLimits
) -> tuple[HealthLevel, str]:
    """Return the exit code and the line that a monitoring plugin prints, with the alarms worst first."""
    level = max((alarm.level for alarm in found), default=HealthLevel.OK)
    texts = [alarm.text for alarm in found] or [
        f"{snapshot.pending if snapshot else 0} pending, none rejected"
    ]
    if snapshot is not None:
        texts += [hold_text(pause) for pause in snapshot.holds if pause.until is not None]
    perfdata = f" | {_perfdata(snapshot, now, limits)}" if snapshot else ""
    return level, f"{level.name} - {'; '.join(texts).replace('|', '/')}{perfdata}"


def hold_text(pause: OperatorPause) -> str:
    """Return a pause that a person has requested in words."""
    what = f"the drop {pause.name}" if pause.kind == "drop" else pause.name
    until = f" until {pause.until.astimezone():%Y-%m-%d %H:%M %Z}" if pause.until else ""
    note = f": {pause.note}" if pause.note else ""
    return f"{what} is paused by {pause.by or 'an operator'}{until}{note}"


def _daemon_alarms(snapshot: Snapshot | None, now: datetime, *, is_running: bool) -> Iterator[Alarm]:
    if not is_running:
        hint = "start it with `systemctl start backupd`, and see `journalctl -u backupd -n 50` for its end"
        yield Alarm(HealthLevel.CRITICAL, AlarmKind.DAEMON, "stopped", "the daemon is not running", hint)
    elif snapshot is None or snapshot.is_outdated(now):
        age = (
            f"its last state is {human_duration(snapshot.age(now))} old"
            if snapshot
            else "it has no state yet"
        )
        hint = (
            "see `journalctl -u backupd -n 50`: it hangs, or it can't write its ledger; then fix that, or"
            " `systemctl restart backupd`"
        )
        yield Alarm(HealthLevel.CRITICAL, AlarmKind.DAEMON, "hung", f"the daemon hangs: {age}", hint)
    for each in snapshot.daemon_problems if snapshot else ():
        text = f"{each.subject}: {each.error}"
        yield Alarm(HealthLevel.WARNING, AlarmKind.DAEMON, each.subject, text, each.hint, each.since)


def _queue_alarms(snapshot: Snapshot, now: datetime, limits: HealthLimits) -> Iterator[Alarm]:
    oldest = _oldest_not_held(snapshot)
    if oldest is not None and now - oldest >= limits.warning_age:
        level = HealthLevel.CRITICAL if now - oldest >= limits.critical_age else HealthLevel.WARNING
        text = f"the oldest pending archive has waited for {human_duration(now - oldest)}"
        hint = "`backupd list --state pending` shows the archives with their errors"
        yield Alarm(level, AlarmKind.BACKLOG, "", text, hint, oldest)
    for destination in snapshot.destinations:
        if destination.is_paused and destination.held is None:
            yield _pause_alarm(destination, now, limits)
    if snapshot.rejected:
        text = f"{snapshot.rejected} {'archive' if snapshot.rejected == 1 else 'archives'} rejected"
        hint = "`backupd list --state rejected` shows the reasons; then `backupd retry`"
        yield Alarm(HealthLevel.WARNING, AlarmKind.REJECTED, "", text, hint)


def _oldest_not_held(snapshot: Snapshot) -> datetime | None:
    """Return a time not after that of the oldest archive of which neither drop nor destination is held.

    It is None if there is none. An archive that a hold delays is no alarm.
    """
    by_destination = [d.oldest for d in snapshot.destinations if d.oldest and d.held is None]
    if not any(drop.held for drop in snapshot.drops):
        return min(by_destination, default=None)
    by_drop = [d.oldest for d in snapshot.drops if d.oldest and d.held is None]
    return max(min(by_destination), min(by_drop)) if by_destination and by_drop else None


def _pause_alarm(destination: DestinationSnapshot, now: datetime, limits: HealthLimits) -> Alarm:
    length = now - (destination.since or now)
    text = f"{destination.name} has been paused for {human_duration(length)}"
    is_critical = length >= limits.critical_age
    if destination.reason == Reason.LOCAL_FILES:
        text, is_critical = f"{text}: its CA, certificate or key cannot be used (`backupd check`)", True
    level = HealthLevel.CRITICAL if is_critical else HealthLevel.WARNING
    hint = destination.hint
    detail = f"{destination.reason}: {destination.error}"
    return Alarm(level, AlarmKind.PAUSED, destination.name, text, hint, destination.since, detail)


def _problem_alarm(problem: ProblemSnapshot) -> Alarm:
    subject = f"{problem.drop}: {problem.reason}"
    if problem.is_critical:
        level = HealthLevel.CRITICAL
        text = f"the folder of the drop {problem.drop} cannot be used: {problem.error}"
    else:
        level, noun = HealthLevel.WARNING, "file" if problem.files == 1 else "files"
        text = f"{problem.files} {noun} of {problem.drop}: {problem.reason.replace('_', ' ')}"
    detail = f"{problem.example or 'the folder'}: {problem.error}"
    return Alarm(level, AlarmKind.PROBLEM, subject, text, problem.hint, problem.since, detail)


def _device_alarms(snapshot: Snapshot) -> Iterator[Alarm]:
    if snapshot.overdue:
        names = ", ".join(f"{each.device or 'all'} ({each.drop})" for each in snapshot.overdue[:_MAX_NAMES])
        if len(snapshot.overdue) > _MAX_NAMES:
            names += f" and {len(snapshot.overdue) - _MAX_NAMES} more"
        since = min(each.since for each in snapshot.overdue)
        hint = "check the backup jobs of these devices"
        yield Alarm(HealthLevel.WARNING, AlarmKind.OVERDUE, "", f"overdue: {names}", hint, since)


def _certificate_alarms(certificate: CertificateSnapshot) -> Iterator[Alarm]:
    state, role = certificate.life.state, "" if certificate.role == "client" else f"{certificate.role} "
    if state is CertificateState.VALID:
        return
    level = HealthLevel.WARNING if state is CertificateState.EXPIRING else HealthLevel.CRITICAL
    text = f"the {role}certificate of {certificate.destination} expires in {certificate.life}"
    if state is CertificateState.EXPIRED:
        text = f"the {role}certificate of {certificate.destination} has expired"
    subject = f"{certificate.destination}: {certificate.role}"
    yield Alarm(level, AlarmKind.CERTIFICATE, subject, text, RENEW_HINTS[certificate.role])


def _hold_alarm(pause: OperatorPause) -> Alarm:
    subject = f"{pause.kind}: {pause.name}"
    hint = f"`backupd resume {pause.name}` ends it; `backupd pause --for TIME` sets an end"
    return Alarm(HealthLevel.WARNING, AlarmKind.HELD, subject, hold_text(pause), hint, pause.since)


def _perfdata(snapshot: Snapshot, now: datetime, limits: HealthLimits) -> str:
    oldest = (now - snapshot.oldest).total_seconds() if snapshot.oldest else 0
    warning, critical = limits.warning_age.total_seconds(), limits.critical_age.total_seconds()
    values = [
        f"pending={snapshot.pending}",
        f"pending_bytes={snapshot.pending_bytes}B",
        f"oldest={oldest:.0f}s;{warning:.0f};{critical:.0f}",
        f"rejected={snapshot.rejected}",
        f"paused={sum(each.is_paused for each in snapshot.destinations)}",
        f"overdue={len(snapshot.overdue)}",
        f"problems={sum(problem.files for problem in snapshot.problems)}",
    ]
    lives = [each.life for each in snapshot.certificates if each.role == "client"]
    if lives:
        life = min(lives, key=lambda life: life.left)
        left, warning_days, critical_days = (
            f"{each / timedelta(days=1):.2f}".removesuffix(".00")
            for each in (life.left, life.limits.warning, life.limits.critical)
        )
        values.append(f"certificate_days={left};{warning_days}:;{critical_days}:")
    return " ".join(values)
