"""Bandwidth limits: rates by the time of day, the token bucket, and the configuration key."""

from __future__ import annotations

import itertools
import random

import pytest
from pydantic import TypeAdapter

from backupd.config.types import Bandwidth
from backupd.core.bandwidth import LARGEST_GRANT, SMALLEST_GRANT, RateSchedule, RateWindow, TokenBucket
from tests.unit.config_files import a_file, faults_in, read, vault

MIB = 1024 * 1024
ANY_BANDWIDTH: TypeAdapter[RateSchedule] = TypeAdapter(Bandwidth)


def at(clock: str) -> int:
    hour, minute = clock.split(":")
    return int(hour) * 60 + int(minute)


class TestSchedule:
    OFFICE = RateWindow(at("08:00"), at("18:00"), 1000)
    NIGHT = RateWindow(at("22:00"), at("06:00"), None)
    SCHEDULE = RateSchedule((OFFICE, NIGHT), 5000)

    @pytest.mark.parametrize(
        ("clock", "rate"),
        [
            ("07:59", 5000),
            ("08:00", 1000),
            ("12:34", 1000),
            ("17:59", 1000),
            ("18:00", 5000),
            ("21:59", 5000),
            ("22:00", None),
            ("23:59", None),
            ("00:00", None),
            ("05:59", None),
            ("06:00", 5000),
        ],
    )
    def test_the_rate_depends_on_the_time_of_day(self, clock: str, rate: int | None) -> None:
        assert self.SCHEDULE.rate_at(at(clock)) == rate

    def test_the_first_window_that_contains_the_time_applies(self) -> None:
        schedule = RateSchedule((RateWindow(0, 60, 1), RateWindow(0, 120, 2)), None)
        assert [schedule.rate_at(minute) for minute in (0, 59, 60, 119, 120)] == [1, 1, 2, 2, None]

    def test_without_windows_the_default_always_applies(self) -> None:
        assert {RateSchedule((), 7).rate_at(minute) for minute in range(24 * 60)} == {7}


class TestBucket:
    def test_an_empty_bucket_grants_nothing_at_first(self) -> None:
        granted, wait = TokenBucket(filled_at=100.0).acquire(MIB, MIB, 100.0)
        assert granted == 0
        assert wait == pytest.approx(SMALLEST_GRANT / MIB)

    def test_after_the_returned_wait_some_bytes_are_granted(self) -> None:
        bucket = TokenBucket(filled_at=100.0)
        _, wait = bucket.acquire(MIB, 10_000, 100.0)
        assert bucket.acquire(MIB, 10_000, 100.0 + wait)[0] == SMALLEST_GRANT

    def test_a_grant_is_not_larger_than_wanted(self) -> None:
        bucket = TokenBucket(filled_at=0.0)
        assert bucket.acquire(5, MIB, 1.0) == (5, 0.0)

    def test_a_small_remainder_does_not_wait_for_a_whole_tls_record(self) -> None:
        granted, wait = TokenBucket(filled_at=0.0).acquire(10, 1024, 0.0)
        assert granted == 0
        assert wait == pytest.approx(10 / 1024)

    def test_a_grant_is_small_enough_for_several_workers(self) -> None:
        assert TokenBucket(filled_at=0.0).acquire(MIB, 1000 * MIB, 1.0) == (LARGEST_GRANT, 0.0)

    @pytest.mark.parametrize("rate", [1024, 50_000, 8 * MIB])
    def test_a_burst_is_at_most_a_tenth_of_a_second_or_one_tls_record(self, rate: int) -> None:
        bucket = TokenBucket(filled_at=0.0)
        first = 0
        while granted := bucket.acquire(MIB, rate, 3600.0)[0]:
            first += granted
        assert first <= max(rate * 0.1, SMALLEST_GRANT)

    @pytest.mark.parametrize("rate", [1024, 20_000, MIB, 8 * MIB, 200 * MIB])
    def test_no_sequence_of_requests_exceeds_the_rate(self, rate: int) -> None:
        chance = random.Random(rate)
        bucket, now, grants = TokenBucket(filled_at=0.0), 0.0, [(0.0, 0)]
        for _ in range(3000):
            granted, wait = bucket.acquire(chance.choice([1, 500, 20_000, MIB]), rate, now)
            grants.append((now, granted))
            now += chance.choice([0.0, 0.0, wait, wait * 0.5, wait * 1.2])
        spans = range(1, len(grants), 7)
        total = list(itertools.accumulate(count for _, count in grants))
        for begin, end in itertools.product(spans, spans):
            if begin <= end:
                seconds = grants[end][0] - grants[begin][0]
                allowed = rate * seconds + max(rate * 0.1, SMALLEST_GRANT) + 1
                assert total[end] - total[begin - 1] <= allowed

    def test_continuous_requests_get_the_whole_rate(self) -> None:
        bucket, now, sent = TokenBucket(filled_at=0.0), 0.0, 0
        while now < 60:
            granted, wait = bucket.acquire(MIB, 8 * MIB, now)
            sent += granted
            now += wait
        assert sent == pytest.approx(60 * 8 * MIB, rel=0.01)

    def test_a_changed_rate_applies_immediately(self) -> None:
        bucket = TokenBucket(filled_at=0.0)
        bucket.acquire(MIB, 1024, 0.0)
        granted, wait = bucket.acquire(MIB, MIB, 1.0)
        assert granted
        assert wait == 0.0


