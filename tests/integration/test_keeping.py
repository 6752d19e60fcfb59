"""The keeper of sent archives on a real ledger and real folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from backupd.core.names import MAX_RECEIPT_FILE_BYTES, RECEIPT_FILE_KINDS
from backupd.core.retention_policy import MinFree, RetentionPolicy
from backupd.delivery.retention import Retention
from backupd.ledger.port import CompletedArchive, DispositionResult
from backupd.ledger.sqlite.connection import FILE_NAME
from backupd.ledger.sqlite.sent_rows import SqliteSentIndex, open_sent_index
from tests.factories import NOW, a_fingerprint, a_sighting, delivered, finished
from tests.privileges import needs_root
from tests.site import Site

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, tmp_path / "drop")
    yield site
    site.end()


def test_what_is_older_goes_with_its_receipt_and_nothing_else_does(site: Site) -> None:
    old = site.send("old.cfg", NOW - 91 * DAY)
    site.send("new.cfg", NOW - 89 * DAY)
    refused = site.send("refused.cfg", NOW - 1000 * DAY, good=False)
    (site.root / "pending.cfg").write_bytes(b"abc")
    (site.root / "sent" / "foreign.cfg").write_bytes(b"abc")
    assert old.with_name("old.cfg.receipt.json").exists()
    site.keep(keep_for=90 * DAY)
    assert site.sent() == ["foreign.cfg", "new.cfg"]
    assert not old.with_name("old.cfg.receipt.json").exists()
    assert old.with_name("new.cfg.receipt.json").exists()
    assert refused.exists()
    assert (site.root / "pending.cfg").exists()
    [said] = site.events("archive.expired")
    assert (said["archive"], said["reason"], said["path"]) == ("old.cfg", "too_old", str(old))
    assert site.removals() == {"old.cfg": "expired", "new.cfg": None, "refused.cfg": None}


def test_records_that_others_planted_cost_little_when_it_goes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = site.send("old.cfg", NOW - 91 * DAY)
    record = old.with_name("old.cfg.receipt.json")
    ours = record.read_bytes()
    record.write_bytes(b"[[]" + b",[]" * 500_000)
    for number in range(2, 150):
        os.link(record, old.with_name(f"old.cfg.receipt-{number}.json"))
    old.with_name("old.cfg.receipt-3.json").unlink()
    old.with_name("old.cfg.receipt-3.json").write_bytes(ours)
    read, real = [], json.loads

    def counted(content: bytes) -> Any:
        read.append(len(content))
        return real(content)

    monkeypatch.setattr(json, "loads", counted)
    site.keep(keep_for=90 * DAY)
    assert site.removals() == {"old.cfg": "expired"}
    assert not old.with_name("old.cfg.receipt-3.json").exists()
    assert len(read) == 3
    assert max(read) <= MAX_RECEIPT_FILE_BYTES

    again = site.send("new.cfg", NOW - 91 * DAY)
    for number in range(2, 150):
        os.link(record, again.with_name(f"new.cfg.receipt-{number}.json"))
    again.with_name("new.cfg.receipt.json").write_bytes(b"{}")
    read.clear()
    site.keep(keep_for=90 * DAY)
    assert not again.exists()
    assert len(read) == RECEIPT_FILE_KINDS


@pytest.mark.parametrize("checksums", [False, True])
def test_a_checksum_file_goes_with_its_archive_only_where_it_came_with_it(
    site: Site, checksums: bool
) -> None:
    """Elsewhere it is an archive of its own, which was delivered by itself."""
    site.checksums = checksums
    old = site.send("old.cfg", NOW - 91 * DAY)
    old.with_name("old.cfg.sha256").write_text("0" * 64)
    site.keep(keep_for=90 * DAY)
    assert site.sent() == ([] if checksums else ["old.cfg.sha256"])


@pytest.mark.parametrize(
    "order", [RetentionPolicy(keep_for=90 * DAY), RetentionPolicy(min_free=MinFree(1 << 60))]
)
def test_what_lies_on_a_filesystem_that_is_away_is_not_taken_for_gone(
    site: Site, order: RetentionPolicy
) -> None:
    old = site.send("old.cfg", NOW - 91 * DAY)
    away = site.root.with_name("away")
    site.root.rename(away)
    (site.root / "sent").mkdir(parents=True)  # what its place shows without it
    site.order = order
    assert not site.keeper.tick()  # nor is there more to do at once
    assert site.removals() == {"old.cfg": None}
    shutil.rmtree(site.root)
    away.rename(site.root)
    site.keep()
    assert site.removals() == {"old.cfg": "expired"}
    assert not old.exists()


def test_nothing_is_touched_or_opened_without_an_order(site: Site) -> None:
    site.send("old.cfg", NOW - 1000 * DAY)
    site.keeper = Retention(lambda: pytest.fail("opened"), site._stocks, site._log)
    site.keep()
    assert site.sent() == ["old.cfg"]


def test_the_last_of_each_folder_stay_however_old(site: Site) -> None:
    for number in range(5):
        site.send(f"a/{number}.cfg", NOW - (200 - number) * DAY)
    site.send("b/only.cfg", NOW - 500 * DAY)
    site.keep(keep_for=90 * DAY, keep_last=2)
    assert site.sent() == ["a/3.cfg", "a/4.cfg", "b/only.cfg"]


def test_the_last_alone_count_per_device_where_the_labels_tell_it(site: Site) -> None:
    site.pattern = re.compile(r"(?P<device>[^-]+)-.*")
    for number in range(4):
        for device in ("r1", "r2"):
            site.send(f"{device}-{number}.cfg", NOW - timedelta(hours=10 - number))
    site.keep(keep_last=3)
    assert site.sent() == [f"{device}-{number}.cfg" for device in ("r1", "r2") for number in (1, 2, 3)]
    site.send("r1-9.cfg", NOW)
    site.keep()
    assert site.sent() == ["r1-2.cfg", "r1-3.cfg", "r1-9.cfg", "r2-1.cfg", "r2-2.cfg", "r2-3.cfg"]
    assert {e["reason"] for e in site.events("archive.expired")} == {"too_many"}


def test_what_was_among_the_last_goes_once_newer_ones_came(site: Site) -> None:
    for number in range(2):
        site.send(f"{number}.cfg", NOW - (200 - number) * DAY)
    site.keep(keep_for=90 * DAY, keep_last=2)
    assert site.sent() == ["0.cfg", "1.cfg"]
    site.send("2.cfg", NOW)
    site.keep(NOW + DAY)
    assert site.sent() == ["1.cfg", "2.cfg"]


def test_many_more_than_a_batch_are_all_seen_to(site: Site) -> None:
    for number in range(200):
        site.send(f"{number:03}.cfg", NOW - DAY + timedelta(seconds=number))
    site.keep(keep_last=10)
    assert site.sent() == [f"{number:03}.cfg" for number in range(190, 200)]
    site.keep(NOW + DAY, keep_for=DAY / 2)
    assert site.sent() == []


def test_another_order_is_applied_to_what_was_looked_at_before(site: Site) -> None:
    for number in range(4):
        site.send(f"{number}.cfg", NOW - 100 * DAY + timedelta(seconds=number))
    site.keep(keep_for=90 * DAY, keep_last=3)
    assert len(site.sent()) == 3
    site.keep(keep_for=90 * DAY, keep_last=1)
    assert site.sent() == ["3.cfg"]


def _rewrite(path: Path) -> None:
    path.write_bytes(b"somebody else's")


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"abc")
    os.rename(other, path)


def _link(path: Path) -> None:
    path.rename(path.with_name("target.cfg"))
    path.symlink_to("target.cfg")


@pytest.mark.parametrize("tamper", [_rewrite, _replace, _link])
def test_a_file_that_is_not_ours_any_more_stays(site: Site, tamper: Callable[[Path], None]) -> None:
    path = site.send("old.cfg", NOW - 91 * DAY)
    time.sleep(0.01)  # for another modification time
    tamper(path)
    site.keep(keep_for=90 * DAY)
    assert os.path.lexists(path)
    assert path.with_name("old.cfg.receipt.json").exists()
    assert site.removals() == {"old.cfg": "changed"}
    assert site.events("archive.expired") == []


def test_a_sent_folder_that_was_swapped_for_a_link_leads_nowhere(site: Site, tmp_path: Path) -> None:
    path = site.send("site/old.cfg", NOW - 91 * DAY)
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    site.keep(keep_for=90 * DAY)
    assert (tmp_path / "elsewhere" / "old.cfg").exists()
    assert site.events("archive.expired") == []


def test_what_somebody_removed_is_noted_and_not_looked_for_again(site: Site) -> None:
    site.send("old.cfg", NOW - 91 * DAY).unlink()
    site.keep(keep_for=90 * DAY)
    assert site.removals() == {"old.cfg": "gone"}


def test_without_the_sent_folder_nothing_is_taken_for_gone(site: Site) -> None:
    site.send("old.cfg", NOW - 91 * DAY)
    (site.root / "sent").rename(site.root / "not-mounted")
    site.keep(keep_for=90 * DAY)
    assert site.removals() == {"old.cfg": None}
    (site.root / "not-mounted").rename(site.root / "sent")
    site.keep()
    assert site.removals() == {"old.cfg": "expired"}


@pytest.mark.parametrize("how_far", ["noted", "renamed", "removed"])
def test_a_removal_that_a_crash_cut_short_is_finished(site: Site, how_far: str) -> None:
    path = site.send("old.cfg", NOW - 91 * DAY)
    shelf = open_sent_index(site.state)
    [kept] = shelf.oldest("switches", None, NOW, 10)
    shelf.condemn([kept.archive.id])
    shelf.close()
    if how_far == "renamed":
        path.rename(path.with_name(f".backupd-{kept.archive.id}.expired"))
    if how_far == "removed":
        path.unlink()
    site.keep(keep_for=90 * DAY)
    assert os.listdir(site.root / "sent") == []
    assert site.removals() == {"old.cfg": "expired"}
    assert len(site.events("archive.expired")) == 1


@pytest.mark.parametrize("content", ['{"archive": "old.cfg"}', "[" * 100_000])
def test_a_receipt_under_our_name_that_is_somebody_else_s_stays(site: Site, content: str) -> None:
    (site.root / "sent").mkdir()
    foreign = site.root / "sent" / "old.cfg.receipt.json"
    foreign.write_text(content)
    site.send("old.cfg", NOW - 91 * DAY)
    assert (site.root / "sent" / "old.cfg.receipt-2.json").exists()
    site.keep(keep_for=90 * DAY)
    assert os.listdir(site.root / "sent") == [foreign.name]


@needs_root
@pytest.mark.root
def test_what_cannot_be_removed_is_said_once_and_tried_again(site: Site) -> None:
    path = site.send("old.cfg", NOW - 91 * DAY)
    subprocess.run(["mount", "--bind", "-o", "ro", str(path.parent), str(path.parent)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(path.parent)], check=True)
        site.keep(keep_for=90 * DAY)
        site.keep()
    finally:
        subprocess.run(["umount", "-l", str(path.parent)], check=True)
    [said] = site.events("disposition.failed")
    assert "Read-only" in said["error"]
    assert path.exists()
    site.keep()
    assert site.sent() == []


def many_delivered(site: Site, count: int) -> list[CompletedArchive]:
    """Have the ledger know of deliveries, without files."""
    names = [b"h-%d-%d" % (count, n) for n in range(count)]
    site.ledger.enqueue([a_sighting(n, fingerprint=a_fingerprint()) for n in names], ["vault"], NOW)
    claims = [c for _ in names for c in site.ledger.claim("vault", NOW)]
    return site.ledger.record([finished(c, delivered()) for c in claims], NOW)


def steps_of(site: Site, now: datetime, **order: Any) -> int:
    """Keep to an order, and return how many steps SQLite took for that."""
    connection = sqlite3.connect(site.state / FILE_NAME, isolation_level=None)
    site._closing.callback(connection.close)
    site.keeper._opened = SqliteSentIndex(connection)
    steps = 0

    def tick() -> None:
        nonlocal steps
        steps += 1

    connection.set_progress_handler(tick, 1)
    site.keep(now, **order)
    return steps


def test_the_cost_of_a_look_does_not_grow_with_the_history(site: Site) -> None:
    steps: list[int] = []
    for count in (100, 3000):
        settled = many_delivered(site, count)
        done = [DispositionResult(s.archive.id, b"sent/x/" + s.archive.relpath) for s in settled]
        site.ledger.record_dispositions(done, [], NOW)
        (site.root / "sent").mkdir(exist_ok=True)
        site.keep(NOW + DAY, keep_for=90 * DAY, keep_last=5)
        steps.append(steps_of(site, NOW + DAY))
    assert steps[1] < 2 * steps[0] + 100


@pytest.mark.parametrize("step", [1, -1], ids=["oldest first", "newest first"])
def test_the_cost_of_what_is_removed_is_that_of_each(site: Site, step: int) -> None:
    steps: list[int] = []
    for count in (100, 1500):
        settled = many_delivered(site, count)
        for minute, one in enumerate(settled[::step]):
            to = b"sent/%d/%s" % (count, one.archive.relpath)
            site.ledger.record_dispositions(
                [DispositionResult(one.archive.id, to)], [], NOW + timedelta(minutes=minute)
            )
        (site.root / "sent").mkdir(exist_ok=True)
        steps.append(steps_of(site, NOW + 2 * DAY, keep_last=5))
    assert steps[1] < 2 * 15 * steps[0]


def test_the_last_ones_are_those_that_came_last_though_the_clock_was_behind(site: Site) -> None:
    for number in range(3):
        site.send("a.cfg", NOW + number * HOUR, b"right")
    site.send("a.cfg", NOW - 2000 * DAY, b"by a clock that was behind")
    site.keep(NOW + DAY, keep_last=1)
    contents = {path.read_bytes() for path in (site.root / "sent").iterdir() if path.suffix != ".json"}
    assert contents == {b"right", b"by a clock that was behind"}
    site.send("a.cfg", NOW + 4 * HOUR, b"right again")
    site.keep(NOW + DAY)
    [last] = [path for path in (site.root / "sent").iterdir() if path.suffix != ".json"]
    assert last.read_bytes() == b"right again"


def test_the_last_ones_of_a_backlog_that_was_sent_newest_first(site: Site) -> None:
    """As `priority = "newest"` does."""
    for number in range(30):
        site.admit(f"{number:02}.cfg", NOW)
    for minute, claim in enumerate(reversed(site.ledger.claim("vault", NOW, most=99))):
        site.put_away(claim, NOW + timedelta(minutes=minute), delivered())
    site.keep(NOW + DAY, keep_last=3)
    newest, sent_last = ["27.cfg", "28.cfg", "29.cfg"], ["00.cfg", "01.cfg", "02.cfg"]
    assert site.sent() == sent_last + newest
    for number in range(30, 33):
        site.send(f"{number}.cfg", NOW + DAY)
    site.keep(NOW + DAY)
    assert site.sent() == ["30.cfg", "31.cfg", "32.cfg"]


# room on the disk


@pytest.fixture
def full_site(tmp_path: Path) -> Iterator[Site]:
    """A site whose drop folder is a filesystem of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    try:
        site = Site(tmp_path, disk)
        yield site
        site.end()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


