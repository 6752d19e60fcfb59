"""The page at `/` of the metrics' server: the state of the daemon and its devices, for people."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from datetime import UTC, datetime
from http import HTTPStatus

from backupd.config.models import Config
from backupd.core.errors import BackupdError
from backupd.core.snapshot import Snapshot
from backupd.ledger.factory import open_history
from backupd.page.document import CONTENT_SECURITY_POLICY, render_page
from backupd.page.page_data import collect_page_data, page_data_without_ledger
from backupd.telemetry.http_server import PageResponse

_MAX_AGE = 2.0
"""Seconds for which a page is served again: a browser that reloads must not cost the deliveries a core."""

_MAX_WAIT = 2.0
"""Seconds that a request waits for another one: a ledger on a disk that hangs must keep one thread only."""


class StatePage:
    """Renders the page for one request at a time; safe for use by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._body = b""
        self._made_at: float | None = None

    def response(self, config: Config, latest: Snapshot | None) -> PageResponse:
        """Return the page; `latest` is the state that it shows."""
        if not self._lock.acquire(timeout=_MAX_WAIT):
            body = b"the ledger does not answer; try again\n"
            return PageResponse(body, status=HTTPStatus.SERVICE_UNAVAILABLE)
        try:
            if self._made_at is None or time.monotonic() > self._made_at + _MAX_AGE:
                self._body = _render(config, latest).encode()
                self._made_at = time.monotonic()
            return PageResponse(
                self._body, "text/html; charset=utf-8", content_policy=CONTENT_SECURITY_POLICY
            )
        finally:
            self._lock.release()


def _render(config: Config, latest: Snapshot | None) -> str:
    now = datetime.now(UTC)
    try:
        with closing(open_history(config)) as history:
            data = collect_page_data(history, config, now, latest=latest)
    except BackupdError as error:
        data = page_data_without_ledger(latest, error.message, now)
    return render_page(data)
