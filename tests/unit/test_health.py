"""The output line and the exit code of a monitoring plugin."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from backupd.core.certificate_life import CertificateLife, CertificateLimits
from backupd.core.drop_problem import FOLDER_FAILED, ProblemCount
from backupd.core.health import HealthFacts, HealthLevel, HealthLimits, plugin_line

HOUR = timedelta(hours=1)
LIMITS = HealthLimits(HOUR, 6 * HOUR)


def lives(**days: float) -> dict[str, CertificateLife]:
    """Return the certificates of destinations, each with the days left, of a lifetime of years."""
    return {name: CertificateLife(timedelta(days=left), CertificateLimits()) for name, left in days.items()}


def a_count(reason: str, files: int = 1) -> ProblemCount:
    since = datetime(2026, 3, 4, tzinfo=UTC)
    return ProblemCount("switches", reason, files, since, b"r1", "Permission denied", "chmod it")


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (HealthFacts(), HealthLevel.OK, "OK - 0 pending, none rejected"),
        (HealthFacts(pending=3, oldest=HOUR / 2), HealthLevel.OK, "OK - 3 pending"),
        (
            HealthFacts(problems=[a_count("unreadable", 5)]),
            HealthLevel.WARNING,
            "WARNING - 5 unreadable in switches",
        ),
        (
            HealthFacts(problems=[a_count("unreadable"), a_count(FOLDER_FAILED)]),
            HealthLevel.CRITICAL,
            "CRITICAL - the folder of the drop switches cannot be used: Permission denied; 1 unreadable",
        ),
        (HealthFacts(running=False), HealthLevel.CRITICAL, "CRITICAL - the daemon is not running"),
        (
            HealthFacts(pending=1, oldest=HOUR),
            HealthLevel.WARNING,
            "the oldest pending archive has waited for 1 h",
        ),
        (
            HealthFacts(pending=1, oldest=6 * HOUR),
            HealthLevel.CRITICAL,
            "the oldest pending archive has waited for 6 h",
        ),
        (HealthFacts(paused={"vault": HOUR / 60}), HealthLevel.WARNING, "vault has been paused for 1 min"),
        (HealthFacts(paused={"vault": 6 * HOUR}), HealthLevel.CRITICAL, "vault has been paused for 6 h"),
        (HealthFacts(rejected=2), HealthLevel.WARNING, "WARNING - 2 rejected"),
        (HealthFacts(certificates=lives(vault=14)), HealthLevel.OK, "OK"),
        (
            HealthFacts(certificates=lives(vault=13.9)),
            HealthLevel.WARNING,
            "the certificate of vault expires in 13 days",
        ),
        (
            HealthFacts(certificates=lives(vault=2)),
            HealthLevel.CRITICAL,
            "the certificate of vault expires in 2 days",
        ),
        (
            HealthFacts(certificates=lives(vault=-1)),
            HealthLevel.CRITICAL,
            "the certificate of vault has expired",
        ),
        (HealthFacts(pending=1, oldest=72 * HOUR), HealthLevel.CRITICAL, "archive has waited for 3 d"),
        (HealthFacts(overdue=["r1 (switches)"]), HealthLevel.WARNING, "overdue: r1 (switches)"),
        (
            HealthFacts(running=False, rejected=1),
            HealthLevel.CRITICAL,
            "CRITICAL - the daemon is not running; 1 rejected",
        ),
        (
            HealthFacts(rejected=1, certificates=lives(v=1)),
            HealthLevel.CRITICAL,
            "v expires in 24 h; 1 rejected",
        ),
    ],
)
def test_the_worst_problem_comes_first_and_sets_the_exit_code(
    facts: HealthFacts, level: HealthLevel, words: str
) -> None:
    found, line = plugin_line(facts, LIMITS)
    assert found is level
    assert line.startswith(level.name + " - ")
    assert words in line


def test_the_performance_data_follows_a_single_vertical_bar() -> None:
    facts = HealthFacts(
        pending=3,
        pending_bytes=10,
        oldest=90 * HOUR / 60,
        paused={"a|b": HOUR},
        certificates=lives(x=100, y=20),
        overdue=["r|1"],
        problems=[a_count("unreadable", 5)],
    )
    _, line = plugin_line(facts, LIMITS)
    text, numbers = line.split("|")
    assert "a/b has been paused" in text
    assert numbers.split() == [
        "pending=3",
        "pending_bytes=10B",
        "oldest=5400s;3600;21600",
        "rejected=0",
        "paused=1",
        "overdue=1",
        "problems=5",
        "certificate_days=20;14:;3:",
    ]
