"""The order in which the daemon starts, goes on, takes a new configuration, and stops."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from backupd import __version__
from backupd.config.files import ExamineFiles
from backupd.config.load import load
from backupd.config.models import Config
from backupd.core.errors import BackupdError, ConfigError, LedgerDamagedError, LedgerError
from backupd.core.units import human_duration
from backupd.daemon.certificates import Certificates
from backupd.daemon.heartbeat import Heartbeat
from backupd.daemon.housekeeping import Housekeeping
from backupd.daemon.runtime import ReloadDiff, RunningDestination, RunningDrop, Runtime
from backupd.daemon.threads import Threads
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.telemetry.systemd import SystemdNotifier

_STOPS = {signal.SIGTERM, signal.SIGINT}
_SIGNALS = {*_STOPS, signal.SIGHUP}
_AFTER_ABORT = 1.5
"""Seconds that aborted uploads get to end in good order."""

_HEAD_START = 10.0
"""Seconds that the first look has before deliveries begin: each is twice as quick without the other.

No longer, or a drop folder on a server that hangs would keep all the others waiting.
"""

_FIRST_LOOK = 60.0
"""Seconds after which it is ready though some drop was not looked through yet: its disk may hang."""

_HUNG = 120.0
"""Seconds without life of a thread that has work, after which that is said where systemd does not watch."""

_TICK = 5.0
"""Seconds between looks at the files of certificates."""


class Daemon:
    """Runs the parts until a signal, or until one of them breaks.

    `examine` looks at the configuration file and what it names; `change_to` changes the parts.
    """

    def __init__(
        self,
        parts: Runtime,
        log: EventLog,
        config_path: Path,
        examine: ExamineFiles,
        change_to: Callable[[Config], ReloadDiff],
        certificates: Certificates,
        upkeep: Housekeeping,
    ) -> None:
        self._parts = parts
        self._log = log
        self._config_path = config_path
        self._examine = examine
        self._change_to = change_to
        self._certificates = certificates
        self._upkeep = upkeep
        self._notifier = SystemdNotifier()
        self._threads = Threads(log)
        self._retired: list[RunningDestination] = []
        self._abandon = threading.Event()
        self._began = time.monotonic()
        self._beats = Heartbeat(parts.ledger, parts.recorder, log, self._began)

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; return the exit code. To be called in the main thread."""
        # Blocked everywhere and waited for here: no handler ever runs in the middle of something.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # see drop.writer
        self._log.emit(
            events.DAEMON_STARTED,
            version=__version__,
            pid=os.getpid(),
            config=str(self._config_path),
            path=str(self._parts.config.state_dir),
        )
        try:
            self._start()
            received = self._go_on()
        except LedgerDamagedError as error:  # found by this thread, and not by one of the others
            self._log.emit(events.DAEMON_FAILED, error=error.message, hint=error.hint)
            self._threads.failed, self._threads.damage = True, error
            received = signal.SIGTERM
        return self._shut_down(received)

    def _start(self) -> None:
        """Go on where the last daemon ended, and begin to watch and to deliver."""
        parts = self._parts
        released = parts.ledger.release_claims()
        self._upkeep.bring_forward()
        self._upkeep.check_clock()
        undisposed = parts.ledger.count_pending_dispositions()
        for drop in parts.drops.values():
            drop.intake.register_folder()
        self._threads.start(parts.recorder.run, self._abandon, parts.recorder.watchdog)
        self._begin(parts.drops, parts.destinations)
        self._wait_for_intakes(parts.drops, self._began + _FIRST_LOOK)
        self._threads.start(parts.retention.run, parts.retention.stop, parts.retention.watchdog)
        self._threads.start(parts.restorer.run, parts.retention.stop, parts.restorer.watchdog)
        self._log.emit(
            events.DAEMON_READY,
            duration_s=time.monotonic() - self._began,
            pending=sum(b.pending for b in parts.ledger.backlog().values()),
            released_claims=released,
            pending_dispositions=undisposed,
        )
        self._beat()
        self._notifier.send("READY=1", self._status())

    @property
    def damage(self) -> LedgerDamagedError | None:
        """Return the damage of the ledger by which it ended."""
        return self._threads.damage

    def _begin(
        self, drops: Mapping[str, RunningDrop], destinations: Mapping[str, RunningDestination]
    ) -> None:
        for drop in drops.values():
            self._threads.start(drop.intake.run, drop.stop, drop.intake.watchdog)
        self._wait_for_intakes(drops, time.monotonic() + _HEAD_START)
        for destination in destinations.values():
            destination.circuit.save()
            for worker in destination.workers:
                self._threads.start(worker.run, destination.stop, worker.watchdog)

    def _wait_for_intakes(self, drops: Mapping[str, RunningDrop], until: float) -> None:
        """Wait until every drop has been looked through once, or a monotonic time."""
        for drop in drops.values():
            while not drop.intake.ready.wait(0.1) and not self._threads.failed and time.monotonic() < until:
                self._notifier.send("EXTEND_TIMEOUT_USEC=30000000")
                self._show_life()
                if signal.sigpending() & _STOPS:
                    return

    def _go_on(self) -> signal.Signals:
        """Wait for a signal that ends it, and see to what has its time meanwhile."""
        next_beat = time.monotonic() + self._heartbeat_every
        while True:
            received = signal.sigtimedwait(_SIGNALS, max(min(next_beat - time.monotonic(), self._tick), 0))
            if received is not None and received.si_signo in _STOPS:
                return signal.Signals(received.si_signo)
            if received is not None:
                self._reload()
            self._show_life()
            self._certificates.tick()
            self._upkeep.check_clock()
            self._let_go()
            if time.monotonic() >= next_beat:
                self._beat()
                next_beat = time.monotonic() + self._heartbeat_every

    @property
    def _heartbeat_every(self) -> float:
        return self._parts.config.heartbeat_every.total_seconds()

    @property
    def _tick(self) -> float:
        return min(_TICK, self._notifier.watchdog_every or math.inf)

    def _show_life(self) -> None:
        every = self._notifier.watchdog_every
        if self._threads.all_alive(_HUNG if every is None else 2 * every):
            self._notifier.send("WATCHDOG=1", self._status())

    def _reload(self) -> None:
        """Take the configuration as it is now; one that can't be used changes nothing."""
        self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            found = self._examine()
            config = load(self._config_path)
            if found.fatal:
                raise ConfigError("\n".join(map(str, found.fatal)), "`backupd check` says more")
            if config.state_dir != self._parts.config.state_dir:
                raise ConfigError("state_dir: can't be changed while it runs", "restart the daemon for that")
            change = self._change_to(config)
        except BackupdError as error:
            self._log.emit(
                events.CONFIG_REFUSED,
                config=str(self._config_path),
                error=error.message,
                hint=error.hint or "mend the file and reload again",
            )
        else:
            self._certificates.update(found)
            self._exchange(change)
        self._notifier.send("READY=1", self._status())

    def _exchange(self, change: ReloadDiff) -> None:
        """Stop what ended and start what is new; an upload under way goes on to its end."""
        for drop in change.drops_stopped.values():
            drop.request_stop()
        self._threads.join(
            [d.intake.watchdog for d in change.drops_stopped.values()], time.monotonic() + _TICK
        )
        for destination in change.destinations_stopped.values():
            destination.circuit.retire()
            destination.request_stop()
        self._retired += change.destinations_stopped.values()
        if change.drops_started:
            with suppress(LedgerError):  # what waited for a drop is tried within a day all the same
                self._upkeep.bring_forward()
        self._begin(change.drops_started, change.destinations_started)
        self._log.emit(
            events.CONFIG_RELOADED,
            config=str(self._config_path),
            drops_changed=sorted({*change.drops_stopped, *change.drops_started}),
            destinations_changed=sorted({*change.destinations_stopped, *change.destinations_started}),
        )

    def _let_go(self) -> None:
        """Let go of what was retired, once its workers ended and their claims are given back."""
        running = self._threads.running()
        ended = [p for p in self._retired if not any(w.watchdog in running for w in p.workers)]
        free = [p for p in ended if p.queue.release_claims()]
        self._retired = [p for p in self._retired if p not in free]

    def _beat(self) -> None:
        """See to what has its time, then tell how things stand."""
        self._upkeep.tick()
        self._certificates.log_expiring()
        self._beats.log(
            self._parts.circuits,
            self._in_flight(),
            self._certificates.days_left(),
            self._upkeep.overdue,
            sum(drop.intake.is_degraded for drop in self._parts.drops.values()),
        )

    def _destinations(self) -> list[RunningDestination]:
        return [*self._parts.destinations.values(), *self._retired]

    def _in_flight(self) -> int:
        return sum(worker.current is not None for part in self._destinations() for worker in part.workers)

    def _status(self) -> str:
        """Return the line for `systemctl status`."""
        parts = [f"uploading {self._in_flight()}"]
        with suppress(LedgerError):
            backlog = self._parts.ledger.backlog()
            parts.insert(0, f"pending {sum(b.pending for b in backlog.values())}")
            oldest = min((b.oldest for b in backlog.values() if b.oldest), default=None)
            if oldest is not None:
                parts.insert(1, f"oldest {human_duration(datetime.now(UTC) - oldest)}")
        if self._parts.recorder.last_delivered is not None:
            parts.append(f"last delivered {self._parts.recorder.last_delivered:%Y-%m-%d %H:%M:%S} UTC")
        shut = [name for name, gate in self._parts.circuits.items() if gate.state != "working"]
        if shut:
            parts.append(f"PAUSED: {', '.join(shut)}")
        return "STATUS=" + "; ".join(parts)

    def _shut_down(self, received: signal.Signals) -> int:
        """Stop taking in, let uploads end within the grace, then abort them; what is left stays pending."""
        began = time.monotonic()
        grace = self._parts.config.shutdown_grace.total_seconds()
        self._log.emit(events.DAEMON_STOPPING, signal=received.name, in_flight=self._in_flight())
        self._notifier.send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int((grace + 10) * 1_000_000)}")
        self._parts.retention.stop.set()
        for drop in self._parts.drops.values():
            drop.request_stop()
        for destination in self._destinations():
            destination.request_stop()
        workers = [worker.watchdog for part in self._destinations() for worker in part.workers]
        clean = self._threads.join(workers, began + grace)
        if not clean:
            self._parts.abort()
            self._threads.join(workers, time.monotonic() + _AFTER_ABORT)
        self._parts.recorder.finish()
        others = [pulse for pulse in self._threads.running() if pulse not in workers]
        settled = self._threads.join(others, time.monotonic() + _AFTER_ABORT)
        self._abandon.set()
        pending = None
        if settled:
            with suppress(LedgerError, LedgerDamagedError):  # the next start does it too
                self._parts.ledger.release_claims()
                self._upkeep.save_clock()
                pending = sum(b.pending for b in self._parts.ledger.backlog().values())
            self._parts.ledger.close()
        self._log.emit(
            events.DAEMON_STOPPED, duration_s=time.monotonic() - began, clean=clean, pending=pending
        )
        return 1 if self._threads.failed else 0
