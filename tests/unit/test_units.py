"""Durations and sizes as text for people."""

from __future__ import annotations

from datetime import timedelta

import pytest

from backupd.core.units import human_duration, human_size


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
