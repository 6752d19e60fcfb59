"""The retention of sent archives, on a real ledger and real folders."""

from __future__ import annotations

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

from backupd.core.names import MAX_RECEIPT_FILE_BYTES, MAX_RECEIPT_FILE_NUMBER
from backupd.core.retention_policy import MinFree, RetentionPolicy
from backupd.dropfolder.folder import DropFolder
from backupd.ledger.port import CompletedArchive, DispositionResult
from backupd.ledger.sqlite.connection import FILE_NAME
from backupd.ledger.sqlite.sent_rows import SqliteSentIndex, open_sent_index
from tests.factories import NOW, a_candidate, a_claim_result, a_fingerprint, delivered, record_dispositions
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


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"abc")
    os.rename(other, path)


def _link(path: Path) -> None:
    path.rename(path.with_name("target.cfg"))
    path.symlink_to("target.cfg")


@pytest.mark.parametrize("change", [_rewrite, _replace, _link])
def test_a_file_that_was_changed_or_replaced_stays(site: Site, change: Callable[[Path], None]) -> None:
    path = site.send("old.cfg", NOW - 91 * DAY)
    time.sleep(0.01)  # so that the modification time differs
    change(path)
    site.apply(keep_for=90 * DAY)
    assert os.path.lexists(path)
    assert path.with_name("old.cfg.receipt.json").exists()
    assert os.path.lexists(path)
    assert site.events("archive.expired") == []


def test_a_link_in_place_of_a_sent_folder_is_not_followed(site: Site, tmp_path: Path) -> None:
    path = site.send("site/old.cfg", NOW - 91 * DAY)
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    site.apply(keep_for=90 * DAY)
    assert (tmp_path / "elsewhere" / "old.cfg").exists()
    assert site.events("archive.expired") == []


def test_a_file_that_an_operator_removed_is_recorded_as_missing(site: Site) -> None:
    site.send("old.cfg", NOW - 91 * DAY).unlink()
    site.apply(keep_for=90 * DAY)
    assert site.removals() == {"old.cfg": "missing"}


def test_without_the_sent_folder_nothing_is_removed_until_it_is_back(site: Site) -> None:
    site.send("old.cfg", NOW - 91 * DAY)
    (site.root / "sent").rename(site.root / "not-mounted")
    site.apply(keep_for=90 * DAY)
    (site.root / "not-mounted").rename(site.root / "sent")
    assert site.sent() == ["old.cfg"]
    site.apply()
    assert site.sent() == []


@pytest.mark.parametrize("progress", ["marked", "renamed", "removed"])
def test_a_removal_that_a_crash_interrupted_is_finished(site: Site, progress: str) -> None:
    path = site.send("old.cfg", NOW - 91 * DAY)
    index = open_sent_index(site.state)
    [sent] = index.oldest("switches", None, NOW, 10)
    index.mark_expiring([sent.archive.id])
    index.close()
    if progress == "renamed":
        path.rename(path.with_name(f".backupd-{sent.archive.id}.expired"))
    if progress == "removed":
        path.unlink()
    site.apply(keep_for=90 * DAY)
    assert os.listdir(site.root / "sent") == []
    assert site.removals() == {"old.cfg": "expired"}
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
def test_a_failed_removal_is_logged_once_and_retried(site: Site) -> None:
    path = site.send("old.cfg", NOW - 91 * DAY)
    subprocess.run(["mount", "--bind", "-o", "ro", str(path.parent), str(path.parent)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(path.parent)], check=True)
        site.apply(keep_for=90 * DAY)
        site.apply()
    finally:
        subprocess.run(["umount", "-l", str(path.parent)], check=True)
    [event] = site.events("disposition.failed")
    assert "Read-only" in event["error"]
    assert path.exists()
    site.apply()
    assert site.sent() == []


