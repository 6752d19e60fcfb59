"""The end of old history, a little at a time."""

from __future__ import annotations

import time
from datetime import datetime, timedelta

from backupd.ledger.upkeep import Upkeep

_BATCH = 200
"""Archives that go in one transaction: others wait some milliseconds for the ledger, no longer."""

_AT_MOST = 0.2
"""Seconds that a tick takes, as long as there is more; the next one goes on."""


class Pruning:
    """Forgets what ended longer ago than history is kept; `tick` is called at each heartbeat."""

    def __init__(self, ledger: Upkeep, keep_for: timedelta) -> None:
        self._ledger = ledger
        self._keep_for = keep_for

    def tick(self, now: datetime) -> None:
        """Delete some of what is too old, if anything is."""
        until = time.monotonic() + _AT_MOST
        while self._ledger.prune(now - self._keep_for, _BATCH) == _BATCH and time.monotonic() < until:
            pass
