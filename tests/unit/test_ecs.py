"""Lines in the Elastic Common Schema, compared with its published fields."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import backupd
from backupd.core.model import DIGEST_BYTES
from backupd.telemetry.docs import SECTIONS
from backupd.telemetry.ecs import CATEGORIES, ECS_VERSION, FIELDS, SUCCESSES, ecs_fields, ecs_line
from backupd.telemetry.events import CATALOGUE, KEYS, Event, JsonType

PUBLISHED = json.loads(Path(__file__).with_name("ecs_fields.json").read_text("utf-8"))
TIME = "2026-03-04T05:06:07.123Z"

TYPES = {
    "keyword": str,
    "match_only_text": str,
    "wildcard": str,
    "date": str,
    "ip": str,
    "long": int,
    "array of keyword": list,
}
"""The Python type of a field's values by its published type."""


def a_value(key: str, json_type: JsonType) -> Any:
    """Return a value for a key."""
    special = {"timestamp": TIME, "address": "[2001:db8::1]:443", "digest": f"sha256:{'0' * 64}"}
    if key in special or key.endswith("_at"):
        return special.get(key, TIME)
    if "enum" in json_type:
        return json_type["enum"][0]
    match json_type["type"]:
        case "string":
            return "x"
        case "integer":
            return 3
        case "number":
            return 1.5
        case "boolean":
            return True
        case "array":
            return ["vault", "annex"]
    return {"vault": a_value(key, json_type["additionalProperties"])}


def a_record(event: Event) -> dict[str, Any]:
    """Return a record of an event with all its keys."""
    keys = ("timestamp", "level", "event", "message", "host", *event.keys)
    record = {key: a_value(key, KEYS[key].type) for key in keys}
    return record | {"level": event.level, "event": event.name}


def all_fields() -> Iterator[tuple[str, Any]]:
    for event in CATALOGUE.values():
        yield from ecs_line(a_record(event)).items()
    for algorithm in DIGEST_BYTES:
        yield from ecs_fields("digest", f"{algorithm}:00")


def test_the_published_list_is_of_the_version_that_each_line_states() -> None:
    assert PUBLISHED["version"] == ECS_VERSION


@pytest.mark.parametrize("key", KEYS)
def test_each_key_becomes_published_fields_of_its_type_or_one_of_our_own(key: str) -> None:
    fields = dict(ecs_fields(key, a_value(key, KEYS[key].type)))
    assert fields
    for name, value in fields.items():
        assert name in PUBLISHED["fields"] or name == f"backupd.{key}"
        if name in PUBLISHED["fields"]:
            assert type(value) is TYPES[PUBLISHED["fields"][name]], name


def test_the_list_has_no_field_that_is_not_written() -> None:
    assert set(PUBLISHED["fields"]) - {name for name, _ in all_fields()} == set()


def test_a_field_has_one_type_in_all_lines_and_is_never_a_value_and_an_object() -> None:
    types: dict[str, set[type]] = {}
    for name, value in all_fields():
        types.setdefault(name, set()).add(type(value))
    assert {name for name, found in types.items() if len(found) > 1 or dict in found} == set()
    objects = {name.rpartition(".")[0] for name in types} - {""}
    objects |= {name.rpartition(".")[0] for name in objects} - {""}
    assert objects & set(types) == set()


@pytest.mark.parametrize("event", CATALOGUE.values(), ids=CATALOGUE.keys())
def test_kind_category_and_outcome_are_allowed_values(event: Event) -> None:
    line = ecs_line(a_record(event))
    allowed = PUBLISHED["allowed"]
    assert list(line)[:4] == ["@timestamp", "log.level", "message", "ecs.version"]
    assert line["event.kind"] in allowed["event.kind"]
    assert set(line["event.category"]) <= set(allowed["event.category"])
    assert line.get("event.outcome", "unknown") in allowed["event.outcome"]


def test_tables_name_only_keys_and_events_of_the_catalogue() -> None:
    assert set(FIELDS) <= set(KEYS)
    assert set(CATALOGUE) >= SUCCESSES
    assert set(CATEGORIES) == {word for words in SECTIONS.values() for word in words}
    assert not {name for name in SUCCESSES if CATALOGUE[name].level != "info"}


def test_a_failed_attempt_has_the_fields_of_the_schema() -> None:
    record = a_record(CATALOGUE["attempt.failed"]) | {
        "message": "attempt 2 to upload core-1/r1.cfg to vault failed: reset",
        "host": "backup1",
        "archive": "core-1/r1.cfg",
        "destination": "vault",
        "reason": "connection_lost",
        "error": "reset",
        "address": "192.0.2.1:443",
        "duration_s": 0.25,
    }
    line = ecs_line(record)
    assert {name: line[name] for name in line if not name.startswith("backupd.")} == {
        "@timestamp": TIME,
        "log.level": "warning",
        "message": "attempt 2 to upload core-1/r1.cfg to vault failed: reset",
        "ecs.version": ECS_VERSION,
        "service.name": "backupd",
        "event.kind": "event",
        "event.category": ["file", "network"],
        "event.outcome": "failure",
        "event.action": "attempt.failed",
        "host.name": "backup1",
        "file.path": "core-1/r1.cfg",
        "file.name": "r1.cfg",
        "event.reason": "connection_lost",
        "error.message": "reset",
        "http.response.status_code": 3,
        "destination.ip": "192.0.2.1",
        "destination.port": 443,
        "event.duration": 250_000_000,
    }
    assert line["backupd.destination"] == "vault"


@pytest.mark.parametrize(
    ("address", "ip", "port"),
    [
        ("192.0.2.1:8443", "192.0.2.1", 8443),
        ("[2001:db8::1]:443", "2001:db8::1", 443),
        ("[fe80::1%eth0]:443", "fe80::1", 443),
    ],
)
def test_an_address_becomes_an_ip_without_its_zone_and_a_port(address: str, ip: str, port: int) -> None:
    assert dict(ecs_fields("address", address)) == {"destination.ip": ip, "destination.port": port}
    ipaddress.ip_address(ip)


def test_names_of_destinations_do_not_become_fields() -> None:
    pending = {"vault": 1, "vault.eu": 2}
    assert dict(ecs_fields("pending_by_destination", pending)) == {
        "backupd.pending_by_destination": ["vault=1", "vault.eu=2"]
    }


def test_each_field_is_on_the_page() -> None:
    page = (Path(backupd.__file__).parent.parent / "docs/monitoring/README.md").read_text("utf-8")
    fields = {name for name in PUBLISHED["fields"] if not name.startswith("file.hash.")}
    assert {name for name in fields if f"`{name}`" not in page} == {"ecs.version"}
    assert f"version {ECS_VERSION} of the schema" in page
    assert all(f"`{key}`" in page for key in FIELDS)
