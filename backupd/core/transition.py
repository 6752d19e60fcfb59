"""What a delivery becomes after an attempt, and an archive after its deliveries."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from backupd.core.backoff import Backoff
from backupd.core.model import Deferred, Delivered, Delivery, DeliveryState, Outcome, Rejected, Superseded
from backupd.core.policy import Action, Blame, Reason, rule_of


@dataclass(frozen=True, slots=True)
class Transition:
    """The next state of a delivery; `due_at` is set only while it is pending."""

    state: DeliveryState
    outcome: Outcome
    due_at: datetime | None = None
    archive_failures: int = 0
    destination_failures: int = 0


class Priority(StrEnum):
    """Which of a destination's due deliveries goes first: due for longest, smallest, or newest."""

    OLDEST = "oldest"
    SMALLEST = "smallest"
    NEWEST = "newest"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a destination's deliveries are retried; `give_up_after` None: for ever."""

    backoff: Backoff
    give_up_after: timedelta | None = None


def next_step(
    delivery: Delivery, outcome: Outcome, now: datetime, patience: RetryPolicy, chance: float
) -> Transition:
    """Return what a delivery becomes, `chance` being random in [0, 1)."""
    match outcome:
        case Delivered():
            return Transition(DeliveryState.DELIVERED, outcome)
        case Rejected():
            return Transition(DeliveryState.REJECTED, outcome)
        case Superseded():
            return Transition(DeliveryState.SUPERSEDED, outcome)
        case _:
            return _deferred(delivery, outcome, now, patience, chance)


def _deferred(
    delivery: Delivery, outcome: Deferred, now: datetime, patience: RetryPolicy, chance: float
) -> Transition:
    age = now - delivery.archive.queued_at
    if patience.give_up_after is not None and age > patience.give_up_after:
        error = f"gave up after {age}; last: {outcome.error}"
        return Transition(DeliveryState.REJECTED, Rejected(Reason.GAVE_UP, error, outcome.http_status))
    if outcome.reason is Reason.STOPPED:
        return Transition(
            DeliveryState.PENDING, outcome, now, delivery.archive_failures, delivery.destination_failures
        )
    rule = rule_of(outcome.reason)
    charged = delivery.archive_failures + (rule.blame is Blame.ARCHIVE)
    faults = delivery.destination_failures + 1 if rule.action is Action.PAUSE else 0
    wait = patience.backoff.before(max(charged, faults), chance)
    if outcome.retry_after is not None:
        wait = max(wait, outcome.retry_after)
    return Transition(DeliveryState.PENDING, outcome, now + wait, charged, faults)


def archive_state(deliveries: Collection[DeliveryState]) -> DeliveryState:
    """Return what an archive's deliveries make of it.

    Pending while any is, and without any; then superseded if any found the file changed, rejected if any
    was refused, delivered only if all were.
    """
    states = set(deliveries)
    if not states or states & {DeliveryState.PENDING, DeliveryState.CLAIMED}:
        return DeliveryState.PENDING
    if DeliveryState.SUPERSEDED in states:
        return DeliveryState.SUPERSEDED
    if DeliveryState.REJECTED in states:
        return DeliveryState.REJECTED
    return DeliveryState.DELIVERED
