"""Durations, times and sizes as text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from backupd.core.units import human_duration, human_size, local_time, machine_time, short_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h"),
        (3661, "1 h 1 min"),
        (47 * 3600 + 59 * 60, "47 h 59 min"),
        (48 * 3600, "2 d"),
        (3 * 86400 + 5 * 3600, "3 d 5 h"),
        (400 * 86400, "400 d"),
    ],
)
def test_a_duration_for_people_has_at_most_two_units_and_is_rounded_down(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text
    assert human_duration(timedelta(seconds=seconds)) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_500_000, "1.4 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_a_size_for_people_has_a_binary_unit(count: int, text: str) -> None:
    assert human_size(count) == text


@pytest.fixture
def in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the host be in the zone of Berlin, given without a database of zones."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_berlin")
def test_a_time_for_people_is_local_and_has_its_zone() -> None:
    assert local_time(datetime(2026, 3, 1, 5, tzinfo=UTC)) == "2026-03-01 06:00:00 CET"
    assert local_time(datetime(2026, 7, 1, 5, tzinfo=UTC)) == "2026-07-01 07:00:00 CEST"
    assert local_time(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)) == "9999-12-31 23:59:59 UTC"


@pytest.mark.usefixtures("in_berlin")
def test_a_time_for_programs_is_in_utc_with_a_z() -> None:
    at = datetime(2026, 3, 1, 5, 0, 0, 250_000, tzinfo=UTC)
    assert machine_time(at) == machine_time(at.astimezone()) == "2026-03-01T05:00:00.250Z"
    assert machine_time(at, "seconds") == "2026-03-01T05:00:00Z"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h"),
        (172_799, "47 h"),
        (172_800, "2 d"),
    ],
)
def test_a_short_duration_has_one_unit(seconds: float, text: str) -> None:
    assert short_duration(seconds) == text
