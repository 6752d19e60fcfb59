"""The pages that are made from the catalogue of events."""

from __future__ import annotations

import json
import sys

from backupd.telemetry.events import CATALOGUE, KEYS, Event

_Type = dict[str, object]

_TEXT: _Type = {"type": "string"}
_COUNT: _Type = {"type": "integer", "minimum": 0}
_INTEGER: _Type = {"type": "integer"}
_SECONDS: _Type = {"type": "number"}
_FLAG: _Type = {"type": "boolean"}
_TIME: _Type = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"}
_NAMES: _Type = {"type": "array", "items": _TEXT}
_GATE: _Type = {"enum": ["open", "paused", "probing"]}


def _each(one: _Type) -> _Type:
    """Return the type of what is said for each destination."""
    return {"type": "object", "additionalProperties": one}


_KEYS_OF: tuple[tuple[_Type, str], ...] = (
    (_TIME, "timestamp retry_at expires_at last_at"),
    (_NAMES, "destinations drops_changed destinations_changed"),
    (_FLAG, "verified clean"),
    (
        _SECONDS,
        (
            "duration_s paused_for_s down_for_s oldest_s uptime_s silent_s step_s overdue_s archives_per_s"
            " change"
        ),
    ),
    (_each(_SECONDS), "oldest_each"),
    (_each(_GATE), "gates"),
    (_GATE, "gate"),
    (_INTEGER, "days_left"),
    (
        _COUNT,
        (
            "pid size attempt sent http_status faults pending pending_bytes found candidates released"
            " undisposed in_flight delivered delivered_bytes rejected lost rate quarantined overdue blind"
            " memory_bytes open_files open_files_most median_size free_bytes min_free_bytes restored unknown"
        ),
    ),
    (
        _TEXT,
        (
            "level event version config drop path observer filesystem archive digest destination delivery_id"
            " reason error hint exception moved_to disposition signal logger thread whose device"
        ),
    ),
)
TYPES = {key: kind for kind, keys in _KEYS_OF for key in keys.split()}
"""The type of each key's value."""

_OTHERWISE = {
    ("daemon.heartbeat", "pending"): _each(_COUNT),
    ("daemon.heartbeat", "days_left"): _each(_INTEGER),
}
"""Keys whose value is of another type in one event."""


def schema() -> dict[str, object]:
    """Return the schema of a line: that of one of the events."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of backupd's log",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in CATALOGUE],
        "$defs": {name: of_event(event) for name, event in CATALOGUE.items()},
    }


def of_event(event: Event) -> dict[str, object]:
    """Return the schema of an event's lines."""
    always: dict[str, object] = {
        "timestamp": _described("timestamp", TYPES["timestamp"]),
        "level": {"const": event.level},
        "event": {"const": event.name},
    }
    keys = {key: _described(key, _OTHERWISE.get((event.name, key)) or TYPES[key]) for key in event.keys}
    return {
        "description": event.meaning,
        "type": "object",
        "properties": always | keys,
        "required": list(always),
        "additionalProperties": False,
    }


def _described(key: str, kind: _Type) -> _Type:
    return {"description": KEYS[key], **kind}


def events_page() -> str:
    """Return `docs/events.md`."""
    lines = [
        "# Events",
        "",
        "One JSON object a line on standard output. This page is made from the program's own catalogue",
        "(`python -m backupd.telemetry.docs`), and so is the [JSON Schema](events.schema.json) of every line",
        "(`python -m backupd.telemetry.docs --schema`).",
        "",
        "Every line has `timestamp`, `level` and `event`.",
        "",
        "| event | level | meaning | keys |",
        "|---|---|---|---|",
    ]
    for event in CATALOGUE.values():
        keys = ", ".join(f"`{key}`" for key in event.keys)
        lines.append(f"| `{event.name}` | {event.level} | {event.meaning} | {keys} |")
    lines += ["", "## Keys", "", "| key | meaning |", "|---|---|"]
    lines += [f"| `{key}` | {meaning} |" for key, meaning in KEYS.items()]
    return "\n".join(lines) + "\n"


def events_schema() -> str:
    """Return `docs/events.schema.json`."""
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(events_schema() if "--schema" in sys.argv else events_page())
