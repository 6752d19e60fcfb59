"""The host's clock, which somebody may set."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

from backupd.core.doubt import ZERO, Doubts
from backupd.ledger.habits import ClockNote

_NOTICED = timedelta(seconds=1)
"""What is less between two looks is the clock being kept right."""


class Clock:
    """Notices when the clock is set; a host that slept is no such thing. Of several threads.

    `before` is what was noted before the start. Whether the host was off since then or the clock is wrong,
    nobody can tell, so the time between is doubted like a step.
    """

    def __init__(self, before: ClockNote | None = None) -> None:
        self._lock = threading.Lock()
        self._offset = _offset()
        self._doubts = Doubts(before.doubts if before else (), _since_boot())
        if before is not None:
            self._doubts.add(datetime.now(UTC) - before.seen_at, _since_boot())

    def doubt_since(self, last: datetime) -> bool:
        """Doubt all of the time since a known one for a day; return False where that is done already."""
        with self._lock:
            boot = _since_boot()
            more = datetime.now(UTC) - last - self._doubts.fresh(boot)
            self._doubts.add(max(more, ZERO), boot)
            return more > ZERO

    def step(self) -> timedelta:
        """Return by how much the clock was set since last asked, negative where it was set back."""
        with self._lock:
            before, self._offset = self._offset, _offset()
            step = self._offset - before
            if abs(step) < _NOTICED:
                return ZERO
            self._doubts.add(step, _since_boot())
            return step

    def believed(self) -> datetime:
        """Return the time by which archives may be removed: without what the clock went forward by lately."""
        with self._lock:
            now = datetime.now(UTC)
            unnoticed = _offset() - self._offset  # of a step in this very moment as well
            return now - self._doubts.total(_since_boot()) - max(unnoticed, ZERO)

    def note(self) -> ClockNote:
        """Return what is to be known of it at the next start."""
        with self._lock:
            now = datetime.now(UTC)
            unnoticed = _offset() - self._offset  # the next start will notice it
            return ClockNote(now - max(unnoticed, ZERO), self._doubts.left(_since_boot()))


def _since_boot() -> timedelta:
    return timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME))


def _offset() -> timedelta:
    return timedelta(seconds=time.time()) - _since_boot()
