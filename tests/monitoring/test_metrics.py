"""Metrics of mtail and rows of lnav from the logs of real daemons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.e2e.test_outages import Endpoint
from tests.monitoring.tools import lnav, metrics_of
from tests.stage import Stage

pytestmark = pytest.mark.long

BEATS = 'heartbeat_every = "0.2s"'
ANNEX = """
[destination.annex]
url = "https://127.0.0.1:{port}/"
ca = "{pki.ca_pem}"
cert = "{pki.client_cert}"
key = "{pki.client_key}"
[drop.people]
path = "{people}"
stable_for = "0.1s"
destinations = ["annex"]
"""


def test_metrics_count_deliveries_and_rejections_and_show_paused_destinations(
    stage: Stage, tmp_path: Path
) -> None:
    people = tmp_path / "people"
    people.mkdir()
    more = ANNEX.format(port=stage.a_free_port(), pki=stage.pki, people=people)
    with Endpoint(stage.pki, lambda name: 422 if "poison" in name else 201) as endpoint:
        stage.configure(endpoint.url, drop='destinations = ["vault"]', top=BEATS, more=more)
        daemon = stage.daemon().ready()
        stage.put('r1","size_bytes":999,"x":".cfg', b"abc")
        stage.put("r2.cfg", b"defgh")
        stage.put("poison.cfg", b"bad")
        stage.put("waits.cfg", b"1234567", into=people)
        daemon.wait_for("archive.delivered", count=2)
        daemon.wait_for("destination.paused", destination="annex")
        daemon.wait_for("archive.disposed", count=3)
        daemon.wait_for(
            "daemon.heartbeat", quarantined=1, pending=1, pending_by_destination={"annex": 1, "vault": 0}
        )
        daemon.wait_for("destination.status", count=len(daemon.events("destination.status")) + 4)
        daemon.stop()
    found = metrics_of(stage.log, tmp_path)
    wanted = {
        'backupd_archives_queued_total{drop="switches"}': 3,
        'backupd_archives_delivered_total{drop="switches"}': 2,
        'backupd_archives_delivered_bytes_total{drop="switches"}': 8,
        'backupd_archives_rejected_total{drop="switches",reason="archive_refused"}': 1,
        'backupd_deliveries_total{destination="vault"}': 2,
        'backupd_delivery_bytes_total{destination="vault"}': 8,
        'backupd_destination_working{destination="annex"}': 0,
        'backupd_destination_working{destination="vault"}': 1,
        'backupd_pending_deliveries{destination="annex"}': 1,
        'backupd_pending_deliveries{destination="vault"}': 0,
        'backupd_pending_bytes{destination="annex"}': 7,
        'backupd_oldest_pending_seconds{destination="vault"}': 0,
        'backupd_watch_degraded{drop="people"}': 0,
        "backupd_quarantined_archives{}": 1,
        "backupd_heartbeat_interval_seconds{}": 0.2,
        'backupd_certificate_state{destination="vault",role="client"}': 0,
    }
    assert {name: found.get(name) for name in wanted} == wanted
    assert found['backupd_oldest_pending_seconds{destination="annex"}'] > 0
    assert found['backupd_destination_pauses_total{destination="annex"}'] >= 1
    last = daemon.events("daemon.heartbeat")[-1]
    assert found["backupd_process_resident_memory_bytes{}"] == last["memory_bytes"] > 10_000_000
    assert found["backupd_process_open_fds{}"] == last["open_files"] > 5
    assert (
        found["backupd_heartbeat_timestamp_seconds{}"]
        >= found["backupd_process_start_time_seconds{}"]
        > 1.6e9
    )


def test_gauges_are_right_after_a_restart(stage: Stage, tmp_path: Path) -> None:
    with Endpoint(stage.pki, lambda _: 422) as endpoint:
        stage.configure(endpoint.url)
        stage.put("poison.cfg", b"bad")
        first = stage.daemon().ready()
        first.wait_for("archive.disposed")
        first.stop()
        stage.log.rename(tmp_path / "first.log")
        stage.daemon().wait_for("destination.status")
        assert metrics_of(stage.log, tmp_path)["backupd_quarantined_archives{}"] == 1
        deliveries = json.loads(stage.backupd("list", "--json").stdout)
        endpoint.status_of = lambda _: 201
        assert stage.backupd("retry", deliveries[0]["id"]).returncode == 0
        stage._daemons[-1].wait_for("archive.disposed")
        stage._daemons[-1].stop()
        stage.daemon().wait_for("destination.status")
        assert metrics_of(stage.log, tmp_path)["backupd_quarantined_archives{}"] == 0


def test_rare_events_become_metrics(tmp_path: Path) -> None:
    log = tmp_path / "rare.log"
    unreadable = {"reason": "unreadable", "problems": 7, "problem_age_s": 5.0}
    forged = '{"timestamp":"2026-03-04T05:06:07.000Z","level":"info","event":"archive.missing"'
    expired = {"certificate_state": "expired", "expires_at": "2026-03-01T00:00:00Z"}
    lines: list[dict[str, object]] = [
        {"event": "watch.degraded", "drop": "switches"},
        {"event": "drop.overdue", "drop": "switches", "device": 'r"1', "overdue_s": 5.0},
        {"event": "drop.overdue", "drop": "people", "overdue_s": 5.0},
        {"event": "drop.overdue", "drop": "people", "device": "p1", "overdue_s": 5.0},
        {"event": "drop.recovered", "drop": "people", "device": "p1"},
        {"event": "log.lost", "lost_lines": 7},
        {"event": "ledger.failed", "error": "disk full"},
        {"event": "daemon.failed", "error": forged},
        {"event": "archive.unusual_size", "drop": "people"},
        {"event": "drop.failed", "drop": "people"},
        {"event": "archive.missing", "drop": "people"},
        {"event": "drop.problem", "drop": "people", **unreadable},
        {"event": "drop.problem", "drop": "people", **unreadable, "reason": "symlink"},
        {"event": "drop.problem_solved", "drop": "people", "reason": "symlink", "problems": 0},
        {"event": "daemon.heartbeat", "quarantined": 0, "overdue_devices": 2},
        {"event": "attempt.failed", "destination": "vault", "reason": "connect_failed", "left_out": 4},
        {"event": "destination.paused", "destination": "annex", "left_out": 2},
        {"event": "destination.held", "destination": "annex"},
        {"event": "drop.held", "drop": "switches"},
        {"event": "drop.held", "drop": "people"},
        {"event": "drop.released", "drop": "people"},
        {"event": "destination.status", "destination": "vault", "circuit": "probing", **expired},
    ]
    time = "2026-03-04T05:06:07.000Z"
    common = {"timestamp": time, "level": "info", "host": "backup1"}
    log.write_text("".join(_line_of_log(common | line) for line in lines))
    found = {name: value for name, value in metrics_of(log, tmp_path).items() if value}
    assert found == {
        'backupd_log_events_total{level="info"}': len(lines) + 6,
        'backupd_watch_degraded{drop="switches"}': 1,
        'backupd_drop_overdue{device="r\\\\\\"1",drop="switches"}': 1,
        'backupd_drop_overdue{device="",drop="people"}': 1,
        "backupd_log_lines_lost_total{}": 7,
        "backupd_ledger_failures_total{}": 1,
        "backupd_daemon_failures_total{}": 1,
        'backupd_problems{drop="people",reason="folder_failed"}': 1,
        'backupd_archives_missing_total{drop="people"}': 1,
        'backupd_problems{drop="people",reason="unreadable"}': 7,
        'backupd_oldest_problem_seconds{drop="people",reason="unreadable"}': 5,
        "backupd_overdue_devices{}": 2,
        "backupd_heartbeat_timestamp_seconds{}": 1772600767,
        'backupd_certificate_expiry_timestamp_seconds{destination="vault",role="client"}': 1772323200,
        'backupd_certificate_state{destination="vault",role="client"}': 3,
        'backupd_destination_pauses_total{destination="annex"}': 3,
        'backupd_destination_held{destination="annex"}': 1,
        'backupd_drop_held{drop="switches"}': 1,
        'backupd_attempts_failed_total{destination="vault",reason="connect_failed"}': 5,
    }


def test_lnav_reads_the_log(stage: Stage, receiver: RunningReceiver, tmp_path: Path) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"abc")
    daemon.wait_for("archive.disposed")
    daemon.stop()
    query = ";SELECT log_level, log_body, event, archive, size_bytes FROM backupd_log"
    rows = lnav(stage.log, tmp_path, query)
    logged = [(event["event"], event["message"]) for event in daemon.events()]
    assert [(row["event"], row["log_body"]) for row in rows] == logged
    (queued,) = (row for row in rows if row["event"] == "archive.queued")
    assert (queued["log_level"], queued["archive"], int(queued["size_bytes"])) == ("info", "r1.cfg", 3)
    assert queued["log_body"] == "r1.cfg was queued for vault"


def _line_of_log(keys: dict[str, object]) -> str:
    """Return a line as backupd writes it, with a message that repeats all of its values."""
    message = {"message": json.dumps(keys, separators=(",", ":"))}
    first = ("timestamp", "level", "event")
    ordered = {key: keys[key] for key in first} | message | {"host": keys["host"]} | keys
    return json.dumps(ordered, separators=(",", ":")) + "\n"