def many_delivered(site: Site, count: int) -> list[CompletedArchive]:
    """Record deliveries in the ledger, without files."""
    names = [b"h-%d-%d" % (count, n) for n in range(count)]
    site.ledger.enqueue([a_candidate(n, fingerprint=a_fingerprint()) for n in names], ["vault"], NOW)
    claims = [c for _ in names for c in site.ledger.claim("vault", NOW)]
    return [*site.ledger.record([a_claim_result(c, delivered()) for c in claims], NOW).completed]


def steps_of(site: Site, now: datetime, **policy: Any) -> int:
    """Apply a policy and return the number of SQLite virtual machine instructions that this took."""
    connection = sqlite3.connect(site.state / FILE_NAME, isolation_level=None)
    site._closing.callback(connection.close)
    site.retention._index = SqliteSentIndex(connection)
    steps = 0

    def tick() -> None:
        nonlocal steps
        steps += 1

    connection.set_progress_handler(tick, 1)
    site.apply(now, **policy)
    return steps


def test_the_cost_of_a_check_does_not_grow_with_the_history(site: Site) -> None:
    steps: list[int] = []
    for count in (100, 3000):
        completed = many_delivered(site, count)
        done = [DispositionResult(s.archive.id, b"sent/x/" + s.archive.relpath) for s in completed]
        record_dispositions(site.ledger, done, [], NOW)
        (site.root / "sent").mkdir(exist_ok=True)
        site.apply(NOW + DAY, keep_for=90 * DAY, keep_last=5)
        steps.append(steps_of(site, NOW + DAY))
    assert steps[1] < 2 * steps[0] + 100


@pytest.mark.parametrize("step", [1, -1], ids=["oldest first", "newest first"])
def test_the_cost_of_a_removal_does_not_grow_with_the_history(site: Site, step: int) -> None:
    steps: list[int] = []
    for count in (100, 1500):
        completed = many_delivered(site, count)
        for minute, one in enumerate(completed[::step]):
            to = b"sent/%d/%s" % (count, one.archive.relpath)
            record_dispositions(
                site.ledger, [DispositionResult(one.archive.id, to)], [], NOW + timedelta(minutes=minute)
            )
        (site.root / "sent").mkdir(exist_ok=True)
        steps.append(steps_of(site, NOW + 2 * DAY, keep_last=5))
    assert steps[1] < 2 * 15 * steps[0]


def test_the_newest_archives_are_those_queued_last_if_the_clock_was_behind(site: Site) -> None:
    for number in range(3):
        site.send("a.cfg", NOW + number * HOUR, b"right")
    site.send("a.cfg", NOW - 2000 * DAY, b"by a clock that was behind")
    site.apply(NOW + DAY, keep_last=1)
    contents = {path.read_bytes() for path in (site.root / "sent").iterdir() if path.suffix != ".json"}
    assert contents == {b"right", b"by a clock that was behind"}
    site.send("a.cfg", NOW + 4 * HOUR, b"right again")
    site.apply(NOW + DAY)
    [last] = [path for path in (site.root / "sent").iterdir() if path.suffix != ".json"]
    assert last.read_bytes() == b"right again"


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


def test_names_at_the_limit_of_their_length_expire(site: Site) -> None:
    for number in range(2):
        site.send("l" * 251 + ".cfg", NOW - (91 + number) * DAY)
    assert len(site.sent()) == 2
    site.apply(keep_for=90 * DAY)
    assert os.listdir(site.root / "sent") == []


def test_the_receipt_file_of_a_development_version_is_read_and_removed(site: Site) -> None:
    sent = site.send("r1.cfg", NOW - 9 * DAY)
    receipt = sent.with_name("r1.cfg.receipt.json")
    receipt.write_text(receipt.read_text().replace('"queued_at"', '"admitted_at"'))
    set_time(receipt, NOW - 9 * DAY)
    site.apply(keep_for=DAY)
    assert os.listdir(sent.parent) == []


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
