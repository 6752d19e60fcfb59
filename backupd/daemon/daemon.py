"""The main thread of the daemon: start, main loop, reload and stop."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from backupd import __version__
from backupd.config.files import ExamineFiles, FilesReport
from backupd.config.load import load
from backupd.config.models import Config
from backupd.core.errors import PENDING, BackupdError, ConfigError, LedgerDamagedError, LedgerError
from backupd.core.folder_place import FolderPlace
from backupd.core.units import human_duration, local_time
from backupd.daemon.announcer import Announcer
from backupd.daemon.certificates import Certificates
from backupd.daemon.heartbeat import Heartbeat
from backupd.daemon.housekeeping import Housekeeping
from backupd.daemon.metrics_export import MetricsExport
from backupd.daemon.monitor import REFRESH_EVERY, Monitor
from backupd.daemon.once import CHECK_EVERY, OnceRun
from backupd.daemon.runtime import ReloadDiff, RunningDestination, RunningDrop, Runtime
from backupd.daemon.threads import Threads
from backupd.telemetry import events
from backupd.telemetry.log import EventLog, log_ledger_failure
from backupd.telemetry.systemd import SystemdNotifier
from backupd.telemetry.thread_watchdog import ThreadWatchdog

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_SIGNALS = {*_STOP_SIGNALS, signal.SIGHUP}

_ABORT_GRACE = 1.5
"""Seconds in which aborted uploads are expected to end."""

_FIRST_SCAN_HEAD_START = 10.0
"""Seconds of the first scan before deliveries start: both are twice as fast one after the other.

