"""The limits of an upload attempt: abort, deadline, time-out outside the body, minimum rate and bandwidth."""

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
from backupd.core.certificate_life import Validity
from backupd.core.policy import Reason
from backupd.upload.base import Abort

RATE_WINDOW = 60.0
"""Seconds over which the rate is measured before it is compared with `min_rate`."""

UNBOUNDED_WAIT = "backupd.unbounded_wait"
"""Name of the request extension that holds `AttemptLimits.unbounded_wait` of the attempt."""

_ALIVE_EVERY = 1.0
"""Longest time in seconds between two calls of `on_alive` during a wait."""


class AttemptEndedError(Exception):
    """The attempt must end now because a limit is exceeded; `reason` names the limit."""

    def __init__(self, reason: Reason, error: str) -> None:
        super().__init__(error)
        self.reason = reason
        self.error = error


class AttemptLimits:
    """The limits of one uploader's attempts; its connections wait for the network through this object.

    `deadline` limits a whole attempt, in seconds. `outside_body_timeout` limits the total time before the
    body and, separately, the total time after it, in seconds: a peer that sends one byte at a time would
    otherwise keep the worker for days. `min_rate` is in bytes per second while the body is sent, 0 for no
    minimum. `bandwidth` is shared with the other uploaders of the destination.
    """

    def __init__(
        self,
        abort: Abort,
        *,
        deadline: float | None = None,
        outside_body_timeout: float | None = None,
        min_rate: int = 0,
        bandwidth: BandwidthLimit | None = None,
    ) -> None:
        self._abort = abort
        self._bandwidth = bandwidth
        self._deadline = deadline
        self._outside_body_timeout = outside_body_timeout
        self._min_rate = min_rate
        self._deadline_at: float | None = None
        self._outside_body_until: float | None = None
        self._measurement: _RateMeasurement | None = None
        self._is_uncounted = False
        self._on_alive: Callable[[], None] = lambda: None
        self._on_idle: Callable[[], None] = lambda: None
        self.server_certificate: Validity | None = None
        """The validity of the destination's certificate in the last TLS handshake."""
        self.address = ""
        """The address and port of the last connection: of the destination, or of its proxy."""
        self.tls_version = ""
        """The version that the last TLS handshake selected, such as `TLSv1.3`."""

    def start(
        self, on_alive: Callable[[], None] = lambda: None, on_idle: Callable[[], None] = lambda: None
    ) -> None:
        """Start the clocks of an attempt; the callbacks are those of `UploadJob`."""
        now = time.monotonic()
        self._on_alive, self._on_idle = on_alive, on_idle
        self._deadline_at = None if self._deadline is None else now + self._deadline
        self._measurement = None
        self._start_outside_body_timeout(now)

    def begin_request(self) -> None:
        """Start the time-out before the body for a further request of the same attempt."""
        self._measurement = None
        self._start_outside_body_timeout(time.monotonic())

    def body_started(self) -> None:
        """Start to measure the rate, and stop the time-out outside the body."""
        self._measurement = _RateMeasurement(time.monotonic()) if self._min_rate else None
        self._outside_body_until = None

    def body_sent(self) -> None:
        """Stop to measure the rate, and start the time-out for the response."""
        self.begin_request()

    def count_bytes(self, count: int) -> None:
        """Count bytes that the socket accepted; raises as `wait` does."""
        self._on_alive()
        if self._measurement is not None and not self._is_uncounted:
            self._measurement.sent_bytes += count
        self._check_limits(time.monotonic())  # a socket that is always writable never leads to `wait`

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Enclose the sending of bytes that are not part of the body: they do not count as progress."""
        self._is_uncounted = True
        try:
            yield
        finally:
            self._is_uncounted = False

    @contextmanager
    def unbounded_wait(self) -> Iterator[None]:
        """Enclose a wait that cannot be interrupted: the watchdog must not take the thread for hung."""
        self._on_idle()
        try:
            yield
        finally:
            self._on_alive()

    def check(self) -> None:
        """Raise AttemptEndedError if a limit is exceeded."""
        self.wait(-1, 0, 0)

    def acquire_bandwidth(self, wanted: int) -> tuple[int, float]:
        """Return how many bytes may be sent now; if none, the seconds until some may be sent.

        Such a wait does not count against `min_rate`.
        """
        if self._bandwidth is None:
            return wanted, 0.0
        granted, wait = self._bandwidth.acquire(wanted)
        self.exclude(wait)
        return granted, wait

    def exclude(self, seconds: float) -> None:
        """Have a time in which nothing was to be sent not count against `min_rate`."""
        if self._measurement is not None:
            self._measurement.started_at += seconds

    def wait(self, fd: int, events: int, timeout: float | None) -> bool:
        """Wait for poll(2) events on a descriptor; return False after `timeout` seconds without any.

        A negative descriptor waits for no events. Raises AttemptEndedError when aborted or if a limit is
        exceeded.
        """
        until = None if timeout is None else time.monotonic() + timeout
        poller = select.poll()
        if fd >= 0:
            poller.register(fd, events)
        poller.register(self._abort.fileno(), select.POLLIN)
        while True:
            now = time.monotonic()
            self._check_limits(now)
            self._on_alive()
            ready = dict(poller.poll(self._milliseconds(now, until)))
            if self._abort.fileno() in ready:
                raise AttemptEndedError(Reason.STOPPED, "the daemon is stopping")
            if ready:
                return True
            if until is not None and time.monotonic() >= until:
                return False

    def _start_outside_body_timeout(self, now: float) -> None:
        self._outside_body_until = (
            None if self._outside_body_timeout is None else now + self._outside_body_timeout
        )

    def _milliseconds(self, now: float, until: float | None) -> int:
        """Return the time to the next event: a limit, the end of the wait, or a call of `on_alive`."""
        limits = (until, self._deadline_at, self._outside_body_until)
        ends = [now + _ALIVE_EVERY, *(end for end in limits if end is not None)]
        if self._measurement is not None:
            ends.append(self._measurement.started_at + RATE_WINDOW)
        return max(math.ceil((min(ends) - now) * 1000), 0)

    def _check_limits(self, now: float) -> None:
        if self._deadline_at is not None and now >= self._deadline_at:
            raise AttemptEndedError(Reason.DEADLINE, f"not finished within {self._deadline:g} s")
        if self._outside_body_until is not None and now >= self._outside_body_until:
            raise AttemptEndedError(
                Reason.READ_TIMEOUT, f"no complete response within {self._outside_body_timeout:g} s"
            )
        measurement = self._measurement
        if measurement is not None and now - measurement.started_at >= RATE_WINDOW:
            rate = measurement.sent_bytes / (now - measurement.started_at)
            if rate < self._min_rate:
                raise AttemptEndedError(
                    Reason.TOO_SLOW, f"{rate:.0f} bytes/s, min_rate is {self._min_rate} bytes/s"
                )
            self._measurement = _RateMeasurement(now)


@dataclass(slots=True)
class _RateMeasurement:
    """The bytes sent since a monotonic time."""

    started_at: float
    sent_bytes: int = 0


class BandwidthLimit:
    """Limits the bytes per second of all uploaders of a destination; safe to use from several threads."""

    def __init__(self, schedule: RateSchedule) -> None:
        self._schedule = schedule
        self._bucket = TokenBucket(filled_at=time.monotonic())
        self._lock = threading.Lock()

    def acquire(self, wanted: int) -> tuple[int, float]:
        """Return how many of the bytes may be sent now; if none, the seconds until some may be sent.

        The rate is the schedule's for the current local time of day.
        """
        clock = datetime.now().astimezone()
        rate = self._schedule.rate_at(clock.hour * 60 + clock.minute)
        if rate is None:
            return wanted, 0.0
        with self._lock:
            return self._bucket.acquire(wanted, rate, time.monotonic())
