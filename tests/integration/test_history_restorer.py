"""The history of a lost ledger, restored from receipt files in real folders."""

from __future__ import annotations

import itertools
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

from backupd.core.model import Archive, DeliveryState
from backupd.core.retention_policy import MinFree
from backupd.delivery import stored_folder
from backupd.delivery.history_restorer import HistoryRestorer
from backupd.delivery.retention import Retention
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.sent_index import SentArchive
from backupd.ledger.sqlite.connection import FILE_NAME, open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.ledger.sqlite.queries import LedgerQueries
from backupd.ledger.sqlite.sent_rows import SqliteSentIndex, open_sent_index
from tests.factories import NOW, a_drop
from tests.privileges import a_folder_of_nobody, without_rights
from tests.site import Site

DAY = timedelta(days=1)
ROWS = """
    SELECT relpath, inode, archive.size, mtime_ns, queued_at, archive.state, archive.digest, disposition,
        has_entry, moved_to, delivery.id, destination, delivery.state, ended_at, reason, error,
        delivery.digest, verified, http_status, receipt
    FROM archive JOIN delivery ON archive_id = archive.id ORDER BY archive.id
"""


class RestorableSite(Site):
    """A site that can lose its ledger and restore it."""

    def __init__(self, base: Path, drop: Path) -> None:
        super().__init__(base, drop)
        self.history_start = NOW - 1000 * DAY
        self.distrusted: list[datetime] = []

    def rows(self) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.state / FILE_NAME)) as db:
            return db.execute(ROWS).fetchall()

    def lose_ledger(self) -> None:
        """Delete the ledger and create a new one."""
        self.ledger.close()
        for path in self.state.iterdir():
            path.unlink()
        self.ledger = SqliteLedger(open_ledger(self.state).connection)

    def restore(
        self, device_of: Callable[[Archive], str | None] = lambda _: None, stop: threading.Event | None = None
    ) -> None:
        self.restorer(device_of).scan(stop or threading.Event())

    def restorer(self, device_of: Callable[[Archive], str | None] = lambda _: None) -> HistoryRestorer:
        drops = {"switches": a_drop(self.folder)}
        return HistoryRestorer(
            lambda: open_sent_index(self.state),
            drops,
            device_of,
            lambda: self.history_start,
            self._distrust,
            self._log,
        )

    def _distrust(self, since: datetime) -> None:
        self.distrusted.append(since)
        self.now = since


