"""Sent archives are removed by a real daemon when their time has come."""

from __future__ import annotations

from backupd.receiver.serve import RunningReceiver
from tests.stage import Stage, until


def test_what_was_sent_is_removed_in_time_with_its_receipt(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='keep_sent_for = "1s"')
    daemon = stage.daemon().ready()
    stage.put("sw.tar.gz", b"content")
    [said] = daemon.wait_for("archive.expired")
    assert (said["archive"], said["reason"]) == ("sw.tar.gz", "too_old")
    until(lambda: list(stage.sent.iterdir()) == [], "an empty sent folder")
    assert [path.read_bytes() for path in stage.stored()] == [b"content"]
    assert daemon.stop() == 0


def test_a_restart_applies_a_new_order_to_what_was_sent_before(
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
    [said] = again.wait_for("archive.expired")
    assert (said["archive"], said["reason"]) == ("0.tar.gz", "too_many")
    assert len(stage.archives(stage.sent)) == 2
    assert again.stop() == 0
