"""The pages `/healthz` and `/readyz`: whether the daemon's main loop runs, and whether it can do its work."""

from __future__ import annotations

import time
from datetime import timedelta
from http import HTTPStatus

from backupd.core.snapshot import Snapshot
from backupd.core.units import human_duration
from backupd.telemetry.http_server import PageRequest, PageResponse

_MAX_START = timedelta(minutes=5)
"""The longest time from the start to the first snapshot, as with drop folders that do not answer."""


class Liveness:
    """Judges the daemon by its snapshots; `update` is a listener of the monitor.

    It measures their age by the monotonic clock, because the host's clock may be set.
    """

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._updated_at = time.monotonic()

    def update(self, snapshot: Snapshot) -> None:
        """Record that the main loop has taken a snapshot now."""
        self._snapshot, self._updated_at = snapshot, time.monotonic()

    def healthz(self, _request: PageRequest) -> PageResponse:
        """Return 200 while the main loop runs; a start counts as running."""
        age, limit = time.monotonic() - self._updated_at, _MAX_START
        if self._snapshot is not None:
            limit = self._snapshot.hung_after
        if age > limit.total_seconds():
            return _unavailable(f"no snapshot for {human_duration(age)}: the main loop hangs")
        return PageResponse(b"ok\n")

    def readyz(self, request: PageRequest) -> PageResponse:
        """Return 200 once all drop folders were scanned, while the ledger can be used."""
        snapshot = self._snapshot
        if snapshot is None or not snapshot.is_ready:
            return _unavailable("the first scan of the drop folders has not ended")
        for problem in snapshot.daemon_problems:
            if problem.subject == "ledger":
                return _unavailable(f"the ledger cannot be used: {problem.error}")
        return self.healthz(request)


def _unavailable(text: str) -> PageResponse:
    return PageResponse(f"{text}\n".encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)
