"""The host's clock, which somebody may set."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

_NOTICED = timedelta(seconds=1)
"""What is less between two looks is the clock being kept right."""

_DOUBT = timedelta(days=1)
"""For how long a clock that was set forward is not believed, where something would be removed by it."""

ZERO = timedelta(0)


class Clock:
    """Notices when the clock is set; a host that slept is no such thing. Of several threads.

    `last` is the latest time that is known from before: whether the host was off since then or the clock is
    wrong, nobody can tell at the start, so the time between is doubted like a step.
    """

    def __init__(self, last: datetime | None = None) -> None:
        self._lock = threading.Lock()
        self._offset = _offset()
        self._doubted = ZERO
        self._doubted_until = _since_boot() + _DOUBT
        if last is not None:
            self.doubt_since(last)

    def doubt_since(self, last: datetime) -> None:
        """Doubt all of the time since a known one for a day, unless more is doubted already."""
        with self._lock:
            self._doubt(max(self._believed_ahead(), datetime.now(UTC) - last))

    def step(self) -> timedelta:
        """Return by how much the clock was set since last asked, negative where it was set back."""
        with self._lock:
            before, self._offset = self._offset, _offset()
            step = self._offset - before
            if abs(step) < _NOTICED:
                return ZERO
            self._doubt(max(self._believed_ahead() + step, ZERO))
            return step

    def believed(self) -> datetime:
        """Return the time by which archives may be removed: without what the clock went forward by lately."""
        with self._lock:
            now = datetime.now(UTC)
            unnoticed = _offset() - self._offset  # of a step in this very moment as well
            return now - self._believed_ahead() - max(unnoticed, ZERO)

    def _doubt(self, ahead: timedelta) -> None:
        self._doubted = ahead
        self._doubted_until = _since_boot() + _DOUBT

    def _believed_ahead(self) -> timedelta:
        return self._doubted if _since_boot() < self._doubted_until else ZERO


def _since_boot() -> timedelta:
    return timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME))


def _offset() -> timedelta:
    return timedelta(seconds=time.time()) - _since_boot()
