"""Plugs the concrete parts together; the only module that knows which they are."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from backupd.config.files import ExamineFiles, FilesReport
from backupd.config.models import Config, DestinationConfig, DropConfig
from backupd.core.backoff import Backoff
from backupd.core.errors import ConfigError
from backupd.core.retention_policy import RetentionPolicy
from backupd.core.transition import Priority, RetryPolicy
from backupd.daemon.certificates import Certificates
from backupd.daemon.daemon import Daemon
from backupd.daemon.housekeeping import HostClock, Housekeeping
from backupd.daemon.runtime import ReloadDiff, RunningDestination, RunningDrop, Runtime
from backupd.delivery.circuit_breaker import CircuitBreaker, Notifier
from backupd.delivery.disposition import Disposition, DispositionRule
from backupd.delivery.recorder import Recorder
from backupd.delivery.restoring import HistoryRestorer
from backupd.delivery.retention import Retention, SentFolder, SentFolders
from backupd.delivery.worker import DestinationQueue, DropSource, Worker
from backupd.dropfolder.folder import DropFolder
from backupd.intake.device_tracker import DeviceTracker
from backupd.intake.intake import Intake
from backupd.ledger.port import Ledger
from backupd.ledger.sqlite.connection import StateLock, open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.ledger.sqlite.sent_rows import open_sent_index
from backupd.telemetry import events
from backupd.telemetry.log import EventLog
from backupd.upload.base import Uploader
from backupd.upload.http.limits import Abort
from backupd.upload.http.uploader import HttpUploader, open_endpoint


def run_daemon(
    config: Config, log: EventLog, config_path: Path, found: FilesReport, examine: ExamineFiles
) -> int:
    """Run the daemon on a configuration, and what its examination found; return its exit code."""
    with StateLock(config.state_dir) as lock:
        opened = open_ledger(config.state_dir, check=lock.check, hopeless=lock.is_hopeless)
        if opened.set_aside is not None:
            log.emit(
                events.LEDGER_RECREATED,
                path=str(opened.set_aside),
                error="the ledger was damaged and has been put aside",
                hint="what is pending is found again in the drop folders, what was put away by its records",
            )
        elif opened.is_new and not lock.is_first:
            log.emit(
                events.LEDGER_RECREATED,
                path=str(config.state_dir),
                error="the ledger is gone, and a new one was begun",
                hint="what is pending is found again in the drop folders; find out who removed the file",
            )
        assembly = Assembly(config, SqliteLedger(opened.connection), log)
        certificates = Certificates(assembly.runtime, log, examine, found)
        upkeep = Housekeeping(assembly.runtime, log, assembly.device_tracker, assembly.clock)
        daemon = Daemon(assembly.runtime, log, config_path, examine, assembly.change_to, certificates, upkeep)
        code = daemon.run()
        lock.ended_well, lock.damage = code == 0, daemon.damage
        return code


class Assembly:
    """Makes the parts of a daemon for a configuration, and changes them for another."""

    def __init__(self, config: Config, ledger: Ledger, log: EventLog) -> None:
        self._log = log
        self._ledger = ledger
        self._abort = Abort()
        self._folders = {name: open_folder(name, drop) for name, drop in config.drop.items()}
        self._rules = _rules(config, self._folders)
        self._sources = {name: _source(drop, self._folders[name]) for name, drop in config.drop.items()}
        self.clock = HostClock(ledger.last_clock_reading())
        self.device_tracker = DeviceTracker(ledger, log)
        self.device_tracker.configure(config.drop, datetime.now(UTC))
        disposal = Disposition(self._rules, log)
        recorder = Recorder(ledger, disposal, log, self._look_again)
        keeper = Retention(
            lambda: open_sent_index(config.state_dir),
            self._stocks,
            log,
            self.clock.trusted_now,
            self._is_known,
        )
        restorer = HistoryRestorer(
            lambda: open_sent_index(config.state_dir),
            self._rules,
            self.device_tracker.device_of,
            lambda: self.clock.trusted_now() - self.runtime.config.keep_history_for,
            self._doubt_since,
            log,
        )
        self.runtime = Runtime(config, ledger, {}, {}, recorder, self._abort.set, keeper, restorer)
        self.runtime.destinations |= {n: self._destination(n, d) for n, d in config.destination.items()}
        self.runtime.drops |= {n: self._drop(n, d, config) for n, d in config.drop.items()}

    def change_to(self, config: Config) -> ReloadDiff:
        """Have the parts be those for another configuration; what is the same goes on as it is.

        Raises ConfigError or LedgerError, and changes nothing, where a folder can't be opened or the ledger
        not be written. What ended is still to be stopped, and what is new to be started.
        """
        before = self.runtime.config
        drops = {n: d for n, d in config.drop.items() if not _is_same_drop(n, before, config)}
        destinations = {n: d for n, d in config.destination.items() if before.destination.get(n) != d}
        folders = {n: open_folder(n, d) for n, d in drops.items() if not self._has_folder(n, d)}
        self.device_tracker.configure(config.drop, datetime.now(UTC))
        self._folders |= folders  # one that was replaced stays open: its archives may be under way
        self._rules |= _rules(config, self._folders)
        self._sources |= {n: _source(d, self._folders[n]) for n, d in drops.items()}
        parts = self.runtime
        parts.config = config
        drops_ended = {n: parts.drops.pop(n) for n in [*parts.drops] if n in drops or n not in config.drop}
        gone = [n for n in parts.destinations if n in destinations or n not in config.destination]
        destinations_ended = {n: parts.destinations.pop(n) for n in gone}
        destinations_begun = {n: self._destination(n, d) for n, d in destinations.items()}
        parts.destinations |= destinations_begun
        drops_begun = {n: self._drop(n, d, config) for n, d in drops.items()}
        parts.drops |= drops_begun
        return ReloadDiff(drops_ended, drops_begun, destinations_ended, destinations_begun)

    def _has_folder(self, name: str, drop: DropConfig) -> bool:
        return name in self._folders and self._folders[name].path == str(drop.path)

    def _drop(self, name: str, drop: DropConfig, config: Config) -> RunningDrop:
        targets, folder = destinations_of(config, drop), self._folders[name]
        settled = self.runtime.recorder.recheck_dispositions
        ledger, log = self._ledger, self._log
        return RunningDrop(
            Intake(name, drop, targets, folder, ledger, log, self._wake, settled, self.device_tracker)
        )

    def _destination(self, name: str, config: DestinationConfig) -> RunningDestination:
        wakeup, backoff = Notifier(), _backoff(config)
        gate = CircuitBreaker(name, backoff, self._log, wakeup, self._ledger)
        patience = RetryPolicy(backoff, config.retry.give_up_after)
        priority = Priority(config.priority)
        lane = DestinationQueue(
            name, self._ledger, gate, patience, priority, wakeup, self._sources, self._log
        )
        endpoint, put = open_endpoint(config, self._abort), self.runtime.recorder.submit
        workers = tuple(Worker(lane, HttpUploader(endpoint), put) for _ in range(config.workers))
        return RunningDestination(lane, workers, gate, wakeup, endpoint.tls_context)

    def _stocks(self) -> SentFolders:
        config = self.runtime.config
        return SentFolders(
            {name: _stock(drop, self._folders[name]) for name, drop in config.drop.items()},
            config.heartbeat_every,
        )

    def _doubt_since(self, last: datetime) -> None:
        if self.clock.distrust_since(last):
            self._ledger.save_clock_reading(self.clock.reading(), patience=5.0)  # before it is looked at

    def _look_again(self, drop: str, relpath: bytes) -> None:
        part = self.runtime.drops.get(drop)
        if part is not None:
            part.intake.recheck(relpath)

    def _is_known(self, drop: str) -> bool:
        return self.runtime.restorer.has_scanned(drop)

    def _wake(self, destinations: Sequence[str]) -> None:
        for name in destinations:
            part = self.runtime.destinations.get(name)
            if part is not None:
                part.notifier.notify()


def _is_same_drop(name: str, before: Config, after: Config) -> bool:
    old, new = before.drop.get(name), after.drop[name]
    return old == new and destinations_of(before, new) == destinations_of(after, new)


def make_uploader(destination: DestinationConfig, abort: Abort) -> Uploader:
    """Return a new uploader for a destination."""
    return HttpUploader.standalone(destination, abort)


def destinations_of(config: Config, drop: DropConfig) -> tuple[str, ...]:
    """Return the names of the destinations that a drop's archives go to."""
    return tuple(config.destination) if drop.destinations is None else tuple(drop.destinations)


