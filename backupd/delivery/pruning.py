"""The end of old history, a little at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from backupd.ledger.habits import Habits

_BATCH = 200
"""Archives that go in one transaction: others wait some milliseconds for the ledger, no longer."""

_AT_MOST = 0.2
"""Seconds that a tick takes, as long as there is more; the next one goes on."""


class Pruning:
    """Forgets what ended long ago; `tick` is called at each heartbeat."""

    def __init__(self, ledger: Habits) -> None:
        self._ledger = ledger

    def tick(self, before: Callable[[], datetime]) -> None:
        """Delete some of what ended before a time, if anything did."""
        until = time.monotonic() + _AT_MOST
        while self._ledger.prune(before, _BATCH) == _BATCH and time.monotonic() < until:
            pass
