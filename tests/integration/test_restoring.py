"""The history of a ledger that was lost, read from the records beside archives: on real folders."""

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
from backupd.delivery import place
from backupd.delivery.restoring import HistoryRestorer
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
TELLS = """
    SELECT relpath, inode, archive.size, mtime_ns, admitted_at, archive.state, archive.digest, disposition,
        live, disposed_to, delivery.id, destination, delivery.state, ended_at, reason, error,
        delivery.digest, verified, http_status, receipt
    FROM archive JOIN delivery ON archive_id = archive.id ORDER BY archive.id
"""


class Lost(Site):
    """A site whose ledger is lost, and begun anew."""

    def __init__(self, base: Path, drop: Path) -> None:
        super().__init__(base, drop)
        self.forgotten = NOW - 1000 * DAY
        self.doubted: list[datetime] = []

    def rows(self) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.state / FILE_NAME)) as db:
            return db.execute(TELLS).fetchall()

    def lose(self) -> None:
        """Lose the ledger and begin another."""
        self.ledger.close()
        for path in self.state.iterdir():
            path.unlink()
        self.ledger = SqliteLedger(open_ledger(self.state).connection)

    def restore(
        self, device_of: Callable[[Archive], str | None] = lambda _: None, stop: threading.Event | None = None
    ) -> None:
        self.restorer(device_of).scan(stop or threading.Event())

    def restorer(self, device_of: Callable[[Archive], str | None] = lambda _: None) -> HistoryRestorer:
        rules = {"switches": a_drop(self.folder)}
        return HistoryRestorer(
            lambda: open_sent_index(self.state),
            rules,
            device_of,
            lambda: self.forgotten,
            self._doubt,
            self._log,
        )

    def _doubt(self, since: datetime) -> None:
        self.doubted.append(since)
        self.now = since


class Behind(datetime):
    """The clock of a host that believes to be in the past."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Behind:
        return cls.fromtimestamp(time.time() - 3 * 86400, tz)


class Stopped(threading.Event):
    """Is set as soon as somebody waits for it."""

    def wait(self, timeout: float | None = None) -> bool:
        return True


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Lost]:
    site = Lost(tmp_path, tmp_path / "drop")
    yield site
    site.end()


def test_what_was_put_away_is_known_again_as_it_was(site: Lost) -> None:
    site.send("a.cfg", NOW)
    site.send("deep/er/b.cfg", NOW + timedelta(minutes=1), b"another")
    site.send("a.cfg", NOW + timedelta(minutes=2), b"the name was taken")
    site.send(os.fsdecode(b"not-\xff-utf8.cfg"), NOW + timedelta(minutes=3))
    site.send("refused.cfg", NOW + timedelta(minutes=4), good=False)
    site.send("l" * 251 + ".cfg", NOW + timedelta(minutes=5))
    before = site.rows()
    site.lose()
    assert not site.rows()

    site.restore()

    assert sorted(site.rows()) == sorted(before)
    sent = [row for row in site.rows() if row[5] == "delivered"]
    assert sent == [row for row in before if row[5] == "delivered"], "not in their order"
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


def test_it_is_older_than_what_came_since_and_goes_in_its_time(site: Lost) -> None:
    for number in range(3):
        site.send(f"{number}.cfg", NOW + number * DAY)
    for number in (2, 1, 0):  # as a restore from tape does, in any order
        (site.root / "sent" / f"{number}.cfg").chmod(0o640)
    site.lose()
    site.send("new.cfg", NOW + 3 * DAY)
    site.restore()
    with closing(sqlite3.connect(site.state / FILE_NAME)) as db:
        paths = [row[0] for row in db.execute("SELECT relpath FROM archive ORDER BY id")]
    assert paths[-1] == b"new.cfg"
    assert site.doubted == [NOW]
    site.keep(NOW + 90 * DAY, keep_for=90 * DAY, keep_last=2)
    assert site.sent() == ["0.cfg", "1.cfg", "2.cfg", "new.cfg"]
    site.keep(NOW + 91 * DAY + timedelta(minutes=1))
    assert site.sent() == ["2.cfg", "new.cfg"]
    assert not (site.root / "sent" / "0.cfg.receipt.json").exists()


@pytest.mark.parametrize("order", [{"keep_for": 30 * DAY}, {"keep_for": 30 * DAY, "keep_last": 1}], ids=str)
def test_what_comes_back_while_old_archives_are_looked_for_is_none(
    site: Lost, order: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock before the doubt it would be old."""

    def comes_back(self: SqliteSentIndex, *arguments: Any) -> list[SentArchive]:
        site.restore()
        return find(self, *arguments)

    site.send("a.cfg", NOW)
    site.send("a.cfg", NOW)
    site.lose()
    find = SqliteSentIndex.oldest
    monkeypatch.setattr(SqliteSentIndex, "oldest", comes_back)
    site.keep(NOW + 400 * DAY, **order)
    assert len(site.doubted) == 1
    assert len(site.sent()) == 2
    assert not site.events("archive.expired")
    site.keep(NOW + 401 * DAY)  # the doubt is over
    assert len(site.sent()) == order.get("keep_last", 0)


