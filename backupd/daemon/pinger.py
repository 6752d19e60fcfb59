"""Requests `ping_url` with each heartbeat, for a service that warns if the requests stay away."""

from __future__ import annotations

import http.client
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from backupd import __version__
from backupd.config.models import Config
from backupd.daemon.monitor import Monitor
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.thread_watchdog import ThreadWatchdog

_TIMEOUT = 10.0
"""Seconds for the connection, and for each read."""

_SUBJECT = "heartbeat.ping_url"
_HINT = "check the URL and the network of this host: `curl -sS -o /dev/null URL`"


class Pinger:
    """Sends one request for each heartbeat, which the daemon logs only if its ledger works.

    A request that is still under way when the next heartbeat comes is not repeated. The thread may hang in
    the host's resolver, and then hinders nothing.
    """

    def __init__(self, config: Config, monitor: Monitor, log: EventLog) -> None:
        self._url = config.heartbeat.ping_url
        self._monitor = monitor
        self._log = log
        self._changed = threading.Event()
        self.watchdog = ThreadWatchdog("pinger", may_hang=True)

    def configure(self, config: Config) -> None:
        """Use the URL of another configuration from now on."""
        self._url = config.heartbeat.ping_url
        if self._url is None:
            self._monitor.solve(_SUBJECT)

    def on_event(self, event: events.Event, _values: Mapping[str, Any]) -> None:
        """Have a request sent after a heartbeat."""
        if event is events.DAEMON_HEARTBEAT and self._url is not None:
            self._changed.set()

    def wake(self) -> None:
        """Wake the thread."""
        self._changed.set()

    def run(self, stop: threading.Event) -> None:
        """Send requests until `stop` is set and `wake` called."""
        while True:
            self._changed.wait()
            self._changed.clear()
            url = self._url
            if stop.is_set():
                return
            if url is not None:
                self._ping(url)

    def _ping(self, url: str) -> None:
        if (error := ping(url)) is None:
            self._monitor.solve(_SUBJECT)
            return
        self._log.emit(events.PING_FAILED, error=error, hint=_HINT)
        self._monitor.report(_SUBJECT, f"the request failed: {error}", _HINT)


def ping(url: str) -> str | None:
    """Send a GET request; return why it failed, without the URL, or None."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # `create_default_context` honours SSLKEYLOGFILE
    context.load_default_certs()
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    headers = {"User-Agent": f"backupd/{__version__}"}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 -- the configuration permits http only
    try:
        with opener.open(request, timeout=_TIMEOUT):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"HTTP status {error.code}"
    except urllib.error.URLError as error:
        return str(getattr(error.reason, "strerror", None) or error.reason).lower()
    except (OSError, http.client.HTTPException, ValueError) as error:
        return type(error).__name__ if not isinstance(error, OSError) else str(error).lower()
