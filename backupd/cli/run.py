"""`backupd run`: the daemon, in the foreground."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, get_args

import typer

from backupd.cli.options import DEFAULT_CONFIG, ConfigPath
from backupd.config.files import examine_files
from backupd.config.load import load
from backupd.config.models import LogLevel
from backupd.core.errors import ConfigError, UsageError
from backupd.daemon.assembly import run_daemon
from backupd.telemetry import events
from backupd.telemetry.journal import writer_for
from backupd.telemetry.log import EventLog, log_library_warnings


def run(
    config: ConfigPath = DEFAULT_CONFIG,
    log_level: Annotated[
        str, typer.Option(metavar="LEVEL", help="Overrides `log.level`: debug, info, warning or error.")
    ] = "",
) -> None:
    """Run the daemon in the foreground; it logs to standard output and ends on SIGTERM or SIGINT."""
    levels = get_args(LogLevel)
    if log_level and log_level not in levels:
        raise UsageError(f"--log-level: expected one of {', '.join(levels)}, got {log_level!r}")
    loaded = load(config)
    report = examine_files(loaded, datetime.now(UTC))
    if report.fatal:
        raise ConfigError(
            "\n".join((f"{config} can't be run:", *map(str, report.fatal))),
            "fix these; `backupd check` tests the destinations, too",
        )
    log = EventLog(writer_for(1), level=loaded.log.level, log_format=loaded.log.format, fixed_level=log_level)
    log_library_warnings(log)
    for problem in report.problems:
        log.emit(events.CONFIG_WARNING, path=problem.where, error=problem.message, hint=problem.hint)
    path = Path(config).absolute()
    raise typer.Exit(
        run_daemon(loaded, log, path, report, lambda: examine_files(load(path), datetime.now(UTC)))
    )