class SlowClock(datetime):
    """The clock of a host that is three days behind."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> SlowClock:
        return cls.fromtimestamp(time.time() - 3 * 86400, tz)


class StoppedAtFirstWait(threading.Event):
    """Is set at the first wait for it."""

    def wait(self, timeout: float | None = None) -> bool:
        return True


@pytest.fixture
def site(tmp_path: Path) -> Iterator[RestorableSite]:
    site = RestorableSite(tmp_path, tmp_path / "drop")
    yield site
    site.close()


def test_a_new_ledger_knows_all_sent_and_rejected_archives_again(site: RestorableSite) -> None:
    site.send("a.cfg", NOW)
    site.send("deep/er/b.cfg", NOW + timedelta(minutes=1), b"another")
    site.send("a.cfg", NOW + timedelta(minutes=2), b"the name was taken")
    site.send(os.fsdecode(b"not-\xff-utf8.cfg"), NOW + timedelta(minutes=3))
    site.send("refused.cfg", NOW + timedelta(minutes=4), accepted=False)
    site.send("l" * 251 + ".cfg", NOW + timedelta(minutes=5))
    before = site.rows()
    site.lose_ledger()
    assert not site.rows()

    site.restore()

    assert sorted(site.rows()) == sorted(before)
    sent = [row for row in site.rows() if row[5] == "delivered"]
    assert sent == [row for row in before if row[5] == "delivered"], "the order has changed"
    assert [
        (e["path"], e["restored_archives"], e["unknown_files"]) for e in site.events("ledger.restored")
    ] == [
        (str(site.root / "sent"), 5, 0),
        (str(site.root / "rejected"), 1, 0),
    ]
    assert site.ledger.count_quarantined() == 1
    with closing(sqlite3.connect(site.state / FILE_NAME)) as db:
        audited = LedgerQueries(db).sent_archives("switches", None, None, 100)
    assert len(audited) == 5


def test_restored_archives_are_older_than_new_ones_and_expire_in_time(site: RestorableSite) -> None:
    for number in range(3):
        site.send(f"{number}.cfg", NOW + number * DAY)
    for number in (2, 1, 0):  # as a restore from a backup does, in any order
        (site.root / "sent" / f"{number}.cfg").chmod(0o640)
    site.lose_ledger()
    site.send("new.cfg", NOW + 3 * DAY)
    site.restore()
    with closing(sqlite3.connect(site.state / FILE_NAME)) as db:
        paths = [row[0] for row in db.execute("SELECT relpath FROM archive ORDER BY id")]
    assert paths[-1] == b"new.cfg"
    assert site.distrusted == [NOW]
    site.apply(NOW + 90 * DAY, keep_for=90 * DAY, keep_last=2)
    assert site.sent() == ["0.cfg", "1.cfg", "2.cfg", "new.cfg"]
    site.apply(NOW + 91 * DAY + timedelta(minutes=1))
    assert site.sent() == ["2.cfg", "new.cfg"]
    assert not (site.root / "sent" / "0.cfg.receipt.json").exists()


@pytest.mark.parametrize("policy", [{"keep_for": 30 * DAY}, {"keep_for": 30 * DAY, "keep_last": 1}], ids=str)
def test_archives_that_are_restored_during_a_check_do_not_expire(
    site: RestorableSite, policy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be old by the clock before it is distrusted."""

    def comes_back(self: SqliteSentIndex, *arguments: Any) -> list[SentArchive]:
        site.restore()
        return find(self, *arguments)

    site.send("a.cfg", NOW)
    site.send("a.cfg", NOW)
    site.lose_ledger()
    find = SqliteSentIndex.oldest
    monkeypatch.setattr(SqliteSentIndex, "oldest", comes_back)
    site.apply(NOW + 400 * DAY, **policy)
    assert len(site.distrusted) == 1
    assert len(site.sent()) == 2
    assert not site.events("archive.expired")
    site.apply(NOW + 401 * DAY)  # the clock is trusted again
    assert len(site.sent()) == policy.get("keep_last", 0)


def test_a_restore_runs_once_and_an_interrupted_one_continues_at_the_next_start(
    site: RestorableSite,
) -> None:
    for number in range(600):
        site.send(f"{number}.cfg", NOW)
    site.lose_ledger()
    site.restore(stop=StoppedAtFirstWait())
    restored = len(site.rows())
    assert 0 < restored < 600
    assert not site.events("ledger.restored")
    site.restore()
    assert len(site.rows()) == 600
    [event] = site.events("ledger.restored")
    assert event["restored_archives"] == 600 - restored

    with closing(sqlite3.connect(site.state / FILE_NAME)) as db:
        db.execute("DELETE FROM archive")
        db.commit()
    site.restore()
    assert not site.rows()


def test_a_missing_folder_is_restored_once_it_exists(site: RestorableSite) -> None:
    site.send("a.cfg", NOW)
    site.send("bad.cfg", NOW, accepted=False)
    site.lose_ledger()
    (site.root / "sent").rename(site.root / "elsewhere")
    site.restore()
    assert [row[0] for row in site.rows()] == [b"bad.cfg"]
    (site.root / "elsewhere").rename(site.root / "sent")
    site.restore()
    assert {row[0] for row in site.rows()} == {b"a.cfg", b"bad.cfg"}


