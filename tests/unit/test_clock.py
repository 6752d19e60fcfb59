"""A clock that is set: noticed, told from a host that slept, and not believed where something is removed."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from backupd.core.clock_skew import ZERO, ClockSkew, ClockSkews
from backupd.daemon.housekeeping import HostClock
from backupd.ledger.port import ClockReading

START = datetime(2026, 5, 1, tzinfo=UTC).timestamp()


class Host:
    """What the host's clocks say."""

    def __init__(self) -> None:
        self.wall, self.boot = START, 1000.0

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds

    @property
    def now(self) -> datetime:
        return datetime.fromtimestamp(self.wall, UTC)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(time, "time", lambda: host.wall)
    monkeypatch.setattr(time, "clock_gettime", lambda _: host.boot)

    class Now(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return host.now

    monkeypatch.setattr("backupd.daemon.housekeeping.datetime", Now)
    return host


def test_time_that_passes_is_no_step_whether_the_host_slept_or_not(host: Host) -> None:
    clock = HostClock()
    for seconds in (5, 0.5, 8 * 3600):
        host.passes(seconds)
        assert clock.step() == ZERO
    assert clock.trusted_now() == host.now


def test_being_kept_right_is_no_step_however_much_it_comes_to(host: Host) -> None:
    clock = HostClock()
    for _ in range(100):
        host.passes(5)
        host.wall += 0.1
        assert clock.step() == ZERO


@pytest.mark.parametrize("seconds", [-3 * 86400, -2, 2, 3 * 86400])
def test_a_step_is_told_once(host: Host, seconds: float) -> None:
    clock = HostClock()
    host.passes(5)
    host.wall += seconds
    assert clock.step() == timedelta(seconds=seconds)
    assert clock.step() == ZERO


def test_a_step_forward_is_not_believed_for_a_day_noticed_or_not(host: Host) -> None:
    clock = HostClock()
    host.wall += 400 * 86400
    assert clock.trusted_now() == datetime.fromtimestamp(START, UTC)
    clock.step()
    host.passes(3600)
    assert clock.trusted_now() == datetime.fromtimestamp(START + 3600, UTC)
    host.passes(86400 + 3600)
    assert clock.trusted_now() == host.now


def test_a_step_back_is_believed_at_once(host: Host) -> None:
    clock = HostClock()
    host.wall += 400 * 86400
    clock.step()
    host.wall -= 400 * 86400
    clock.step()
    assert clock.trusted_now() == host.now
    host.wall -= 86400
    clock.step()
    assert clock.trusted_now() == host.now


def test_the_time_before_a_start_is_doubted_for_a_day(host: Host) -> None:
    """The host may have been off, or its clock may be wrong."""
    last = host.now
    host.passes(1000 * 24 * 3600)
    clock = HostClock(ClockReading(last))
    assert clock.trusted_now() == last
    host.passes(3600)
    assert clock.step() == ZERO
    assert clock.trusted_now() == last + timedelta(hours=1)
    host.passes(23 * 3600 - 1)
    assert clock.trusted_now() == host.now - timedelta(days=1000)
    host.passes(3601)
    assert clock.trusted_now() == host.now


def test_a_history_that_is_read_later_is_doubted_as_well(host: Host) -> None:
    clock = HostClock()
    assert clock.trusted_now() == host.now
    oldest = host.now - timedelta(days=30)
    clock.distrust_since(host.now - timedelta(days=2))
    clock.distrust_since(oldest)
    clock.distrust_since(host.now + timedelta(days=1))
    assert clock.trusted_now() == oldest
    host.passes(86400 + 3600)
    assert clock.trusted_now() == host.now


def test_a_start_by_an_earlier_clock_is_believed(host: Host) -> None:
    last = host.now
    host.wall -= 3600
    assert HostClock(ClockReading(last)).trusted_now() == host.now


def test_a_step_soon_after_a_start_is_doubted_with_it(host: Host) -> None:
    last = host.now
    host.passes(3600)
    clock = HostClock(ClockReading(last))
    host.wall += 7200
    assert clock.step() == timedelta(hours=2)
    assert clock.trusted_now() == last


def test_a_start_goes_on_doubting_what_was_doubted_before(host: Host) -> None:
    right = host.now
    host.wall += 400 * 86400
    clock = HostClock(ClockReading(right))
    for number in range(1, 25):  # a start each hour
        host.passes(3600 - 1)
        assert clock.step() == ZERO
        assert clock.trusted_now() == right + timedelta(seconds=3599) * number
        note = clock.reading()
        host.passes(1)  # between end and start
        clock = HostClock(note)
    host.passes(2 * 3600)
    assert host.now - clock.trusted_now() < timedelta(minutes=1)


def test_a_clock_that_was_put_right_between_two_starts_is_believed(host: Host) -> None:
    right = host.now
    host.wall += 400 * 86400
    clock = HostClock(ClockReading(right))
    host.passes(60)
    note = clock.reading()
    host.wall -= 400 * 86400
    assert HostClock(note).trusted_now() == host.now
    assert HostClock(note).reading().skews == []


def test_a_doubt_ends_though_others_come(host: Host) -> None:
    right = host.now
    host.wall += 300 * 86400
    clock = HostClock(ClockReading(right))
    for number in range(40):
        host.passes(0.9 * 3600)
        host.wall += 2 * (-1) ** number
        clock.step()
    assert host.now - clock.trusted_now() <= timedelta(seconds=2)


def test_a_history_that_comes_back_is_doubted_for_a_day_of_its_own(host: Host) -> None:
    host.wall += 1000 * 86400
    clock = HostClock(ClockReading(host.now - timedelta(days=1000)))
    host.passes(86400 + 1800)  # that doubt is about to end
    old = host.now - timedelta(days=900)
    assert clock.distrust_since(old)
    assert not clock.distrust_since(old + timedelta(days=1))
    host.passes(86400)
    assert clock.trusted_now() == old + timedelta(days=1)
    host.passes(3600)
    assert clock.trusted_now() == host.now


def test_a_step_that_is_not_noticed_yet_is_left_to_the_next_start(host: Host) -> None:
    clock = HostClock()
    right = host.now
    host.wall += 400 * 86400
    assert HostClock(clock.reading()).trusted_now() == right


DAY, HOUR = timedelta(days=1), timedelta(hours=1)


def test_steps_that_come_together_are_one_doubt() -> None:
    skews = ClockSkews([], ZERO)
    for minute in range(24 * 60):
        skews.add(timedelta(seconds=2), timedelta(minutes=minute))
    assert len(skews.active(DAY)) <= 25
    assert skews.total(DAY) == timedelta(seconds=2 * 24 * 60)


def test_a_step_back_takes_the_latest_doubts_away() -> None:
    skews = ClockSkews([ClockSkew(5 * DAY, HOUR), ClockSkew(3 * DAY, 2 * HOUR)], ZERO)
    skews.add(-DAY, ZERO)
    assert skews.active(ZERO) == [ClockSkew(5 * DAY, HOUR), ClockSkew(2 * DAY, 2 * HOUR)]
    skews.add(-4 * DAY, ZERO)
    assert skews.active(ZERO) == [ClockSkew(3 * DAY, HOUR)]
    skews.add(-9 * DAY, ZERO)
    assert skews.active(ZERO) == []
    assert skews.total(ZERO) == ZERO
