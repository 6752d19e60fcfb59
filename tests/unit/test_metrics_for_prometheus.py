"""The metrics of a daemon: their names, their series from the start, and their values from snapshots."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families

from backupd.core.certificate_life import CertificateLimits, Validity
from backupd.core.circuit import CircuitState
from backupd.core.snapshot import (
    CertificateSnapshot,
    DaemonProblem,
    DestinationSnapshot,
    DropSnapshot,
    OperatorPause,
    OverdueDevice,
    ProblemSnapshot,
    Snapshot,
    Upload,
)
from backupd.telemetry import events
from backupd.telemetry.metrics import COUNTERS, Metrics
from tests.unit.config_files import SMALLEST, read

NOW = datetime.now(UTC)
SECOND = '[destination.annex]\nurl = "https://annex.example.net/"'


def metrics(text: str = SMALLEST) -> Metrics:
    return Metrics(read(text), "backup1", "1.2.3", lambda: 7)


def a_snapshot(**fields: object) -> Snapshot:
    values = {"heartbeat_every": timedelta(seconds=60), "is_ready": True, **fields}
    return Snapshot(NOW, "backup1", "1.2.3", 42, NOW - timedelta(hours=1), **values)  # type: ignore[arg-type]


def values(exposed: Metrics) -> dict[str, float]:
    """Return the value of each series, by its name and the values of its labels without the host."""
    found = {}
    for family in text_string_to_metric_families(exposed.exposition()[0].decode()):
        for sample in family.samples:
            assert sample.labels["host"] == "backup1"
            labels = [value for name, value in sorted(sample.labels.items()) if name != "host"]
            found[" ".join([sample.name, *labels])] = sample.value
    return found


def test_each_counter_of_a_drop_and_a_destination_starts_with_zero() -> None:
    found = values(metrics())
    named = {counter.name for counter in COUNTERS if counter.labels}

    assert {series.split()[0].removesuffix("_total") for series in found} >= named
    assert found["backupd_archives_missing_total switches"] == 0
    assert found["backupd_attempts_failed_total vault connect_failed"] == 0
    assert found["backupd_archives_rejected_total switches archive_refused"] == 0
    assert "backupd_archives_rejected_total switches connect_failed" not in found
    assert found["backupd_ledger_failures_total"] == 0


def test_events_are_counted_by_their_labels_and_amounts() -> None:
    exposed = metrics()
    for size in (3, 4):
        exposed.count(events.DELIVERY_VERIFIED, {"destination": "vault", "size_bytes": size, "archive": "a"})
    exposed.count(events.ATTEMPT_FAILED, {"destination": "vault", "reason": "tls_failed"})
    found = values(exposed)

    assert found["backupd_deliveries_total vault"] == 2
    assert found["backupd_delivery_bytes_total vault"] == 7
    assert found["backupd_attempts_failed_total vault tls_failed"] == 1
    assert found["backupd_log_events_total info"] == 2
    assert found["backupd_log_events_total warning"] == 1
    assert found["backupd_log_lines_lost_total"] == 7


def test_a_reload_starts_the_series_of_new_destinations_and_ends_those_of_removed_ones() -> None:
    exposed = metrics()
    exposed.count(events.DELIVERY_VERIFIED, {"destination": "vault", "size_bytes": 1})
    exposed.configure(read(SMALLEST + SECOND))

    assert values(exposed)["backupd_deliveries_total vault"] == 1
    assert values(exposed)["backupd_deliveries_total annex"] == 0

    exposed.configure(read(SMALLEST.replace("destination.vault", "destination.annex")))
    exposed.count(events.DELIVERY_VERIFIED, {"destination": "vault", "size_bytes": 1})

    assert not [series for series in values(exposed) if " vault" in series]


def test_no_label_has_the_name_of_a_file() -> None:
    labels = {label for counter in COUNTERS for label in counter.labels}

    assert labels <= {"drop", "destination", "reason", "level"}


def test_gauges_show_the_last_snapshot() -> None:
    held = OperatorPause("destination", "annex", NOW)
    life = CertificateLimits().life(Validity(NOW - timedelta(days=300), NOW + timedelta(days=2)), NOW)
    exposed = metrics(SMALLEST + SECOND)
    exposed.update(
        a_snapshot(
            drops=(DropSnapshot("switches", "/srv", pending=3, last_at=NOW, fault="no inotify"),),
            destinations=(
                DestinationSnapshot(
                    "vault", pending=3, oldest=NOW - timedelta(hours=1), circuit=CircuitState.PAUSED
                ),
                DestinationSnapshot("annex", circuit=CircuitState.WORKING, held=held),
                DestinationSnapshot("removed", pending=1),
            ),
            uploads=(Upload("i", "switches", "a.cfg", "annex", 1, 100, 40, NOW, 10),),
            rejected=2,
            problems=(ProblemSnapshot("switches", "unreadable", 5, NOW, "b.cfg", "error", ""),),
            certificates=(CertificateSnapshot("vault", "client", "/c.pem", NOW + timedelta(days=2), life),),
            devices=9,
            overdue=(OverdueDevice("switches", "sw1", None, NOW),),
            daemon_problems=(DaemonProblem("ledger", NOW, "disk full"),),
            memory_bytes=1000,
            open_files_limit=1024,
        )
    )
    found = values(exposed)

    assert found["backupd_oldest_pending_seconds vault"] >= 3600
    assert found["backupd_oldest_pending_seconds annex"] == 0
    expected = {
        "heartbeat_timestamp_seconds": round(NOW.timestamp(), 6),
        "heartbeat_interval_seconds": 60,
        "ready": 1,
        "up": 1,
        "build_info 1.2.3": 1,
        "quarantined_archives": 2,
        "pending_deliveries vault": 3,
        "pending_deliveries removed": 1,
        "drop_pending_archives switches": 3,
        "drop_held switches": 0,
        "watch_degraded switches": 1,
        "destination_working vault": 0,
        "destination_working annex": 1,
        "destination_held vault": 0,
        "destination_held annex": 1,
        "uploads_in_flight annex": 1,
        "uploads_in_flight_bytes annex": 100,
        "uploads_in_flight_sent_bytes annex": 40,
        "uploads_in_flight vault": 0,
        "problems switches unreadable": 5,
        "certificate_state vault client": 2,
        "devices": 9,
        "overdue_devices": 1,
        "drop_overdue sw1 switches": 1,
        "daemon_problems ledger": 1,
        "process_resident_memory_bytes": 1000,
        "process_max_fds": 1024,
    }
    assert {name: found.get(f"backupd_{name}") for name in expected} == expected
    assert "backupd_process_open_fds" not in found
    assert "backupd_destination_working removed" not in found


def test_the_last_exposition_shows_that_the_daemon_has_ended() -> None:
    exposed = metrics()

    assert b'backupd_up{host="backup1"} 0.0' in exposed.last_exposition()
    assert values(exposed)["backupd_up"] == 1  # a reload may have ended the writer of the file only


def test_a_client_gets_openmetrics_if_it_accepts_that() -> None:
    body, content_type = metrics().exposition("application/openmetrics-text;version=1.0.0;q=0.9,*/*;q=0.1")

    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")


@pytest.mark.parametrize("version", ["abc", "1..0"])
def test_a_client_gets_text_if_the_version_that_it_accepts_is_no_number(version: str) -> None:
    body, content_type = metrics().exposition(f"application/openmetrics-text; version={version}")

    assert content_type.startswith("text/plain")
    assert b"backupd_up" in body


def test_each_metric_has_a_base_unit_and_a_counter_ends_with_total() -> None:
    exposed = metrics()
    exposed.update(a_snapshot())
    types = dict(re.findall(r"# TYPE (\S+) (\S+)", exposed.exposition()[0].decode()))

    assert len(types) > 30
    for name, kind in types.items():
        assert name.endswith("_total") is (kind == "counter"), name
        assert not re.search(r"_(ms|millis|minutes|hours|days|kb|mb|percent)(_|$)", name), name