@pytest.fixture
def site_of_nobody() -> Iterator[RestorableSite]:
    with a_folder_of_nobody() as folder, without_rights():
        site = RestorableSite(folder, folder / "drop")
        yield site
        site.close()


def test_unreadable_files_are_logged_and_do_not_delay_the_others(site_of_nobody: RestorableSite) -> None:
    site = site_of_nobody
    for name in ("a.cfg", "b.cfg", "c/c.cfg"):
        site.send(name, NOW)
    site.lose_ledger()
    receipt, folder = site.root / "sent" / "b.cfg.receipt.json", site.root / "sent" / "c"
    receipt.chmod(0)
    folder.chmod(0)
    below = os.open(site.root / "sent", os.O_RDONLY)
    for _ in range(20):  # no archive is ever moved to so long a path
        os.mkdir("d" * 250, dir_fd=below)
        below, above = os.open("d" * 250, os.O_RDONLY, dir_fd=below), below
        os.close(above)
    os.close(below)
    site.restore()
    assert [row[0] for row in site.rows()] == [b"a.cfg"]
    [event] = site.events("ledger.incomplete")
    assert event["error"].startswith("2 files or folders cannot be used now, the first is sent/")
    receipt.chmod(0o644)
    folder.chmod(0o755)
    site.restore()
    assert len(site.rows()) == 3
    site.apply(NOW + 99 * DAY, keep_for=DAY)
    assert os.listdir(site.root / "sent" / "c") == []


def test_the_clock_is_distrusted_when_a_folder_becomes_readable(site_of_nobody: RestorableSite) -> None:
    site = site_of_nobody
    site.send("a.cfg", NOW)
    site.lose_ledger()
    (site.root / "sent").chmod(0)
    restorer = site.restorer()
    with without_rights():
        restorer.scan(threading.Event())
    assert (site.distrusted, site.rows()) == ([], [])
    (site.root / "sent").chmod(0o755)
    restorer._retry_at.clear()  # an hour later
    restorer.scan(threading.Event())
    assert (site.distrusted, len(site.rows())) == ([NOW], 1)


def test_the_clock_is_distrusted_for_restored_archives_and_not_for_known_ones(
    site_of_nobody: RestorableSite,
) -> None:
    site = site_of_nobody
    for number in range(70):
        site.send(f"{number:02}.cfg", NOW)
    site.send("old.cfg", NOW - 200 * DAY).chmod(0o640)  # so that it is on the second page
    site.send("shut/late.cfg", NOW - 300 * DAY)
    (site.root / "sent" / "shut").chmod(0)
    site.lose_ledger()
    with without_rights():
        site.restore()
        assert site.distrusted == [NOW, NOW - 200 * DAY]
        assert site.events("ledger.incomplete")
        site.restore()  # as at the next start
        assert site.distrusted == [NOW, NOW - 200 * DAY]
    (site.root / "sent" / "shut").chmod(0o755)
    site.restore()
    assert site.distrusted == [NOW, NOW - 200 * DAY, NOW - 300 * DAY]


def test_no_space_is_freed_before_the_oldest_archives_are_known(site: RestorableSite) -> None:
    for number in range(3):
        site.send(f"old-{number}.cfg", NOW, b"x" * 4096)
    site.lose_ledger()
    site.send("new.cfg", NOW + 3 * DAY, b"x" * 4096)
    restorer = site.restorer()
    site.retention = Retention(
        site._open_index, site._scope, site._log, lambda: site.now, restorer.has_scanned
    )
    free = os.statvfs(site.root)
    more_than_free = MinFree(free.f_bavail * free.f_frsize + 64 * 2**30)
    site.apply(NOW + 3 * DAY, min_free=more_than_free)
    ledger = site.state / FILE_NAME
    elsewhere = ledger.rename(ledger.with_name("elsewhere"))
    restorer.scan(threading.Event())  # the ledger cannot be opened
    elsewhere.rename(ledger)
    assert site.events("ledger.failed")
    restorer.scan(threading.Event())  # the retry is not due yet
    site.apply(NOW + 3 * DAY)
    assert len(site.sent()) == 4
    assert not site.events("disk.low"), "the archives are not removed yet"
    restorer._retry_at.clear()  # a minute later
    restorer.scan(threading.Event())
    assert site.distrusted
    site.retention.tick()
    assert site.sent() == []
    removed = [event["archive"] for event in site.events("archive.expired")]
    assert removed == ["old-0.cfg", "old-1.cfg", "old-2.cfg", "new.cfg"]


