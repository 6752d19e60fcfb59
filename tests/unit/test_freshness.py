from datetime import datetime, timedelta

import pytest

from backupd.core.devices import WHOLE_DROP, Device, device_of, overdue_and_recovered, overdue_by
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
    ("device", "after", "late"),
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
        "late",
        "known for long",
        "never came",
        "never came in time",
        "not expected",
        "clock set back",
    ],
)
def test_a_device_is_overdue_once_nothing_came_for_longer_than_it_should(
    device: Device, after: timedelta, late: timedelta | None
) -> None:
    assert overdue_by(device, NOW + after) == late


@pytest.mark.parametrize(
    ("device", "overdue", "recovered"),
    [
        (a_device(last_at=NOW), True, False),
        (a_device(last_at=NOW, alarmed=True), True, False),
        (a_device(last_at=NOW + HOUR, alarmed=True), False, True),
        (a_device(last_at=NOW + HOUR), False, False),
        (a_device(every=None, alarmed=True), False, True),
    ],
    ids=["falls silent", "still silent", "came", "in time", "not expected any more"],
)
def test_only_what_was_said_to_be_overdue_recovers(device: Device, overdue: bool, recovered: bool) -> None:
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
def test_a_device_is_named_by_the_template(by: str | None, values: dict[str, str], name: str | None) -> None:
    assert device_of(TextTemplate.parse(by) if by else None, values) == name
