"""The retention policy: which sent archives are removed, and how the keys for it are written."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from pydantic import TypeAdapter, ValidationError

from backupd.config.types import FreeSpace
from backupd.core.retention_policy import Expiry, MinFree, RetentionPolicy, series_of, smallest_prefix
from tests.unit.config_files import a_file, faults_in, read

DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("policy", "age", "newer", "reason"),
    [
        (RetentionPolicy(), 1000 * DAY, 1000, None),
        (RetentionPolicy(keep_for=90 * DAY), 90 * DAY, 0, None),
        (RetentionPolicy(keep_for=90 * DAY), 91 * DAY, 0, Expiry.TOO_OLD),
        (RetentionPolicy(keep_last=3), 1000 * DAY, 2, None),
        (RetentionPolicy(keep_last=3), timedelta(0), 3, Expiry.TOO_MANY),
        (RetentionPolicy(keep_for=90 * DAY, keep_last=3), 91 * DAY, 2, None),
        (RetentionPolicy(keep_for=90 * DAY, keep_last=3), 89 * DAY, 3, None),
        (RetentionPolicy(keep_for=90 * DAY, keep_last=3), 91 * DAY, 3, Expiry.TOO_OLD),
        (RetentionPolicy(min_free=MinFree(1)), 1000 * DAY, 1000, None),
    ],
)
def test_an_archive_is_removed_if_it_is_old_and_not_among_the_latest(
    policy: RetentionPolicy, age: timedelta, newer: int, reason: Expiry | None
) -> None:
    assert policy.expiry_reason(age, newer) is reason
    assert policy.expires is (policy.keep_for is not None or policy.keep_last is not None)


@pytest.mark.parametrize(
    ("pattern", "series"),
    [
        (None, b"folder sent/site"),
        ("(?P<site>[^/]+)/.*", b"folder sent/site"),
        ("site/(?P<device>r[0-9]+)-.*", b"device r1"),
        ("other/(?P<device>.*)", b"folder sent/site"),
        ("site/(?P<device>x*).*", b"folder sent/site"),
    ],
)
def test_an_archive_is_in_the_series_of_its_device_or_else_of_its_folder(
    pattern: str | None, series: bytes
) -> None:
    compiled = re.compile(pattern) if pattern else None
    assert series_of(b"site/r1-0304.cfg", b"sent/site/r1-0304.cfg", compiled) == series


@pytest.mark.parametrize(
    ("shortage", "sizes", "wanted"),
    [
        (-5, [3], 0),
        (0, [3], 0),
        (1, [], 0),
        (1, [3, 3], 1),
        (3, [3, 3], 1),
        (4, [3, 3], 2),
        (7, [3, 3], 2),
        (3, [0, 0, 3, 1], 3),
    ],
)
def test_only_as_many_files_are_removed_as_the_shortage_needs(
    shortage: int, sizes: list[int], wanted: int
) -> None:
    assert smallest_prefix(shortage, sizes) == wanted


def test_a_percentage_is_that_of_the_whole_filesystem() -> None:
    assert MinFree(percent=5).of(1000) == 50
    assert MinFree(size=70).of(1000) == 70


@pytest.mark.parametrize(
    ("text", "space", "written"),
    [
        ("5%", MinFree(percent=5.0), "5%"),
        ("0.5%", MinFree(percent=0.5), "0.5%"),
        ("2GiB", MinFree(2 * 1024**3), "2GiB"),
    ],
)
def test_min_free_is_a_size_or_a_percentage(text: str, space: MinFree, written: str) -> None:
    adapter = TypeAdapter[MinFree](FreeSpace)
    assert adapter.validate_python(text) == space
    assert adapter.dump_python(space, mode="json") == written


@pytest.mark.parametrize("text", ["", "5", "100%", "-1%", "5 %", "0%", "0B", "much", 5, True])
def test_min_free_refuses_other_values(text: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter[MinFree](FreeSpace).validate_python(text)


@pytest.mark.parametrize("key", ['keep_sent_for = "1d"', "keep_sent_last = 1"])
def test_retention_keys_need_on_delivered_move(key: str) -> None:
    assert read(a_file(f"{key}\nmin_free = '1%'")).drop["switches"]
    [fault] = faults_in(a_file(f'on_delivered = "delete"\n{key}'))
    assert 'expected on_delivered "move"' in fault