It is limited because a drop folder on a file server that hangs must not delay all other deliveries.
"""

_FIRST_SCAN_TIMEOUT = 60.0
"""Seconds after which the daemon is ready although a first scan has not ended: its disk may hang."""

_STALLED_AFTER = 120.0
"""Seconds without a sign of life after which a thread is logged, if systemd sets no watchdog time-out."""

_MAX_UPLOADS_NAMED = 3
"""Uploads that are named while the daemon waits for them."""

_SIGNAL_CHECK_EVERY = 0.1
"""Seconds after which Ctrl-C ends the wait for uploads."""

_TICK = 5.0
"""Seconds between two checks of the certificate files and of the clock."""


class Daemon:
    """Runs the daemon's threads until a signal arrives or one of them fails.

    `examine_files` checks the configuration file and the files that it names; `change_to` applies a new
    configuration to `runtime`, and `follow_folders` to the archives in the ledger. `silent` are the drops
    with a filesystem that does not answer at the start. `notify_user` is called with a line for the terminal
    once the daemon waits for uploads before it ends. With `once_timeout`, the daemon ends by itself once
    nothing is left to do, or after that time.
    """

    def __init__(
        self,
        runtime: Runtime,
        log: EventLog,
        config_path: Path,
        examine_files: ExamineFiles,
        change_to: Callable[[Config, Mapping[str, FolderPlace]], ReloadDiff],
        follow_folders: Callable[[Mapping[str, FolderPlace]], None],
        certificates: Certificates,
        housekeeping: Housekeeping,
        monitor: Monitor,
        announcer: Announcer,
        systemd: SystemdNotifier,
        silent: Collection[str],
        notify_user: Callable[[str], None],
        once_timeout: timedelta | None = None,
    ) -> None:
        self._runtime = runtime
        self._log = log
        self._config_path = config_path
        self._examine_files = examine_files
        self._change_to = change_to
        self._follow_folders = follow_folders
        self._certificates = certificates
        self._housekeeping = housekeeping
        self._monitor = monitor
        self._announcer = announcer
        self._systemd = systemd
        self._silent = silent
        self._notify_user = notify_user
        self._once = OnceRun(runtime, once_timeout) if once_timeout is not None else None
        self._threads = Threads(log)
        self._abandon = threading.Event()
        self._was_interrupted = False
        """Whether Ctrl-C ended the wait for uploads."""
        self._started = time.monotonic()
        self._heartbeat = Heartbeat(runtime.ledger, runtime.recorder, log, self._started)
        self._metrics_export = MetricsExport(log, monitor, self._threads)

    @property
    def damage(self) -> LedgerDamagedError | None:
        """Return the damage of the ledger for which the daemon ended."""
        return self._threads.damage

    def run(self) -> int:
        """Run until SIGTERM or SIGINT and return the exit code; call it in the main thread."""
        # Blocked in all threads and received by `sigtimedwait`, so that no handler interrupts any code.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # sent when a lease is broken, see dropfolder.filesystem
        self._log.emit(
            events.DAEMON_STARTED,
            version=__version__,
            pid=os.getpid(),
            config=str(self._config_path),
            path=str(self._runtime.config.state_dir),
        )
        try:
            self._start()
            received = self._main_loop()
        except LedgerDamagedError as error:  # detected by this thread
            self._log.emit(events.DAEMON_FAILED, error=error.message, hint=error.hint)
            self._threads.failed, self._threads.damage = True, error
            received = signal.SIGTERM
        except Exception as error:  # noqa: BLE001 -- no memory, threads or descriptors are left, or a bug
            self._threads.log_failure("main", error)
            self._threads.failed, received = True, signal.SIGTERM
        return self._shut_down(received)

    def _start(self) -> None:
        """Take over the state of the last run, and start all threads."""
        runtime = self._runtime
        self._metrics_export.configure(runtime.config)
        released_claims = self._housekeeping.renew_session()
        with self._housekeeping.logged_failures():
            self._housekeeping.bring_forward(now=self._once is not None)
        self._housekeeping.check_clock()
        self._housekeeping.take_over(self._silent)
        self._housekeeping.forget_removed_drops()
        self._housekeeping.apply_pauses()
        pending_dispositions = pending = None
        with self._housekeeping.logged_failures():
            pending_dispositions = runtime.ledger.count_pending_dispositions()
        self._threads.start(runtime.recorder.run, self._abandon, runtime.recorder.watchdog)
        self._announcer.start(self._threads)
        self._certificates.pause_unusable(runtime.destinations)
        self._start_threads(runtime.drops, runtime.destinations)
        self._wait_for_first_scans(runtime.drops, self._started + _FIRST_SCAN_TIMEOUT)
        self._monitor.is_ready = True
        self._threads.start(runtime.retention.run, runtime.retention.stop, runtime.retention.watchdog)
        with self._housekeeping.logged_failures():
            pending = sum(b.pending for b in runtime.ledger.backlog().values())
        self._log.emit(
            events.DAEMON_READY,
            duration_s=time.monotonic() - self._started,
            pending=pending,
            released_claims=released_claims,
            pending_dispositions=pending_dispositions,
        )
        self._log_heartbeat()
        self._systemd.send("READY=1", self._status())

    def _start_threads(
        self, drops: Mapping[str, RunningDrop], destinations: Mapping[str, RunningDestination]
    ) -> None:
        for drop in drops.values():
            for part in (drop.intake, *drop.examiner_pool.threads):
                self._threads.start(part.run, drop.stop, part.watchdog)
        self._wait_for_first_scans(drops, time.monotonic() + _FIRST_SCAN_HEAD_START)
        for destination in destinations.values():
            destination.circuit.save()
            for worker in destination.workers:
                self._threads.start(worker.run, destination.stop, worker.watchdog)

    def _wait_for_first_scans(self, drops: Mapping[str, RunningDrop], until: float) -> None:
        """Wait until every drop has been scanned once, or a monotonic time."""
        for drop in drops.values():
            while not drop.intake.ready.wait(0.1) and not self._threads.failed and time.monotonic() < until:
                self._systemd.extend_timeout()
                self._notify_watchdog()
                self._housekeeping.check_drops()
                self._monitor.refresh()
                if signal.sigpending() & _STOP_SIGNALS:
                    return

    def _main_loop(self) -> signal.Signals | None:
        """Do the periodic work until a stop signal, which is returned, or the end of a single run."""
        next_heartbeat = time.monotonic() + self._heartbeat_every
        next_tick = time.monotonic() + self._tick
        while True:
            until = min(next_heartbeat, next_tick, time.monotonic() + REFRESH_EVERY)
            received = self._wait_for_signal(until)
            if self._once and self._once.is_over():
                return None
            if received is not None and received.si_signo in _STOP_SIGNALS:
                return signal.Signals(received.si_signo)
            if received is not None:
                self._reload()
            if received is not None or time.monotonic() >= next_tick:
                self._do_tick()
                next_tick = time.monotonic() + self._tick
            self._housekeeping.apply_pauses()
            if time.monotonic() >= next_heartbeat:
                self._log_heartbeat()
                next_heartbeat = time.monotonic() + self._heartbeat_every
            else:
                self._monitor.refresh()

    def _do_tick(self) -> None:
        self._threads.check_ended()
        self._notify_watchdog()
        self._certificates.tick()
        self._metrics_export.tick()
        self._housekeeping.check_clock()
        self._housekeeping.renew_session()
        self._housekeeping.check_drops()
        self._replace_hung()
        self._reap_retired()

    def _wait_for_signal(self, until: float) -> signal.struct_siginfo | None:
        """Return the signal that arrives until a monotonic time or until a single run is over, or None."""
        if self._once is None:
            return signal.sigtimedwait(_SIGNALS, max(until - time.monotonic(), 0))
        received = None
        while received is None and time.monotonic() < until and not self._once.is_over():
            received = signal.sigtimedwait(_SIGNALS, CHECK_EVERY)
        return received

    @property
    def _heartbeat_every(self) -> float:
        return self._runtime.config.heartbeat_every.total_seconds()

    @property
    def _tick(self) -> float:
        return min(_TICK, self._systemd.watchdog_every or math.inf)

    def _notify_watchdog(self) -> None:
        """Notify systemd that the daemon is alive, if every thread is."""
        every = self._systemd.watchdog_every
        if self._threads.all_alive(_STALLED_AFTER if every is None else 2 * every):
            self._systemd.send("WATCHDOG=1", self._status())

    def _reload(self) -> None:
        """Apply the configuration file as it is now; one that cannot be used changes nothing."""
        self._systemd.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            report = self._examine_files()
            config = load(self._config_path)
            if report.fatal:
                raise ConfigError("\n".join(map(str, report.fatal)), "`backupd check` shows the details")
            if config.state_dir != self._runtime.config.state_dir:
                raise ConfigError(
                    "state_dir: can't be changed by a reload", "restart the daemon: systemctl restart backupd"
                )
            diff = self._change_to(config, report.places)
        except BackupdError as error:
            hint = error.hint or "fix the file and reload again"
            self._log.emit(
                events.CONFIG_REFUSED, config=str(self._config_path), error=error.message, hint=hint
            )
            self._monitor.report("configuration", f"the new one was refused: {error.message}", hint)
        else:
            self._monitor.solve("configuration")
            self._log.configure(config.log.level, config.log.format)
            self._announcer.configure(config)
            self._certificates.update(report)
            self._apply(diff, report)
        self._systemd.send("READY=1", self._status())

    def _apply(self, diff: ReloadDiff, report: FilesReport) -> None:
        """Stop the removed threads and start the new ones; uploads in progress are finished."""
        for drop in diff.drops_stopped.values():
            drop.request_stop()
        stopped = [watchdog for drop in diff.drops_stopped.values() for watchdog in drop.watchdogs]
        self._threads.join(stopped, time.monotonic() + _TICK)
        used = [drop.drop.folder for drop in diff.drops_started.values()]
        for drop in diff.drops_stopped.values():
            if drop.drop.folder not in used:  # another drop may have the same folder now
                drop.drop.folder.unlock()
        for destination in diff.destinations_stopped.values():
            destination.circuit.retire()
            destination.request_stop()
        if diff.drops_stopped or diff.drops_started:
            with self._housekeeping.logged_failures():
                self._follow_folders(report.places)
        self._housekeeping.take_over(report.silent)
        self._housekeeping.forget_removed_drops()
        self._runtime.retired += diff.destinations_stopped.values()
        if diff.drops_started:
            with suppress(LedgerError):  # deliveries that wait for a new drop are retried within a day anyway
                self._housekeeping.bring_forward()
        self._certificates.pause_unusable(diff.destinations_started)
        self._start_threads(diff.drops_started, diff.destinations_started)
        self._metrics_export.configure(self._runtime.config)
        self._log.emit(
            events.CONFIG_RELOADED,
            config=str(self._config_path),
            drops_changed=sorted({*diff.drops_stopped, *diff.drops_started}),
            destinations_changed=sorted({*diff.destinations_stopped, *diff.destinations_started}),
        )

    def _replace_hung(self) -> None:
        """Have other threads take over from workers and a recorder that hang with the folder of a drop."""
        for destination in self._runtime.destinations.values():
            for worker in destination.replace_hung():
                self._threads.start(worker.run, destination.stop, worker.watchdog)
        recorder = self._runtime.recorder
        if recorder.replace_hung():
            self._threads.start(recorder.run, self._abandon, recorder.watchdog)

    def _reap_retired(self) -> None:
        """Forget the retired destinations of which all workers have ended and all claims are released."""
        running = self._threads.running()
        retired = self._runtime.retired
        ended = [d for d in retired if not any(w.watchdog in running for w in d.workers)]
        released = [d for d in ended if d.queue.release_claims()]
        for destination in released:
            destination.probe_abort.close()
        self._runtime.retired = [d for d in retired if d not in released]

    def _log_heartbeat(self) -> None:
        """Do the work of a heartbeat, then log the state of the daemon."""
        self._housekeeping.tick()
        self._certificates.log_expiring()
        self._log.log_left_out()
        try:
            snapshot = self._monitor.take()
        except LedgerError as error:
            log_ledger_failure(self._log, error)
            return
        degraded_drops = sum(drop.intake.is_degraded for drop in self._runtime.drops.values())
        self._heartbeat.log(snapshot, degraded_drops)

    def _destinations(self) -> list[RunningDestination]:
        return [*self._runtime.destinations.values(), *self._runtime.retired]

    def _uploads(self) -> list[str]:
        """Return the uploads in progress in words, such as `core-1.tar.gz → vault, 45 %`."""
        now = datetime.now(UTC)
        uploads = [upload for worker in self._runtime.workers if (upload := worker.upload(now)) is not None]
        return [f"{each.archive} → {each.destination}, {each.percent} %" for each in uploads]

    def _status(self) -> str:
        """Return the status line for `systemctl status`."""
        fields = [f"uploading {self._runtime.in_flight}"]
        snapshot = self._monitor.latest
        if snapshot is not None:
            fields.insert(0, f"pending {snapshot.pending}")
            if snapshot.oldest is not None:
                fields.insert(1, f"oldest {human_duration(datetime.now(UTC) - snapshot.oldest)}")
        if self._runtime.recorder.last_delivered is not None:
            fields.append(f"last delivered {local_time(self._runtime.recorder.last_delivered)}")
        paused = [name for name, circuit in self._runtime.circuits.items() if circuit.state != "working"]
        if paused:
            fields.append(f"PAUSED: {', '.join(paused)}")
        held = sorted(pause.name for pause in self._runtime.pauses.active())
        if held:
            fields.append(f"held by a person: {', '.join(held)}")
        return "STATUS=" + "; ".join(fields)

    def _shut_down(self, received: signal.Signals | None) -> int:
        """Stop the intakes, wait for uploads for `shutdown_grace` or until Ctrl-C, and abort the rest.

        Aborted deliveries stay pending. Returns the exit code.
        """
        started = time.monotonic()
        grace = self._runtime.config.shutdown_grace.total_seconds()
        uploads = self._uploads()
        self._log.emit(
            events.DAEMON_STOPPING,
            signal=received.name if received else None,
            in_flight=len(uploads),
            uploads=_first_ones(uploads),
            grace_s=grace if uploads else None,
        )
        if uploads:
            noun = "upload" if len(uploads) == 1 else "uploads"
            self._notify_user(
                f"waiting up to {human_duration(grace)} for {len(uploads)} {noun}"
                f" ({'; '.join(_first_ones(uploads))}); Ctrl-C again ends at once"
            )
        self._systemd.send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int((grace + 10) * 1_000_000)}")
        self._runtime.retention.stop.set()
        for drop in self._runtime.drops.values():
            drop.request_stop()
        for destination in self._destinations():
            destination.request_stop()
        workers = [worker.watchdog for worker in self._runtime.workers]
        clean = self._wait_for_uploads(workers, started + grace)
        if not clean:
            self._runtime.abort()
            self._threads.join(workers, time.monotonic() + _ABORT_GRACE)
        self._runtime.recorder.finish()
        self._metrics_export.request_stop()
        self._announcer.request_stop()
        left = {*workers, *self._announcer.without_ledger}
        others = [watchdog for watchdog in self._threads.running() if watchdog not in left]
        all_ended = self._threads.join(others, time.monotonic() + _ABORT_GRACE)
        self._abandon.set()
        pending, code = None, PENDING if self._once else 0
        if all_ended:
            with suppress(LedgerError, LedgerDamagedError):  # the next start does the same
                code = self._once.exit_code() if self._once else 0
                self._runtime.ledger.release_own()
                self._monitor.take()
                self._housekeeping.save_clock()
                pending = sum(b.pending for b in self._runtime.ledger.backlog().values())
            self._runtime.ledger.close()
        self._log.log_left_out()
        self._log.emit(
            events.DAEMON_STOPPED, duration_s=time.monotonic() - started, clean=clean, pending=pending
        )
        if self._threads.failed:
            return 1
        return code or (PENDING if self._was_interrupted else 0)

    def _wait_for_uploads(self, workers: Sequence[ThreadWatchdog], until: float) -> bool:
        """Wait for the workers until a monotonic time or Ctrl-C; return whether all have ended.

        A second SIGTERM changes nothing: a service manager has its own time-out.
        """
        while not self._threads.join(workers, min(until, time.monotonic() + _SIGNAL_CHECK_EVERY)):
            self._was_interrupted = signal.sigtimedwait({signal.SIGINT}, 0) is not None
            if self._was_interrupted or time.monotonic() >= until:
                uploads = self._uploads()
                self._log.emit(
                    events.DAEMON_ABORTING,
                    signal=signal.SIGINT.name if self._was_interrupted else None,
                    in_flight=len(uploads),
                    uploads=_first_ones(uploads),
                )
                return False
        return True


def _first_ones(uploads: Sequence[str]) -> list[str]:
    """Return the first of some uploads, and how many there are beside them."""
    others = len(uploads) - _MAX_UPLOADS_NAMED
    return [*uploads[:_MAX_UPLOADS_NAMED], *([f"and {others} more"] if others > 0 else [])]
