"""Notifications to systemd; sd_notify(3)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress


class SystemdNotifier:
    """Sends states to the socket in $NOTIFY_SOCKET; does nothing if systemd has set none."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None
        )
        micros = environ.get("WATCHDOG_USEC", "")
        is_for_this_process = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_every = int(micros) / 2e6 if micros.isdigit() and is_for_this_process else None
        """Seconds between two `WATCHDOG=1`, half of systemd's time-out; None if the unit has no watchdog."""
        self._next_extension = 0.0

    def extend_timeout(self) -> None:
        """Have systemd wait for another 30 seconds for the start; sent at most once per second."""
        now = time.monotonic()
        if now >= self._next_extension:
            self._next_extension = now + 1
            self.send("EXTEND_TIMEOUT_USEC=30000000")

    def send(self, *states: str) -> None:
        """Send states such as `READY=1`; never raises, because deliveries do not depend on systemd."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.sendto("\n".join(states).encode(), self._address)