def schedule_in(text: str) -> RateSchedule:
    schedule = vault(read(a_file(destination=text))).bandwidth
    assert schedule is not None
    return schedule


@pytest.mark.parametrize(
    ("text", "rate"),
    [("2MB/s", 2_000_000), ("2MB", 2_000_000), ("1KiB/s", 1024), ("1.5 MiB/s", 1_572_864), ("none", None)],
)
def test_a_single_rate_applies_all_day(text: str, rate: int | None) -> None:
    assert schedule_in(f'bandwidth = "{text}"') == RateSchedule((), rate)


def test_a_table_sets_rates_by_the_time_of_day() -> None:
    table = 'bandwidth = { "08:00-18:00" = "1MB/s", "22:00-06:00" = "none", default = "5MB/s" }'
    assert schedule_in(table) == RateSchedule(
        (RateWindow(480, 1080, 1_000_000), RateWindow(1320, 360, None)), 5_000_000
    )


def test_outside_all_windows_the_rate_is_unlimited_by_default() -> None:
    assert schedule_in('bandwidth = { "08:00-18:00" = "1MB/s" }').default is None


def test_without_the_key_the_rate_is_unlimited() -> None:
    assert vault(read(a_file())).bandwidth is None


@pytest.mark.parametrize(
    "text", ['"2MB/s"', '"none"', '{ "08:00-18:00" = "1MB/s", "22:00-06:00" = "none", default = "5MB/s" }']
)
def test_a_schedule_is_parsed_from_its_own_text(text: str) -> None:
    schedule = schedule_in(f"bandwidth = {text}")
    written = ANY_BANDWIDTH.dump_python(schedule, mode="json")
    assert ANY_BANDWIDTH.validate_python(written) == schedule


def test_a_schedule_object_is_accepted_as_it_is() -> None:
    assert ANY_BANDWIDTH.validate_python(TestSchedule.SCHEDULE) is TestSchedule.SCHEDULE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"fast"', 'expected a rate such as "2MB/s", or "none", got "fast"'),
        ('"2MB/min"', 'expected a rate such as "2MB/s", or "none"'),
        ('""', 'expected a rate such as "2MB/s", or "none"'),
        ('"-1MB/s"', 'expected a rate such as "2MB/s", or "none"'),
        ("2000000", 'expected a rate such as "2MB/s", or "none"'),
        ("true", 'expected a rate such as "2MB/s", or "none"'),
        ('["2MB/s"]', 'expected a rate such as "2MB/s", or "none"'),
        ('"0B/s"', 'expected a rate of at least "1KiB/s"'),
        ('"1023B/s"', 'expected a rate of at least "1KiB/s"'),
        ('{ "8-18" = "1MB/s" }', 'expected hours such as "08:00-18:00", or "default", as keys'),
        ('{ "08:00-24:00" = "1MB/s" }', 'expected hours such as "08:00-18:00"'),
        ('{ "08:00-18:60" = "1MB/s" }', 'expected hours such as "08:00-18:00"'),
        ('{ "08:00-08:00" = "1MB/s" }', 'expected hours such as "08:00-18:00"'),
        ('{ night = "1MB/s" }', 'expected hours such as "08:00-18:00"'),
        ('{ "08:00-18:00" = "slow" }', 'expected a rate such as "2MB/s", or "none"'),
        ("{ default = 5 }", 'expected a rate such as "2MB/s", or "none"'),
    ],
)
def test_a_bad_bandwidth_is_a_fault(text: str, message: str) -> None:
    (fault,) = faults_in(a_file(destination=f"bandwidth = {text}"))
    assert fault.startswith("destination.vault.bandwidth")
    assert message in fault
