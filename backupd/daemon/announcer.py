"""Everything that tells people and programs outside about the daemon: messages, hooks and pings."""

from __future__ import annotations

import threading

from backupd.config.models import Config
from backupd.daemon.hook_runner import HookRunner
from backupd.daemon.messenger import Messenger
from backupd.daemon.monitor import Monitor
from backupd.daemon.pinger import Pinger
from backupd.daemon.threads import Threads
from backupd.ledger.port import Ledger
from backupd.telemetry.log import EventLog
from backupd.telemetry.thread_watchdog import ThreadWatchdog


class Announcer:
    """Runs the threads of the messenger, the hook runner and the pinger; none delays another or a delivery.

    It listens to the log and to the snapshots from the beginning on, so that no event before the start of
    the threads is lost.
    """

    def __init__(self, config: Config, ledger: Ledger, monitor: Monitor, log: EventLog) -> None:
        self._messenger = Messenger(config, ledger, monitor, log)
        self._hook_runner = HookRunner(config, log)
        self._pinger = Pinger(config, monitor, log)
        self._parts = (self._messenger, self._hook_runner, self._pinger)
        self._stop = threading.Event()
        log.listeners += [part.on_event for part in self._parts]
        monitor.listeners.append(self._messenger.on_snapshot)

    @property
    def without_ledger(self) -> tuple[ThreadWatchdog, ...]:
        """Return the watchdogs of the threads that need not have ended when the ledger is closed."""
        return self._hook_runner.watchdog, self._pinger.watchdog

    def start(self, threads: Threads) -> None:
        """Start the threads."""
        for part in self._parts:
            threads.start(part.run, self._stop, part.watchdog)

    def configure(self, config: Config) -> None:
        """Use another configuration from now on."""
        for part in self._parts:
            part.configure(config)

    def request_stop(self) -> None:
        """Request the threads to stop; do not wait for them."""
        self._stop.set()
        for part in self._parts:
            part.wake()
