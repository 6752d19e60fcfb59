"""The review of an outcome by those of other archives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import count

import pytest

from backupd.core.model import Deferred, Delivered, Delivery, Outcome, Receipt, Rejected
from backupd.core.outcome_review import OutcomeReview
from backupd.core.policy import Reason
from tests.factories import a_delivery, a_digest, an_archive

NGINX = "400 Bad Request: Request Header Or Cookie Too Large"
STORED = Delivered(a_digest(b"abc"), Receipt(201))


def deliveries() -> Iterator[Delivery]:
    """Yield deliveries of different archives."""
    for number in count(1):
        archive = replace(an_archive(b"site/sw-%d.tar.gz" % number), id=number)
        yield replace(a_delivery(archive), id=f"d-{number}")


def refused(words: str = "400 Bad Request", status: int | None = 400) -> Rejected:
    return Rejected(Reason.REFUSED, words, status)


def failed(reason: Reason = Reason.SERVER_ERROR, retry_after: timedelta | None = None) -> Deferred:
    return Deferred(reason, "502 Bad Gateway", 502, retry_after)


def reasons(outcomes: list[Outcome]) -> list[Reason | None]:
    return [getattr(outcome, "reason", None) for outcome in outcomes]


@pytest.mark.parametrize(
    "words",
    [
        "400 Bad Request",
        "400 Bad Request: request {number}f3a7 of {name} failed at 12:{number}",
        '422 Unprocessable: {{"path": "/store/{name}", "id": "eftixk72aD6Ap51TnqcoF8eFidJG9Z"}}',
    ],
)
def test_only_three_archives_are_rejected_in_the_same_words(words: str) -> None:
    review = OutcomeReview()
    outcomes = []
    for number, delivery in zip(range(20), deliveries(), strict=False):
        name = delivery.archive.relpath.decode()
        outcomes.append(review.review(delivery, refused(words.format(number=number, name=name))))
    assert reasons(outcomes) == [Reason.REFUSED] * 3 + [Reason.ALL_REFUSED] * 17
    assert isinstance(outcomes[3], Deferred)
    assert outcomes[3].error.startswith(words[:15])


def test_a_success_between_rejections_shows_that_the_archives_are_at_fault() -> None:
    review, others = OutcomeReview(), deliveries()
    outcomes = []
    for _ in range(10):
        outcomes += [review.review(next(others), refused()) for _ in range(3)]
        review.review(next(others), STORED)
    assert reasons(outcomes) == [Reason.REFUSED] * 30


def test_one_archive_that_is_rejected_again_and_again_is_one() -> None:
    review, delivery = OutcomeReview(), next(deliveries())
    assert reasons([review.review(delivery, refused()) for _ in range(10)]) == [Reason.REFUSED] * 10


def test_ten_archives_are_rejected_whatever_the_words_are() -> None:
    review = OutcomeReview()
    outcomes = [
        review.review(delivery, refused(f"400 Bad Request: {chr(97 + number) * 5}"))
        for number, delivery in zip(range(20), deliveries(), strict=False)
    ]
    assert reasons(outcomes) == [Reason.REFUSED] * 10 + [Reason.ALL_REFUSED] * 10


def test_archives_that_this_host_rejects_say_nothing_about_the_destination() -> None:
    review, others = OutcomeReview(), deliveries()
    outcomes = [review.review(next(others), refused("the archive ends too early", None)) for _ in range(10)]
    assert reasons(outcomes) == [Reason.REFUSED] * 10


def test_an_archive_that_fails_while_others_pass_is_at_fault() -> None:
    review, others = OutcomeReview(), deliveries()
    large = next(others)
    outcomes = [review.review(large, failed())]
    for _ in range(2):
        review.review(next(others), STORED)
    outcomes += [review.review(large, failed()) for _ in range(5)]
    assert reasons(outcomes) == [Reason.SERVER_ERROR] * 4 + [Reason.FAILS_ALONE] * 2
    assert isinstance(outcomes[-1], Deferred)
    assert "502 Bad Gateway" in outcomes[-1].error


def test_an_archive_that_fails_after_others_passed_during_its_attempt_is_at_fault() -> None:
    review, others = OutcomeReview(), deliveries()
    large = next(others)
    review.begin(large)
    for _ in range(2):
        other = next(others)
        review.begin(other)
        review.review(other, STORED)
    outcomes = []
    for _ in range(5):
        outcomes.append(review.review(large, failed()))
        review.begin(large)
    assert reasons(outcomes) == [Reason.SERVER_ERROR] * 4 + [Reason.FAILS_ALONE]


def test_two_archives_that_fail_while_others_pass_are_at_fault() -> None:
    review, others = OutcomeReview(), deliveries()
    large = [next(others), next(others)]
    outcomes = []
    for _ in range(6):
        outcomes.append([review.review(delivery, failed()) for delivery in large])
        review.review(next(others), STORED)
    assert reasons(outcomes[-1]) == [Reason.FAILS_ALONE] * 2


def test_while_the_destination_is_down_no_archive_is_at_fault() -> None:
    review, others = OutcomeReview(), deliveries()
    for _ in range(5):
        review.review(next(others), STORED)
    waiting = [next(others) for _ in range(3)]
    outcomes = [review.review(delivery, failed()) for _ in range(20) for delivery in waiting]
    assert set(reasons(outcomes)) == {Reason.SERVER_ERROR}


def test_failures_that_pass_at_the_next_attempt_are_those_of_the_destination() -> None:
    review, others = OutcomeReview(), deliveries()
    unlucky = next(others)
    outcomes = []
    for _ in range(20):
        outcomes.append(review.review(unlucky, failed()))
        review.review(next(others), STORED)
        other = next(others)
        review.review(other, failed())
        review.review(other, STORED)
    assert set(reasons(outcomes)) == {Reason.SERVER_ERROR}


@pytest.mark.parametrize(
    "outcome", [failed(Reason.CONNECT), failed(Reason.UNAUTHORIZED), failed(retry_after=timedelta(seconds=5))]
)
def test_a_failure_that_no_archive_can_cause_is_that_of_the_destination(outcome: Deferred) -> None:
    review, others = OutcomeReview(), deliveries()
    one = next(others)
    outcomes = []
    for _ in range(20):
        outcomes.append(review.review(one, outcome))
        review.review(next(others), STORED)
    assert set(reasons(outcomes)) == {outcome.reason}


@pytest.mark.parametrize("retry_after", [None, timedelta(seconds=1)])
def test_an_archive_that_never_passes_is_at_fault_even_where_others_fail_now_and_then(
    retry_after: timedelta | None,
) -> None:
    review, others = OutcomeReview(), deliveries()
    large = next(others)
    outcomes = []
    for _ in range(40):
        outcomes.append(review.review(large, failed(retry_after=retry_after)))
        other = next(others)
        review.review(other, failed())
        review.review(other, STORED)
    assert reasons(outcomes) == [Reason.SERVER_ERROR] * 30 + [Reason.FAILS_ALONE] * 10
    assert {outcome.retry_after for outcome in outcomes if isinstance(outcome, Deferred)} == {retry_after}


def test_of_many_archives_that_fail_while_others_pass_the_later_ones_are_at_fault_at_once() -> None:
    review, others = OutcomeReview(), deliveries()
    for delivery in [next(others) for _ in range(3)]:
        for _ in range(5):
            review.review(delivery, failed())
            review.review(next(others), STORED)
    later = [review.review(next(others), failed()) for _ in range(30)]
    assert reasons(later) == [Reason.FAILS_ALONE] * 9 + [Reason.SERVER_ERROR] * 21  # now it may be down
    review.review(next(others), STORED)
    assert reasons([review.review(next(others), failed())]) == [Reason.FAILS_ALONE]


def test_memory_is_bounded_while_archives_fail() -> None:
    review, others = OutcomeReview(), deliveries()
    for number in range(3000):
        review.review(next(others), failed())
        review.review(next(others), refused(f"400 {chr(0x4E00 + number)}"))
    assert len(review._failing) <= 1000
    assert len(review._rejected) <= 20