def test_it_is_done_once_and_what_is_cut_short_is_done_at_the_next_start(site: Lost) -> None:
    for number in range(600):
        site.send(f"{number}.cfg", NOW)
    site.lose()
    site.restore(stop=Stopped())
    begun = len(site.rows())
    assert 0 < begun < 600
    assert not site.events("ledger.restored")
    site.restore()
    assert len(site.rows()) == 600
    [said] = site.events("ledger.restored")
    assert said["restored_archives"] == 600 - begun

    with closing(sqlite3.connect(site.state / FILE_NAME)) as db:
        db.execute("DELETE FROM archive")
        db.commit()
    site.restore()
    assert not site.rows()


def test_a_folder_that_is_not_there_now_is_looked_at_once_it_is(site: Lost) -> None:
    site.send("a.cfg", NOW)
    site.send("bad.cfg", NOW, good=False)
    site.lose()
    (site.root / "sent").rename(site.root / "elsewhere")
    site.restore()
    assert [row[0] for row in site.rows()] == [b"bad.cfg"]
    (site.root / "elsewhere").rename(site.root / "sent")
    site.restore()
    assert {row[0] for row in site.rows()} == {b"a.cfg", b"bad.cfg"}


@pytest.fixture
def site_of_nobody() -> Iterator[Lost]:
    with a_folder_of_nobody() as folder, without_rights():
        site = Lost(folder, folder / "drop")
        yield site
        site.end()


def test_what_can_not_be_seen_now_keeps_nothing_else_back_and_is_said(site_of_nobody: Lost) -> None:
    site = site_of_nobody
    for name in ("a.cfg", "b.cfg", "c/c.cfg"):
        site.send(name, NOW)
    site.lose()
    record, folder = site.root / "sent" / "b.cfg.receipt.json", site.root / "sent" / "c"
    record.chmod(0)
    folder.chmod(0)
    below = os.open(site.root / "sent", os.O_RDONLY)
    for _ in range(20):  # so deep nothing was ever put away
        os.mkdir("d" * 250, dir_fd=below)
        below, above = os.open("d" * 250, os.O_RDONLY, dir_fd=below), below
        os.close(above)
    os.close(below)
    site.restore()
    assert [row[0] for row in site.rows()] == [b"a.cfg"]
    [said] = site.events("ledger.incomplete")
    assert said["error"].startswith("2 can't be read or believed now, such as sent/")
    record.chmod(0o644)
    folder.chmod(0o755)
    site.restore()
    assert len(site.rows()) == 3
    site.keep(NOW + 99 * DAY, keep_for=DAY)
    assert os.listdir(site.root / "sent" / "c") == []


def test_what_can_be_seen_later_only_is_doubted_then(site_of_nobody: Lost) -> None:
    site = site_of_nobody
    site.send("a.cfg", NOW)
    site.lose()
    (site.root / "sent").chmod(0)
    restorer = site.restorer()
    with without_rights():
        restorer.scan(threading.Event())
    assert (site.doubted, site.rows()) == ([], [])
    (site.root / "sent").chmod(0o755)
    restorer._again.clear()  # an hour later
    restorer.scan(threading.Event())
    assert (site.doubted, len(site.rows())) == ([NOW], 1)


