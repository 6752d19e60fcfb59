"""How far the clock may be ahead, and until when."""

from __future__ import annotations

from datetime import timedelta

from backupd.core.clock_skew import TRUST_AFTER, ZERO, ClockSkew

DAY, HOUR, SECOND = timedelta(days=1), timedelta(hours=1), timedelta(seconds=1)


def test_the_steps_of_a_day_are_added_and_end_together() -> None:
    skew = ClockSkew().after(2 * HOUR, ZERO).after(HOUR, 5 * HOUR)
    assert skew.at(TRUST_AFTER - SECOND) == 3 * HOUR
    assert skew.at(TRUST_AFTER) == ZERO


def test_a_larger_step_starts_the_day_again() -> None:
    skew = ClockSkew().after(HOUR, ZERO).after(400 * DAY, 23 * HOUR)
    assert skew.at(23 * HOUR + TRUST_AFTER - SECOND) == 400 * DAY + HOUR
    assert skew.at(23 * HOUR + TRUST_AFTER) == ZERO


def test_a_step_after_the_end_is_distrusted_alone() -> None:
    skew = ClockSkew().after(9 * DAY, ZERO).after(HOUR, 2 * DAY)
    assert skew.at(2 * DAY) == HOUR


def test_a_step_back_reduces_the_skew() -> None:
    skew = ClockSkew().after(8 * DAY, ZERO).after(-DAY, HOUR)
    assert skew.at(HOUR) == 7 * DAY
    assert skew.after(-9 * DAY, HOUR).at(HOUR) == ZERO


def test_a_host_that_is_off_each_night_trusts_its_clock_again_and_again() -> None:
    skew, ends = ClockSkew(), 0
    for day in range(30):
        skew = skew.after(8 * HOUR, 16 * HOUR * day)  # the time since boot does not count the nights
        ends += skew.at(16 * HOUR * (day + 1)) == ZERO
        assert skew.at(16 * HOUR * day) <= 16 * HOUR
    assert ends == 15


def test_steps_of_every_minute_do_not_keep_the_clock_distrusted() -> None:
    skew = ClockSkew().after(300 * DAY, ZERO)
    for minute in range(24 * 60):
        skew = skew.after(2 * SECOND, timedelta(minutes=minute))
    assert skew.at(DAY) == ZERO
