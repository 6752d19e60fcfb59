"""The retention policy: which sent archives are removed, and how the keys for it are written."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import TypeAdapter, ValidationError

from backupd.config.types import FreeSpace
from backupd.core.retention_policy import (
    Expiry,
    MinFree,
    RetentionPolicy,
    SentFile,
    newest_of_series,
    series_of,
    smallest_prefix,
)
from tests.unit.config_files import a_file, faults_in, read

DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("policy", "age", "is_among_newest", "reason"),
    [
        (RetentionPolicy(), 1000 * DAY, False, None),
        (RetentionPolicy(keep_for=90 * DAY), 90 * DAY, False, None),
        (RetentionPolicy(keep_for=90 * DAY), 91 * DAY, False, Expiry.TOO_OLD),
        (RetentionPolicy(keep_last=3), 1000 * DAY, True, None),
        (RetentionPolicy(keep_last=3), timedelta(0), False, Expiry.TOO_MANY),
        (RetentionPolicy(keep_for=90 * DAY, keep_last=3), 91 * DAY, True, None),
        (RetentionPolicy(keep_for=90 * DAY, keep_last=3), 89 * DAY, False, None),
        (RetentionPolicy(keep_for=90 * DAY, keep_last=3), 91 * DAY, False, Expiry.TOO_OLD),
        (RetentionPolicy(min_free=MinFree(1)), 1000 * DAY, False, None),
    ],
)
def test_an_archive_is_removed_if_it_is_old_and_not_among_the_latest(
    policy: RetentionPolicy, age: timedelta, is_among_newest: bool, reason: Expiry | None
) -> None:
    assert policy.expiry_reason(age, is_among_newest=is_among_newest) is reason
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
    assert series_of(b"sent/site/r1-0304.cfg", b"site/r1-0304.cfg", compiled) == series


@pytest.mark.parametrize(
    ("pattern", "below", "series"),
    [
        (r"(?P<device>.+)\.cfg", b"r1.cfg.20260304T050607Z-2", b"device r1"),
        ("(?P<device>.+)", b"r1.cfg.20260304T050607Z", b"device r1.cfg"),
        (r"(?P<device>[^.]+)\.cfg\.[0-9TZ]+", b"r1.cfg.20260304T050607Z", b"device r1"),
        (r"(?P<device>.+)\.txt", b"r1.cfg.20260304T050607Z", b"folder sent"),
    ],
)
def test_a_time_that_was_added_to_a_name_is_not_part_of_the_device(
    pattern: str, below: bytes, series: bytes
) -> None:
    assert series_of(b"sent/" + below, below, re.compile(pattern)) == series


def a_sent_file(name: str, moved: int, *, written: int = 0, receipt: str = "", series: str = "a") -> SentFile:
    moved_at = datetime(2026, 3, 4, tzinfo=UTC) + timedelta(hours=moved)
    return SentFile(moved_at, name.encode(), "switches", 3, written, series.encode(), receipt.encode())


@pytest.mark.parametrize(
    ("files", "newest"),
    [
        ([], set()),
        ([a_sent_file("a", 1)], {b"a"}),
        ([a_sent_file(name, moved, written=moved) for moved, name in enumerate("abcd")], {b"c", b"d"}),
        ([a_sent_file(name, n, written=-n) for n, name in enumerate("abcd")], {b"a", b"b", b"c", b"d"}),
        ([a_sent_file(name, n, series=name) for n, name in enumerate("abcd")], {b"a", b"b", b"c", b"d"}),
        (
            [
                *(a_sent_file(name, moved, written=moved) for moved, name in enumerate("abc")),
                a_sent_file("y", 9, written=9, receipt="y.receipt.json"),
                a_sent_file("z", -1, written=-1, receipt="z.receipt.json"),
            ],
            {b"b", b"c", b"y"},
        ),
    ],
    ids=["none", "one", "the last two", "in reverse", "a series each", "without archives"],
)
def test_the_newest_of_each_series_are_found_by_both_times(files: list[SentFile], newest: set[bytes]) -> None:
    assert newest_of_series(files, 2) == newest


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
