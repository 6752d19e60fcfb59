"""The retention of sent archives, on a real ledger and real folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

from backupd.core.retention_policy import MinFree, RetentionPolicy
from backupd.delivery import past_devices, retention
from backupd.delivery.receipt_file import MAX_RECEIPT_FILE_BYTES, MAX_RECEIPT_FILE_NUMBER, file_time
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.sqlite.connection import open_for_reading
from backupd.ledger.sqlite.queries import LedgerQueries
from tests.factories import NOW, delivered
from tests.privileges import a_folder_of_nobody, without_rights
from tests.site import Site, set_time

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, tmp_path / "drop")
    yield site
    site.close()


def test_an_expired_archive_is_removed_with_its_receipt_file_and_no_other_file(site: Site) -> None:
    old = site.send("old.cfg", NOW - 91 * DAY)
    site.send("new.cfg", NOW - 89 * DAY)
    refused = site.send("refused.cfg", NOW - 1000 * DAY, accepted=False)
    (site.root / "pending.cfg").write_bytes(b"abc")
    (site.root / "sent" / "foreign.cfg").write_bytes(b"abc")
    assert old.with_name("old.cfg.receipt.json").exists()
    site.apply(keep_for=90 * DAY)
    assert site.sent() == ["foreign.cfg", "new.cfg"]
    assert not old.with_name("old.cfg.receipt.json").exists()
    assert old.with_name("new.cfg.receipt.json").exists()
    assert refused.exists()
    assert (site.root / "pending.cfg").exists()
    [event] = site.events("archive.expired")
    assert (event["archive"], event["reason"], event["path"]) == ("old.cfg", "too_old", str(old))


def test_receipt_files_of_other_users_cost_little_at_the_removal(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = site.send("old.cfg", NOW - 91 * DAY)
    receipt = old.with_name("old.cfg.receipt.json")
    own_content = receipt.read_bytes()
    receipt.write_bytes(b"[[]" + b",[]" * 500_000)
    set_time(receipt, NOW - 91 * DAY)
    for number in range(2, 150):
        os.link(receipt, old.with_name(f"old.cfg.receipt-{number}.json"))
    old.with_name("old.cfg.receipt-3.json").unlink()
    old.with_name("old.cfg.receipt-3.json").write_bytes(own_content)
    read, real = [], DropFolder.read

    def counted(folder: DropFolder, relpath: bytes, max_bytes: int) -> bytes:
        read.append(max_bytes)
        return real(folder, relpath, max_bytes)

    monkeypatch.setattr(DropFolder, "read", counted)
    site.apply(keep_for=90 * DAY)
    assert site.sent() == []
    assert not old.with_name("old.cfg.receipt-3.json").exists()
    assert old.with_name("old.cfg.receipt-4.json").exists()
    assert len(read) <= MAX_RECEIPT_FILE_NUMBER
    assert max(read) <= MAX_RECEIPT_FILE_BYTES + 1


@pytest.mark.parametrize("checksums", [False, True])
def test_a_checksum_file_is_removed_with_its_archive_only_if_it_belongs_to_it(
    site: Site, checksums: bool
) -> None:
    """Otherwise it is an archive of its own, which was delivered separately."""
    site.uses_checksum_files = checksums
    old = site.send("old.cfg", NOW - 91 * DAY)
    old.with_name("old.cfg.sha256").write_text("0" * 64)
    site.apply(keep_for=90 * DAY)
    assert site.sent() == ([] if checksums else ["old.cfg.sha256"])


@pytest.mark.parametrize(
    "policy", [RetentionPolicy(keep_for=90 * DAY), RetentionPolicy(min_free=MinFree(1 << 60))]
)
def test_archives_on_an_unmounted_filesystem_are_removed_once_it_is_mounted(
    site: Site, policy: RetentionPolicy
) -> None:
    old = site.send("old.cfg", NOW - 91 * DAY)
    away = site.root.with_name("away")
    site.root.rename(away)
    (site.root / "sent").mkdir(parents=True)  # the empty mount point
    site.policy = policy
    site.apply()
    assert (away / "sent" / "old.cfg").exists()
    shutil.rmtree(site.root)
    away.rename(site.root)
    site.apply()
    assert not old.exists()
    assert len(site.events("archive.expired")) == 1


def test_without_a_policy_nothing_is_removed(site: Site) -> None:
    site.send("old.cfg", NOW - 1000 * DAY)
    site.apply()
    assert site.sent() == ["old.cfg"]


def test_the_newest_archives_of_each_folder_stay_at_any_age(site: Site) -> None:
    for number in range(5):
        site.send(f"a/{number}.cfg", NOW - (200 - number) * DAY)
    site.send("b/only.cfg", NOW - 500 * DAY)
    site.apply(keep_for=90 * DAY, keep_last=2)
    assert site.sent() == ["a/3.cfg", "a/4.cfg", "b/only.cfg"]


def test_the_newest_archives_are_counted_per_device_if_the_label_pattern_names_it(site: Site) -> None:
    site.label_pattern = re.compile(r"(?P<device>[^-]+)-.*")
    for number in range(4):
        for device in ("r1", "r2"):
            site.send(f"{device}-{number}.cfg", NOW - timedelta(hours=10 - number))
    site.apply(keep_last=3)
    assert site.sent() == [f"{device}-{number}.cfg" for device in ("r1", "r2") for number in (1, 2, 3)]
    site.send("r1-9.cfg", NOW)
    site.apply()
    assert site.sent() == ["r1-2.cfg", "r1-3.cfg", "r1-9.cfg", "r2-1.cfg", "r2-2.cfg", "r2-3.cfg"]
    assert {e["reason"] for e in site.events("archive.expired")} == {"too_many"}


def test_an_archive_is_removed_once_enough_newer_ones_have_arrived(site: Site) -> None:
    for number in range(2):
        site.send(f"{number}.cfg", NOW - (200 - number) * DAY)
    site.apply(keep_for=90 * DAY, keep_last=2)
    assert site.sent() == ["0.cfg", "1.cfg"]
    site.send("2.cfg", NOW)
    site.apply(NOW + DAY)
    assert site.sent() == ["1.cfg", "2.cfg"]


def test_more_archives_than_a_batch_are_all_removed(site: Site) -> None:
    for number in range(200):
        site.send(f"{number:03}.cfg", NOW - DAY + timedelta(seconds=number))
    site.apply(keep_last=10)
    assert site.sent() == [f"{number:03}.cfg" for number in range(190, 200)]
    site.apply(NOW + DAY, keep_for=DAY / 2)
    assert site.sent() == []


def test_a_new_policy_applies_to_archives_that_were_checked_before(site: Site) -> None:
    for number in range(4):
        site.send(f"{number}.cfg", NOW - 100 * DAY + timedelta(seconds=number))
    site.apply(keep_for=90 * DAY, keep_last=3)
    assert len(site.sent()) == 3
    site.apply(keep_for=90 * DAY, keep_last=1)
    assert site.sent() == ["3.cfg"]


def _rewrite(path: Path) -> None:
    path.write_bytes(b"of another program")


def _link(path: Path) -> None:
    path.rename(path.with_name("target.cfg"))
    path.symlink_to("target.cfg")


@pytest.mark.parametrize("change", [_rewrite, _link])
def test_a_file_that_was_changed_or_replaced_stays(site: Site, change: Callable[[Path], None]) -> None:
    path = site.send("old.cfg", NOW - 91 * DAY)
    time.sleep(0.01)  # so that the modification time differs
    change(path)
    site.apply(keep_for=90 * DAY)
    assert os.path.lexists(path)
    assert path.with_name("old.cfg.receipt.json").exists()
    assert site.events("archive.expired") == []


def test_a_link_in_place_of_a_sent_folder_is_not_followed(site: Site, tmp_path: Path) -> None:
    path = site.send("site/old.cfg", NOW - 91 * DAY)
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    site.apply(keep_for=90 * DAY)
    assert (tmp_path / "elsewhere" / "old.cfg").exists()
    assert site.events("archive.expired") == []


def test_the_receipt_file_of_an_archive_that_an_operator_removed_goes_when_the_archive_would(
    site: Site,
) -> None:
    path = site.send("old.cfg", NOW - 91 * DAY)
    path.unlink()
    receipt = path.with_name("old.cfg.receipt.json")
    site.apply(NOW - 2 * DAY, keep_for=90 * DAY)
    assert receipt.exists()
    site.apply(NOW)
    assert not receipt.exists()
    [event] = site.events("archive.expired")
    assert (event["archive"], event["path"], event["size_bytes"]) == ("old.cfg", str(receipt), 0)


def test_receipt_files_without_an_archive_take_no_place_of_the_newest(site: Site) -> None:
    paths = [site.send(f"{number}.cfg", NOW + number * HOUR) for number in range(4)]
    paths[3].unlink()
    paths[0].unlink()
    site.apply(NOW + DAY, keep_last=2)
    assert site.sent() == ["1.cfg", "2.cfg"]
    assert paths[3].with_name("3.cfg.receipt.json").exists(), "it shows that the newest is missing"
    assert not paths[0].with_name("0.cfg.receipt.json").exists()


def test_without_the_sent_folder_nothing_is_removed_until_it_is_back(site: Site) -> None:
    site.send("old.cfg", NOW - 91 * DAY)
    (site.root / "sent").rename(site.root / "not-mounted")
    site.apply(keep_for=90 * DAY)
    (site.root / "not-mounted").rename(site.root / "sent")
    assert site.sent() == ["old.cfg"]
    site.apply()
    assert site.sent() == []


def test_a_removal_that_a_crash_interrupted_is_finished_and_logged(site: Site) -> None:
    """The archive is removed before its receipt file."""
    path = site.send("old.cfg", NOW - 91 * DAY)
    path.unlink()
    site.restart()
    site.apply(keep_for=90 * DAY)
    assert os.listdir(site.root / "sent") == []
    assert len(site.events("archive.expired")) == 1


@pytest.mark.parametrize("content", ['{"archive": "old.cfg"}', "[" * 100_000])
def test_a_receipt_file_of_another_program_stays(site: Site, content: str) -> None:
    (site.root / "sent").mkdir()
    foreign = site.root / "sent" / "old.cfg.receipt.json"
    foreign.write_text(content)
    set_time(foreign, NOW - 91 * DAY)
    site.send("old.cfg", NOW - 91 * DAY)
    assert (site.root / "sent" / "old.cfg.receipt-2.json").exists()
    site.apply(keep_for=90 * DAY)
    assert os.listdir(site.root / "sent") == [foreign.name]


@pytest.mark.root
def test_a_failed_removal_is_logged_and_retried(site: Site) -> None:
    path = site.send("old.cfg", NOW - 91 * DAY)
    subprocess.run(["mount", "--bind", "-o", "ro", str(path.parent), str(path.parent)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(path.parent)], check=True)
        site.apply(keep_for=90 * DAY)
    finally:
        subprocess.run(["umount", "-l", str(path.parent)], check=True)
    [event] = site.events("retention.skipped")
    assert event["error"] == ("1 that cannot be removed (Read-only file system), the first is sent/old.cfg")
    assert path.exists()
    site.apply()
    assert site.sent() == []


def test_the_newest_archives_of_a_backlog_that_was_sent_newest_first_stay(site: Site) -> None:
    """As `priority = "newest"` does."""
    for number in range(30):
        site.enqueue(f"{number:02}.cfg", NOW)
    for minute, claim in enumerate(reversed(site.ledger.claim("vault", NOW, limit=99))):
        site.finish(claim, NOW + timedelta(minutes=minute), delivered())
    site.apply(NOW + DAY, keep_last=3)
    newest, sent_last = ["27.cfg", "28.cfg", "29.cfg"], ["00.cfg", "01.cfg", "02.cfg"]
    assert site.sent() == sent_last + newest
    for number in range(30, 33):
        site.send(f"{number}.cfg", NOW + DAY)
    site.apply(NOW + DAY)
    assert site.sent() == ["30.cfg", "31.cfg", "32.cfg"]


def test_an_archive_counts_from_its_receipt_if_the_folder_was_copied(site: Site) -> None:
    """A copy, or a change of permissions, gives new change times."""
    for number in (2, 1, 0):
        site.send(f"{number}.cfg", NOW + number * DAY).chmod(0o640)
    site.apply(NOW + 90 * DAY, keep_for=90 * DAY, keep_last=2)
    assert site.sent() == ["0.cfg", "1.cfg", "2.cfg"]
    site.apply(NOW + 91 * DAY + timedelta(minutes=1))
    assert site.sent() == ["1.cfg", "2.cfg"]


def test_a_receipt_file_with_an_older_time_expires_nothing_early(site: Site) -> None:
    path = site.send("new.cfg", NOW - DAY)
    set_time(path.with_name("new.cfg.receipt.json"), NOW - 1000 * DAY)
    site.apply(keep_for=90 * DAY)
    assert site.sent() == ["new.cfg"]


def test_archives_of_one_name_are_one_series_of_their_device(site: Site) -> None:
    """Names that are taken get the time at the end."""
    site.label_pattern = re.compile(r"(?P<device>[^/]+)\.cfg")
    for day in range(4):
        site.send("r1.cfg", NOW + day * DAY, b"%d" % day)
        site.send("r2.cfg", NOW + day * DAY, b"%d" % day)
    site.apply(NOW + 9 * DAY, keep_last=2)
    kept = [(name[:2], (site.root / "sent" / name).read_bytes()) for name in site.sent()]
    assert sorted(kept) == [("r1", b"2"), ("r1", b"3"), ("r2", b"2"), ("r2", b"3")]


def test_an_archive_with_the_name_of_a_receipt_file_expires(site: Site) -> None:
    site.send("a.receipt.json", NOW - 91 * DAY)
    site.send("b.reason.json", NOW - 91 * DAY)
    site.apply(keep_for=90 * DAY)
    assert os.listdir(site.root / "sent") == []
    assert len(site.events("archive.expired")) == 2


def test_the_latest_of_several_receipt_files_belongs_to_the_file(site: Site) -> None:
    site.send("a.cfg", NOW - 91 * DAY).unlink()  # by hand, and the receipt file was left
    site.send("a.cfg", NOW - DAY, b"xyz")
    assert (site.root / "sent" / "a.cfg.receipt-2.json").exists()
    site.apply(keep_for=90 * DAY)
    assert site.sent() == ["a.cfg"]
    site.apply(NOW + 90 * DAY)
    assert site.sent() == []


def test_the_receipt_file_of_a_development_version_is_read_and_removed(site: Site) -> None:
    sent = site.send("r1.cfg", NOW - 9 * DAY)
    receipt = sent.with_name("r1.cfg.receipt.json")
    receipt.write_text(receipt.read_text().replace('"queued_at"', '"admitted_at"'))
    set_time(receipt, NOW - 9 * DAY)
    site.apply(keep_for=DAY)
    assert os.listdir(sent.parent) == []


def test_names_at_the_limit_of_their_length_expire(site: Site) -> None:
    for number in range(2):
        site.send("l" * 251 + ".cfg", NOW - (91 + number) * DAY)
    assert len(site.sent()) == 2
    site.apply(keep_for=90 * DAY)
    assert os.listdir(site.root / "sent") == []


def test_files_without_a_receipt_file_are_counted_at_each_walk(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_DISPOSITION_TIME", timedelta(0))  # their change time is now
    (site.root / "sent" / "deep").mkdir(parents=True)
    for name in ("deep/a.cfg", "deep/b.cfg", "SHA256SUMS", ".hidden"):
        (site.root / "sent" / name).write_bytes(b"abc")
    time.sleep(0.01)
    for _ in range(2):
        site.apply(keep_for=90 * DAY)
    assert len(site.sent()) == 4
    for event in site.events("retention.skipped"):
        assert (event["drop"], event["path"]) == ("switches", str(site.root / "sent"))
        assert event["skipped_files"] == 2
        assert event["error"].startswith("2 without a valid receipt file, the first is sent/deep/")
    assert len(site.events("retention.skipped")) == 2


def test_a_file_that_was_just_moved_is_not_reported(site: Site) -> None:
    """The recorder writes its receipt file soon."""
    (site.root / "sent").mkdir()
    (site.root / "sent" / "a.cfg").write_bytes(b"abc")
    site.apply(keep_for=90 * DAY)
    assert not site.events("retention.skipped")


def changed(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda receipt: receipt | fields


def of_delivery(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda receipt: receipt | {"deliveries": [receipt["deliveries"][0] | fields]}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda _: [[]], id="not an object"),
        pytest.param(lambda _: {}, id="empty"),
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
        pytest.param(of_delivery(reason="because"), id="an unknown reason"),
        pytest.param(of_delivery(receipt="x" * (1 << 17)), id="too long"),
    ],
)
def test_a_file_of_which_the_receipt_file_does_not_match_is_never_removed(
    site: Site, change: Callable[[dict[str, Any]], Any]
) -> None:
    receipt = site.send("a.cfg", NOW - 91 * DAY).with_name("a.cfg.receipt.json")
    receipt.write_text(json.dumps(change(json.loads(receipt.read_text()))))
    set_time(receipt, NOW - 91 * DAY)
    site.send("good.cfg", NOW - 91 * DAY)
    site.apply(keep_for=90 * DAY)
    assert site.sent() == ["a.cfg"]
    assert receipt.exists()
    [event] = site.events("retention.skipped")
    assert event["error"] == "1 without a valid receipt file, the first is sent/a.cfg"


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
    ids=["empty", "zero", "deep", "wide", "no Unicode", "a size as float", "long", "cut"],
)
def test_a_file_with_a_damaged_receipt_file_is_removed_once_that_is_repaired(
    site: Site, damage: Callable[[bytes], bytes]
) -> None:
    receipt = site.send("a.cfg", NOW - 91 * DAY).with_name("a.cfg.receipt.json")
    good = receipt.read_bytes()
    damaged = damage(good)
    assert damaged != good
    for content, left in ((damaged, ["a.cfg"]), (good, [])):
        receipt.write_bytes(content)
        set_time(receipt, NOW - 91 * DAY)
        site.apply(keep_for=90 * DAY)
        assert site.sent() == left


def test_other_files_with_names_of_receipt_files_do_not_hide_the_receipt(site: Site) -> None:
    sent = site.root / "sent"
    sent.mkdir()
    (sent / "a.cfg.receipt.json").mkdir()
    (sent / "a.cfg.receipt-2.json").symlink_to("/etc/hostname")
    os.mkfifo(sent / "a.cfg.receipt-3.json")
    (sent / "a.cfg.receipt-4.json").write_text("{}")
    site.send("a.cfg", NOW - 91 * DAY)
    assert (sent / "a.cfg.receipt-5.json").exists()
    set_time(sent / "a.cfg.receipt.json", NOW - 91 * DAY)
    site.apply(keep_for=90 * DAY)
    assert site.sent() == []
    assert not (sent / "a.cfg.receipt-5.json").exists()
    assert (sent / "a.cfg.receipt-4.json").exists()


@pytest.fixture
def site_of_nobody() -> Iterator[Site]:
    with a_folder_of_nobody() as folder, without_rights():
        site = Site(folder, folder / "drop")
        yield site
        site.close()


def test_unreadable_files_are_reported_and_do_not_delay_the_others(site_of_nobody: Site) -> None:
    site = site_of_nobody
    for name in ("a.cfg", "b.cfg", "c/c.cfg"):
        site.send(name, NOW - 91 * DAY)
    receipt, folder = site.root / "sent" / "b.cfg.receipt.json", site.root / "sent" / "c"
    receipt.chmod(0)
    folder.chmod(0)
    below = os.open(site.root / "sent", os.O_RDONLY)
    for _ in range(20):  # no archive is ever moved to so long a path
        os.mkdir("d" * 250, dir_fd=below)
        below, above = os.open("d" * 250, os.O_RDONLY, dir_fd=below), below
        os.close(above)
    os.close(below)
    site.apply(keep_for=90 * DAY)
    assert not (site.root / "sent" / "a.cfg").exists()
    assert (site.root / "sent" / "b.cfg").exists()
    [event] = site.events("retention.skipped")
    assert event["error"] == (
        "1 unreadable (Permission denied), the first is sent/c;"
        " 1 that cannot be removed (Permission denied), the first is sent/b.cfg"
    )
    receipt.chmod(0o644)
    folder.chmod(0o755)
    site.apply()
    assert not (site.root / "sent" / "b.cfg").exists()
    assert os.listdir(folder) == []


class ClockOfSpring(datetime):
    """The clock of a host that is months behind the file system."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> ClockOfSpring:
        return cls.fromtimestamp((NOW + DAY).timestamp(), tz)


