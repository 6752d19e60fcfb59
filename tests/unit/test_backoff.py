"""Backoff with jitter, and the Retry-After field."""

from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backupd.core.backoff import MAX_RETRY_AFTER, Backoff, parse_retry_after
from tests.factories import NOW, SECOND

CHANCES = st.floats(0, 1, exclude_max=True)
WAITS = st.timedeltas(timedelta(milliseconds=1), timedelta(days=36500))


@given(WAITS, WAITS, st.integers(0, 10_000), CHANCES)
def test_a_wait_is_between_a_tenth_of_its_step_and_the_step(
    one: timedelta, other: timedelta, failures: int, chance: float
) -> None:
    initial, longest = sorted((one, other))
    step = initial.total_seconds() * 2.0 ** min(max(failures - 1, 0), 1000)
    step = min(step, longest.total_seconds())
    wait = Backoff(initial, longest).before(failures, chance).total_seconds()
    assert step / 10 * 0.999 - 2e-6 <= wait <= step * 1.001
    assert 0 < wait <= longest.total_seconds()


def test_the_step_doubles_until_it_is_the_longest() -> None:
    backoff = Backoff(SECOND, timedelta(seconds=9))
    almost_one = 1 - 1e-9
    waits = [backoff.before(failures, almost_one).total_seconds() for failures in range(7)]
    assert waits == pytest.approx([1, 1, 2, 4, 8, 9, 9])


def test_the_random_number_spreads_the_waits() -> None:
    backoff = Backoff(10 * SECOND, timedelta(hours=1))
    assert backoff.before(1, 0.0) == SECOND
    assert backoff.before(1, 0.5) == 5.5 * SECOND


def test_a_hundred_years_and_a_billion_failures_do_not_overflow() -> None:
    century = timedelta(days=36500)
    assert Backoff(century, century).before(10**9, 0.0) == century / 10


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("000000000000030", 30),
        ("000", 0),
        ("3601", 3600),
        ("9" * 5000, 3600),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 89.109877),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
        ("Wed, 04 Mar 2026 05:06:37", 29.109877),
        ("Wed, 04 Mar 2026 06:06:37 +0100", 29.109877),
    ],
)
def test_retry_after_is_a_number_of_seconds_or_a_date(text: str, seconds: float) -> None:
    assert parse_retry_after(text, NOW) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "soon", "-1", "1.5", "٣", "²", "Wed, 04 Mar", "1h", "Mon, 99 Foo 2026 1:1:1"]
)
def test_a_malformed_retry_after_is_ignored(text: str) -> None:
    assert parse_retry_after(text, NOW) is None


@example("Mon, 1 Jan 0001 00:00:00 +2359", NOW)
@example("Fri, 31 Dec 9999 23:59:59 -2359", NOW)
@example("Mon, 1 Jan 2026 00:00:00 +9999", NOW)
@given(
    st.one_of(
        st.text(),
        st.from_regex(
            r"[A-Z][a-z]{2}, [0-9]{1,3} (Jan|Dec|Foo) [0-9]{1,6}"
            r" [0-9]{1,2}:[0-9]{1,3}(:[0-9]+)?( [+-][0-9]{1,6}| GMT)?"
        ),
        st.text("0123456789 :,+-JanGMTFri."),
    ),
    st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=14))])),
)
def test_no_retry_after_is_negative_or_longer_than_an_hour(text: str, now: datetime) -> None:
    wait = parse_retry_after(text, now)
    assert wait is None or timedelta(0) <= wait <= MAX_RETRY_AFTER == timedelta(hours=1)
