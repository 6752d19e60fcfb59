"""Compares every line that a daemon logs with the catalogue of events."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from backupd.telemetry.docs import event_schema
from backupd.telemetry.events import CATALOGUE, KEYS, JsonType
from backupd.telemetry.message import required_keys


def check_log(text: str) -> int:
    """Check the lines of a log and return their number; raise AssertionError at the first wrong one.

    Lines that do not start with a brace were printed by Python or by a command. A last line without a line
    end was cut off when the daemon was killed.
    """
    count = 0
    for line in text.splitlines(keepends=True):
        if line.startswith("{") and line.endswith("\n"):
            check_line(json.loads(line))
            count += 1
    return count


def check_line(line: dict[str, Any]) -> None:
    """Check one line."""
    assert line.get("event") in CATALOGUE, f"no event of the catalogue: {line}"
    faults = [f"{list(fault.path)}: {fault.message}" for fault in _validator(line["event"]).iter_errors(line)]
    assert not faults, f"{line['event']}: {'; '.join(faults)}"
    mixed = [key for key, value in line.items() if not _has_notation(value, KEYS[key].type)]
    assert not mixed, f"{line['event']}: integers and other numbers in one key: {mixed}: {line}"
    missing = required_keys(CATALOGUE[line["event"]].message) - set(line)
    assert not missing, f"{line['event']}: its message needs {missing}: {line}"
    assert line["message"].isprintable(), f"{line['event']}: more than one line: {line}"


def _has_notation(value: Any, json_type: JsonType) -> bool:
    """Return whether numbers have a decimal point just where their type is not integer.

    A typed store takes the type of a key from its first line, and JSON Schema accepts both.
    """
    match json_type:
        case {"type": "number"}:
            return isinstance(value, float)
        case {"type": "integer"}:
            return isinstance(value, int)
        case {"additionalProperties": inner}:
            return all(_has_notation(each, inner) for each in value.values())
    return True


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(event_schema(CATALOGUE[name]))
