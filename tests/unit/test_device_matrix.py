"""The matrix of devices by days: which days are delivered, late, missing or of no interest."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from backupd.core.device_matrix import CalendarDay, DayState, DeviceRow, device_matrix
from backupd.core.devices import Device
from backupd.core.snapshot import DeviceDay

FIRST = datetime(2026, 3, 1, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
CALENDAR = [CalendarDay(f"2026-03-0{n + 1}", FIRST + n * DAY, FIRST + (n + 1) * DAY) for n in range(5)]
NOW = FIRST + 4 * DAY + 12 * HOUR
LETTERS = {
    DayState.DELIVERED: "d",
    DayState.LATE: "l",
    DayState.WAITING: "w",
    DayState.REJECTED: "r",
    DayState.MISSING: "m",
    DayState.NONE: "-",
}


def a_device(name: str = "sw1", *, known_at: datetime = FIRST - 9 * DAY, **fields: Any) -> Device:
    return Device("switches", name, known_at, **{"every": 25 * HOUR, **fields})


def sent(at: datetime, device: str = "sw1", **fields: Any) -> DeviceDay:
    values = {"archives": 1, "delivered": 1, "rejected": 0, "unusual": 0, "last_at": at, **fields}
    return DeviceDay("switches", device, f"{at:%Y-%m-%d}", first_at=at, **values)


def night(number: int, hour: float = 2) -> datetime:
    """Return a time on the day with this number, of which 0 is the first in the calendar."""
    return FIRST + number * DAY + hour * HOUR


def matrix(
    *days: DeviceDay, devices: list[Device] | None = None, **history_from: datetime
) -> list[DeviceRow]:
    known = [a_device(archives=9, last_at=NOW)] if devices is None else devices
    return device_matrix(known, days, CALENDAR, NOW, history_from or {"switches": FIRST - 99 * DAY})


def letters(*days: DeviceDay, device: Device | None = None, **history_from: datetime) -> str:
    [row] = matrix(*days, devices=None if device is None else [device], **history_from)
    return "".join(LETTERS[state] for state in row.states)


def test_each_day_with_a_backup_in_time_is_delivered() -> None:
    assert letters(*(sent(night(n)) for n in range(-1, 5))) == "ddddd"


def test_days_without_an_expected_backup_are_missing_until_one_comes() -> None:
    assert letters(sent(night(-1)), sent(night(0)), sent(night(3)), sent(night(4))) == "dmmld"


def test_a_backup_that_is_due_later_today_is_not_missing() -> None:
    days = [sent(night(n, hour=20)) for n in range(-1, 4)]
    assert letters(*days) == "dddd-"


def test_a_backup_after_its_time_is_late() -> None:
    assert letters(*(sent(night(n, hour=9 if n == 2 else 2)) for n in range(-1, 5))) == "ddldd"


def test_the_first_and_not_the_last_archive_of_a_day_shows_whether_it_was_late() -> None:
    device = a_device(every=2 * HOUR, archives=9, last_at=NOW)
    days = [sent(night(n, 0), last_at=night(n, 23)) for n in range(-1, 5)]
    assert letters(*days, device=device) == "ddddd"


@pytest.mark.parametrize(
    ("counts", "letter"),
    [
        ({"archives": 2, "delivered": 1}, "w"),
        ({"archives": 1, "delivered": 0, "rejected": 1}, "r"),
        ({"archives": 2, "delivered": 1, "rejected": 1}, "d"),
    ],
    ids=["one waits", "the only one is rejected", "one of two is rejected"],
)
def test_archives_that_are_not_delivered_show(counts: dict[str, Any], letter: str) -> None:
    assert letters(sent(night(4), **counts), device=a_device(every=None)) == f"----{letter}"


def test_nothing_is_missing_from_a_device_without_an_interval() -> None:
    assert letters(sent(night(1)), device=a_device(every=None)) == "-d---"


def test_nothing_is_missing_from_before_a_device_was_listed() -> None:
    assert letters(device=a_device(known_at=night(2))) == "---mm"


def test_nothing_is_missing_from_before_the_first_archive_of_a_device() -> None:
    device = a_device(known_at=night(2), archives=1, last_at=night(2))
    assert letters(sent(night(2)), device=device) == "--dmm"


def test_a_weekly_backup_is_expected_once_a_week() -> None:
    device = a_device(every=8 * DAY, archives=9, last_at=night(2))
    assert letters(sent(night(-5)), sent(night(2)), device=device) == "--d--"


def test_a_device_that_stopped_long_ago_is_missing_on_each_day() -> None:
    assert letters(device=a_device(archives=9, last_at=FIRST - 8 * DAY)) == "mmmmm"


def test_nothing_is_missing_from_before_the_history_of_a_new_ledger() -> None:
    device = a_device(archives=9, last_at=NOW)
    days = [sent(night(3)), sent(night(4))]
    assert letters(*days, device=device, switches=night(3)) == "---dd"
    assert letters(*days, device=device, firewalls=night(3)) == "mmmld"


def test_a_drop_without_tracked_devices_has_a_row() -> None:
    assert matrix(sent(night(1), device=""), devices=[]) == [
        DeviceRow("switches", "", (DayState.NONE, DayState.DELIVERED, *[DayState.NONE] * 3))
    ]


def test_a_device_that_is_not_tracked_and_sent_nothing_in_these_days_has_no_row() -> None:
    assert matrix(sent(night(-1), device=""), devices=[]) == []


def test_days_with_an_archive_of_unusual_size_are_marked() -> None:
    [row] = matrix(sent(night(1), unusual=1), sent(night(3), unusual=2))
    assert row.unusual == (1, 3)


def test_missing_backups_come_first_then_gaps_then_names() -> None:
    fine = [sent(night(n), device) for n in range(-1, 5) for device in ("a", "z")]
    gap = [sent(night(n), "gap") for n in (-1, 1, 2, 3, 4)]
    stopped = [sent(night(n), "stopped") for n in (-1, 0)]
    other = DeviceDay("aaa", "", "2026-03-02", 1, 1, 0, 0, night(1), night(1))
    devices = [a_device(name, archives=9, last_at=NOW) for name in ("a", "gap", "stopped", "z")]

    rows = matrix(*fine, *gap, *stopped, other, devices=devices)

    assert [row.device for row in rows] == ["stopped", "gap", "a", "z", ""]
    assert [row.has_gap for row in rows] == [True, True, False, False, False]
    assert [row.is_missing_now for row in rows] == [True, False, False, False, False]
