"""Detection of threads that hang."""

from __future__ import annotations

import math
import time

HUNG_AFTER = 30.0
"""Seconds without a sign of life after which a thread hangs with the filesystem of a drop."""


class ThreadWatchdog:
    """Measures the time since a thread's last sign of life; an idle thread waits for work and cannot hang.

    A thread that `may_hang` is no reason to restart the daemon: all others go on without it.
    """

    def __init__(self, name: str, *, may_hang: bool = False) -> None:
        self.name = name
        self.may_hang = may_hang
        self.has_returned = False
        """Whether the thread has ended as it should."""
        self._last = math.inf

    def alive(self) -> None:
        """Give a sign of life; the thread is busy until it calls `idle`."""
        self._last = time.monotonic()

    def idle(self) -> None:
        """Stop the measurement until the next call of `alive`."""
        self._last = math.inf

    def age(self) -> float:
        """Return the seconds since the last sign of life; 0 while idle."""
        return max(time.monotonic() - self._last, 0.0)
