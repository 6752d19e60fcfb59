"""The contract of the ledger for what the receivers of notifications know."""

from __future__ import annotations

from datetime import timedelta

from backupd.core.notifications import EventTally, NotificationKind, NotificationState, Reported
from backupd.ledger.port import Ledger
from tests.contract.bench import Bench
from tests.factories import NOW

STATE = NotificationState(
    (Reported(NotificationKind.PAUSED, "destination:vault", "vault works again", 2, NOW),),
    {NotificationKind.PAUSED: NOW},
    {NotificationKind.REJECTED: NOW + timedelta(seconds=1)},
    {NotificationKind.REJECTED: EventTally(12, ("a\\xff.cfg was rejected", 'b "ü"\n'))},
    NOW - timedelta(hours=1),
)


def test_the_state_of_a_receiver_outlives_the_daemon(bench: Bench) -> None:
    state = STATE.count(NotificationKind.PROBLEM, "c\udcff.cfg is missing")
    bench.ledger.save_notification_state("ops#1", NotificationState())
    bench.ledger.save_notification_state("ops#1", state)
    bench.ledger.save_notification_state("ops#2", NotificationState())

    found = bench.crash().notification_states()

    assert found.keys() == {"ops#1", "ops#2"}
    assert found["ops#1"] == state
    assert found["ops#2"] == NotificationState()


def test_a_receiver_is_forgotten(ledger: Ledger) -> None:
    ledger.save_notification_state("ops#1", STATE)
    ledger.save_notification_state("ops#1", None)
    ledger.save_notification_state("never#1", None)

    assert ledger.notification_states() == {}
