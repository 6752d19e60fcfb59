"""The claims of a destination's workers, on a real ledger that can't always be written."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from backupd.core.errors import LedgerError
from backupd.core.retry import Backoff
from backupd.core.step import Patience, Priority
from backupd.delivery.gate import SharedGate
from backupd.delivery.wakeup import Wakeup
from backupd.delivery.worker import Lane
from backupd.ledger.database import open_ledger
from backupd.ledger.sqlite import SqliteLedger
from backupd.ops.lines import LineWriter
from backupd.ops.log import EventLog
from tests.factories import NOW, a_sighting


class Failing(SqliteLedger):
    """A ledger on a disk that is full for a while."""

    full = False

    def release_claims(self, delivery_ids: Sequence[str] | None = None) -> int:
        if self.full:
            raise LedgerError("the ledger can't be written: database or disk is full", "make room")
        return super().release_claims(delivery_ids)


def test_claims_that_cannot_be_given_back_are_kept_and_not_lost(tmp_path: Path) -> None:
    ledger = Failing(open_ledger(tmp_path).connection)
    log, wakeup = EventLog(LineWriter(1), level="error"), Wakeup()
    backoff = Backoff(timedelta(seconds=1), timedelta(seconds=2))
    gate = SharedGate("vault", backoff, log, wakeup, ledger)
    lane = Lane("vault", ledger, gate, Patience(backoff, None), Priority.OLDEST, wakeup, {}, log)
    ledger.admit([a_sighting(b"r%d" % number) for number in range(4)], ["vault"], NOW)
    assert lane.claim() is not None
    ledger.full = True
    lane.give_back()
    ledger.full = False
    assert lane.claim() is not None
    lane.give_back()
    assert len(ledger.claim("vault", NOW, most=4)) == 2
    ledger.close()
