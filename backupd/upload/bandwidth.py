"""A destination's bandwidth limit, shared by its workers."""

from __future__ import annotations

import threading
import time
from datetime import datetime

from backupd.core.bandwidth import Bucket, Schedule


class Bandwidth:
    """Grants bytes to whoever asks, at the rate that the schedule has for the local time of day."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._bucket = Bucket(filled_at=time.monotonic())
        self._lock = threading.Lock()

    def take(self, wanted: int) -> tuple[int, float]:
        """Return how many of the bytes may go now, and if none, the seconds until some may."""
        clock = datetime.now().astimezone()
        rate = self._schedule.rate_at(clock.hour * 60 + clock.minute)
        if rate is None:
            return wanted, 0.0
        with self._lock:
            return self._bucket.take(wanted, rate, time.monotonic())
