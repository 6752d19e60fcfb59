"""The daemon's threads: start, supervision and join."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

from backupd.core.errors import BackupdError, LedgerDamagedError
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.thread_watchdog import ThreadWatchdog

_HUNG_HINT = (
    "a disk or network filesystem that hangs is a usual cause, see `dmesg -T`; systemd restarts the daemon"
)
_MAY_HANG_HINT = "its filesystem does not answer, see `dmesg -T`; all other drops and destinations go on"

_FAILED_HINT = "systemd restarts the daemon; report this exception"
_ENDED_HINT = "systemd restarts the daemon; the memory may be short: see `MemoryMax=` and `dmesg -T`"
_LIMIT_HINT = "systemd restarts the daemon; raise `MemoryMax=`, `TasksMax=` or `LimitAS=` of the unit"


class Threads:
    """Starts threads; an exception in one of them stops the daemon, and systemd restarts it."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._running: list[tuple[threading.Thread, ThreadWatchdog]] = []
        self._logged_stalled: set[str] = set()
        """Names of the stalled threads that were logged."""
        self.failed = False
        self.damage: LedgerDamagedError | None = None
        """The damage of the ledger that a thread has found."""

    def start(
        self, body: Callable[[threading.Event], None], stop: threading.Event, watchdog: ThreadWatchdog
    ) -> None:
        """Run `body(stop)` in a thread until it returns; it returns soon after `stop` is set."""

        def supervised() -> None:
            try:
                body(stop)
                watchdog.has_returned = True
            except Exception as error:  # noqa: BLE001 -- every exception is logged and stops the daemon
                self.log_failure(watchdog.name, error)
            finally:  # even if that fails, as without memory
                if not watchdog.has_returned:
                    self._stop_daemon()

        # a daemon thread: one that hangs in a system call must not keep the process from exiting
        thread = threading.Thread(target=supervised, name=watchdog.name, daemon=True)
        self._running = [each for each in self._running if each[0].is_alive() or not each[1].has_returned]
        thread.start()
        self._running.append((thread, watchdog))

    def join(self, watchdogs: Sequence[ThreadWatchdog], until: float) -> bool:
        """Wait for the threads of these watchdogs until a monotonic time; return whether all have ended."""
        threads = [thread for thread, watchdog in self._running if watchdog in watchdogs]
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in threads)

    def check_ended(self) -> None:
        """Stop the daemon if a thread has ended without returning, whatever has prevented its report."""
        for thread, watchdog in self._running:
            if not thread.is_alive() and not watchdog.has_returned and not self.failed:
                error = f"the thread {watchdog.name} has ended"
                self._log.emit(events.DAEMON_FAILED, error=error, hint=_ENDED_HINT)
                self._stop_daemon()

    def running(self) -> list[ThreadWatchdog]:
        """Return the watchdogs of all running threads."""
        return [watchdog for thread, watchdog in self._running if thread.is_alive()]

    def all_alive(self, within: float) -> bool:
        """Return whether every busy thread showed life within so many seconds; log those that did not.

        Those that may hang are logged, and count as alive.
        """
        stalled = [watchdog for watchdog in self.running() if watchdog.age() > within]
        for watchdog in stalled:
            if watchdog.name not in self._logged_stalled:
                self._log.emit(
                    events.DAEMON_HUNG,
                    thread=watchdog.name,
                    stalled_s=watchdog.age(),
                    hint=_MAY_HANG_HINT if watchdog.may_hang else _HUNG_HINT,
                )
        self._logged_stalled = {watchdog.name for watchdog in stalled}
        return all(watchdog.may_hang for watchdog in stalled)

    def log_failure(self, name: str, error: Exception) -> None:
        """Log the exception of a thread."""
        if isinstance(error, LedgerDamagedError):
            self.damage = error
        hint = error.hint if isinstance(error, BackupdError) else _FAILED_HINT
        if isinstance(error, MemoryError) or "can't start new thread" in str(error):
            hint = _LIMIT_HINT
        self._log.emit(events.DAEMON_FAILED, error=f"thread {name}: {error!r}", hint=hint, exc_info=error)

    def _stop_daemon(self) -> None:
        self.failed = True
        os.kill(os.getpid(), signal.SIGTERM)