def test_a_clock_that_is_behind_loses_no_history(
    site: RestorableSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.send("a.cfg", NOW)
    site.lose_ledger()
    monkeypatch.setattr(stored_folder, "datetime", SlowClock)
    site.restore()
    assert not site.rows()
    [event] = site.events("ledger.incomplete")
    assert "the clock of this host may be wrong" in event["error"]
    monkeypatch.undo()
    site.restore()
    assert len(site.rows()) == 1


def test_receipt_files_with_a_time_in_the_future_are_retried(site: RestorableSite) -> None:
    receipt = site.send("a.cfg", NOW).with_name("a.cfg.receipt.json")
    good = receipt.read_text()
    ahead = (datetime.now(NOW.tzinfo) + DAY).isoformat()  # as if the clock of this host were a day behind
    receipt.write_text(re.sub('"ended_at": "[^"]+"', f'"ended_at": "{ahead}"', good))
    site.lose_ledger()
    site.restore()
    assert not site.rows()
    assert site.events("ledger.incomplete")
    receipt.write_text(good)
    site.restore()
    assert len(site.rows()) == 1


def test_archives_from_before_the_history_are_neither_restored_nor_unknown(site: RestorableSite) -> None:
    site.send("old.cfg", NOW - 2 * DAY)
    site.send("new.cfg", NOW)
    site.lose_ledger()
    site.history_start = NOW - DAY
    site.restore()
    assert [row[0] for row in site.rows()] == [b"new.cfg"]
    [event] = site.events("ledger.restored")
    assert (event["restored_archives"], event["unknown_files"]) == (1, 0)


def test_the_newest_archives_are_kept_while_only_some_are_known(site: RestorableSite) -> None:
    for number in range(100):
        site.send(f"{number:02}.cfg", NOW + timedelta(minutes=number))
    site.lose_ledger()
    site.restore(stop=StoppedAtFirstWait())
    known = len(site.rows())
    assert 0 < known < 100
    site.apply(NOW + DAY, keep_last=2)
    assert site.sent() == [f"{number:02}.cfg" for number in range(known - 2, 100)]
    site.restore()
    site.apply(NOW + DAY)
    assert site.sent() == ["98.cfg", "99.cfg"]


@pytest.mark.parametrize("year", [1969, 2300, 12_000])
def test_extreme_file_times_do_not_stop_the_restore(
    site: RestorableSite, monkeypatch: pytest.MonkeyPatch, year: int
) -> None:
    site.send("a.cfg", NOW)
    site.lose_ledger()
    site.history_start = datetime(1, 1, 1, tzinfo=NOW.tzinfo)
    odd = (year - 1970) * 366 * 86400 * 10**9

    def stat(self: DropFolder, relpath: bytes) -> os.stat_result:
        status = list(real(self, relpath))
        times = {"st_mtime_ns": odd, "st_ctime_ns": odd, "st_mtime": odd / 1e9, "st_ctime": odd / 1e9}
        return os.stat_result(status, times)

    real = DropFolder.stat
    monkeypatch.setattr(DropFolder, "stat", stat)
    site.restore()
    assert bool(site.rows()) == (year < 2000)
    assert bool(site.events("ledger.incomplete")) == (year > 2000)


def test_a_walk_through_empty_folders_shows_signs_of_life(site: RestorableSite) -> None:
    for number in range(50):
        (site.root / "sent" / str(number)).mkdir(parents=True)
    calls = itertools.count()
    sent = stored_folder.StoredFolder("switches", site.folder, b"sent", DeliveryState.DELIVERED, b"receipt")
    assert sent.files(lambda: next(calls) >= 0, stored_folder.ReadProblems()) == []
    assert next(calls) > 50


def test_the_latest_of_several_receipt_files_belongs_to_the_file(site: RestorableSite) -> None:
    site.send("a.cfg", NOW).unlink()  # by hand, and the receipt file was left
    site.send("a.cfg", NOW + DAY, b"xyz")
    latest = site.rows()[-1]
    assert (site.root / "sent" / "a.cfg.receipt-2.json").exists()
    site.lose_ledger()
    site.restore()
    assert site.rows() == [latest]


def test_a_device_is_restored_from_archives_that_arrived_whole(site: RestorableSite) -> None:
    for minutes in (2, 1):
        site.send(f"{minutes}.cfg", NOW + timedelta(minutes=minutes))
    site.send("refused.cfg", NOW + timedelta(minutes=3), accepted=False)
    broken = site.send("broken.cfg", NOW + timedelta(minutes=4), accepted=False)
    receipt = broken.with_name("broken.cfg.reason.json")
    receipt.write_text(receipt.read_text().replace('"archive_refused"', '"truncated"'))
    site.lose_ledger()
    site.restore(lambda _: "r1")
    assert len(site.rows()) == 4
    with closing(sqlite3.connect(site.state / FILE_NAME)) as db:
        [device] = LedgerQueries(db).devices(NOW)
    assert (device.device, device.last_at, device.archives) == ("r1", NOW + timedelta(minutes=3), 3)


def test_the_receipt_file_of_a_development_version_is_read_and_removed(site: RestorableSite) -> None:
    sent = site.send("r1.cfg", NOW)
    receipt = sent.with_name("r1.cfg.receipt.json")
    receipt.write_text(receipt.read_text().replace('"queued_at"', '"admitted_at"'))
    site.lose_ledger()
    site.restore()
    assert [row[0] for row in site.rows()] == [b"r1.cfg"]
    site.apply(NOW + timedelta(days=9), keep_for=timedelta(days=1))
    assert list(sent.parent.iterdir()) == []


def changed(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda receipt: receipt | fields


def of_delivery(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda receipt: receipt | {"deliveries": [receipt["deliveries"][0] | fields]}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda _: [[]], id="not an object"),
        pytest.param(lambda _: {}, id="empty"),
        pytest.param(changed(drop="others"), id="another drop"),
        pytest.param(changed(size=4), id="another size"),
        pytest.param(changed(size="3"), id="a size as text"),
        pytest.param(changed(archive="b.cfg"), id="another archive"),
        pytest.param(changed(archive="../../etc/a.cfg"), id="outside the folder"),
        pytest.param(changed(archive="/a.cfg"), id="an absolute path"),
        pytest.param(changed(archive=""), id="an empty path"),
        pytest.param(changed(digest="sha256:$(id)"), id="an invalid digest"),
        pytest.param(changed(digest="nosuch:abcdef12"), id="an unknown algorithm"),
        pytest.param(changed(digest=None), id="without a digest"),
        pytest.param(of_delivery(digest=None), id="delivered without a digest"),
        pytest.param(changed(queued_at="0001-01-01T00:00:00+14:00"), id="before the year 1"),
        pytest.param(changed(queued_at="2026-01-01T00:00:00"), id="without a time zone"),
        pytest.param(changed(deliveries=[]), id="without deliveries"),
        pytest.param(of_delivery(state="pending"), id="pending"),
        pytest.param(of_delivery(state="rejected"), id="rejected"),
        pytest.param(of_delivery(delivery_id="x"), id="an invalid id"),
        pytest.param(of_delivery(http_status=10**30), id="an invalid status"),
        pytest.param(of_delivery(reason="because"), id="an unknown reason"),
        pytest.param(of_delivery(receipt="x" * (1 << 17)), id="too long"),
        pytest.param(of_delivery(receipt={"a": 1}), id="not a text"),
    ],
)
def test_a_receipt_file_that_does_not_match_the_file_is_ignored(
    site: RestorableSite, change: Callable[[dict[str, Any]], Any]
) -> None:
    site.send("a.cfg", NOW)
    site.send("good.cfg", NOW)
    receipt = site.root / "sent" / "a.cfg.receipt.json"
    receipt.write_text(json.dumps(change(json.loads(receipt.read_text()))))
    site.lose_ledger()
    site.restore()
    assert [row[0] for row in site.rows()] == [b"good.cfg"]
    [event] = site.events("ledger.restored")
    assert (event["restored_archives"], event["unknown_files"]) == (1, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"\x00",
        lambda _: b"[" * 100_000,
        lambda _: b'{"deliveries": [' + b"[]," * 1_300_000 + b"[]]}",
        lambda good: good.replace(b'"receipt": "', b'"receipt": "\\ud800'),
        lambda good: good.replace(b'"size": 3', b'"size": 3e0'),
        lambda good: good + b" " * (1 << 17),
        lambda good: good[:-3],
    ],
)
def test_an_invalid_receipt_file_is_ignored(site: RestorableSite, damage: Callable[[bytes], bytes]) -> None:
    receipt = site.send("a.cfg", NOW).with_name("a.cfg.receipt.json")
    good = receipt.read_bytes()
    damaged = damage(good)
    assert damaged != good
    receipt.write_bytes(damaged)
    site.lose_ledger()
    site.restore()
    assert not site.rows()
    receipt.write_bytes(good)
    site.lose_ledger()
    site.restore()
    assert len(site.rows()) == 1


