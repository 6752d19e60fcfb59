"""The pages that are made from the catalogue of events."""

from __future__ import annotations

import json
import sys

from backupd.telemetry.events import ALWAYS, CATALOGUE, KEYS, Event, Key


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
    fixed: dict[str, dict[str, object]] = {"level": {"const": event.level}, "event": {"const": event.name}}
    properties = {name: fixed.get(name) or _described(KEYS[name]) for name in (*ALWAYS, *event.keys)}
    return {
        "description": event.meaning,
        "type": "object",
        "properties": properties,
        "required": list(ALWAYS),
        "additionalProperties": False,
    }


def _described(key: Key) -> dict[str, object]:
    return {"description": key.meaning, **key.type}


def events_page() -> str:
    """Return `docs/events.md`."""
    lines = [
        "# Events",
        "",
        "One JSON object a line on standard output. This page is made from the program's own catalogue",
        "(`python -m backupd.telemetry.docs`), and so is the [JSON Schema](events.schema.json) of every line",
        "(`python -m backupd.telemetry.docs --schema`).",
        "",
        f"Every line has {', '.join(f'`{name}`' for name in ALWAYS)}.",
        "",
        "| event | level | meaning | keys |",
        "|---|---|---|---|",
    ]
    for event in CATALOGUE.values():
        keys = ", ".join(f"`{key}`" for key in event.keys)
        lines.append(f"| `{event.name}` | {event.level} | {event.meaning} | {keys} |")
    lines += ["", "## Keys", "", "| key | type | meaning |", "|---|---|---|"]
    lines += [f"| `{key.name}` | {_type_name(key)} | {key.meaning} |" for key in KEYS.values()]
    return "\n".join(lines) + "\n"


def _type_name(key: Key) -> str:
    """Return the type of a key in a word or two."""
    if "enum" in key.type:
        return "string"
    return f"array of {key.type['items']['type']}s" if "items" in key.type else str(key.type["type"])


def events_schema() -> str:
    """Return `docs/events.schema.json`."""
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(events_schema() if "--schema" in sys.argv else events_page())
