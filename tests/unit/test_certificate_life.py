"""The state of a certificate by days and by the share of its lifetime."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from backupd.core.certificate_life import CertificateLimits, Validity

NOW = datetime(2026, 3, 4, tzinfo=UTC)
DAY, HOUR, SECOND = timedelta(days=1), timedelta(hours=1), timedelta(seconds=1)


@pytest.mark.parametrize(
    ("lifetime", "left", "state"),
    [
        (365 * DAY, 14 * DAY, "valid"),
        (365 * DAY, 14 * DAY - SECOND, "expiring"),
        (365 * DAY, 3 * DAY, "expiring"),
        (365 * DAY, 3 * DAY - SECOND, "critical"),
        (365 * DAY, SECOND, "critical"),
        (365 * DAY, 0 * DAY, "expired"),
        (365 * DAY, -DAY, "expired"),
        (40 * DAY, 10 * DAY, "valid"),
        (40 * DAY, 10 * DAY - SECOND, "expiring"),
        (DAY, DAY, "valid"),
        (DAY, 8 * HOUR, "valid"),
        (DAY, 6 * HOUR - SECOND, "expiring"),
        (DAY, 2.4 * HOUR, "expiring"),
        (DAY, 2.4 * HOUR - SECOND, "critical"),
        (DAY, -SECOND, "expired"),
        (HOUR, 16 / 60 * HOUR, "valid"),
        (HOUR, 14 / 60 * HOUR, "expiring"),
    ],
)
def test_limits_are_a_quarter_and_a_tenth_of_the_lifetime_at_most(
    lifetime: timedelta, left: timedelta, state: str
) -> None:
    validity = Validity(NOW + left - lifetime, NOW + left)
    assert CertificateLimits().life(validity, NOW).state == state


def test_limits_that_are_set_hold_for_certificates_that_live_long_enough() -> None:
    limits = CertificateLimits(warning=60 * DAY, critical=30 * DAY)
    lives = [limits.life(Validity(NOW - 300 * DAY, NOW + days * DAY), NOW) for days in (61, 59, 29)]
    assert [life.state for life in lives] == ["valid", "expiring", "critical"]


@pytest.mark.parametrize(
    ("left", "days", "text"),
    [
        (30 * DAY, 30, "30 days"),
        (2 * DAY - SECOND, 1, "47 h 59 min"),
        (SECOND, 0, "1 s"),
        (5.5 * HOUR, 0, "5 h 30 min"),
        (-SECOND, -1, "0 s"),
        (-DAY - SECOND, -2, "0 s"),
    ],
)
def test_days_left_are_rounded_down_and_the_last_two_days_are_given_in_hours(
    left: timedelta, days: int, text: str
) -> None:
    life = CertificateLimits().life(Validity(NOW - 365 * DAY, NOW + left), NOW)
    assert (life.days_left, str(life)) == (days, text)
