"""What bounds the time of an attempt on the wire: the abort, the deadline and the least rate."""

from __future__ import annotations

import math
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from backupd.core.bandwidth import RateSchedule, TokenBucket
from backupd.core.policy import Reason
from backupd.upload.base import Abort


class BandwidthLimit:
    """Grants bytes to whoever asks, at the rate that the schedule has for the local time of day."""

    def __init__(self, schedule: RateSchedule) -> None:
        self._schedule = schedule
        self._bucket = TokenBucket(filled_at=time.monotonic())
        self._lock = threading.Lock()

    def take(self, wanted: int) -> tuple[int, float]:
        """Return how many of the bytes may go now, and if none, the seconds until some may."""
        clock = datetime.now().astimezone()
        rate = self._schedule.rate_at(clock.hour * 60 + clock.minute)
        if rate is None:
            return wanted, 0.0
        with self._lock:
            return self._bucket.acquire(wanted, rate, time.monotonic())


_SIGN_OF_LIFE = 1.0
"""Seconds after which every wait shows life."""

RATE_WINDOW = 60.0
"""Seconds over which the least rate is measured."""

UNWATCHED = "backupd.unwatched"
"""The key under which a request carries the `Line.unwatched` of its attempt."""


class AttemptEndedError(Exception):
    """The attempt is to end now, for `reason`; raised out of a wait on the wire."""

    def __init__(self, reason: Reason, error: str) -> None:
        super().__init__(error)
        self.reason = reason
        self.error = error


@dataclass(slots=True)
class _Window:
    began: float
    moved: int = 0


class AttemptLimits:
    """The bounds of one uploader's attempts; its connections ask it how long they may wait.

    `deadline` is in seconds for a whole attempt, None for none; `patience` for all that comes before the
    body, and again for all that comes after it; `min_rate` in bytes per second while the body is sent, 0
    for none; `bandwidth` is shared with the destination's other uploaders.
    """

    def __init__(
        self,
        abort: Abort,
        *,
        deadline: float | None = None,
        patience: float | None = None,
        min_rate: int = 0,
        bandwidth: BandwidthLimit | None = None,
    ) -> None:
        self._abort = abort
        self._bandwidth = bandwidth
        self._deadline = deadline
        self._patience = patience
        self._min_rate = min_rate
        self._ends: float | None = None
        self._patient_until: float | None = None
        self._window: _Window | None = None
        self._is_aside = False
        self._alive: Callable[[], None] = lambda: None
        self._resting: Callable[[], None] = lambda: None
        self.peer_expires: float | None = None
        """When the certificate expires that the other side showed last, in seconds since the epoch."""

    def start(
        self, alive: Callable[[], None] = lambda: None, resting: Callable[[], None] = lambda: None
    ) -> None:
        """Start the clock of an attempt; `alive` and `resting` are those of `Cargo`."""
        now = time.monotonic()
        self._alive, self._resting = alive, resting
        self._ends = None if self._deadline is None else now + self._deadline
        self._window = None
        self._be_patient(now)

    def body_started(self) -> None:
        """From here on the least rate counts; what went before was no sending."""
        self._window = _Window(time.monotonic()) if self._min_rate else None
        self._patient_until = None

    def body_sent(self) -> None:
        """From here on the destination works, and the rate says nothing."""
        self._window = None
        self._be_patient(time.monotonic())

    def _be_patient(self, now: float) -> None:
        """Bound what is no sending: who answers a byte at a time would else keep us for days."""
        self._patient_until = None if self._patience is None else now + self._patience

    def count_bytes(self, count: int) -> None:
        """Note bytes that the connection took."""
        self._alive()
        if self._window is not None and not self._is_aside:
            self._window.moved += count
        self._check(time.monotonic())  # who never lets us wait is no exception

    @contextmanager
    def without_timeouts(self) -> Iterator[None]:
        """Enclose what may be sent beside the body: the least rate does not count it."""
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Enclose a wait that can't be bounded: it is slow, not hung."""
        self._resting()
        try:
            yield
        finally:
            self._alive()

    def check(self) -> None:
        """Raise AttemptEndedError where the attempt is to end now."""
        self.wait(-1, 0, 0)

    def acquire_bandwidth(self, wanted: int) -> tuple[int, float]:
        """Return how many bytes may be sent now, and if none, the seconds until some may.

        That wait is ours, not the destination's: it does not count against the least rate.
        """
        if self._bandwidth is None:
            return wanted, 0.0
        granted, wait = self._bandwidth.take(wanted)
        if self._window is not None:
            self._window.began += wait
        return granted, wait

    def wait(self, fd: int, events: int, timeout: float | None) -> bool:
        """Wait for poll(2) events on a descriptor, if any; return False after `timeout` seconds.

        Raises AttemptEndedError when aborted, over the deadline, or slower than the least rate.
        """
        until = None if timeout is None else time.monotonic() + timeout
        poller = select.poll()
        if fd >= 0:
            poller.register(fd, events)
        poller.register(self._abort.fileno(), select.POLLIN)
        while True:
            now = time.monotonic()
            self._check(now)
            self._alive()
            ready = dict(poller.poll(self._milliseconds(now, until)))
            if self._abort.fileno() in ready:
                raise AttemptEndedError(Reason.STOPPED, "the daemon was told to stop")
            if ready:
                return True
            if until is not None and time.monotonic() >= until:
                return False

    def _milliseconds(self, now: float, until: float | None) -> int:
        bounds = (until, self._ends, self._patient_until)
        ends = [now + _SIGN_OF_LIFE, *(t for t in bounds if t is not None)]
        if self._window is not None:
            ends.append(self._window.began + RATE_WINDOW)
        return max(math.ceil((min(ends) - now) * 1000), 0)

    def _check(self, now: float) -> None:
        if self._ends is not None and now >= self._ends:
            raise AttemptEndedError(Reason.DEADLINE, f"not done after {self._deadline:g} s")
        if self._patient_until is not None and now >= self._patient_until:
            raise AttemptEndedError(Reason.READ_TIMEOUT, f"no end of the answer after {self._patience:g} s")
        window = self._window
        if window is not None and now - window.began >= RATE_WINDOW:
            rate = window.moved / (now - window.began)
            if rate < self._min_rate:
                raise AttemptEndedError(Reason.TOO_SLOW, f"{rate:.0f} bytes/s, less than {self._min_rate}")
            self._window = _Window(now)
