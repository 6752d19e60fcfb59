"""The daemon as a process: overdue devices, and archives of unusual size."""

from __future__ import annotations

import contextlib
import signal
import sqlite3

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.stage import TIMEOUT, Stage, until

TOP = 'heartbeat_every = "0.2s"'
EXPECT = 'label_pattern = \'(?P<device>[^-]+)-.*\'\nexpect = { every = "1s", by = "{device}" }'


@pytest.mark.long
def test_an_overdue_device_is_logged_again_after_a_kill_until_it_sends_an_archive(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, top=TOP, drop=EXPECT)
    daemon = stage.daemon().ready()
    stage.put("sw1-a.cfg", b"a" * 100)
    first = daemon.wait_for("drop.overdue", count=2, device="sw1")[0]
    assert (first["drop"], first["level"]) == ("switches", "warning")
    assert first["overdue_s"] > 0
    assert first["last_at"]
    daemon.kill()

    daemon = stage.daemon().ready()
    daemon.wait_for("drop.overdue", device="sw1")
    stage.put("sw1-b.cfg", b"b" * 100)
    daemon.wait_for("drop.recovered", device="sw1")
    daemon.wait_for("archive.delivered", archive="sw1-b.cfg")
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_forgotten_device_is_no_longer_overdue(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, top=TOP, drop=EXPECT)
    daemon = stage.daemon().ready()
    stage.put("sw1-a.cfg", b"a" * 100)
    daemon.wait_for("drop.overdue", device="sw1")

    done = stage.backupd("forget", "sw1")
    assert (done.returncode, done.stdout) == (0, "sw1 of switches: forgotten\n")
    daemon.wait_for("drop.recovered", device="sw1")
    overdue, heartbeats = len(daemon.events("drop.overdue")), len(daemon.events("daemon.heartbeat"))
    daemon.wait_for("daemon.heartbeat", count=heartbeats + 8)  # more than `every`
    assert len(daemon.events("drop.overdue")) == overdue

    again = stage.backupd("forget", "sw1", "--drop", "switches")
    assert again.returncode == 2
    assert "no device is called 'sw1' in the drop 'switches'" in again.stderr
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_listed_device_that_never_sent_an_archive_is_overdue(
    stage: Stage, receiver: RunningReceiver
) -> None:
    listed = EXPECT.replace(" }", ', devices = ["sw9"] }')
    stage.configure(receiver.url, top=TOP, drop=listed)
    daemon = stage.daemon().ready()
    overdue = daemon.wait_for("drop.overdue", device="sw9")[0]
    assert "last_at" not in overdue

    forgotten = stage.backupd("forget", "sw9")
    assert forgotten.returncode == 0
    assert "its interval starts again\n  hint: drop.switches.expect.devices expects it" in forgotten.stdout
    daemon.wait_for("drop.recovered", device="sw9")
    assert daemon.stop() == 0


def test_an_archive_of_unusual_size_is_delivered_and_logged_once(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, top=TOP, drop='size_alarm = "50%"')
    daemon = stage.daemon().ready()
    for number in range(3):
        stage.put(f"{number}.cfg", b"%d" % number * 1000)
        daemon.wait_for("archive.queued", archive=f"{number}.cfg")
    stage.put("odd.cfg", b"x" * 100)
    (odd,) = daemon.wait_for("archive.unusual_size")
    assert (odd["archive"], odd["size_bytes"], odd["median_size_bytes"], odd["change_ratio"]) == (
        "odd.cfg",
        100,
        1000,
        -0.9,
    )
    daemon.wait_for("archive.disposed", archive="odd.cfg")
    assert daemon.stop() == 0
    again = stage.daemon().ready()
    again.wait_for("daemon.heartbeat", count=2)
    assert not again.events("archive.unusual_size")
    assert again.stop() == 0
    assert stage.sent / "odd.cfg" in stage.archives(stage.sent)


def test_old_history_is_removed_from_the_ledger_and_the_files_are_kept(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, top=f'{TOP}\nkeep_history_for = "1s"')
    daemon = stage.daemon().ready()
    for number in range(3):
        stage.put(f"{number}.cfg", b"%d" % number * 1000)
    daemon.wait_for("archive.disposed", count=3)

    def left() -> int:
        with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3", timeout=TIMEOUT)) as ledger:
            return int(ledger.execute("SELECT count(*) FROM archive").fetchone()[0])

    until(lambda: left() == 1, "the history to go")  # the last number is not reused
    assert len(stage.archives(stage.sent)) == 3
    assert daemon.stop() == 0


def test_a_reload_changes_the_expected_devices(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, top=TOP, drop=EXPECT)
    daemon = stage.daemon().ready()
    stage.put("sw1-a.cfg", b"a" * 100)
    daemon.wait_for("drop.overdue", device="sw1")

    stage.configure(receiver.url, top=TOP, drop='expect.every = "1s"')
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("config.reloaded", drops_changed=["switches"])
    daemon.wait_for("drop.recovered", device="sw1")  # the devices of the drop are no longer distinguished
    overdue = until(lambda: [e for e in daemon.events("drop.overdue") if "device" not in e], "the whole drop")
    assert overdue[0]["drop"] == "switches"
    stage.put("sw2-a.cfg", b"a" * 100)
    until(lambda: [e for e in daemon.events("drop.recovered") if "device" not in e], "it to recover")
    assert daemon.stop() == 0
