"""The daemon's threads, and the order in which they start and stop."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from backupd import __version__
from backupd.core.errors import BackupdError, LedgerError
from backupd.delivery.gate import SharedGate
from backupd.delivery.recorder import Recorder
from backupd.delivery.wakeup import Wakeup
from backupd.delivery.worker import Worker
from backupd.heartbeat import Heartbeat
from backupd.intake.intake import Intake
from backupd.ledger.port import Ledger
from backupd.ops import events
from backupd.ops.log import EventLog
from backupd.ops.notify import Notifier

_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_AFTER_ABORT = 1.5
"""Seconds that aborted uploads get to end in good order."""

_HEAD_START = 10.0
"""Seconds that the first look has before deliveries begin: each is twice as quick without the other.

No longer, or a drop folder on a server that hangs would keep all the others waiting.
"""


@dataclass(slots=True)
class Parts:
    """What assembly made: everything the daemon runs."""

    ledger: Ledger
    intakes: Sequence[Intake]
    workers: Sequence[Worker]
    gates: Mapping[str, SharedGate]
    wakeups: Mapping[str, Wakeup]
    recorder: Recorder
    abort: Callable[[], None]


class Daemon:
    """Runs the parts until a signal, or until one of them breaks."""

    def __init__(
        self,
        parts: Parts,
        log: EventLog,
        *,
        shutdown_grace: timedelta,
        heartbeat_every: timedelta,
        notifier: Notifier | None = None,
    ) -> None:
        self._parts = parts
        self._log = log
        self._grace = shutdown_grace.total_seconds()
        self._heartbeat_every = heartbeat_every.total_seconds()
        self._notifier = notifier or Notifier()
        self._stop = threading.Event()
        self._abandon = threading.Event()
        self._failed = False
        self._threads: list[threading.Thread] = []
        self._began = time.monotonic()
        self._beats = Heartbeat(parts.ledger, parts.recorder, log, self._began)

    def run(self, path: str, config: str) -> int:
        """Run until SIGTERM or SIGINT; return the exit code. To be called in the main thread.

        `path` and `config` are the state directory's and configuration's, for the log.
        """
        # Blocked everywhere and waited for here: no handler ever runs in the middle of something.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # see drop.writer
        self._log.emit(events.DAEMON_STARTED, version=__version__, pid=os.getpid(), config=config, path=path)
        released = self._parts.ledger.release_claims()
        undisposed = self._parts.recorder.recover()
        for gate in self._parts.gates.values():
            gate.note()
        self._start_threads()
        self._log.emit(
            events.DAEMON_READY,
            duration_s=time.monotonic() - self._began,
            pending=sum(b.pending for b in self._parts.ledger.backlog().values()),
            released=released,
            undisposed=undisposed,
        )
        self._heartbeat()
        self._notifier.send("READY=1", self._status())
        received = self._wait_for_signal()
        return self._shut_down(received)

    def _start_threads(self) -> None:
        parts = self._parts
        self._start("recorder", parts.recorder.run, self._abandon)
        for intake in parts.intakes:
            self._start(f"intake-{intake.name}", intake.run, self._stop)
        self._wait_for_intakes(time.monotonic() + _HEAD_START)
        for number, worker in enumerate(parts.workers, 1):
            self._start(f"worker-{number}", worker.run, self._stop)
        self._wait_for_intakes(math.inf)

    def _wait_for_intakes(self, until: float) -> None:
        """Wait until every drop has been looked through once."""
        for intake in self._parts.intakes:
            while not intake.ready.wait(0.1) and not self._failed and time.monotonic() < until:
                self._notifier.send("EXTEND_TIMEOUT_USEC=30000000")

    def _start(self, name: str, body: Callable[[threading.Event], None], stop: threading.Event) -> None:
        def guarded() -> None:
            try:
                body(stop)
            except Exception as error:  # noqa: BLE001 -- whatever it is: say it and end for a restart
                hint = (
                    error.hint if isinstance(error, BackupdError) else "systemd restarts it; report the trace"
                )
                self._log.emit(
                    events.DAEMON_FAILED, error=f"thread {name}: {error!r}", hint=hint, exc_info=error
                )
                self._failed = True
                os.kill(os.getpid(), signal.SIGTERM)

        # daemonic: a thread that hangs in a system call must not keep the process from its end
        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _wait_for_signal(self) -> signal.Signals:
        next_beat = time.monotonic() + self._heartbeat_every
        while True:
            until = next_beat
            if self._notifier.watchdog_every is not None:
                until = min(until, time.monotonic() + self._notifier.watchdog_every)
            received = signal.sigtimedwait(_SIGNALS, max(until - time.monotonic(), 0))
            if received is not None:
                return signal.Signals(received.si_signo)
            self._notifier.send("WATCHDOG=1", self._status())
            if time.monotonic() >= next_beat:
                self._heartbeat()
                next_beat = time.monotonic() + self._heartbeat_every

    def _heartbeat(self) -> None:
        self._beats.beat(self._parts.gates, self._in_flight())

    def _in_flight(self) -> int:
        return sum(worker.current is not None for worker in self._parts.workers)

    def _status(self) -> str:
        shut = [name for name, gate in self._parts.gates.items() if gate.state != "open"]
        paused = f"; paused: {', '.join(shut)}" if shut else ""
        return f"STATUS=uploading {self._in_flight()}{paused}"

    def _shut_down(self, received: signal.Signals) -> int:
        """Stop taking in, let uploads end within the grace, then abort them; what is left stays pending."""
        began = time.monotonic()
        self._log.emit(events.DAEMON_STOPPING, signal=received.name, in_flight=self._in_flight())
        extend = int((self._grace + 10) * 1_000_000)
        self._notifier.send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={extend}")
        self._stop.set()
        for intake in self._parts.intakes:
            intake.poke()
        for wakeup in self._parts.wakeups.values():
            wakeup.ring()
        workers = [t for t in self._threads if t.name.startswith("worker-")]
        clean = _join(workers, began + self._grace)
        if not clean:
            self._parts.abort()
            _join(workers, time.monotonic() + _AFTER_ABORT)
        self._parts.recorder.finish()
        others = [t for t in self._threads if t not in workers]
        settled = _join(others, time.monotonic() + _AFTER_ABORT)
        self._abandon.set()
        pending = None
        if settled:
            with suppress(LedgerError):  # the next start does it too
                self._parts.ledger.release_claims()
            pending = sum(b.pending for b in self._parts.ledger.backlog().values())
            self._parts.ledger.close()
        self._log.emit(
            events.DAEMON_STOPPED, duration_s=time.monotonic() - began, clean=clean, pending=pending
        )
        return 1 if self._failed else 0


def _join(threads: Sequence[threading.Thread], until: float) -> bool:
    """Wait for threads until a monotonic time; return whether all have ended."""
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0))
    return not any(thread.is_alive() for thread in threads)
