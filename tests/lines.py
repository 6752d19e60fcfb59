"""Holds every line that a daemon logs against the catalogue's JSON Schema."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from backupd.telemetry.docs import of_event
from backupd.telemetry.events import CATALOGUE


def check_log(text: str) -> int:
    """Check the lines of a log and return how many there were; raises AssertionError at the first wrong one.

    What begins with no brace is what Python or a command printed beside the log; a last line that is not
    whole was cut off by the daemon's end.
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


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(of_event(CATALOGUE[name]))