def test_other_files_with_names_of_receipt_files_do_not_hide_the_receipt(site: RestorableSite) -> None:
    (site.root / "sent").mkdir()
    (site.root / "sent" / "a.cfg.receipt.json").mkdir()
    (site.root / "sent" / "a.cfg.receipt-2.json").symlink_to("/etc/hostname")
    os.mkfifo(site.root / "sent" / "a.cfg.receipt-3.json")
    (site.root / "sent" / "a.cfg.receipt-4.json").write_text("{}")
    site.send("a.cfg", NOW)
    assert (site.root / "sent" / "a.cfg.receipt-5.json").exists()
    site.lose_ledger()
    site.restore()
    assert [row[0] for row in site.rows()] == [b"a.cfg"]


def test_a_delivery_id_used_twice_costs_no_other_archive(site: RestorableSite) -> None:
    for name in ("a.cfg", "b.cfg", "c.cfg"):
        site.send(name, NOW)
    first, second = (site.root / "sent" / f"{name}.cfg.receipt.json" for name in "ab")
    receipt = json.loads(first.read_text())
    first.write_text(json.dumps(receipt | {"deliveries": receipt["deliveries"] * 2}))
    second.write_text(json.dumps(json.loads(second.read_text()) | {"deliveries": receipt["deliveries"]}))
    site.lose_ledger()
    site.restore()
    assert b"c.cfg" in {row[0] for row in site.rows()}
    assert len(site.rows()) == 2


def test_links_in_place_of_files_and_folders_are_not_followed(site: RestorableSite) -> None:
    site.send("deep/a.cfg", NOW)
    (site.root / "sent" / "deep").rename(site.root.parent / "outside")
    (site.root / "sent" / "deep").symlink_to(site.root.parent / "outside")
    (site.root / "sent" / "a.cfg").symlink_to(site.root.parent / "outside" / "a.cfg")
    (site.root / "sent" / "a.cfg.receipt.json").write_bytes(
        (site.root.parent / "outside" / "a.cfg.receipt.json").read_bytes()
    )
    site.lose_ledger()
    site.restore()
    assert not site.rows()
