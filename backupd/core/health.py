"""The health of a daemon, as the output line and exit code of a monitoring plugin."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum

from backupd.core.certificate_life import CertificateLife, CertificateState
from backupd.core.drop_problem import FOLDER_REASONS, ProblemCount
from backupd.core.units import human_duration


class HealthLevel(IntEnum):
    """The exit codes of a monitoring plugin.

    Source: Monitoring Plugins Development Guidelines, "Plugin Return Codes".
    """

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class HealthFacts:
    """The state of a daemon and its queue.

    `pending_bytes` is the size of all `pending` archives, `oldest` the age of the oldest of them. `paused`
    has the length of the pause of each paused destination, `unusable` those with a CA, certificate or key
    that cannot be used, `certificates` the client certificate of each destination, `overdue` the devices
    that should have sent an archive, and `problems` the files that will not be sent, or not moved, as things
    are.
    """

    running: bool = True
    pending: int = 0
    pending_bytes: int = 0
    oldest: timedelta | None = None
    rejected: int = 0
    paused: Mapping[str, timedelta] = field(default_factory=dict)
    unusable: Collection[str] = ()
    certificates: Mapping[str, CertificateLife] = field(default_factory=dict)
    overdue: Sequence[str] = ()
    problems: Sequence[ProblemCount] = ()


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """The ages of the oldest pending archive, or of a pause, from which on they are a warning or critical."""

    warning_age: timedelta
    critical_age: timedelta


def plugin_line(facts: HealthFacts, limits: HealthLimits) -> tuple[HealthLevel, str]:
    """Return the exit code and the line that a monitoring plugin prints, worst problem first."""
    problems = list(_problems(facts, limits))
    level = max((level for level, _ in problems), default=HealthLevel.OK)
    worst_first = sorted(problems, key=lambda problem: -problem[0])
    text = "; ".join(text for _, text in worst_first) or f"{facts.pending} pending, none rejected"
    return level, f"{level.name} - {text.replace('|', '/')} | {_perfdata(facts, limits)}"


def _problems(facts: HealthFacts, limits: HealthLimits) -> Iterator[tuple[HealthLevel, str]]:
    if not facts.running:
        yield HealthLevel.CRITICAL, "the daemon is not running"
    if facts.oldest is not None and facts.oldest >= limits.warning_age:
        text = f"the oldest pending archive has waited for {human_duration(facts.oldest)}"
        yield HealthLevel.CRITICAL if facts.oldest >= limits.critical_age else HealthLevel.WARNING, text
    for name, length in facts.paused.items():
        text = f"{name} has been paused for {human_duration(length)}"
        if name in facts.unusable:
            yield HealthLevel.CRITICAL, f"{text}: its CA, certificate or key cannot be used (`backupd check`)"
        else:
            yield HealthLevel.CRITICAL if length >= limits.critical_age else HealthLevel.WARNING, text
    if facts.rejected:
        yield HealthLevel.WARNING, f"{facts.rejected} rejected"
    for name, life in facts.certificates.items():
        if life.state is not CertificateState.VALID:
            yield _certificate_problem(name, life)
    for problem in facts.problems:
        yield _problem(problem)
    if facts.overdue:
        yield HealthLevel.WARNING, f"overdue: {', '.join(facts.overdue)}"


def _certificate_problem(name: str, life: CertificateLife) -> tuple[HealthLevel, str]:
    if life.state is CertificateState.EXPIRED:
        return HealthLevel.CRITICAL, f"the certificate of {name} has expired"
    level = HealthLevel.CRITICAL if life.state is CertificateState.CRITICAL else HealthLevel.WARNING
    return level, f"the certificate of {name} expires in {life}"


def _problem(problem: ProblemCount) -> tuple[HealthLevel, str]:
    if problem.reason in FOLDER_REASONS:
        return HealthLevel.CRITICAL, f"the folder of the drop {problem.drop} cannot be used: {problem.error}"
    return HealthLevel.WARNING, f"{problem.files} {problem.reason} in {problem.drop}"


def _perfdata(facts: HealthFacts, limits: HealthLimits) -> str:
    oldest = facts.oldest.total_seconds() if facts.oldest else 0
    warning, critical = limits.warning_age.total_seconds(), limits.critical_age.total_seconds()
    values = [
        f"pending={facts.pending}",
        f"pending_bytes={facts.pending_bytes}B",
        f"oldest={oldest:.0f}s;{warning:.0f};{critical:.0f}",
        f"rejected={facts.rejected}",
        f"paused={len(facts.paused)}",
        f"overdue={len(facts.overdue)}",
        f"problems={sum(problem.files for problem in facts.problems)}",
    ]
    if facts.certificates:
        life = min(facts.certificates.values(), key=lambda life: life.left)
        left, warning_days, critical_days = (
            f"{each / timedelta(days=1):.2f}".removesuffix(".00")
            for each in (life.left, life.limits.warning, life.limits.critical)
        )
        values.append(f"certificate_days={left};{warning_days}:;{critical_days}:")
    return " ".join(values)
