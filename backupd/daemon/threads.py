"""The daemon's threads: started, guarded and joined."""

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


class Threads:
    """Starts threads; one that breaks has the process told to end, for a restart."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._running: list[tuple[threading.Thread, ThreadWatchdog]] = []
        self._said: set[str] = set()
        self.failed = False
        self.damage: LedgerDamagedError | None = None
        """The damage of the ledger that one broke by."""

    def start(
        self, body: Callable[[threading.Event], None], stop: threading.Event, pulse: ThreadWatchdog
    ) -> None:
        """Run a body until it returns; `stop` asks it to."""

        def guarded() -> None:
            try:
                body(stop)
            except Exception as error:  # noqa: BLE001 -- whatever it is: say it and end for a restart
                hint = (
                    error.hint if isinstance(error, BackupdError) else "systemd restarts it; report the trace"
                )
                self._log.emit(
                    events.DAEMON_FAILED, error=f"thread {pulse.name}: {error!r}", hint=hint, exc_info=error
                )
                self.failed = True
                if isinstance(error, LedgerDamagedError):
                    self.damage = error
                os.kill(os.getpid(), signal.SIGTERM)

        # daemonic: a thread that hangs in a system call must not keep the process from its end
        thread = threading.Thread(target=guarded, name=pulse.name, daemon=True)
        self._running = [each for each in self._running if each[0].is_alive()]
        self._running.append((thread, pulse))
        thread.start()

    def join(self, pulses: Sequence[ThreadWatchdog], until: float) -> bool:
        """Wait for the threads of some pulses until a monotonic time; return whether all have ended."""
        threads = [thread for thread, pulse in self._running if pulse in pulses]
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in threads)

    def running(self) -> list[ThreadWatchdog]:
        """Return the pulses of all threads that run."""
        return [pulse for thread, pulse in self._running if thread.is_alive()]

    def all_alive(self, within: float) -> bool:
        """Tell whether every thread that is not at rest showed life within seconds; say which did not."""
        hung = [pulse for pulse in self.running() if pulse.age() > within]
        for pulse in hung:
            if pulse.name not in self._said:
                self._log.emit(
                    events.DAEMON_HUNG,
                    thread=pulse.name,
                    stalled_s=pulse.age(),
                    hint="a disk or network filesystem that hangs does this; systemd restarts the daemon",
                )
        self._said = {pulse.name for pulse in hung}
        return not hung
