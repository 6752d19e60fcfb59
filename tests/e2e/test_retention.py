"""The daemon removes expired archives from `sent`."""

from __future__ import annotations

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.stage import Stage, until


def test_an_expired_archive_is_removed_with_its_receipt_file(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='keep_sent_for = "1s"')
    daemon = stage.daemon().ready()
    stage.put("sw.tar.gz", b"content")
    [expired] = daemon.wait_for("archive.expired")
    assert (expired["archive"], expired["reason"]) == ("sw.tar.gz", "too_old")
    until(lambda: list(stage.sent.iterdir()) == [], "an empty sent folder")
    assert [path.read_bytes() for path in stage.stored()] == [b"content"]
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_restart_applies_a_new_retention_policy_to_earlier_archives(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    for number in range(3):
        stage.put(f"{number}.tar.gz", b"content")
        daemon.wait_for("archive.disposed", count=number + 1)
    daemon.stop()
    stage.configure(receiver.url, drop="keep_sent_last = 2")
    again = stage.daemon().ready()
    [expired] = again.wait_for("archive.expired")
    assert (expired["archive"], expired["reason"]) == ("0.tar.gz", "too_many")
    assert len(stage.archives(stage.sent)) == 2
    assert again.stop() == 0


@pytest.mark.long
def test_kills_during_the_removal_leave_neither_archives_nor_receipt_files(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    for number in range(200):
        stage.put(f"{number:03}.tar.gz", b"content %d" % number)
    daemon.wait_for("archive.disposed", count=200)
    daemon.stop()
    stage.configure(receiver.url, drop='keep_sent_for = "1s"')
    for _ in range(3):
        killed = stage.daemon()
        killed.wait_for("archive.expired")
        killed.kill()
        archives = {path.name for path in stage.archives(stage.sent)}
        receipts = {path.name for path in stage.sent.glob("*.receipt.json")}
        assert {f"{name}.receipt.json" for name in archives} <= receipts
    again = stage.daemon().ready()
    until(lambda: list(stage.sent.iterdir()) == [], "an empty sent folder")
    assert not again.events("retention.skipped")
    assert again.stop() == 0
    assert len(stage.stored()) == 200
