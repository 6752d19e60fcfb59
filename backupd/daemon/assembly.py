"""Builds the daemon from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from backupd.config.files import ExamineFiles, FilesReport
from backupd.config.models import Config, DestinationConfig, DropConfig
from backupd.core.errors import LedgerDamagedError, LedgerFullError
from backupd.core.folder_place import FolderPlace, label_of
from backupd.core.model import Deferred
from backupd.core.policy import Reason
from backupd.daemon.announcer import Announcer
from backupd.daemon.certificates import Certificates
from backupd.daemon.daemon import Daemon
from backupd.daemon.housekeeping import HostClock, Housekeeping
from backupd.daemon.monitor import Monitor
from backupd.daemon.runtime import ReloadDiff, RunningDestination, RunningDrop, Runtime
from backupd.delivery.circuit_breaker import CircuitBreaker, Notifier
from backupd.delivery.destination import Destination, DestinationQueue
from backupd.delivery.disposition import Disposition
from backupd.delivery.recorder import Recorder
from backupd.delivery.retention import Retention, RetentionScope
from backupd.delivery.worker import Worker
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import DropFolder
from backupd.intake.device_tracker import DeviceTracker
from backupd.intake.examiner import ExaminerPool
from backupd.intake.intake import Intake
from backupd.ledger.factory import open_ledger
from backupd.ledger.port import ClockReading, Ledger, OpenedLedger
from backupd.telemetry import events
from backupd.telemetry.log import EventLog, log_ledger_failure
from backupd.telemetry.systemd import SystemdNotifier
from backupd.upload.base import Abort
from backupd.upload.registry import open_endpoint, probe


def run_daemon(
    config: Config,
    log: EventLog,
    config_path: Path,
    report: FilesReport,
    examine_files: ExamineFiles,
    notify_user: Callable[[str], None],
    once_timeout: timedelta | None = None,
) -> int:
    """Run the daemon on a configuration and the report of its files; return the exit code.

    `notify_user` is called with lines for the terminal. With `once_timeout`, the daemon ends once nothing is
    left to do, or after that time.
    """
    systemd = SystemdNotifier()
    with open_ledger(config, systemd.extend_timeout) as opened:
        try:
            assembly = Assembly(config, opened.ledger, log, report)
        except LedgerDamagedError as error:
            _log_recreated(log, opened)
            log.emit(events.DAEMON_FAILED, error=error.message, hint=error.hint)
            opened.ended_cleanly, opened.damage = False, error
            return 1
        certificates = Certificates(assembly.runtime, log, examine_files, report)
        housekeeping = Housekeeping(assembly.runtime, log, assembly.device_tracker, assembly.clock)
        monitor = Monitor(assembly.runtime, certificates, log)
        announcer = Announcer(config, opened.ledger, monitor, log)
        _log_recreated(log, opened)
        daemon = Daemon(
            assembly.runtime,
            log,
            config_path,
            examine_files,
            assembly.change_to,
            assembly.follow_folders,
            certificates,
            housekeeping,
            monitor,
            announcer,
            systemd,
            report.silent,
            notify_user,
            once_timeout,
        )
        code = daemon.run()
        opened.ended_cleanly, opened.damage = code != 1, daemon.damage
        return code


def _log_recreated(log: EventLog, opened: OpenedLedger) -> None:
    if opened.recreated is not None:
        lost = opened.recreated
        log.emit(events.LEDGER_RECREATED, path=lost.path, error=lost.error, hint=lost.hint)


_DISTRUSTED_READING = ClockReading(datetime.fromtimestamp(0, UTC))
"""The clock reading of a lost ledger: no time is known to be right, so that nothing is removed for a day."""


class Assembly:
    """Builds the runtime of a daemon from a configuration, and changes it to another configuration."""

    def __init__(self, config: Config, ledger: Ledger, log: EventLog, report: FilesReport) -> None:
        self._log = log
        self._ledger = ledger
        self._abort = Abort()
        self._drops = {
            name: Drop.of(name, drop, _new_folder(drop), destinations_of(config, drop))
            for name, drop in config.drop.items()
        }
        """Every drop since the start, as archives of a removed one may still be uploading.

        Also the earlier folders of drops, while archives in them are pending.
        """
        self._places = _reached(report.places)
        self.clock = HostClock(
            ledger.last_clock_reading() or (None if report.is_new else _DISTRUSTED_READING)
        )
        self.device_tracker = DeviceTracker(ledger, log)
        drops = {**self._drops}
        try:
            self._add_earlier_folders(config, report.places)
            self.device_tracker.configure(drops, ledger.now())
        except LedgerFullError as error:  # no archive can be queued until there is room
            log_ledger_failure(log, error)
            self.device_tracker.postpone(drops)
        disposition = Disposition(self._drops, log, lambda: ledger.session)
        recorder = Recorder(ledger, disposition, log, self._recheck)
        retention = Retention(
            ledger, self._retention_scope, self.device_tracker.device_of, log, self.clock.trusted_now
        )
        self.runtime = Runtime(config, ledger, {}, {}, recorder, self._abort.set, retention)
        self.runtime.destinations |= {n: self._build_destination(n, d) for n, d in config.destination.items()}
        self.runtime.drops |= {n: self._build_drop(n) for n in config.drop}

    def change_to(self, config: Config, places: Mapping[str, FolderPlace]) -> ReloadDiff:
        """Change the runtime where another configuration differs; the caller stops and starts the threads.

        `places` are those of its drop folders. A drop with a link that leads to another folder now differs.
        Raises LedgerError, and changes nothing, if the ledger cannot be written.
        """
        runtime, before = self.runtime, self.runtime.config
        led_away = {name for name, place in places.items() if self._has_other_path(name, place)}
        changed = [n for n in config.drop if n in led_away or not _is_same_drop(n, before, config)]
        drops = {n: self._changed_drop(n, config, keep_folder=n not in led_away) for n in changed}
        current = {name: drops.get(name) or self._drops[name] for name in config.drop}
        self.device_tracker.configure(current, self._ledger.now())
        self._drops |= drops
        self._places |= _reached(places)
        runtime.config = config
        destinations = {n: d for n, d in config.destination.items() if before.destination.get(n) != d}
        drops_gone = [n for n in runtime.drops if n in drops or n not in config.drop]
        drops_stopped = {name: runtime.drops.pop(name) for name in drops_gone}
        gone = [n for n in runtime.destinations if n in destinations or n not in config.destination]
        destinations_stopped = {name: runtime.destinations.pop(name) for name in gone}
        destinations_started = {n: self._build_destination(n, d) for n, d in destinations.items()}
        runtime.destinations |= destinations_started
        drops_started = {name: self._build_drop(name) for name in drops}
        runtime.drops |= drops_started
        return ReloadDiff(drops_stopped, drops_started, destinations_stopped, destinations_started)

    def follow_folders(self, places: Mapping[str, FolderPlace]) -> None:
        """Have the archives in the ledger follow the folders of the current configuration, after a reload.

        To be called while no intake of a changed drop runs. Raises LedgerError if that can't be written.
        """
        config = self.runtime.config
        self._add_earlier_folders(config, places)
        self.device_tracker.configure({name: self._drops[name] for name in config.drop}, self._ledger.now())
        self.runtime.recorder.recheck_dispositions(drops_renamed=True, wait=False)

    def _add_earlier_folders(self, config: Config, places: Mapping[str, FolderPlace]) -> None:
        for name, place in self._ledger.assign_folders(places).items():
            table = config.drop[label_of(name)].model_copy(update={"path": Path(place.path)})
            folder = DropFolder(place.path, is_open=False, opens_itself=True)
            self._drops[name] = Drop.of(name, table, folder, destinations_of(config, table))

    def _has_other_path(self, name: str, place: FolderPlace) -> bool:
        """Return whether a drop folder is known to have another path without links than before."""
        before = self._places.get(name)
        return before is not None and place.filesystem is not None and before.path != place.path

    def _changed_drop(self, name: str, config: Config, *, keep_folder: bool) -> Drop:
        """Build a drop from its changed table; the folder stays open if its path is the same."""
        table = config.drop[name]
        before = self._drops[name] if name in self.runtime.config.drop else None  # a removed one is unlocked
        is_same_folder = keep_folder and before is not None and before.folder.path == str(table.path)
        folder = before.folder if before and is_same_folder else _new_folder(table)
        return Drop.of(name, table, folder, destinations_of(config, table))

    def _build_drop(self, name: str) -> RunningDrop:
        on_due = self.runtime.recorder.recheck_dispositions
        drop, pool, tracker = self._drops[name], ExaminerPool(name), self.device_tracker
        intake = Intake(drop, self._ledger, self._log, pool, self._notify, on_due, tracker)
        return RunningDrop(drop, intake, pool)

    def _build_destination(self, name: str, config: DestinationConfig) -> RunningDestination:
        destination, notifier = Destination.of(name, config), Notifier()
        backoff = destination.retry_policy.backoff
        circuit = CircuitBreaker(name, backoff, self._log, notifier, self._ledger)
        probe_abort = Abort()
        queue = DestinationQueue(
            destination,
            self._ledger,
            circuit,
            notifier,
            self._drops,
            self._log,
            self.runtime.pauses,
            partial(_probe, name, config, probe_abort),
        )
        endpoint, submit = open_endpoint(config, self._abort), self.runtime.recorder.submit
        workers = [Worker(queue, endpoint.make_uploader(), submit) for _ in range(config.workers)]
        return RunningDestination(queue, workers, circuit, notifier, endpoint, probe_abort)

    def _retention_scope(self) -> RetentionScope:
        config = self.runtime.config
        usable = {name: self._drops[name] for name in config.drop if self._drops[name].folder.is_usable}
        return RetentionScope(usable, config.heartbeat_every)

    def _recheck(self, drop: str, relpath: bytes) -> None:
        running = self.runtime.drops.get(drop)
        if running is not None:
            running.intake.recheck(relpath)

    def _notify(self, destinations: Sequence[str]) -> None:
        for name in destinations:
            running = self.runtime.destinations.get(name)
            if running is not None:
                running.notifier.notify()


_UNAVAILABLE = frozenset((502, 503, 504))
"""Statuses of a proxy in front of a server that is down; `check` shows them, but does not judge by them."""


def _probe(name: str, config: DestinationConfig, abort: Abort) -> Deferred | None:
    """Return why a destination would not take an archive; None if nothing keeps it from that."""
    result = probe(name, config, abort)
    if result.reason is None and result.http_status in _UNAVAILABLE:
        return Deferred(Reason.SERVER_ERROR, result.detail, result.http_status)
    if result.reason is None:
        return None
    return Deferred(result.reason, result.detail, result.http_status)


def _reached(places: Mapping[str, FolderPlace]) -> dict[str, FolderPlace]:
    return {name: place for name, place in places.items() if place.filesystem is not None}


def _is_same_drop(name: str, before: Config, after: Config) -> bool:
    old, new = before.drop.get(name), after.drop[name]
    return old == new and destinations_of(before, new) == destinations_of(after, new)


def _new_folder(table: DropConfig) -> DropFolder:
    """Return the folder of a drop; its intake opens and locks it."""
    return DropFolder(str(table.path), is_open=False, is_exclusive=True)


def destinations_of(config: Config, drop: DropConfig) -> tuple[str, ...]:
    """Return the names of the destinations of a drop's archives."""
    return tuple(config.destination) if drop.destinations is None else tuple(drop.destinations)
