"""Lines for people at a terminal: local time, level, event and sentence, and below it the hint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from backupd.core.names import printable
from backupd.telemetry.events import CATALOGUE, DAEMON_HEARTBEAT, DESTINATION_STATUS
from backupd.telemetry.message import render

_COLOURS = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_BOLD, _DIM, _RESET = "\x1b[1m", "\x1b[2m", "\x1b[0m"

_DATE_AND_TIME = "%Y-%m-%d %H:%M:%S %Z"

_IN_PLACE = frozenset(("timestamp", "level", "event", "message", "host", "hint", "exception"))
"""Keys that a line shows in a place of their own, or not at all."""

_WITHOUT_KEYS = frozenset((DAEMON_HEARTBEAT.name, DESTINATION_STATUS.name))
"""Events of which the sentence is enough, as they are logged every minute."""


def console_line(record: Mapping[str, Any], *, coloured: bool, with_keys: bool) -> str:
    """Return the line, or several of them if there is a hint or a stack trace; no value adds a line.

    `with_keys` adds the keys that the sentence does not have a place for.
    """
    event = CATALOGUE[record["event"]]
    times = {key: _local(record[key], _DATE_AND_TIME) for key in record if _is_time(key)}
    values = {**record, **times}
    time = _local(record["timestamp"], "%H:%M:%S %Z")
    level = _styled(f"{event.level:7}", _COLOURS[event.level], coloured)
    name = _styled(f"{event.name:20}", _BOLD, coloured)
    line = f"{time} {level} {name} {render(event.message, values)}"
    if with_keys and event.name not in _WITHOUT_KEYS:
        line += _styled("".join(f" {each}" for each in _keys(values)), _DIM, coloured)
    below = [f"hint: {printable(str(record['hint']))}"] if "hint" in record else []
    below += [f"| {printable(each)}" for each in str(record.get("exception", "")).splitlines()]
    return "\n".join((line, *(f"    {_styled(each, _DIM, coloured)}" for each in below)))


def _is_time(key: str) -> bool:
    return key == "until" or key.endswith("_at")


def _keys(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if key not in _IN_PLACE:
            yield f"{key}={_quoted(_in_words(value))}"


def _in_words(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case dict():
            return " ".join(f"{name}={_in_words(item)}" for name, item in value.items())
        case list():
            return ", ".join(map(_in_words, value))
    return str(value)


def _quoted(value: str) -> str:
    text = printable(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"' if not text or any(c in text for c in ' "=') else text


def _local(time: str, form: str) -> str:
    return f"{datetime.fromisoformat(time).astimezone():{form}}"


def _styled(text: str, style: str, coloured: bool) -> str:
    return f"{style}{text}{_RESET}" if coloured and text else text
