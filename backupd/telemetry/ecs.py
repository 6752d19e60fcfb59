"""Lines in the Elastic Common Schema: the field for each key, and the categories of each event.

A key that the schema has no field for is in the namespace `backupd`. Names are dotted, so that no line has
an object where another one has a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from backupd.telemetry.events import CATALOGUE, DAEMON_HEARTBEAT, DESTINATION_STATUS, Event

ECS_VERSION = "9.4.0"
"""The version of the schema; https://www.elastic.co/docs/reference/ecs."""

FIELDS = {
    "timestamp": "@timestamp",
    "level": "log.level",
    "event": "event.action",
    "message": "message",
    "host": "host.name",
    "version": "service.version",
    "pid": "process.pid",
    "archive": "file.path",
    "size_bytes": "file.size",
    "http_status": "http.response.status_code",
    "reason": "event.reason",
    "error": "error.message",
    "exception": "error.stack_trace",
    "logger": "log.logger",
    "thread": "process.thread.name",
}
"""The field of each key that has one of the same meaning and type; `ecs_fields` converts some others."""

CATEGORIES = {
    "daemon": ("process",),
    "config": ("configuration",),
    "clock": ("host",),
    "library": ("process",),
    "log": ("process",),
    "metrics": ("process",),
    "certificate": ("configuration",),
    "ledger": ("database",),
    "drop": ("file",),
    "watch": ("file",),
    "disk": ("host",),
    "archive": ("file",),
    "inspection": ("file",),
    "disposition": ("file",),
    "retention": ("file",),
    "attempt": ("file", "network"),
    "delivery": ("file", "network"),
    "destination": ("network",),
    "notify": ("network",),
    "ping": ("network",),
    "hook": ("process",),
}
"""`event.category` by the first word of an event."""

SUCCESSES = frozenset(
    (
        "daemon.ready",
        "config.reloaded",
        "certificate.renewed",
        "archive.delivered",
        "archive.disposed",
        "delivery.verified",
        "destination.resumed",
        "notify.sent",
    )
)
"""Events with the `event.outcome` success."""

_METRICS = frozenset((DAEMON_HEARTBEAT.name, DESTINATION_STATUS.name))
"""Events that are measurements."""

_HASHES = frozenset(("md5", "sha1", "sha256", "sha384", "sha512"))
"""Digest algorithms with a field below `file.hash`."""


def ecs_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a line; the first are in the order that is usual for logs in the schema."""
    event = CATALOGUE[record["event"]]
    first = {
        "@timestamp": record["timestamp"],
        "log.level": event.level,
        "message": record["message"],
        "ecs.version": ECS_VERSION,
        "service.name": "backupd",
        "event.kind": "metric" if event.name in _METRICS else "event",
        "event.category": list(CATEGORIES[event.name.partition(".")[0]]),
    }
    outcome = _outcome(event)
    if outcome:
        first["event.outcome"] = outcome
    for key, value in record.items():
        first.update(ecs_fields(key, value))
    return first


def ecs_fields(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields for a key and its value."""
    match key:
        case "archive":
            yield "file.path", value
            yield "file.name", value.rpartition("/")[2]
        case "duration_s":
            yield "event.duration", round(value * 1_000_000_000)
        case "digest":
            algorithm, _, hexadecimal = value.partition(":")
            if algorithm in _HASHES:
                yield f"file.hash.{algorithm}", hexadecimal
            else:
                yield "backupd.digest", value
        case "address":
            host, _, port = value.rpartition(":")
            yield "destination.ip", host.strip("[]").partition("%")[0]  # an IP field accepts no zone
            yield "destination.port", int(port)
        case _ if isinstance(value, dict):  # as an object, its names would become fields
            yield f"backupd.{key}", [f"{name}={item}" for name, item in value.items()]
        case _:
            yield FIELDS.get(key, f"backupd.{key}"), value


def _outcome(event: Event) -> str:
    if event.name in SUCCESSES:
        return "success"
    return "failure" if event.level == "error" or event.name.endswith(".failed") else ""
