"""The state of a delivery after an attempt, and of an archive after its deliveries."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.core.model import DeliveryState, Outcome, Rejected
from backupd.core.policy import RULES, Action, Blame, Reason
from backupd.core.transition import archive_state, next_step
from tests.factories import (
    END_STATES,
    NOW,
    SECOND,
    a_delivery,
    a_retry_policy,
    an_archive,
    deferred,
    delivered,
    rejected,
    superseded,
)

LATER = [
    rule.reason for rule in RULES if rule.action is not Action.REJECT and rule.reason is not Reason.STOPPED
]


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (delivered(), DeliveryState.DELIVERED),
        (rejected(), DeliveryState.REJECTED),
        (superseded(), DeliveryState.SUPERSEDED),
    ],
)
def test_a_final_outcome_sets_the_final_state(outcome: Outcome, state: DeliveryState) -> None:
    step = next_step(a_delivery(), outcome, NOW, a_retry_policy(), 0.5)
    assert (step.state, step.outcome, step.due_at) == (state, outcome, None)


@pytest.mark.parametrize("reason", LATER)
def test_a_deferred_delivery_is_retried_and_counts_against_the_party_to_blame(reason: Reason) -> None:
    step = next_step(
        a_delivery(archive_failures=2, destination_failures=3), deferred(reason), NOW, a_retry_policy(), 0.5
    )
    assert step.state is DeliveryState.PENDING
    assert step.due_at is not None
    assert step.due_at > NOW
    rule = next(rule for rule in RULES if rule.reason is reason)
    assert step.archive_failures == 2 + (rule.blame is Blame.ARCHIVE)
    assert step.destination_failures == (4 if rule.action is Action.PAUSE else 0)


def test_a_failure_of_the_destination_does_not_count_against_the_archive() -> None:
    assert next_step(a_delivery(), deferred(Reason.CONNECT), NOW, a_retry_policy(), 0.5).archive_failures == 0


def test_each_failure_lengthens_the_wait_up_to_the_longest() -> None:
    waits = []
    for failures in range(20):
        step = next_step(
            a_delivery(destination_failures=failures),
            deferred(),
            NOW,
            a_retry_policy(maximum=60 * SECOND),
            0.5,
        )
        assert step.due_at is not None
        waits.append(step.due_at - NOW)
    assert waits == sorted(waits)
    assert waits[-1] <= 60 * SECOND


def test_an_archive_that_alone_fails_is_retried_up_to_a_day_apart() -> None:
    step = next_step(
        a_delivery(archive_failures=30), deferred(Reason.FAILS_ALONE), NOW, a_retry_policy(), 0.999
    )
    assert step.due_at is not None
    assert timedelta(hours=23) < step.due_at - NOW <= timedelta(days=1)


def test_a_longer_retry_after_is_honoured() -> None:
    wait = timedelta(minutes=40)
    step = next_step(
        a_delivery(), deferred(Reason.RATE_LIMITED, retry_after=wait), NOW, a_retry_policy(), 0.5
    )
    assert step.due_at == NOW + wait


def test_a_shorter_retry_after_does_not_shorten_the_wait() -> None:
    outcome = deferred(Reason.RATE_LIMITED, retry_after=timedelta(0))
    with_it = next_step(a_delivery(), outcome, NOW, a_retry_policy(), 0.5)
    without = next_step(a_delivery(), deferred(Reason.RATE_LIMITED), NOW, a_retry_policy(), 0.5)
    assert with_it.due_at == without.due_at


def test_a_stop_of_the_daemon_counts_as_no_failure() -> None:
    delivery = a_delivery(archive_failures=2, destination_failures=3)
    step = next_step(delivery, deferred(Reason.STOPPED), NOW, a_retry_policy(), 0.5)
    assert (step.state, step.due_at, step.archive_failures, step.destination_failures) == (
        DeliveryState.PENDING,
        NOW,
        2,
        3,
    )


def test_a_delivery_is_given_up_only_after_give_up_after() -> None:
    delivery = a_delivery(an_archive(queued_at=NOW - timedelta(hours=2)))
    held = next_step(delivery, deferred(), NOW, a_retry_policy(give_up_after=timedelta(hours=2)), 0.5)
    assert held.state is DeliveryState.PENDING
    step = next_step(delivery, deferred(), NOW, a_retry_policy(give_up_after=timedelta(hours=1)), 0.5)
    assert step.state is DeliveryState.REJECTED
    assert isinstance(step.outcome, Rejected)
    assert step.outcome.reason is Reason.GAVE_UP
    assert "did not work" in step.outcome.error


def test_without_give_up_after_a_delivery_is_never_given_up() -> None:
    delivery = a_delivery(an_archive(queued_at=NOW - timedelta(days=3650)))
    assert next_step(delivery, deferred(), NOW, a_retry_policy(), 0.5).state is DeliveryState.PENDING


@pytest.mark.parametrize(
    ("states", "state"),
    [
        ("delivered", "delivered"),
        ("delivered delivered", "delivered"),
        ("delivered pending", "pending"),
        ("rejected claimed", "pending"),
        ("superseded pending", "pending"),
        ("delivered rejected", "rejected"),
        ("delivered superseded", "superseded"),
        ("rejected superseded", "superseded"),
        ("", "pending"),
    ],
)
def test_the_state_of_an_archive_follows_from_its_deliveries(states: str, state: str) -> None:
    assert archive_state([DeliveryState(one) for one in states.split()]) is DeliveryState(state)


@given(st.lists(st.sampled_from([state for state in DeliveryState if state is not DeliveryState.RETRIED])))
def test_an_archive_is_delivered_only_if_every_delivery_is(states: list[DeliveryState]) -> None:
    state = archive_state(states)
    assert (state is DeliveryState.DELIVERED) == (set(states) == {DeliveryState.DELIVERED})
    assert (state in END_STATES) == (bool(states) and set(states) <= set(END_STATES))
