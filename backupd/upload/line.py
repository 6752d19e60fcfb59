"""What bounds the time of an attempt on the wire: the abort, the deadline and the least rate."""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass

from backupd.core.policy import Reason

RATE_WINDOW = 60.0
"""Seconds over which the least rate is measured."""


class AttemptEndedError(Exception):
    """The attempt is to end now, for `reason`; raised out of a wait on the wire."""

    def __init__(self, reason: Reason, error: str) -> None:
        super().__init__(error)
        self.reason = reason
        self.error = error


class Abort:
    """Ends every wait on the wire at once, from any thread and for good."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        """Abort what is under way."""
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        """Return a descriptor that is readable once aborted."""
        return self._fd

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)


@dataclass(slots=True)
class _Window:
    began: float
    moved: int = 0


class Line:
    """The bounds of one uploader's attempts; its connections ask it how long they may wait.

    `deadline` is in seconds for a whole attempt, None for none; `min_rate` in bytes per second while
    the body is sent, 0 for none.
    """

    def __init__(self, abort: Abort, *, deadline: float | None = None, min_rate: int = 0) -> None:
        self._abort = abort
        self._deadline = deadline
        self._min_rate = min_rate
        self._ends: float | None = None
        self._window: _Window | None = None

    def begin(self) -> None:
        """Start the clock of an attempt."""
        now = time.monotonic()
        self._ends = None if self._deadline is None else now + self._deadline
        self._window = _Window(now) if self._min_rate else None

    def body_sent(self) -> None:
        """From here on the destination works, and the rate says nothing."""
        self._window = None

    def moved(self, count: int) -> None:
        """Note bytes that the connection took."""
        if self._window is not None:
            self._window.moved += count
            self._check(time.monotonic())

    def wait(self, fd: int, events: int, timeout: float | None) -> bool:
        """Wait for poll(2) events on a descriptor; return False once `timeout` seconds have passed.

        Raises AttemptEndedError when aborted, over the deadline, or slower than the least rate.
        """
        until = None if timeout is None else time.monotonic() + timeout
        poller = select.poll()
        poller.register(fd, events)
        poller.register(self._abort.fileno(), select.POLLIN)
        while True:
            now = time.monotonic()
            self._check(now)
            if until is not None and now >= until:
                return False
            ready = dict(poller.poll(self._milliseconds(now, until)))
            if self._abort.fileno() in ready:
                raise AttemptEndedError(Reason.STOPPED, "the daemon was told to stop")
            if ready:
                return True

    def _milliseconds(self, now: float, until: float | None) -> int | None:
        ends = [t for t in (until, self._ends) if t is not None]
        if self._window is not None:
            ends.append(self._window.began + RATE_WINDOW)
        return max(int((min(ends) - now) * 1000) + 1, 0) if ends else None

    def _check(self, now: float) -> None:
        if self._ends is not None and now >= self._ends:
            raise AttemptEndedError(Reason.DEADLINE, f"not done after {self._deadline:g} s")
        window = self._window
        if window is not None and now - window.began >= RATE_WINDOW:
            rate = window.moved / (now - window.began)
            if rate < self._min_rate:
                raise AttemptEndedError(Reason.TOO_SLOW, f"{rate:.0f} bytes/s, less than {self._min_rate}")
            self._window = _Window(now)