def test_times_in_the_future_are_reported_and_take_no_place_of_the_newest(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of a time in which the clock of this host was ahead."""
    for number in range(3):
        site.send(f"{number}.cfg", NOW + number * HOUR)
    ahead = site.send("ahead.cfg", NOW + 9 * HOUR)
    set_time(ahead.with_name("ahead.cfg.receipt.json"), datetime.now(UTC))
    monkeypatch.setattr(retention, "datetime", ClockOfSpring)
    site.apply(NOW + DAY, keep_last=2)
    assert site.sent() == ["1.cfg", "2.cfg", "ahead.cfg"]
    [event] = site.events("retention.skipped")
    assert event["error"] == "1 with a time in the future, the first is sent/ahead.cfg"
    assert "touch" in event["hint"]


@pytest.mark.parametrize("year", [1902, 1969, 2300, 2440])
def test_extreme_file_times_do_not_end_the_walk(site: Site, year: int) -> None:
    path = site.send("a.cfg", NOW - 91 * DAY)
    for file in (path, path.with_name("a.cfg.receipt.json")):
        set_time(file, datetime(year, 1, 1, tzinfo=UTC))
    site.apply(keep_for=90 * DAY, keep_last=1)
    assert site.sent() == ["a.cfg"]
    site.apply(keep_for=90 * DAY)
    assert site.sent() == ([] if year < 2000 else ["a.cfg"])


def test_a_time_after_those_of_file_systems_is_their_last_one() -> None:
    assert file_time(12_000 * 366 * 86400 * 10**9).year == 2262
    assert file_time(-(12_000 * 86400 * 10**9)).year == 1937


def test_a_walk_through_empty_folders_shows_signs_of_life(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        (site.root / "sent" / str(number)).mkdir(parents=True)
    signs: list[int] = []
    monkeypatch.setattr(site.retention.watchdog, "alive", lambda: signs.append(1))
    site.apply(keep_for=90 * DAY)
    assert len(signs) > 50


def test_a_walk_ends_once_the_daemon_stops(site: Site) -> None:
    for number in range(3):
        site.send(f"{number}.cfg", NOW - 91 * DAY)
    site.retention.stop.set()
    site.apply(keep_for=90 * DAY)
    assert len(site.sent()) == 3


# what a new ledger learns


def devices(site: Site) -> list[tuple[str, datetime | None, int]]:
    """Return name, last arrival and number of archives of each device in the ledger."""
    with closing(open_for_reading(site.state)) as connection:
        found = LedgerQueries(connection).devices(NOW)
    return [(device.device, device.last_at, device.archives) for device in found]


def test_a_new_ledger_knows_when_each_device_last_sent_an_archive(site: Site) -> None:
    """An archive that arrived whole counts even if it was rejected."""
    site.expects_devices = True
    for minutes in (2, 1):
        site.send(f"r1-{minutes}.cfg", NOW + timedelta(minutes=minutes))
    site.send("r1-refused.cfg", NOW + timedelta(minutes=3), accepted=False)
    broken = site.send("r1-broken.cfg", NOW + timedelta(minutes=4), accepted=False)
    receipt = broken.with_name("r1-broken.cfg.reason.json")
    receipt.write_text(receipt.read_text().replace('"archive_refused"', '"truncated"'))
    site.send("r2-a.cfg", NOW)
    site.lose_ledger()
    assert devices(site) == []
    site.apply()
    assert devices(site) == [("r1", NOW + timedelta(minutes=3), 3), ("r2", NOW, 1)]


def test_a_ledger_learns_the_devices_of_earlier_archives_once(site: Site) -> None:
    site.expects_devices = True
    site.send("r1-a.cfg", NOW)
    site.apply()
    assert devices(site) == [("r1", NOW, 1)]
    with closing(open_for_reading(site.state)) as connection:
        LedgerQueries(connection).forget_device("r1", None, NOW)
    site.restart()
    site.apply()
    assert devices(site) == []


def test_devices_are_learned_before_their_archives_expire(site: Site) -> None:
    site.expects_devices = True
    site.send("r1-a.cfg", NOW - 91 * DAY)
    site.apply(keep_for=90 * DAY)
    assert site.sent() == []
    assert devices(site) == [("r1", NOW - 91 * DAY, 1)]


def test_devices_are_learned_once_all_their_files_can_be_read(site_of_nobody: Site) -> None:
    """A device with a later archive would look overdue."""
    site = site_of_nobody
    site.expects_devices = True
    site.send("r1-a.cfg", NOW)
    receipt = site.send("r1-b.cfg", NOW + DAY).with_name("r1-b.cfg.receipt.json")
    receipt.chmod(0)
    site.apply()
    assert devices(site) == []
    [event] = site.events("ledger.incomplete")
    assert event["error"] == "1 unreadable (Permission denied), the first is sent/r1-b.cfg"
    receipt.chmod(0o640)
    site.apply()
    assert devices(site) == [("r1", NOW + DAY, 2)]


def test_devices_are_learned_once_the_clock_is_right(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.expects_devices = True
    site.send("r1-a.cfg", NOW + 3 * DAY)
    with monkeypatch.context() as behind:
        behind.setattr(past_devices, "datetime", ClockOfSpring)
        site.apply()
    assert devices(site) == []
    assert "with a time in the future" in site.events("ledger.incomplete")[0]["error"]
    site.apply()
    assert devices(site) == [("r1", NOW + 3 * DAY, 1)]


def test_devices_are_learned_once_the_sent_folder_is_there(site: Site) -> None:
    site.expects_devices = True
    site.send("r1-a.cfg", NOW)
    (site.root / "sent").rename(site.root / "not-mounted")
    site.apply()
    assert devices(site) == []
    (site.root / "not-mounted").rename(site.root / "sent")
    site.apply()
    assert devices(site) == [("r1", NOW, 1)]


def test_without_expected_devices_and_a_policy_no_receipt_file_is_read(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.send("r1-a.cfg", NOW)
    monkeypatch.setattr(DropFolder, "read", lambda *_: pytest.fail("read"))
    site.apply()
    assert devices(site) == []


def test_rejected_files_that_the_ledger_does_not_know_are_reported_at_each_walk(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_DISPOSITION_TIME", timedelta(0))  # their change time is now
    rejected = site.send("a.cfg", NOW, accepted=False)
    time.sleep(0.01)
    site.apply()
    assert not site.events("archive.unknown")
    site.lose_ledger()
    site.apply()
    site.apply()
    for event in site.events("archive.unknown"):
        assert (event["path"], event["unknown_files"]) == (str(rejected.parent), 1)
    assert len(site.events("archive.unknown")) == 2


# disk space


@pytest.fixture
def full_site(tmp_path: Path) -> Iterator[Site]:
    """A site with a filesystem of 8 MiB as its drop folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    try:
        site = Site(tmp_path, disk)
        yield site
        site.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


MIB = 1024 * 1024


def test_a_filesystem_that_does_not_answer_does_not_end_the_retention(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.send("old.cfg", NOW - DAY)
    with monkeypatch.context() as broken, socket.socket() as other:
        other.close()
        broken.setattr(DropFolder, "fileno", lambda _: other.fileno())  # EBADF in place of ESTALE
        site.apply(min_free=MinFree(1 << 60))
    assert site.sent() == ["old.cfg"]
    site.apply()
    assert site.sent() == []


@pytest.mark.root
@pytest.mark.parametrize("min_free", [MinFree(4 * MIB), MinFree(percent=50)])
def test_on_a_full_disk_the_oldest_archives_are_removed_until_enough_is_free(
    full_site: Site, min_free: MinFree
) -> None:
    site = full_site
    for number in range(6):
        site.send(f"{number}.cfg", NOW - (6 - number) * DAY, bytes(MIB))
    site.send("refused.cfg", NOW - 100 * DAY, bytes(MIB // 2), accepted=False)
    site.apply(keep_last=10, min_free=min_free)
    assert site.sent() == ["3.cfg", "4.cfg", "5.cfg"]
    assert [e["archive"] for e in site.events("archive.expired")] == ["0.cfg", "1.cfg", "2.cfg"]
    assert {e["reason"] for e in site.events("archive.expired")} == {"disk_low"}
    assert site.events("disk.low") == []
    assert (site.root / "rejected" / "refused.cfg").exists()


@pytest.mark.root
def test_low_disk_space_is_logged_again_while_it_lasts(full_site: Site) -> None:
    site = full_site
    site.send("one.cfg", NOW - DAY, bytes(MIB))
    pending = site.root / "pending.cfg"
    pending.write_bytes(bytes(5 * MIB))
    site.apply(min_free=MinFree(4 * MIB))
    assert (site.sent(), pending.exists()) == ([], True)
    [event] = site.events("disk.low")
    assert (event["level"], event["drop"], event["min_free_bytes"]) == ("error", "switches", 4 * MIB)
    assert event["free_bytes"] < 4 * MIB
    site.apply(NOW + timedelta(seconds=30))
    assert len(site.events("disk.low")) == 1
    site.apply(NOW + timedelta(seconds=61))
    assert len(site.events("disk.low")) == 2
    pending.unlink()
    site.apply(NOW + timedelta(seconds=62))
    pending.write_bytes(bytes(5 * MIB))
    site.apply(NOW + timedelta(seconds=63))
    assert len(site.events("disk.low")) == 3
