"""Files that are generated from the catalogue of events: a page, a JSON Schema and a format for lnav.

`python -m backupd.telemetry.docs` prints docs/events.md, with `--schema` docs/events.schema.json, and with
`--lnav` docs/monitoring/backupd.lnav.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from backupd.telemetry.events import CATALOGUE, COMMON_KEYS, KEYS, Event, JsonType, Key

SECTIONS = {
    "The daemon, its configuration and its host": ("daemon", "config", "clock", "library", "log"),
    "Metrics": ("metrics",),
    "Certificates": ("certificate",),
    "The ledger": ("ledger",),
    "Drop folders": ("drop", "watch", "disk"),
    "Archives": ("archive", "inspection", "disposition", "retention"),
    "Uploads and destinations": ("attempt", "delivery", "destination"),
    "Notifications, hooks and pings": ("notify", "hook", "ping"),
}
"""Sections of the page, each with the first words of its events."""

_INTRODUCTION = """\
# Events

backupd logs one JSON object per line to standard output. Each line is an event with a fixed name, such as
`archive.delivered`, and a key has the same type in every event. Alert on `event`, and read `message`:

```json
{"timestamp":"2026-03-04T05:06:07.123Z","level":"info","event":"archive.queued",\
"message":"core-1/running.cfg was queued for vault","host":"backup1","drop":"switches",\
"archive":"core-1/running.cfg","size_bytes":9012,"destinations":["vault"]}
```

Every line has %s. A key without a value is missing from
its line. The tables give the meaning of each event, the template of its message and its other keys. A part of
a template in square brackets is left out if its key is missing or 0. Messages have rounded durations and
sizes.

In the journal, an entry is the sentence, with the hint if there is one. Each key is a field, such as in
`journalctl BACKUPD_EVENT=archive.rejected BACKUPD_DESTINATION=vault`, and `BACKUPD_JSON` has the whole line:

```sh
journalctl -u backupd -o cat --output-fields=BACKUPD_JSON | jq -c 'select(.level == "error")'
```

This page, the [JSON Schema](events.schema.json) of every line and the
[format for lnav](monitoring/backupd.lnav.json) are generated from the program's catalogue:
`python -m backupd.telemetry.docs`, with `--schema` or `--lnav`.
[monitoring](monitoring/README.md) has metrics, alerts and a dashboard.
"""


def events_page() -> str:
    """Return `docs/events.md`."""
    lines = [_INTRODUCTION % ", ".join(f"`{name}`" for name in COMMON_KEYS)]
    for title, prefixes in SECTIONS.items():
        lines += [f"## {title}", "", "| event | level | meaning, message, keys |", "|---|---|---|"]
        lines += [_event_row(event) for event in CATALOGUE.values() if _first_word(event) in prefixes]
        lines.append("")
    lines += ["## Keys", "", "| key | type | meaning |", "|---|---|---|"]
    lines += [f"| `{key.name}` | {_type_in_words(key.type)} | {key.meaning} |" for key in KEYS.values()]
    return "\n".join(lines) + "\n"


def events_schema() -> str:
    """Return `docs/events.schema.json`."""
    return json.dumps(log_schema(), indent=2) + "\n"


def lnav_format() -> str:
    """Return `docs/monitoring/backupd.lnav.json`; see https://docs.lnav.org/en/latest/formats.html."""
    log_format = {
        "title": "backupd",
        "description": "The log of backupd, one JSON object per line",
        "json": True,
        "hide-extra": True,
        "file-pattern": ".*",
        "timestamp-field": "timestamp",
        "level-field": "level",
        "body-field": "message",
        "opid-field": "delivery_id",
        "level": {level: level for level in ("error", "warning", "info", "debug")},
        "line-format": [
            {"field": "__timestamp__"},
            " ",
            {"field": "level", "min-width": 7},
            " ",
            {"field": "event", "min-width": 20},
            " ",
            {"field": "message"},
        ],
        "value": dict(_lnav_columns()),
    }
    document = {"$schema": "https://lnav.org/schemas/format-v1.schema.json", "backupd_log": log_format}
    return json.dumps(document, indent=2) + "\n"


def log_schema() -> dict[str, object]:
    """Return the JSON Schema of a line, which is that of one of the events."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of backupd's log",
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in CATALOGUE],
        "$defs": {name: event_schema(event) for name, event in CATALOGUE.items()},
    }


def event_schema(event: Event) -> dict[str, object]:
    """Return the JSON Schema of an event's lines."""
    fixed: dict[str, dict[str, object]] = {"level": {"const": event.level}, "event": {"const": event.name}}
    properties = {name: fixed.get(name) or _key_schema(KEYS[name]) for name in (*COMMON_KEYS, *event.keys)}
    return {
        "description": event.meaning,
        "type": "object",
        "properties": properties,
        "required": list(COMMON_KEYS),
        "additionalProperties": False,
    }


def _key_schema(key: Key) -> dict[str, object]:
    return {"description": key.meaning, **key.type}


def _first_word(event: Event) -> str:
    return event.name.partition(".")[0]


def _event_row(event: Event) -> str:
    keys = " ".join(f"`{key}`" for key in event.keys)
    return f"| `{event.name}` | {event.level} | {event.meaning}<br>*{event.message}*<br>{keys} |"


def _type_in_words(json_type: JsonType) -> str:
    if "enum" in json_type:
        return "string"
    if "items" in json_type:
        return f"array of {json_type['items']['type']}s"
    if "additionalProperties" in json_type:
        return f"object of {_type_in_words(json_type['additionalProperties'])}s"
    return str(json_type["type"])


_LNAV_KINDS = {"string": "string", "integer": "integer", "number": "float", "boolean": "boolean"}
"""Kinds of lnav's columns by JSON type; arrays and objects are `json`."""

_LNAV_IDENTIFIERS = frozenset(
    ("event", "host", "archive", "device", "destination", "delivery_id", "reason", "circuit", "thread")
)
"""Keys for which lnav shows each value in its own colour."""

_LNAV_SHOWN = frozenset(("hint", "exception"))
"""Keys that lnav shows below the message; in its SQL table all keys are columns."""

_LNAV_WITHOUT_COLUMN = frozenset(("timestamp", "level", "message", "drop"))
"""Keys that lnav has in columns of its own, and `drop`, which is a keyword of SQL."""


def _lnav_columns() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the name and the definition of each column."""
    for key in KEYS.values():
        if key.name in _LNAV_WITHOUT_COLUMN:
            continue
        kind = "string" if "enum" in key.type else _LNAV_KINDS.get(key.type["type"], "json")
        column: dict[str, object] = {"kind": kind, "description": key.meaning}
        if key.name in _LNAV_IDENTIFIERS:
            column["identifier"] = True
        if key.name not in _LNAV_SHOWN:
            column["hidden"] = True
        yield key.name, column


_OUTPUTS = {(): events_page, ("--schema",): events_schema, ("--lnav",): lnav_format}

if __name__ == "__main__":
    _output = _OUTPUTS.get(tuple(sys.argv[1:]))
    if _output is None:
        sys.exit("usage: python -m backupd.telemetry.docs [--schema | --lnav]")
    sys.stdout.write(_output())
