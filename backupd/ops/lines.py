"""Writing lines to a descriptor."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Mapping
from types import MappingProxyType

Record = Mapping[str, object]
"""An event with its keys, all of them plain, as it is written."""

PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}
"""Of syslog(3), by level."""

_NONE: Record = MappingProxyType({"level": "info"})


class LineWriter:
    """Writes whole lines to a descriptor and never raises; what could not be written is counted.

    `prefixed` puts `<N>` with the priority before each line, for the journal (sd-daemon(3)). `patience` are
    the seconds for which a reader that takes nothing is waited for; once that is over, it is waited for
    by no other line until it takes one. None: forever.
    """

    def __init__(self, fd: int, *, prefixed: bool = False, patience: float | None = None) -> None:
        self._fd = fd
        self._prefixed = prefixed
        self._patience = self._left = patience
        self._lock = threading.Lock()
        self._torn = False
        self.lost = 0

    def line(self, text: str, record: Record = _NONE) -> bool:
        """Write a line; return whether it went out whole."""
        if self._prefixed:
            prefix = f"<{PRIORITIES[str(record['level'])]}>"
            text = prefix + text.replace("\n", "\n" + prefix)
        data = (text + "\n").encode("utf-8", "backslashreplace")
        with self._lock:
            if self._torn:
                data = b"\n" + data
            left = data
            try:
                while left:
                    left = left[self._write(left) :]
            except OSError:
                self._torn = self._torn or len(left) < len(data)
                self.lost += 1
                return False
            self._torn = False
            return True

    debug = info = warning = error = line

    def forget(self, lost: int) -> None:
        """Count so many lines as told of."""
        with self._lock:
            self.lost -= lost

    def _write(self, data: bytes) -> int:
        if self._left is None:
            return os.write(self._fd, data)
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        if not poll.poll(self._left * 1000):
            self._left = 0.0
            raise TimeoutError
        self._left = self._patience
        return os.write(self._fd, data[: select.PIPE_BUF])  # so much goes out at once if anything does
