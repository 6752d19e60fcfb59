"""The page of a real ledger: its data, and its size for a large site."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backupd.core.health import AlarmKind
from backupd.ledger.factory import open_history
from backupd.page.document import render_page
from backupd.page.page_data import ARCHIVES, DAYS, PageData, collect_page_data
from tests.showcase import FIREWALLS, SWITCHES, a_config, a_showcase, fill_large

NOW = datetime(2026, 12, 1, 14, 2, 19, tzinfo=UTC)
MAX_BYTES = 300_000


def collected(base: Path, days: int = DAYS) -> PageData:
    with a_showcase(base, NOW) as config, closing(open_history(config)) as history:
        return collect_page_data(history, config, NOW, days)


def test_the_page_has_the_data_of_the_ledger(tmp_path: Path) -> None:
    data = collected(tmp_path)
    rows = {(row.drop, row.device): row for row in data.rows}

    assert data.is_running
    assert data.snapshot is not None
    assert {AlarmKind.PAUSED, AlarmKind.OVERDUE, AlarmKind.REJECTED} <= {alarm.kind for alarm in data.alarms}
    assert {each.destination for each in data.throughput} == {"vault", "offsite"}
    assert sum(each.delivered for each in data.throughput if each.destination == "vault") == 18
    assert {device for drop, device in rows if drop == "switches"} == set(SWITCHES)
    assert {device for drop, device in rows if drop == "firewalls"} == set(FIREWALLS)
    assert ("people", "") in rows
    assert data.rows[0].device == "access-b-3"
    assert [row.device for row in data.rows if row.has_gap] == ["access-b-3", "fw-branch-south", "fw-edge-2"]
    assert rows["switches", "core-switch-2"].unusual == (17,)


def test_the_last_archives_have_all_of_their_deliveries(tmp_path: Path) -> None:
    data = collected(tmp_path)
    archives = [record.archive.id for record in data.archives]

    assert len(set(archives)) == ARCHIVES
    assert len(archives) == 2 * ARCHIVES
    assert archives == sorted(archives, reverse=True)


def test_the_matrix_has_as_many_days_as_wanted(tmp_path: Path) -> None:
    data = collected(tmp_path, days=7)

    assert len(data.calendar) == 7
    assert {len(row.states) for row in data.rows} == {7}
    assert data.calendar[-1].begins <= NOW < data.calendar[-1].ends


def test_days_before_the_kept_history_are_not_missing(tmp_path: Path) -> None:
    config = fill_large(tmp_path, NOW, devices=1, days=60)
    config = config.model_copy(update={"keep_history_for": timedelta(days=3)})
    with closing(open_history(config)) as history:
        history._db.execute("PRAGMA query_only = OFF")  # type: ignore[attr-defined]
        history._db.execute("DELETE FROM archive WHERE queued_at < ?", [_micros(NOW - timedelta(days=3))])  # type: ignore[attr-defined]
        [row] = collect_page_data(history, config, NOW).rows

    assert not row.has_gap


@pytest.mark.long
def test_a_page_of_1000_devices_has_less_than_300_kb(tmp_path: Path) -> None:
    config = fill_large(tmp_path, NOW, devices=1000, days=32)
    with closing(open_history(config)) as history:
        data = collect_page_data(history, config, NOW)

    assert len(data.rows) == 1000
    assert sum(row.has_gap for row in data.rows) > 300
    assert len(render_page(data).encode()) < MAX_BYTES


def test_a_ledger_that_no_daemon_has_used_has_a_page(tmp_path: Path) -> None:
    config = fill_large(tmp_path, NOW, devices=0, days=0)
    with closing(open_history(config)) as history:
        data = collect_page_data(history, a_config(tmp_path, ["other"]), NOW)

    assert data.snapshot is None
    assert not data.is_running
    assert "no daemon has used this ledger yet" in render_page(data)


def _micros(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000)
