"""The pages `/healthz` and `/readyz`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from backupd.core.snapshot import DaemonProblem, Snapshot
from backupd.telemetry import liveness
from backupd.telemetry.http_server import PageRequest
from backupd.telemetry.liveness import Liveness

NOW = datetime(2026, 3, 4, tzinfo=UTC)
REQUEST = PageRequest("/")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(liveness, "time", clock)
    return clock


def a_snapshot(*problems: DaemonProblem, is_ready: bool = True, heartbeat_s: float = 60) -> Snapshot:
    every = timedelta(seconds=heartbeat_s)
    return Snapshot(NOW, "backup1", "1", 1, NOW, every, is_ready, daemon_problems=problems)


def test_a_daemon_is_alive_until_its_snapshots_stay_away(clock: Clock) -> None:
    page = Liveness()
    page.update(a_snapshot())
    clock.now += 179
    assert page.healthz(REQUEST).status == 200
    clock.now += 2
    response = page.healthz(REQUEST)

    assert response.status == 503
    assert response.body == b"no snapshot for 3 min: the main loop hangs\n"


def test_the_limit_is_a_minute_at_least(clock: Clock) -> None:
    page = Liveness()
    page.update(a_snapshot(heartbeat_s=0.2))
    clock.now += 59

    assert page.healthz(REQUEST).status == 200


def test_a_daemon_that_starts_is_alive_and_not_ready(clock: Clock) -> None:
    page = Liveness()
    clock.now += 200

    assert page.healthz(REQUEST).status == 200
    assert page.readyz(REQUEST).body == b"the first scan of the drop folders has not ended\n"
    clock.now += 200
    assert page.healthz(REQUEST).status == 503


def test_a_daemon_is_ready_after_the_first_scans_with_a_ledger(clock: Clock) -> None:
    page = Liveness()
    page.update(a_snapshot(is_ready=False))
    assert page.readyz(REQUEST).status == 503
    page.update(a_snapshot())
    assert page.readyz(REQUEST).status == 200
    page.update(a_snapshot(DaemonProblem("metrics.textfile", NOW, "disk full")))
    assert page.readyz(REQUEST).status == 200
    page.update(a_snapshot(DaemonProblem("ledger", NOW, "disk full")))

    assert page.readyz(REQUEST).body == b"the ledger cannot be used: disk full\n"
    assert page.healthz(REQUEST).status == 200
