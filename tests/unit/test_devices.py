"""Overdue devices, and archives of an unusual size."""

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.core.devices import (
    WHOLE_DROP,
    Device,
    SizeAnomaly,
    device_of,
    median,
    overdue_and_recovered,
    overdue_by,
    relative_change,
    size_anomaly,
)
from backupd.core.names import TextTemplate
from tests.factories import NOW, SECOND

HOUR = timedelta(hours=1)


def a_device(
    *,
    known_at: datetime = NOW,
    last_at: datetime | None = None,
    every: timedelta | None = HOUR,
    alarmed: bool = False,
) -> Device:
    return Device("switches", "sw1", known_at, last_at, 0 if last_at is None else 1, every, alarmed)


@pytest.mark.parametrize(
    ("device", "after", "overdue"),
    [
        (a_device(last_at=NOW), HOUR, None),
        (a_device(last_at=NOW), HOUR + SECOND, SECOND),
        (a_device(last_at=NOW, known_at=NOW - 9 * HOUR), HOUR, None),
        (a_device(), HOUR, None),
        (a_device(), 3 * HOUR, 2 * HOUR),
        (a_device(every=None), 1000 * HOUR, None),
        (a_device(last_at=NOW + HOUR), timedelta(0), None),
    ],
    ids=[
        "in time",
        "overdue",
        "known for long",
        "never came",
        "never came in time",
        "not expected",
        "clock set back",
    ],
)
def test_a_device_is_overdue_once_no_archive_came_for_longer_than_every(
    device: Device, after: timedelta, overdue: timedelta | None
) -> None:
    assert overdue_by(device, NOW + after) == overdue


@pytest.mark.parametrize(
    ("device", "overdue", "recovered"),
    [
        (a_device(last_at=NOW), True, False),
        (a_device(last_at=NOW, alarmed=True), True, False),
        (a_device(last_at=NOW + HOUR, alarmed=True), False, True),
        (a_device(last_at=NOW + HOUR), False, False),
        (a_device(every=None, alarmed=True), False, True),
    ],
    ids=["first overdue", "still overdue", "came", "in time", "not expected any more"],
)
def test_only_a_device_that_was_reported_as_overdue_recovers(
    device: Device, overdue: bool, recovered: bool
) -> None:
    assert overdue_and_recovered([device], NOW + 2 * HOUR) == ([device] * overdue, [device] * recovered)


VALUES = {"site": "zrh", "device": "sw1", "kind": ""}


@pytest.mark.parametrize(
    ("by", "values", "name"),
    [
        (None, VALUES, WHOLE_DROP),
        ("{device}", VALUES, "sw1"),
        ("{site}/{device}", VALUES, "zrh/sw1"),
        ("{device}-{kind}", VALUES, "sw1-"),
        ("{kind}", VALUES, None),
        ("{site}/{device}", dict.fromkeys(VALUES, ""), None),
    ],
)
def test_the_template_names_the_device(by: str | None, values: dict[str, str], name: str | None) -> None:
    assert device_of(TextTemplate.parse(by) if by else None, values) == name


@pytest.mark.parametrize(
    ("sizes", "middle"), [([5], 5), ([9, 1], 5), ([9, 1, 2], 2), ([4, 1, 3, 2], 2), ([0, 0, 0], 0)]
)
def test_the_median_is_the_middle_size(sizes: list[int], middle: int) -> None:
    assert median(sizes) == middle


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=10))
def test_at_most_half_of_the_sizes_are_on_either_side_of_the_median(sizes: list[int]) -> None:
    middle = median(sizes)
    assert sum(size < middle for size in sizes) <= len(sizes) / 2
    assert sum(size > middle for size in sizes) <= len(sizes) / 2


@pytest.mark.parametrize(
    ("size", "before", "anomaly"),
    [
        (100, [100, 100, 100], None),
        (149, [100, 100, 100], None),
        (150, [100, 100, 100], SizeAnomaly(100, 0.5)),
        (51, [100, 100, 100], None),
        (50, [100, 100, 100], SizeAnomaly(100, -0.5)),
        (1, [100, 100], None),
        (1, [], None),
        (1000, [100, 5000, 90], SizeAnomaly(100, 9.0)),
        (0, [0, 0, 0], None),
        (1, [0, 0, 0], SizeAnomaly(0, 1.0)),
    ],
)
def test_a_size_is_unusual_if_it_differs_enough_from_the_median_of_at_least_three(
    size: int, before: list[int], anomaly: SizeAnomaly | None
) -> None:
    assert size_anomaly(size, before, 0.5) == anomaly


def test_a_change_is_a_fraction_of_the_usual_size() -> None:
    assert [relative_change(size, 200) for size in (0, 100, 200, 500)] == [-1.0, -0.5, 0.0, 1.5]
