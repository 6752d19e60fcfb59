"""The history of a ledger that was lost, read from the records beside archives: on real folders."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from backupd.core.model import Archive
from backupd.delivery.disposal import Rule
from backupd.delivery.restoring import Restorer
from backupd.ledger.database import FILE_NAME, open_ledger
from backupd.ledger.history import History
from backupd.ledger.sqlite import SqliteLedger
from backupd.ledger.sqlite_shelf import open_shelf
from tests.factories import NOW
from tests.site import Site

TELLS = """
    SELECT relpath, inode, archive.size, mtime_ns, admitted_at, archive.state, archive.digest, disposition,
        live, disposed_to, delivery.id, destination, delivery.state, ended_at, reason, error,
        delivery.digest, verified, http_status, receipt
    FROM archive JOIN delivery ON archive_id = archive.id ORDER BY archive.id
"""


class Lost(Site):
    """A site whose ledger is lost, and begun anew."""

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
        rules = {"switches": Rule(self.folder, "move", b"sent", b"rejected")}
        restorer = Restorer(lambda: open_shelf(self.state), rules, device_of, self._log)
        restorer.run(stop or threading.Event())


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

    assert site.rows() == before
    [said] = site.events("ledger.restored")
    assert (said["drop"], said["restored"], said["unknown"]) == ("switches", 6, 0)
    assert site.ledger.quarantined() == 1
    with closing(sqlite3.connect(site.state / FILE_NAME)) as db:
        audited = History(db).in_sent("switches", None, None, 100)
    assert len(audited) == 5


def test_it_is_older_than_what_came_since_and_ends_in_its_time(site: Lost) -> None:
    old = site.send("old.cfg", NOW)
    site.lose()
    site.send("new.cfg", NOW + timedelta(minutes=1))
    site.restore()
    with closing(sqlite3.connect(site.state / FILE_NAME)) as db:
        assert [row[0] for row in db.execute("SELECT relpath FROM archive ORDER BY id")] == [
            b"old.cfg",
            b"new.cfg",
        ]
    assert site.ledger.latest() == NOW + timedelta(minutes=1)
    put_away = old.stat().st_ctime  # the time of a record is not believed, where something hangs on it
    in_time = NOW.fromtimestamp(put_away, NOW.tzinfo) + timedelta(days=90)
    site.keep(in_time - timedelta(minutes=1), keep_for=timedelta(days=90))
    assert old.exists()
    site.keep(in_time + timedelta(minutes=1))
    assert not old.exists()
    assert not old.with_name("old.cfg.receipt.json").exists()


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
    assert said["restored"] == 600 - begun

    with closing(sqlite3.connect(site.state / FILE_NAME)) as db:
        db.execute("DELETE FROM archive")
        db.commit()
    site.restore()
    assert not site.rows()


def test_a_folder_that_is_not_there_now_is_looked_at_by_the_next_start(site: Lost) -> None:
    site.send("a.cfg", NOW)
    site.lose()
    (site.root / "sent").rename(site.root / "elsewhere")
    site.restore()
    (site.root / "elsewhere").rename(site.root / "sent")
    site.restore()
    assert len(site.rows()) == 1


def test_its_device_is_known_again(site: Lost) -> None:
    for minutes in (2, 1):
        site.send(f"{minutes}.cfg", NOW + timedelta(minutes=minutes))
    site.lose()
    site.restore(lambda archive: "r1" if archive.relpath != b"0.cfg" else None)
    with closing(sqlite3.connect(site.state / FILE_NAME)) as db:
        [device] = History(db).devices(NOW)
    assert (device.device, device.last_at, device.archives) == ("r1", NOW + timedelta(minutes=2), 2)


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
        pytest.param(changed(digest="sha256:$(id)"), id="no digest"),
        pytest.param(changed(admitted_at="2999-01-01T00:00:00+00:00"), id="of the future"),
        pytest.param(changed(admitted_at="0001-01-01T00:00:00+14:00"), id="before all time"),
        pytest.param(changed(admitted_at="2026-01-01T00:00:00"), id="of no zone"),
        pytest.param(changed(deliveries=[]), id="never delivered"),
        pytest.param(of_delivery(state="pending"), id="pending"),
        pytest.param(of_delivery(state="rejected"), id="rejected"),
        pytest.param(of_delivery(ended_at="2999-01-01T00:00:00+00:00"), id="to end"),
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
    assert (said["restored"], said["unknown"]) == (1, 1)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"[" * 100_000, b'{"archive": "\\ud800"}', b'{"size": 1e999}', b'"' + b"x" * (5 << 20)],
)
def test_a_record_that_can_not_be_read_is_none(site: Lost, content: bytes) -> None:
    site.send("a.cfg", NOW)
    (site.root / "sent" / "a.cfg.receipt.json").write_bytes(content)
    site.lose()
    site.restore()
    assert not site.rows()


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
