"""Durations, sizes and percentages in a configuration."""

import re
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from backupd.config.types import (
    DURATION_PATTERN,
    MAX_DURATION,
    MAX_SIZE,
    SIZE_PATTERN,
    Duration,
    Percentage,
    PositiveDuration,
    Size,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("0s", timedelta(0)),
        ("0.2s", timedelta(milliseconds=200)),
        ("250ms", timedelta(milliseconds=250)),
        ("5m", timedelta(minutes=5)),
        ("26h", timedelta(hours=26)),
        ("30d", timedelta(days=30)),
        ("1h30m", timedelta(minutes=90)),
        ("1.5h", timedelta(minutes=90)),
        ("1d2h3m4s5ms", timedelta(days=1, hours=2, minutes=3, seconds=4, milliseconds=5)),
        ("36500d", MAX_DURATION),
    ],
)
def test_a_duration_is_parsed_from_numbers_with_units(text: str, duration: timedelta) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text",
    ["", " ", "two", "5", "5 m", "m", "-1s", "1s1h", "1h1h", "1e3s", ".5s", "5M", "1s\n", "٣s", "1w", "inf"],
)
def test_other_texts_are_refused_as_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r'^expected a duration such as "2s"$'):
        parse_duration(text)


@pytest.mark.parametrize("text", ["36500d1ms", "99999999999999999999d", "9" * 20 + ".999999999h"])
def test_a_duration_above_a_hundred_years_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match='at most "36500d"'):
        parse_duration(text)


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(0), "0s"),
        (timedelta(milliseconds=200), "0.2s"),
        (timedelta(microseconds=1), "0.000001s"),
        (timedelta(seconds=90), "90s"),
        (timedelta(minutes=10), "10m"),
        (timedelta(hours=26), "26h"),
        (timedelta(days=30), "30d"),
        (timedelta(days=1, microseconds=1), "86400.000001s"),
    ],
)
def test_a_duration_is_written_in_one_unit(duration: timedelta, text: str) -> None:
    assert format_duration(duration) == text


@given(st.timedeltas(min_value=timedelta(0), max_value=MAX_DURATION))
def test_every_duration_is_parsed_from_its_own_text(duration: timedelta) -> None:
    text = format_duration(duration)
    assert parse_duration(text) == duration
    assert re.search(DURATION_PATTERN, text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0B", 0),
        ("1B", 1),
        ("20MB", 20_000_000),
        ("1GiB", 2**30),
        ("1KiB", 1024),
        ("1kB", 1000),
        ("1KB", 1000),
        ("1 kib", 1024),
        ("1.5KiB", 1536),
        ("2TB", 2 * 10**12),
        ("3PiB", 3 * 2**50),
        ("9223372036854775807B", MAX_SIZE),
    ],
)
def test_a_size_is_parsed_from_a_number_with_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "1", "B", "-1B", "1 GB ", "1gigabyte", "1iB", "1EB", "1_000B", "1e3B", "٣B"]
)
def test_other_texts_are_refused_as_a_size(text: str) -> None:
    with pytest.raises(ValueError, match=r'^expected a size such as "20MB"$'):
        parse_size(text)


def test_a_fraction_of_a_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="a whole number of bytes"):
        parse_size("0.5B")


def test_a_size_that_the_ledger_can_not_store_is_refused() -> None:
    with pytest.raises(ValueError, match="less than"):
        parse_size("8192PiB")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1, "1B"),
        (1000, "1kB"),
        (1024, "1KiB"),
        (20_000_000, "20MB"),
        (2**30, "1GiB"),
        (1001, "1001B"),
    ],
)
def test_a_size_is_written_in_the_unit_that_fits(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(min_value=0, max_value=MAX_SIZE))
def test_every_size_is_parsed_from_its_own_text(size: int) -> None:
    text = format_size(size)
    assert parse_size(text) == size
    assert re.search(SIZE_PATTERN, text)


@given(st.text(alphabet="0123456789.dhmskKiMB "))
def test_the_schema_accepts_what_the_parsers_accept(text: str) -> None:
    for parse, pattern in ((parse_duration, DURATION_PATTERN), (parse_size, SIZE_PATTERN)):
        try:
            parse(text)
        except ValueError:
            continue
        assert re.search(pattern, text)


def test_models_accept_durations_and_sizes_as_objects() -> None:
    assert TypeAdapter(Duration).validate_python(timedelta(seconds=3)) == timedelta(seconds=3)
    assert TypeAdapter(Size).validate_python(4096) == 4096
    assert TypeAdapter(Size).validate_python("4KiB") == 4096


@pytest.mark.parametrize("value", [5, 2.5, None, timedelta(-1), timedelta(days=40000), "two"])
def test_models_refuse_other_values_as_a_duration(value: object) -> None:
    with pytest.raises(ValidationError, match="expected a duration"):
        TypeAdapter(Duration).validate_python(value)


@pytest.mark.parametrize("value", [-1, 2.5, True, None, 2**63, "two"])
def test_models_refuse_other_values_as_a_size(value: object) -> None:
    with pytest.raises(ValidationError, match="expected a size"):
        TypeAdapter(Size).validate_python(value)


def test_a_positive_duration_is_not_zero() -> None:
    with pytest.raises(ValidationError, match='longer than "0s"'):
        TypeAdapter(PositiveDuration).validate_python("0s")
    assert TypeAdapter(PositiveDuration).validate_python("1ms") == timedelta(milliseconds=1)


PERCENTAGE = TypeAdapter(Percentage)


@pytest.mark.parametrize(
    ("text", "fraction"), [("1%", 0.01), ("50%", 0.5), ("33.3%", 0.333), ("100%", 1.0), ("1000%", 10.0)]
)
def test_a_percentage_is_parsed_to_a_fraction(text: str, fraction: float) -> None:
    assert PERCENTAGE.validate_python(text) == fraction
    assert PERCENTAGE.dump_python(fraction, mode="json") == text
    assert PERCENTAGE.validate_python(fraction) == fraction


@pytest.mark.parametrize(
    "value",
    ["", "50", "50 %", "0%", "0.9%", "1000.1%", "-5%", "5e1%", "٣%", "%", "50%\n", 50, 50.0, 0.0, None],
)
def test_other_values_are_refused_as_a_percentage(value: object) -> None:
    with pytest.raises(ValidationError, match='a percentage from "1%" to "1000%"'):
        PERCENTAGE.validate_python(value)
