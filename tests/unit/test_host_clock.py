"""Steps of the host's clock: detected, not confused with a sleeping host, and distrusted by retention."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from backupd.core.clock_skew import ZERO
from backupd.daemon.housekeeping import HostClock
from backupd.ledger.port import ClockReading

START = datetime(2026, 5, 1, tzinfo=UTC).timestamp()


class Host:
    """The clocks of the host: the wall clock, and the time since boot."""

    def __init__(self) -> None:
        self.wall, self.boot = START, 1000.0

    def advance(self, seconds: float) -> None:
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


def test_elapsed_time_is_no_step_even_if_the_host_slept(host: Host) -> None:
    clock = HostClock()
    for seconds in (5, 0.5, 8 * 3600):
        host.advance(seconds)
        assert clock.step() == ZERO
    assert clock.trusted_now() == host.now


def test_many_small_adjustments_are_no_step(host: Host) -> None:
    clock = HostClock()
    for _ in range(100):
        host.advance(5)
        host.wall += 0.1
        assert clock.step() == ZERO


@pytest.mark.parametrize("seconds", [-3 * 86400, -2, 2, 3 * 86400])
def test_a_step_is_returned_once(host: Host, seconds: float) -> None:
    clock = HostClock()
    host.advance(5)
    host.wall += seconds
    assert clock.step() == timedelta(seconds=seconds)
    assert clock.step() == ZERO


def test_a_step_forward_is_distrusted_for_a_day_detected_or_not(host: Host) -> None:
    clock = HostClock()
    host.wall += 400 * 86400
    assert clock.trusted_now() == datetime.fromtimestamp(START, UTC)
    clock.step()
    host.advance(3600)
    assert clock.trusted_now() == datetime.fromtimestamp(START + 3600, UTC)
    host.advance(86400 + 3600)
    assert clock.trusted_now() == host.now


def test_a_step_back_is_trusted_at_once(host: Host) -> None:
    clock = HostClock()
    host.wall += 400 * 86400
    clock.step()
    host.wall -= 400 * 86400
    clock.step()
    assert clock.trusted_now() == host.now
    host.wall -= 86400
    clock.step()
    assert clock.trusted_now() == host.now


def test_the_time_before_a_start_is_distrusted_for_a_day(host: Host) -> None:
    """The host may have been off, or its clock may be wrong."""
    last = host.now
    host.advance(1000 * 24 * 3600)
    clock = HostClock(ClockReading(last))
    assert clock.trusted_now() == last
    host.advance(3600)
    assert clock.step() == ZERO
    assert clock.trusted_now() == last + timedelta(hours=1)
    host.advance(23 * 3600 - 1)
    assert clock.trusted_now() == host.now - timedelta(days=1000)
    host.advance(3601)
    assert clock.trusted_now() == host.now


def test_a_start_with_an_earlier_clock_is_trusted(host: Host) -> None:
    last = host.now
    host.wall -= 3600
    assert HostClock(ClockReading(last)).trusted_now() == host.now


def test_a_step_soon_after_a_start_is_added_to_its_distrust(host: Host) -> None:
    last = host.now
    host.advance(3600)
    clock = HostClock(ClockReading(last))
    host.wall += 7200
    assert clock.step() == timedelta(hours=2)
    assert clock.trusted_now() == last


def test_a_distrusted_time_stays_distrusted_after_a_start(host: Host) -> None:
    right = host.now
    host.wall += 400 * 86400
    clock = HostClock(ClockReading(right))
    for number in range(1, 25):  # a start each hour
        host.advance(3600 - 1)
        assert clock.step() == ZERO
        assert clock.trusted_now() == right + timedelta(seconds=3599) * number
        reading = clock.reading()
        host.advance(1)  # between end and start
        clock = HostClock(reading)
    host.advance(2 * 3600)
    assert host.now - clock.trusted_now() < timedelta(minutes=1)


def test_a_clock_that_was_corrected_between_two_starts_is_trusted(host: Host) -> None:
    right = host.now
    host.wall += 400 * 86400
    clock = HostClock(ClockReading(right))
    host.advance(60)
    reading = clock.reading()
    host.wall -= 400 * 86400
    assert HostClock(reading).trusted_now() == host.now
    assert HostClock(reading).reading().ahead == ZERO


def test_a_distrust_ends_although_further_steps_follow(host: Host) -> None:
    right = host.now
    host.wall += 300 * 86400
    clock = HostClock(ClockReading(right))
    for number in range(40):
        host.advance(0.9 * 3600)
        host.wall += 2 * (-1) ** number
        clock.step()
    assert host.now - clock.trusted_now() <= timedelta(seconds=2)


def test_an_undetected_step_is_detected_by_the_next_start(host: Host) -> None:
    clock = HostClock()
    right = host.now
    host.wall += 400 * 86400
    assert HostClock(clock.reading()).trusted_now() == right
