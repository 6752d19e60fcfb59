"""Signs of life of a thread."""

from __future__ import annotations

import math
import time


class ThreadWatchdog:
    """When a thread last showed life; one that rests waits for work, in which nothing can hang."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._last = math.inf

    def alive(self) -> None:
        """Show life: from here on the next sign is awaited."""
        self._last = time.monotonic()

    def idle(self) -> None:
        """Show no life until the next `beat`, and be awaited by nobody."""
        self._last = math.inf

    def age(self) -> float:
        """Return the seconds since the last sign; 0 at rest."""
        return max(time.monotonic() - self._last, 0.0)
