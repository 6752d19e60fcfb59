"""The list of clock steps that are distrusted."""

from __future__ import annotations

from datetime import timedelta

from backupd.core.clock_skew import ZERO, ClockSkew, ClockSkews

DAY, HOUR = timedelta(days=1), timedelta(hours=1)


def test_steps_within_an_hour_are_merged() -> None:
    skews = ClockSkews([], ZERO)
    for minute in range(24 * 60):
        skews.add(timedelta(seconds=2), timedelta(minutes=minute))
    assert len(skews.active(DAY)) <= 25
    assert skews.total(DAY) == timedelta(seconds=2 * 24 * 60)


def test_a_step_back_cancels_the_latest_steps() -> None:
    skews = ClockSkews([ClockSkew(5 * DAY, HOUR), ClockSkew(3 * DAY, 2 * HOUR)], ZERO)
    skews.add(-DAY, ZERO)
    assert skews.active(ZERO) == [ClockSkew(5 * DAY, HOUR), ClockSkew(2 * DAY, 2 * HOUR)]
    skews.add(-4 * DAY, ZERO)
    assert skews.active(ZERO) == [ClockSkew(3 * DAY, HOUR)]
    skews.add(-9 * DAY, ZERO)
    assert skews.active(ZERO) == []
    assert skews.total(ZERO) == ZERO