def test_whatever_comes_back_is_doubted_and_what_is_known_is_not(site_of_nobody: Lost) -> None:
    site = site_of_nobody
    for number in range(70):
        site.send(f"{number:02}.cfg", NOW)
    site.send("old.cfg", NOW - 200 * DAY).chmod(0o640)  # it lies on the second page by that
    site.send("shut/late.cfg", NOW - 300 * DAY)
    (site.root / "sent" / "shut").chmod(0)
    site.lose()
    with without_rights():
        site.restore()
        assert site.doubted == [NOW, NOW - 200 * DAY]
        assert site.events("ledger.incomplete")
        site.restore()  # as at the next start
        assert site.doubted == [NOW, NOW - 200 * DAY]
    (site.root / "sent" / "shut").chmod(0o755)
    site.restore()
    assert site.doubted == [NOW, NOW - 200 * DAY, NOW - 300 * DAY]


def test_no_room_is_made_before_the_old_ones_are_known(site: Lost) -> None:
    for number in range(3):
        site.send(f"old-{number}.cfg", NOW, b"x" * 4096)
    site.lose()
    site.send("new.cfg", NOW + 3 * DAY, b"x" * 4096)
    restorer = site.restorer()
    site.keeper = Retention(site._open_shelf, site._stocks, site._log, lambda: site.now, restorer.has_scanned)
    free = os.statvfs(site.root)
    short = MinFree(free.f_bavail * free.f_frsize + 64 * 2**30)
    site.keep(NOW + 3 * DAY, min_free=short)
    ledger = site.state / FILE_NAME
    elsewhere = ledger.rename(ledger.with_name("elsewhere"))
    restorer.scan(threading.Event())  # it fails
    elsewhere.rename(ledger)
    assert site.events("ledger.failed")
    restorer.scan(threading.Event())  # which it does not at once do again
    site.keep(NOW + 3 * DAY)
    assert len(site.sent()) == 4
    assert not site.events("disk.low"), "there is something left"
    restorer._again.clear()  # a minute later
    restorer.scan(threading.Event())
    assert site.doubted
    site.keeper.tick()
    assert site.sent() == []
    removed = [event["archive"] for event in site.events("archive.expired")]
    assert removed == ["old-0.cfg", "old-1.cfg", "old-2.cfg", "new.cfg"]


def test_a_clock_that_is_behind_costs_no_history(site: Lost, monkeypatch: pytest.MonkeyPatch) -> None:
    site.send("a.cfg", NOW)
    site.lose()
    monkeypatch.setattr(place, "datetime", Behind)
    site.restore()
    assert not site.rows()
    [said] = site.events("ledger.incomplete")
    assert "the clock may be wrong" in said["error"]
    monkeypatch.undo()
    site.restore()
    assert len(site.rows()) == 1


def test_records_of_the_future_beside_files_that_were_copied_are_no_loss(site: Lost) -> None:
    record = site.send("a.cfg", NOW).with_name("a.cfg.receipt.json")
    good = record.read_text()
    ahead = (datetime.now(NOW.tzinfo) + DAY).isoformat()  # by a clock that is a day behind now
    record.write_text(re.sub('"ended_at": "[^"]+"', f'"ended_at": "{ahead}"', good))
    site.lose()
    site.restore()
    assert not site.rows()
    assert site.events("ledger.incomplete")
    record.write_text(good)
    site.restore()
    assert len(site.rows()) == 1


def test_what_is_older_than_the_history_is_neither_restored_nor_unknown(site: Lost) -> None:
    site.send("old.cfg", NOW - 2 * DAY)
    site.send("new.cfg", NOW)
    site.lose()
    site.forgotten = NOW - DAY
    site.restore()
    assert [row[0] for row in site.rows()] == [b"new.cfg"]
    [said] = site.events("ledger.restored")
    assert (said["restored_archives"], said["unknown_files"]) == (1, 0)


