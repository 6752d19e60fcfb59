"""The state of a delivery after an attempt, and of an archive after its deliveries."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from backupd.core.backoff import Backoff
from backupd.core.model import Deferred, Delivered, Delivery, DeliveryState, Outcome, Rejected, Superseded
from backupd.core.policy import Action, Blame, Reason, rule_of
from backupd.core.units import human_duration


@dataclass(frozen=True, slots=True)
class Transition:
    """The next state of a delivery.

    `due_at` is the time of the next attempt, set only if the delivery is pending. The failure counts are
    those of `Delivery`.
    """

    state: DeliveryState
    outcome: Outcome
    due_at: datetime | None = None
    archive_failures: int = 0
    destination_failures: int = 0


class Priority(StrEnum):
    """The order of a destination's due deliveries: due for longest first, smallest first, or newest first."""

    OLDEST = "oldest"
    SMALLEST = "smallest"
    NEWEST = "newest"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a destination's deliveries are retried; indefinitely if `give_up_after` is None."""

    backoff: Backoff
    give_up_after: timedelta | None = None


_MAX_WAIT_ALONE = timedelta(days=1)
"""Longest wait before an archive that alone fails is sent again: it may be large, and nothing has changed."""


def next_step(
    delivery: Delivery, outcome: Outcome, now: datetime, retry_policy: RetryPolicy, chance: float
) -> Transition:
    """Return the state of a delivery after an attempt; `chance` is a random number in [0, 1)."""
    match outcome:
        case Delivered():
            return Transition(DeliveryState.DELIVERED, outcome)
        case Rejected():
            return Transition(DeliveryState.REJECTED, outcome)
        case Superseded():
            return Transition(DeliveryState.SUPERSEDED, outcome)
        case _:
            return _deferred(delivery, outcome, now, retry_policy, chance)


def _deferred(
    delivery: Delivery, outcome: Deferred, now: datetime, retry_policy: RetryPolicy, chance: float
) -> Transition:
    age = now - delivery.archive.queued_at
    if retry_policy.give_up_after is not None and age > retry_policy.give_up_after:
        error = f"gave up after {human_duration(age)}; last error: {outcome.error}"
        return Transition(DeliveryState.REJECTED, Rejected(Reason.GAVE_UP, error, outcome.http_status))
    if outcome.reason is Reason.STOPPED:
        return Transition(
            DeliveryState.PENDING, outcome, now, delivery.archive_failures, delivery.destination_failures
        )
    rule = rule_of(outcome.reason)
    archive_failures = delivery.archive_failures + (rule.blame is Blame.ARCHIVE)
    destination_failures = delivery.destination_failures + 1 if rule.action is Action.PAUSE else 0
    backoff = retry_policy.backoff
    if outcome.reason is Reason.FAILS_ALONE:
        backoff = replace(backoff, longest=max(backoff.longest, _MAX_WAIT_ALONE))
    wait = backoff.before(max(archive_failures, destination_failures), chance)
    if outcome.retry_after is not None:
        wait = max(wait, outcome.retry_after)
    return Transition(DeliveryState.PENDING, outcome, now + wait, archive_failures, destination_failures)


def archive_state(deliveries: Collection[DeliveryState]) -> DeliveryState:
    """Return the state of an archive from those of its deliveries.

    It is pending while a delivery is pending or claimed, and without deliveries. Otherwise it is superseded
    if any delivery is, rejected if any is, and delivered only if all are.
    """
    states = set(deliveries)
    if not states or states & {DeliveryState.PENDING, DeliveryState.CLAIMED}:
        return DeliveryState.PENDING
    if DeliveryState.SUPERSEDED in states:
        return DeliveryState.SUPERSEDED
    if DeliveryState.REJECTED in states:
        return DeliveryState.REJECTED
    return DeliveryState.DELIVERED