def open_folder(name: str, drop: DropConfig) -> DropFolder:
    """Return a drop folder, held open; raises ConfigError where it can't be."""
    try:
        return DropFolder(str(drop.path))
    except OSError as error:
        raise ConfigError(
            f"drop.{name}.path: {drop.path} can't be opened ({error.strerror})",
            "make the folder, readable and writable for the daemon's user",
        ) from error


def _backoff(destination: DestinationConfig) -> Backoff:
    return Backoff(destination.retry.initial, destination.retry.max)


def _source(drop: DropConfig, folder: DropFolder) -> DropSource:
    return DropSource(folder, re.compile(drop.label_pattern) if drop.label_pattern else None)


def _stock(drop: DropConfig, folder: DropFolder) -> SentFolder:
    order = RetentionPolicy(drop.keep_sent_for, drop.keep_sent_last, drop.min_free)
    pattern = re.compile(drop.label_pattern) if drop.label_pattern else None
    checksums = drop.checksum_file != "off"
    return SentFolder(folder, os.fsencode(drop.sent_dir.strip("/")), order, pattern, checksums)


def _rules(config: Config, folders: dict[str, DropFolder]) -> dict[str, DispositionRule]:
    return {
        name: DispositionRule(
            folders[name],
            drop.on_delivered,
            os.fsencode(drop.sent_dir.strip("/")),
            os.fsencode(drop.rejected_dir.strip("/")),
            checksums=drop.checksum_file != "off",
        )
        for name, drop in config.drop.items()
    }