def test_the_last_ones_are_kept_while_only_some_are_known(site: Lost) -> None:
    for number in range(100):
        site.send(f"{number:02}.cfg", NOW + timedelta(minutes=number))
    site.lose()
    site.restore(stop=Stopped())
    known = len(site.rows())
    assert 0 < known < 100
    site.keep(NOW + DAY, keep_last=2)
    assert site.sent() == [f"{number:02}.cfg" for number in range(known - 2, 100)]
    site.restore()
    site.keep(NOW + DAY)
    assert site.sent() == ["98.cfg", "99.cfg"]


@pytest.mark.parametrize("year", [1969, 2300, 12_000])
def test_odd_times_of_files_end_nothing(site: Lost, monkeypatch: pytest.MonkeyPatch, year: int) -> None:
    site.send("a.cfg", NOW)
    site.lose()
    site.forgotten = datetime(1, 1, 1, tzinfo=NOW.tzinfo)
    odd = (year - 1970) * 366 * 86400 * 10**9

    def stat(self: DropFolder, relpath: bytes) -> os.stat_result:
        found = list(real(self, relpath))
        times = {"st_mtime_ns": odd, "st_ctime_ns": odd, "st_mtime": odd / 1e9, "st_ctime": odd / 1e9}
        return os.stat_result(found, times)

    real = DropFolder.stat
    monkeypatch.setattr(DropFolder, "stat", stat)
    site.restore()
    assert bool(site.rows()) == (year < 2000)
    assert bool(site.events("ledger.incomplete")) == (year > 2000)


def test_empty_folders_are_walked_with_signs_of_life(site: Lost) -> None:
    for number in range(50):
        (site.root / "sent" / str(number)).mkdir(parents=True)
    beats = itertools.count()
    sent = place.StoredFolder("switches", site.folder, b"sent", DeliveryState.DELIVERED, b"receipt")
    assert sent.files(lambda: next(beats) >= 0, place.ReadProblems()) == []
    assert next(beats) > 50


def test_the_latest_of_several_records_is_of_the_file(site: Lost) -> None:
    site.send("a.cfg", NOW).unlink()  # by hand, and its receipt was left
    site.send("a.cfg", NOW + DAY, b"xyz")
    latest = site.rows()[-1]
    assert (site.root / "sent" / "a.cfg.receipt-2.json").exists()
    site.lose()
    site.restore()
    assert site.rows() == [latest]


def test_its_device_is_known_again_by_what_arrived_whole(site: Lost) -> None:
    for minutes in (2, 1):
        site.send(f"{minutes}.cfg", NOW + timedelta(minutes=minutes))
    site.send("refused.cfg", NOW + timedelta(minutes=3), good=False)
    broken = site.send("broken.cfg", NOW + timedelta(minutes=4), good=False)
    record = broken.with_name("broken.cfg.reason.json")
    record.write_text(record.read_text().replace('"archive_refused"', '"truncated"'))
    site.lose()
    site.restore(lambda _: "r1")
    assert len(site.rows()) == 4
    with closing(sqlite3.connect(site.state / FILE_NAME)) as db:
        [device] = LedgerQueries(db).devices(NOW)
    assert (device.device, device.last_at, device.archives) == ("r1", NOW + timedelta(minutes=3), 3)