MIB = 1024 * 1024


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("least", [MinFree(4 * MIB), MinFree(percent=50)])
def test_where_the_disk_gets_full_the_oldest_go_until_there_is_room(full_site: Site, least: MinFree) -> None:
    site = full_site
    for number in range(6):
        site.send(f"{number}.cfg", NOW - (6 - number) * DAY, bytes(MIB))
    site.send("refused.cfg", NOW - 100 * DAY, bytes(MIB // 2), good=False)
    site.keep(keep_last=10, min_free=least)
    assert site.sent() == ["3.cfg", "4.cfg", "5.cfg"]
    assert [e["archive"] for e in site.events("archive.expired")] == ["0.cfg", "1.cfg", "2.cfg"]
    assert {e["reason"] for e in site.events("archive.expired")} == {"disk_low"}
    assert site.events("disk.low") == []
    assert (site.root / "rejected" / "refused.cfg").exists()


@needs_root
@pytest.mark.root
def test_where_that_is_not_enough_it_is_said_once_and_again_while_it_lasts(full_site: Site) -> None:
    site = full_site
    site.send("one.cfg", NOW - DAY, bytes(MIB))
    pending = site.root / "pending.cfg"
    pending.write_bytes(bytes(5 * MIB))
    site.keep(min_free=MinFree(4 * MIB))
    assert (site.sent(), pending.exists()) == ([], True)
    [said] = site.events("disk.low")
    assert (said["level"], said["drop"], said["min_free_bytes"]) == ("error", "switches", 4 * MIB)
    assert said["free_bytes"] < 4 * MIB
    site.keep(NOW + timedelta(seconds=30))
    assert len(site.events("disk.low")) == 1
    site.keep(NOW + timedelta(seconds=61))
    assert len(site.events("disk.low")) == 2
    pending.unlink()
    site.keep(NOW + timedelta(seconds=62))
    pending.write_bytes(bytes(5 * MIB))
    site.keep(NOW + timedelta(seconds=63))
    assert len(site.events("disk.low")) == 3
