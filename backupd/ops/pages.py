"""The pages that are made from the catalogue of events."""

from __future__ import annotations

import json

from backupd.ops.events import CATALOGUE
from backupd.ops.keys import KEYS
from backupd.ops.schema import schema


def as_markdown() -> str:
    """Return `docs/events.md`."""
    lines = [
        "# Events",
        "",
        "One JSON object a line on standard output. This page is made from the program's own catalogue",
        "(`python -m backupd.ops.events`), and so is the [JSON Schema](events.schema.json) of every line",
        "(`python -m backupd.ops.events --schema`).",
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


def as_json_schema() -> str:
    """Return `docs/events.schema.json`."""
    return json.dumps(schema(), indent=2) + "\n"
