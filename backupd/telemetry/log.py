"""The log: each event becomes one line, in JSON, ECS or for the console, which a writer passes on."""

from __future__ import annotations

import enum
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from backupd.core.errors import LedgerError
from backupd.core.names import as_text
from backupd.core.units import machine_time
from backupd.telemetry.console import console_line
from backupd.telemetry.ecs import ecs_line
from backupd.telemetry.events import CATALOGUE, LEDGER_FAILED, LIBRARY_WARNING, LOG_LOST, Event
from backupd.telemetry.journal import JournalWriter, LineWriter
from backupd.telemetry.message import render

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


@dataclass(slots=True)
class _Repetition:
    """The lines of one cause since the last heartbeat: logged, left out, and the last that was left out."""

    logged: int = 0
    left_out: int = 0
    last: tuple[Event, Mapping[str, Any]] | None = None


class EventLog:
    """Logs events of the catalogue; safe for use by several threads.

    Of an event with a `limit`, further lines of the same cause are left out and counted, unless the level is
    `debug`. `log_left_out` logs the last of them, with their number.

    Values of the model become values of JSON: a file name in bytes becomes text, a duration becomes seconds,
    a key with None is left out. A file name cannot forge a line or a key, because all formats escape it.
    """

    def __init__(
        self,
        writer: LineWriter | JournalWriter,
        *,
        level: str = "info",
        log_format: str = "json",
        fixed_level: str = "",
    ) -> None:
        self._writer = writer
        self._fixed_level = fixed_level
        self._repetitions: dict[tuple[object, ...], _Repetition] = {}
        self._lock = threading.Lock()
        self._reported_lost = 0
        """Lost lines of which the log has the number."""
        self.listeners: list[Callable[[Event, Mapping[str, Any]], None]] = []
        """Called with each event and its values, whether it is logged or left out; they must not block."""
        self.configure(level, log_format)

    def configure(self, level: str, log_format: str) -> None:
        """Set the level and the format of further lines.

        The format `auto` is console on a terminal and JSON otherwise. `fixed_level` of the constructor has
        precedence over `level`.
        """
        level = self._fixed_level or level
        self._is_limited = level != "debug"
        self._logger = structlog.wrap_logger(
            self._writer,
            wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
            processors=[
                _CommonKeys(socket.gethostname()),
                structlog.processors.ExceptionRenderer(),
                _arguments_of_writer(_line_format(log_format, level, self._writer)),
            ],
        ).bind()  # binds once instead of for every line

    def emit(self, event: Event, *, exc_info: BaseException | None = None, **keys: object) -> None:
        """Log an event with some of its keys; never raises."""
        values = {key: _json_value(value) for key, value in keys.items() if value is not None}
        for listener in self.listeners:
            listener(event, values)
        if exc_info is not None:
            values["exc_info"] = exc_info  # rendered without the values of local variables
        if event.limit is None or self._is_within_limit(event, event.limit, values):
            self._write(event, values)

    @property
    def lost_lines(self) -> int:
        """Return the number of lines that could not be written."""
        return self._reported_lost + self._writer.lost

    def log_left_out(self) -> None:
        """Log one line for each cause of which lines were left out since the last call."""
        with self._lock:
            repetitions, self._repetitions = self._repetitions, {}
        for each in repetitions.values():
            if each.last is not None:
                event, values = each.last
                others = {"left_out": each.left_out - 1} if each.left_out > 1 else {}
                self._write(event, {**values, **others})

    def _is_within_limit(self, event: Event, limit: int, values: Mapping[str, Any]) -> bool:
        cause = (event.name, *(values.get(key) for key in event.cause))
        with self._lock:
            repetition = self._repetitions.setdefault(cause, _Repetition())
            if repetition.logged < limit or not self._is_limited:
                repetition.logged += 1
                return True
            repetition.left_out += 1
            repetition.last = event, values
            return False

    def _write(self, event: Event, values: Mapping[str, Any]) -> None:
        lost = self._writer.lost
        if lost:
            is_written = self._logger.error(LOG_LOST.name, lost_lines=lost)
            self._writer.subtract_lost(lost if is_written else 1)  # the writer counted this line as well
            self._reported_lost += lost if is_written else 0
        getattr(self._logger, event.level)(event.name, **values)


def log_ledger_failure(log: EventLog, error: LedgerError) -> None:
    """Log that the ledger failed."""
    log.emit(LEDGER_FAILED, error=error.message, hint=error.hint)


def log_library_warnings(log: EventLog) -> None:
    """Log warnings and errors of libraries as events.

    Lower levels are dropped: httpx logs whole URLs at INFO.
    """
    root = logging.getLogger()
    root.handlers = [_LibraryHandler(log)]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)


class _LibraryHandler(logging.Handler):
    """Logs records of Python's `logging` as events."""

    def __init__(self, log: EventLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # the arguments do not fit the format
            message = str(record.msg)
        self._log.emit(LIBRARY_WARNING, logger=record.name, error=message)


class _CommonKeys:
    """The processor that puts the keys of every line before those of the event."""

    def __init__(self, host: str) -> None:
        self._host = host

    def __call__(self, _logger: WrappedLogger, level: str, record: EventDict) -> EventDict:
        event = CATALOGUE[record.pop("event")]
        return {
            "timestamp": machine_time(datetime.now(UTC)),
            "level": level,
            "event": event.name,
            "message": render(event.message, record),
            "host": self._host,
            **record,
        }


def _arguments_of_writer(format_line: Callable[[EventDict], str]) -> Processor:
    """Return the processor that calls a writer with the line and its record."""

    def processor(_logger: WrappedLogger, _level: str, record: EventDict) -> tuple[Any, Any]:
        return (format_line(record), record), {}

    return processor


def _json_value(value: Any) -> Any:
    match value:
        case enum.Enum():
            return value.value
        case bytes():
            return as_text(value)
        case timedelta():
            return round(value.total_seconds(), 3)
        case float():
            return round(value, 3)
        case datetime():
            return machine_time(value, "seconds")
        case str() | int() | None:
            return value
        case dict():
            return {key: _json_value(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_json_value(item) for item in value]
        case _:
            return str(value)


_JSON = json.JSONEncoder(separators=(",", ":"))  # `json.dumps` would make an encoder for each line


def _line_format(
    log_format: str, level: str, writer: LineWriter | JournalWriter
) -> Callable[[EventDict], str]:
    """Return the function that makes a line of a record."""
    if log_format == "ecs":
        return lambda record: _JSON.encode(ecs_line(record))
    # the journal gets a sentence for people in any case
    is_console = log_format == "console" or (log_format == "auto" and writer.is_terminal)
    if isinstance(writer, JournalWriter) or not is_console:
        return _JSON.encode
    coloured = not os.environ.get("NO_COLOR") and (writer.is_terminal or bool(os.environ.get("FORCE_COLOR")))
    return partial(console_line, coloured=coloured, with_keys=level == "debug")
