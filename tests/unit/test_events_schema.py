"""The JSON Schema of the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import backupd
from backupd.telemetry.docs import events_schema, schema
from backupd.telemetry.events import CATALOGUE, KEYS
from tests.lines import check_line, check_log

PAGE = Path(backupd.__file__).parent.parent / "docs" / "events.schema.json"

ADMITTED: dict[str, Any] = {
    "timestamp": "2026-03-04T05:06:07.123Z",
    "level": "info",
    "event": "archive.queued",
    "message": "r1.cfg is queued for vault",
    "host": "backup1",
    "drop": "switches",
    "archive": "r1.cfg",
    "size_bytes": 3,
    "destinations": ["vault"],
}


def test_the_file_is_made_from_the_catalogue() -> None:
    text = PAGE.read_text("utf-8")
    assert text == events_schema(), "run: python -m backupd.telemetry.docs --schema > docs/events.schema.json"
    assert set(json.loads(text)["$defs"]) == set(CATALOGUE)


def test_it_is_a_schema_and_each_key_has_a_type() -> None:
    Draft202012Validator.check_schema(schema())
    assert all(set(key.type) & {"type", "enum"} for key in KEYS.values())


def test_a_line_is_valid_as_a_whole_and_as_its_event() -> None:
    Draft202012Validator(schema()).validate(ADMITTED)
    assert check_log(json.dumps(ADMITTED) + "\nTraceback\n") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"event": "archive.eaten"},
        {"level": "error"},
        {"size_bytes": "3"},
        {"size_bytes": -1},
        {"destinations": "vault"},
        {"timestamp": "yesterday"},
        {"colour": "red"},
        {"hint": "a key of other events"},
    ],
    ids=str,
)
def test_a_line_that_is_not_as_the_catalogue_says_is_found(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_line(ADMITTED | wrong)
    assert not Draft202012Validator(schema()).is_valid(ADMITTED | wrong)
