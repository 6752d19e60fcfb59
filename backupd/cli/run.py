"""`backupd run`: the daemon, in the foreground."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, get_args

import typer

from backupd.cli.options import DEFAULT_CONFIG, ConfigPath
from backupd.config.files import examine_files
from backupd.config.load import load
from backupd.config.models import Config, LogLevel
from backupd.config.types import parse_duration
from backupd.core.errors import BackupdError, ConfigError, UsageError
from backupd.core.names import printable
from backupd.daemon.assembly import run_daemon
from backupd.daemon.hook_runner import unknown_events
from backupd.telemetry import events
from backupd.telemetry.journal import writer_for
from backupd.telemetry.log import EventLog, log_library_warnings


def run(
    config: ConfigPath = DEFAULT_CONFIG,
    log_level: Annotated[
        str, typer.Option(metavar="LEVEL", help="Overrides `log.level`: debug, info, warning or error.")
    ] = "",
    once: Annotated[
        bool,
        typer.Option("--once", help="Deliver what waits, and end; for cron. The exit code is the result."),
    ] = False,
    timeout: Annotated[
        str, typer.Option(metavar="TIME", help='With --once: end after this time, such as "10m".')
    ] = "1h",
) -> None:
    """Run the daemon in the foreground; it logs to standard output and ends on SIGTERM or Ctrl-C (SIGINT).

    It waits for uploads in progress, for `shutdown_grace` at most. Ctrl-C then ends it at once: it exits with
    75, the deliveries stay pending, and the next start sends them.

    With --once, for cron, it ends once every finished file is delivered, rejected or deferred. It waits for
    `stable_for`, but neither for files that are being written nor for a paused destination. It exits with 0
    if nothing waits, 3 if an archive was rejected, 69 if a destination with pending deliveries is
    unavailable, 75 if anything else is pending.
    """
    path = Path(config).absolute()
    levels = get_args(LogLevel)
    log = EventLog(
        writer_for(1),
        log_format=os.environ.get("BACKUPD_LOG__FORMAT") or "auto",  # until the configuration is known
        fixed_level=log_level if log_level in levels else "",
    )
    try:
        if log_level and log_level not in levels:
            raise UsageError(f"--log-level: expected one of {', '.join(levels)}, got {log_level!r}")
        once_timeout = _parse_timeout(timeout) if once else None
        loaded = load(config)
        log.configure(loaded.log.level, loaded.log.format)
        code = _start(loaded, log, path, once_timeout)
    except BackupdError as error:
        _log_failed_start(log, path, error.message, error.hint)
        if _shares_output() and not sys.stdout.isatty():
            raise typer.Exit(error.exit_code) from error
        raise
    except (OSError, MemoryError) as error:
        _log_failed_start(log, path, str(error) or "no memory is left")
        raise
    raise typer.Exit(code)


def _parse_timeout(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--timeout: {error}, got {text!r}") from error


def _start(loaded: Config, log: EventLog, path: Path, once_timeout: timedelta | None) -> int:
    """Check the files of a configuration and run the daemon; return its exit code."""
    report = examine_files(loaded, datetime.now(UTC))
    if report.fatal:
        raise ConfigError(
            "\n".join((f"{path} can't be run:", *map(str, report.fatal))),
            "fix these; `backupd check` tests the destinations, too",
        )
    log_library_warnings(log)
    for problem in (*report.problems, *unknown_events(loaded)):
        log.emit(events.CONFIG_WARNING, path=problem.where, error=problem.message, hint=problem.hint)
    return run_daemon(
        loaded,
        log,
        path,
        report,
        lambda: examine_files(load(path), datetime.now(UTC)),
        _print_on_terminal,
        once_timeout,
    )


def _print_on_terminal(line: str) -> None:
    """Print a line to standard error if that is a terminal, in place of the `^C` on it."""
    with suppress(OSError, ValueError):  # the terminal may be gone
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{printable(line)}\n")
            sys.stderr.flush()


def _log_failed_start(log: EventLog, path: Path, error: str, hint: str = "") -> None:
    """Log why the daemon does not start, except on a terminal that shows the text of the error as well."""
    if not (_shares_output() and sys.stdout.isatty()):
        log.emit(events.DAEMON_START_FAILED, config=str(path), error=error, hint=hint or None)


def _shares_output() -> bool:
    """Return whether standard output and standard error are the same file, terminal or journal."""
    return os.path.sameopenfile(1, 2)
