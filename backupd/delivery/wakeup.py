"""A bell that wakes everybody who waits."""

from __future__ import annotations

import threading


class Wakeup:
    """Like an event that is never cleared: who waits hears of every ring after the one last heard."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rings = 0

    def ring(self) -> None:
        """Wake all who wait."""
        with self._changed:
            self._rings += 1
            self._changed.notify_all()

    def heard(self) -> int:
        """Return the number of the last ring, to be passed to `wait`."""
        with self._changed:
            return self._rings

    def wait(self, heard: int, timeout: float | None) -> None:
        """Wait for a ring after `heard`, at most `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._rings != heard, timeout)
