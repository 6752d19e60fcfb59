"""The line and the exit code of a monitoring plugin."""

from __future__ import annotations

from datetime import timedelta

import pytest

from backupd.core.health import Facts, Level, Limits, plugin_line

HOUR = timedelta(hours=1)
LIMITS = Limits(HOUR, 6 * HOUR)


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (Facts(), Level.OK, "OK - 0 pending, none rejected"),
        (Facts(pending=3, oldest=HOUR / 2), Level.OK, "OK - 3 pending"),
        (Facts(running=False), Level.CRITICAL, "CRITICAL - the daemon is not running"),
        (Facts(pending=1, oldest=HOUR), Level.WARNING, "the oldest pending archive waits for 60 min"),
        (Facts(pending=1, oldest=6 * HOUR), Level.CRITICAL, "the oldest pending archive waits for 6 h"),
        (Facts(paused={"vault": HOUR / 60}), Level.WARNING, "vault is paused for 60 s"),
        (Facts(paused={"vault": 6 * HOUR}), Level.CRITICAL, "vault is paused for 6 h"),
        (Facts(rejected=2), Level.WARNING, "WARNING - 2 rejected"),
        (Facts(days_left={"vault": 14}), Level.OK, "OK"),
        (Facts(days_left={"vault": 13}), Level.WARNING, "the certificate of vault ends in 13 days"),
        (Facts(days_left={"vault": 2}), Level.CRITICAL, "the certificate of vault ends in 2 days"),
        (Facts(days_left={"vault": -1}), Level.CRITICAL, "the certificate of vault has expired"),
        (Facts(pending=1, oldest=72 * HOUR), Level.CRITICAL, "archive waits for 3 d"),
        (Facts(overdue=["r1 (switches)"]), Level.WARNING, "overdue: r1 (switches)"),
        (
            Facts(running=False, rejected=1),
            Level.CRITICAL,
            "CRITICAL - the daemon is not running; 1 rejected",
        ),
        (Facts(rejected=1, days_left={"v": 1}), Level.CRITICAL, "v ends in 1 days; 1 rejected"),
    ],
)
def test_the_worst_counts_and_comes_first(facts: Facts, level: Level, words: str) -> None:
    found, line = plugin_line(facts, LIMITS)
    assert found is level
    assert line.startswith(level.name + " - ")
    assert words in line


def test_the_numbers_stand_behind_a_single_bar() -> None:
    facts = Facts(
        pending=3,
        pending_bytes=10,
        oldest=90 * HOUR / 60,
        paused={"a|b": HOUR},
        days_left={"x": 100, "y": 20},
        overdue=["r|1"],
    )
    _, line = plugin_line(facts, LIMITS)
    text, numbers = line.split("|")
    assert "a/b is paused" in text
    assert numbers.split() == [
        "pending=3",
        "pending_bytes=10B",
        "oldest=5400s;3600;21600",
        "rejected=0",
        "paused=1",
        "overdue=1",
        "certificate_days=20;14:;3:",
    ]
