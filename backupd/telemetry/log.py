"""Structured logging: one event a line, to a descriptor or the journal."""

from __future__ import annotations

import enum
import json
import logging
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from backupd.core.names import as_text, printable
from backupd.telemetry.events import CATALOGUE, LIBRARY_WARNING, LOG_LOST, Event
from backupd.telemetry.journal import JournalWriter, LineWriter

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class EventLog:
    """Logs events of the catalogue.

    Keys hold values of the model and are made plain here: bytes are file names, durations become
    seconds, None is left out. A name can't forge a line: JSON and the console renderer escape it.
    """

    def __init__(
        self, writer: LineWriter | JournalWriter, *, level: str = "info", console: bool = False
    ) -> None:
        self._writer = writer
        self._logger = structlog.wrap_logger(
            writer,
            wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
            processors=[
                _Header(socket.gethostname()),
                structlog.processors.ExceptionRenderer(),
                _with_its_record(_console if console else _as_json),
            ],
        ).bind()  # once, and not for each line

    def emit(self, event: Event, *, exc_info: BaseException | None = None, **keys: object) -> None:
        """Log an event with some of its keys."""
        lost = self._writer.lost
        if lost:
            told = self._logger.error(LOG_LOST.name, lost_lines=lost)
            self._writer.forget(lost if told else 1)
        plain = {key: _plain(value) for key, value in keys.items() if value is not None}
        if exc_info is not None:
            plain["exc_info"] = exc_info  # rendered without the values of local variables
        getattr(self._logger, event.level)(event.name, **plain)


def take_over_library_loggers(log: EventLog) -> None:
    """Send what libraries log at WARNING and above through the event log.

    Below that httpx writes whole URLs, and watchdog a line for each file.
    """
    root = logging.getLogger()
    root.handlers = [_LibraryHandler(log)]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)


class _LibraryHandler(logging.Handler):
    def __init__(self, log: EventLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # its arguments don't fit
            message = str(record.msg)
        self._log.emit(LIBRARY_WARNING, logger=record.name, error=message)


_JSON = json.JSONEncoder(separators=(",", ":"))


def _as_json(record: EventDict) -> str:
    return _JSON.encode(record)  # made once: `json.dumps` makes one for each line


def _with_its_record(render: Callable[[EventDict], str]) -> Processor:
    """Return the processor that hands a writer the line and what it shows."""

    def processor(_logger: WrappedLogger, _level: str, record: EventDict) -> tuple[Any, Any]:
        return (render(record), record), {}

    return processor


class _Header:
    """The processor that puts the keys of every line in front of those of the event."""

    def __init__(self, host: str) -> None:
        self._host = host

    def __call__(self, _logger: WrappedLogger, level: str, record: EventDict) -> EventDict:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        event = CATALOGUE[record.pop("event")]
        message = event.sentence(record)
        return {
            "timestamp": now,
            "level": level,
            "event": event.name,
            "message": message,
            "host": self._host,
            **record,
        }


def _plain(value: Any) -> Any:
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
            return value.isoformat(timespec="seconds").replace("+00:00", "Z")
        case str() | int() | None:
            return value
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case _:
            return str(value)


_COLOURS = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_NOT_SHOWN = {"timestamp", "level", "event", "message", "host", "exception"}


def _console(record: EventDict) -> str:
    keys = {key: value for key, value in record.items() if key not in _NOT_SHOWN}
    clock, event, level = record["timestamp"][11:23], record["event"], record["level"]
    shown = " ".join(f"{key}={_quoted(value)}" for key, value in keys.items())
    message = printable(record["message"])
    line = f"{clock} {_COLOURS[level]}{level:7}\x1b[0m \x1b[1m{event}\x1b[0m {message} {shown}"
    return "\n    | ".join((line, *map(printable, str(record.get("exception", "")).splitlines())))


def _quoted(value: object) -> str:
    text = printable(str(value)).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"' if not text or any(c in text for c in ' "=') else text