def changed(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record | fields


def of_delivery(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record | {"deliveries": [record["deliveries"][0] | fields]}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda _: [[]], id="no object"),
        pytest.param(lambda _: {}, id="empty"),
        pytest.param(changed(drop="others"), id="another drop's"),
        pytest.param(changed(size=4), id="another size"),
        pytest.param(changed(size="3"), id="a size in words"),
        pytest.param(changed(archive="b.cfg"), id="another's"),
        pytest.param(changed(archive="../../etc/a.cfg"), id="of elsewhere"),
        pytest.param(changed(archive="/a.cfg"), id="of the root"),
        pytest.param(changed(archive=""), id="of nothing"),
        pytest.param(changed(digest="sha256:$(id)"), id="a digest that is none"),
        pytest.param(changed(digest="nosuch:abcdef12"), id="of no algorithm"),
        pytest.param(changed(digest=None), id="without a digest"),
        pytest.param(of_delivery(digest=None), id="delivered without a digest"),
        pytest.param(changed(queued_at="0001-01-01T00:00:00+14:00"), id="before all time"),
        pytest.param(changed(queued_at="2026-01-01T00:00:00"), id="of no zone"),
        pytest.param(changed(deliveries=[]), id="never delivered"),
        pytest.param(of_delivery(state="pending"), id="pending"),
        pytest.param(of_delivery(state="rejected"), id="rejected"),
        pytest.param(of_delivery(delivery_id="x"), id="no id"),
        pytest.param(of_delivery(http_status=10**30), id="a large number"),
        pytest.param(of_delivery(reason="because"), id="no reason"),
        pytest.param(of_delivery(receipt="x" * (1 << 17)), id="too much"),
        pytest.param(of_delivery(receipt={"a": 1}), id="no text"),
    ],
)
def test_a_record_that_can_not_be_of_the_file_is_not_believed(
    site: Lost, change: Callable[[dict[str, Any]], Any]
) -> None:
    site.send("a.cfg", NOW)
    site.send("good.cfg", NOW)
    record = site.root / "sent" / "a.cfg.receipt.json"
    record.write_text(json.dumps(change(json.loads(record.read_text()))))
    site.lose()
    site.restore()
    assert [row[0] for row in site.rows()] == [b"good.cfg"]
    [said] = site.events("ledger.restored")
    assert (said["restored_archives"], said["unknown_files"]) == (1, 1)


@pytest.mark.parametrize(
    "spoil",
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
def test_a_record_that_can_not_be_read_is_none(site: Lost, spoil: Callable[[bytes], bytes]) -> None:
    record = site.send("a.cfg", NOW).with_name("a.cfg.receipt.json")
    good = record.read_bytes()
    spoilt = spoil(good)
    assert spoilt != good
    record.write_bytes(spoilt)
    site.lose()
    site.restore()
    assert not site.rows()
    record.write_bytes(good)
    site.lose()
    site.restore()
    assert len(site.rows()) == 1


def test_what_was_planted_before_a_record_does_not_hide_it(site: Lost) -> None:
    (site.root / "sent").mkdir()
    (site.root / "sent" / "a.cfg.receipt.json").mkdir()
    (site.root / "sent" / "a.cfg.receipt-2.json").symlink_to("/etc/hostname")
    os.mkfifo(site.root / "sent" / "a.cfg.receipt-3.json")
    (site.root / "sent" / "a.cfg.receipt-4.json").write_text("{}")
    site.send("a.cfg", NOW)
    assert (site.root / "sent" / "a.cfg.receipt-5.json").exists()
    site.lose()
    site.restore()
    assert [row[0] for row in site.rows()] == [b"a.cfg"]


def test_one_id_for_two_costs_no_other_archive(site: Lost) -> None:
    for name in ("a.cfg", "b.cfg", "c.cfg"):
        site.send(name, NOW)
    first, second = (site.root / "sent" / f"{name}.cfg.receipt.json" for name in "ab")
    record = json.loads(first.read_text())
    first.write_text(json.dumps(record | {"deliveries": record["deliveries"] * 2}))
    second.write_text(json.dumps(json.loads(second.read_text()) | {"deliveries": record["deliveries"]}))
    site.lose()
    site.restore()
    assert b"c.cfg" in {row[0] for row in site.rows()}
    assert len(site.rows()) == 2


def test_a_link_in_the_place_of_a_file_or_folder_is_not_followed(site: Lost) -> None:
    site.send("deep/a.cfg", NOW)
    (site.root / "sent" / "deep").rename(site.root.parent / "outside")
    (site.root / "sent" / "deep").symlink_to(site.root.parent / "outside")
    (site.root / "sent" / "a.cfg").symlink_to(site.root.parent / "outside" / "a.cfg")
    (site.root / "sent" / "a.cfg.receipt.json").write_bytes(
        (site.root.parent / "outside" / "a.cfg.receipt.json").read_bytes()
    )
    site.lose()
    site.restore()
    assert not site.rows()
