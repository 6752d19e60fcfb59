"""Plugs the concrete parts together; the only module that knows which they are."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backupd.config.destination import DestinationConfig
from backupd.config.models import Config, DropConfig
from backupd.core.errors import ConfigError
from backupd.core.retry import Backoff
from backupd.core.step import Patience, Priority
from backupd.daemon import Daemon, Parts
from backupd.delivery.disposal import Disposal, Rule
from backupd.delivery.gate import SharedGate
from backupd.delivery.recorder import Recorder
from backupd.delivery.wakeup import Wakeup
from backupd.delivery.worker import Lane, Source, Worker
from backupd.drop.folder import DropFolder
from backupd.intake.intake import Intake
from backupd.ledger.database import StateLock, open_ledger
from backupd.ledger.port import Ledger
from backupd.ledger.sqlite import SqliteLedger
from backupd.ops import events
from backupd.ops.log import EventLog
from backupd.upload.endpoint import open_endpoint
from backupd.upload.http import HttpUploader
from backupd.upload.line import Abort
from backupd.upload.port import Uploader

if TYPE_CHECKING:
    from backupd.upload.probe import Probe


def run_daemon(config: Config, log: EventLog, config_path: Path) -> int:
    """Run the daemon on a checked configuration; return its exit code."""
    with StateLock(config.state_dir) as lock:
        opened = open_ledger(config.state_dir, check=not lock.was_clean)
        if opened.set_aside is not None:
            log.emit(
                events.LEDGER_REPLACED,
                path=str(opened.set_aside),
                error="the ledger was damaged and has been put aside",
                hint="pending archives are found again in the drop folders; the history is in that file",
            )
        parts = assemble(config, SqliteLedger(opened.connection), log)
        daemon = Daemon(
            parts, log, shutdown_grace=config.shutdown_grace, heartbeat_every=config.heartbeat_every
        )
        return daemon.run(str(config.state_dir), str(config_path))


def assemble(config: Config, ledger: Ledger, log: EventLog) -> Parts:
    """Return all parts of a daemon for a configuration."""
    abort = Abort()
    folders = {name: open_folder(name, drop) for name, drop in config.drop.items()}
    wakeups = {name: Wakeup() for name in config.destination}
    gates = {
        name: SharedGate(name, _backoff(destination), log, wakeups[name], ledger)
        for name, destination in config.destination.items()
    }
    intakes: dict[str, Intake] = {}

    def look_again(drop: str, relpath: bytes) -> None:
        if drop in intakes:
            intakes[drop].look_again(relpath)

    recorder = Recorder(ledger, Disposal(_rules(config, folders), log), log, look_again)
    sources = {name: _source(drop, folders[name]) for name, drop in config.drop.items()}
    workers = []
    for name, destination in config.destination.items():
        patience = Patience(_backoff(destination), destination.retry.give_up_after)
        priority = Priority(destination.priority)
        lane = Lane(name, ledger, gates[name], patience, priority, wakeups[name], sources, log)
        endpoint = open_endpoint(destination, abort)
        workers += [Worker(lane, HttpUploader(endpoint), recorder.put) for _ in range(destination.workers)]

    def wake(destinations: Sequence[str]) -> None:
        for name in destinations:
            wakeups[name].ring()

    for name, drop in config.drop.items():
        targets = destinations_of(config, drop)
        intakes[name] = Intake(name, drop, targets, folders[name], ledger, log, wake, recorder.look)
    return Parts(ledger, list(intakes.values()), workers, gates, wakeups, recorder, abort.set)


def make_uploader(destination: DestinationConfig, abort: Abort) -> Uploader:
    """Return a new uploader for a destination."""
    return HttpUploader.alone(destination, abort)


def probe_all(config: Config) -> list[Probe]:
    """Ask every destination whether it would take an archive."""
    from backupd.upload.probe import probe_all as ask  # noqa: PLC0415 -- the daemon needs no asyncio

    return ask(config.destination)


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


def _source(drop: DropConfig, folder: DropFolder) -> Source:
    return Source(folder, re.compile(drop.label_pattern) if drop.label_pattern else None)


def _rules(config: Config, folders: dict[str, DropFolder]) -> dict[str, Rule]:
    return {
        name: Rule(
            folders[name],
            drop.on_delivered,
            os.fsencode(drop.sent_dir.strip("/")),
            os.fsencode(drop.rejected_dir.strip("/")),
            checksums=drop.checksum_file != "off",
        )
        for name, drop in config.drop.items()
    }
