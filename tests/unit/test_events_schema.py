"""The JSON Schema of the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import backupd
from backupd.telemetry.docs import events_schema, log_schema
from backupd.telemetry.events import CATALOGUE, KEYS
from tests.lines import check_line, check_log

SCHEMA = Path(backupd.__file__).parent.parent / "docs" / "events.schema.json"

QUEUED: dict[str, Any] = {
    "timestamp": "2026-03-04T05:06:07.123Z",
    "level": "info",
    "event": "archive.queued",
    "message": "r1.cfg was queued for vault",
    "host": "backup1",
    "drop": "switches",
    "archive": "r1.cfg",
    "size_bytes": 3,
    "destinations": ["vault"],
}


def test_the_schema_is_generated_from_the_catalogue() -> None:
    text = SCHEMA.read_text("utf-8")
    assert text == events_schema(), "run: python -m backupd.telemetry.docs --schema > docs/events.schema.json"
    assert set(json.loads(text)["$defs"]) == set(CATALOGUE)


def test_the_schema_is_valid_and_each_key_has_a_type() -> None:
    Draft202012Validator.check_schema(log_schema())
    assert all(set(key.type) & {"type", "enum"} for key in KEYS.values())


def test_a_line_conforms_to_the_schema_and_to_that_of_its_event() -> None:
    Draft202012Validator(log_schema()).validate(QUEUED)
    assert check_log(json.dumps(QUEUED) + "\nTraceback\n") == 1


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
        {"host": None},
    ],
    ids=str,
)
def test_a_line_that_differs_from_the_catalogue_is_found(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_line(QUEUED | wrong)
    assert not Draft202012Validator(log_schema()).is_valid(QUEUED | wrong)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"size_bytes": 3}, {"size_bytes": 3.0}),
        ({"oldest_s": 0.0}, {"oldest_s": 0}),
        ({"oldest_s_by_destination": {"vault": 1.5}}, {"oldest_s_by_destination": {"a": 1.5, "vault": 0}}),
        ({"pending_by_destination": {"vault": 1}}, {"pending_by_destination": {"vault": 1.0}}),
    ],
    ids=str,
)
def test_a_number_in_the_notation_of_another_type_is_found(
    right: dict[str, Any], wrong: dict[str, Any]
) -> None:
    common = {key: QUEUED[key] for key in ("timestamp", "message", "host")}
    event = {"event": "daemon.heartbeat", "level": "info", "pending": 1, "in_flight": 0}
    if "size_bytes" in right:
        common, event = QUEUED, {}
    check_line({**common, **event, **right})
    with pytest.raises(AssertionError, match="integers and other numbers"):
        check_line({**common, **event, **wrong})


def test_each_key_has_one_type_also_within_objects_and_arrays() -> None:
    for key in KEYS.values():
        inner = key.type.get("additionalProperties") or key.type.get("items") or key.type
        assert isinstance(inner.get("type", ""), str), key.name  # no list of types
        assert inner.get("type") not in {"object", "array"}, key.name
        assert len({type(value) for value in inner.get("enum", ())}) <= 1, key.name


@pytest.mark.parametrize("key", QUEUED)
def test_a_line_without_a_key_that_it_needs_is_found(key: str) -> None:
    line = {name: value for name, value in QUEUED.items() if name != key}
    if key in {"drop", "size_bytes"}:  # neither in every line nor in the message
        check_line(line)
    else:
        with pytest.raises(AssertionError):
            check_line(line)


def test_a_message_with_a_line_end_is_found() -> None:
    with pytest.raises(AssertionError):
        check_line(QUEUED | {"message": "r1.cfg\nwas queued"})
