"""Detection of threads that hang."""

from __future__ import annotations

import math
import time


class ThreadWatchdog:
    """Measures the time since a thread's last sign of life; an idle thread waits for work and cannot hang."""

    def __init__(self, name: str) -> None:
        self.name = name
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
