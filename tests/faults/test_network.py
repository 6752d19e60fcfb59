"""The network does what it likes, and every archive arrives once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.network import Tally, deliver, run
from tests.faults.proxy import BELOW_HTTP, Fault, Kind

SEED = random.randrange(1_000_000)


LOSE_THE_ANSWER = (
    Kind.STALL_BEFORE_ANSWER,
    Kind.NO_ANSWER,
    Kind.HALF_AN_ANSWER,
    Kind.RESET_IN_ANSWER,
    Kind.SLOW_ANSWER,
    Kind.BAD_GATEWAY,
)
HARMLESS = (Kind.TWO_ANSWERS, Kind.CLOSED_TWICE)


@pytest.mark.parametrize("kind", [*Kind], ids=lambda kind: kind.value)
def test_each_fault_costs_no_archive_and_stores_none_twice(tmp_path: Path, kind: Kind) -> None:
    course = deliver(tmp_path, [Fault(kind, after=5_000)] * 2, 6, asks=False, sizes=(300_000,), deadline="2s")

    assert course.struck == {kind: 2}
    assert course.attempts_failed > 0 or kind in HARMLESS


def test_a_certificate_that_is_wrong_from_now_on_costs_no_archive(tmp_path: Path) -> None:
    course = deliver(tmp_path, [Fault(Kind.WRONG_CERTIFICATE)] * 12, 6, asks=False, sizes=(30_000,))

    assert course.struck == {Kind.WRONG_CERTIFICATE: 12}
    assert course.attempts_failed >= 12
    assert 1 <= course.sent_whole <= 1 + course.failed_besides


@pytest.mark.parametrize("kind", LOSE_THE_ANSWER, ids=lambda kind: kind.value)
def test_a_lost_answer_is_asked_for(tmp_path: Path, kind: Kind) -> None:
    """The answer is lost, then that to the question for it."""
    schedule = [
        Fault(kind, after=302_000),
        Fault(kind if kind is not Kind.STALL_BEFORE_ANSWER else Kind.HANG),
    ]
    course = deliver(tmp_path, schedule, 1, asks=True, sizes=(300_000,), workers=1, deadline="2s")

    assert course.attempts_failed > 0
    assert 1 <= course.sent_whole <= 1 + course.failed_besides
    assert course.archives == 1


@pytest.mark.parametrize("kind", BELOW_HTTP, ids=lambda kind: kind.value)
def test_each_fault_below_http2_costs_no_archive_and_stores_none_twice(tmp_path: Path, kind: Kind) -> None:
    course = deliver(
        tmp_path,
        [Fault(kind, after=5_000)] * 2,
        6,
        asks=False,
        http2=True,
        sizes=(300_000,),
        deadline="2s",
    )

    assert course.struck == {kind: 2}
    assert course.attempts_failed > 0


def test_faults_on_the_ways_to_two_destinations_cost_neither_an_archive(tmp_path: Path) -> None:
    schedule = [Fault(kind, after=5_000) for kind in Kind for _ in range(2)]
    course = deliver(tmp_path, schedule, 12, asks=False, to_both=True, sizes=(300_000,), deadline="2s")

    assert course.struck == dict.fromkeys(Kind, 2)
    assert course.attempts_failed > 0


def test_any_schedule_ends_with_all_archives_delivered_once() -> None:
    print(f"seed {SEED}")
    tally = Tally()

    run(SEED, count=60, times=1, most=2, tally=tally)

    assert tally.archives >= 120
    assert tally.struck == dict.fromkeys(Kind, 2)
