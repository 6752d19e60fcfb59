"""The daemon as a process delivers archives, by any way to create a file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.stage import Stage


def test_an_archive_is_delivered_verified_and_moved(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    content = os.urandom(300_000)
    stage.put("router-1.cfg", content)

    daemon.wait_for("archive.disposed", archive="router-1.cfg")

    assert stage.archives(stage.drop) == [stage.sent / "router-1.cfg"]
    assert (stage.sent / "router-1.cfg").read_bytes() == content
    record = json.loads((stage.sent / "router-1.cfg.receipt.json").read_text())
    assert record["digest"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert [path.read_bytes() for path in stage.stored()] == [content]
    names = [event["event"] for event in daemon.events() if "archive" in event]
    assert names == ["archive.queued", "delivery.verified", "archive.delivered", "archive.disposed"]
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("when", ["before the start", "while it runs"])
def test_each_of_five_hundred_files_is_delivered_exactly_once(
    stage: Stage, receiver: RunningReceiver, when: str
) -> None:
    stage.configure(receiver.url)
    contents = {f"sw-{number}.tar.gz": b"%d " % number + os.urandom(20_000) for number in range(500)}
    daemon = None if when == "before the start" else stage.daemon().ready()
    for name, content in contents.items():
        stage.put(name, content)
    daemon = daemon or stage.daemon()

    daemon.wait_for("archive.disposed", count=500)

    assert {path.name: path.read_bytes() for path in stage.archives(stage.sent)} == contents
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in stage.stored()]
    assert sorted(digests) == sorted(hashlib.sha256(content).hexdigest() for content in contents.values())
    assert not daemon.events("watch.degraded")
    assert not daemon.events("attempt.failed")


def _written(drop: Path) -> None:
    (drop / "a.tar.gz").write_bytes(b"x" * 5000)


def _renamed(drop: Path) -> None:
    (drop / "a.tar.gz.part").write_bytes(b"x" * 5000)
    (drop / "a.tar.gz.part").rename(drop / "a.tar.gz")


def _hard_linked(drop: Path) -> None:
    outside = drop.parent / "outside"
    outside.write_bytes(b"x" * 5000)
    os.link(outside, drop / "a.tar.gz")


def _moved_in(drop: Path) -> None:
    outside = drop.parent / "outside"
    outside.write_bytes(b"x" * 5000)
    outside.rename(drop / "a.tar.gz")


def _linked_unnamed(drop: Path) -> None:
    fd = os.open(drop, os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"x" * 5000)
    root = os.open("/", os.O_RDONLY)  # with src_dir_fd, os.link follows the symbolic link, see linkat(2)
    os.link(f"/proc/self/fd/{fd}", drop / "a.tar.gz", src_dir_fd=root)
    os.close(root)
    os.close(fd)


@pytest.mark.long
@pytest.mark.parametrize("make", [_written, _renamed, _hard_linked, _moved_in, _linked_unnamed])
@pytest.mark.parametrize("stable_for", ["0s", "0.2s"])
def test_each_way_to_create_a_file_causes_an_event(
    stage: Stage, receiver: RunningReceiver, make: object, stable_for: str
) -> None:
    stage.configure(receiver.url, drop=f'stable_for = "{stable_for}"\nrescan_every = "1h"')
    daemon = stage.daemon().ready()
    assert callable(make)
    make(stage.drop)

    daemon.wait_for("archive.disposed")

    assert len(daemon.events("archive.delivered")) == 1
    assert [path.read_bytes() for path in stage.stored()] == [b"x" * 5000]


def test_archives_in_folders_that_are_created_or_moved_in_are_delivered(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='rescan_every = "1h"')
    daemon = stage.daemon().ready()
    deep = stage.drop / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "one.tar.gz").write_bytes(b"1" * 100)
    outside = stage.base / "outside" / "c"
    outside.mkdir(parents=True)
    for number in range(50):
        (outside / f"n{number}.tar.gz").write_bytes(b"%d" % number)
    outside.rename(stage.drop / "c")

    daemon.wait_for("archive.disposed", count=51)

    assert (stage.sent / "a" / "b" / "one.tar.gz").exists()
    assert len(stage.archives(stage.sent / "c")) == 50


def test_archives_in_a_renamed_folder_are_delivered_without_a_warning(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='rescan_every = "1h"')
    for number in range(200):
        (stage.drop / "berlin" / f"rack-{number}").mkdir(parents=True)
    daemon = stage.daemon().ready()
    for old, new in (("berlin", "hamburg"), ("hamburg", "bremen")):
        (stage.drop / old).rename(stage.drop / new)
        stage.put("sw1.tar.gz", b"sw1", into=stage.drop / new / "rack-7")
        daemon.wait_for("archive.disposed", archive=f"{new}/rack-7/sw1.tar.gz")
    assert not daemon.events("library.warning")
    assert daemon.stop() == 0


def test_a_file_with_a_hidden_or_temporary_name_is_delivered_once_it_is_renamed(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='rescan_every = "0.3s"')
    daemon = stage.daemon().ready()
    for name in ("x.tar.gz.part", ".x.tar.gz", "y.tar.gz.filepart", "x.tar.gz~", "x.tar.gz.tmp"):
        (stage.drop / name).write_bytes(b"half")
    stage.put("proof.tar.gz", b"delivered after a look at the others")
    daemon.wait_for("archive.disposed", archive="proof.tar.gz")
    assert len(daemon.events("archive.queued")) == 1

    (stage.drop / "x.tar.gz.part").rename(stage.drop / "x.tar.gz")

    daemon.wait_for("archive.disposed", archive="x.tar.gz")


def test_a_second_archive_with_the_same_name_overwrites_no_file(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    daemon = stage.daemon().ready()
    for number in range(3):
        stage.put("daily.tar.gz", b"content %d" % number)
        daemon.wait_for("archive.disposed", count=number + 1)

    kept = {path.read_bytes() for path in stage.archives(stage.sent)}
    assert kept == {b"content 0", b"content 1", b"content 2"}
    assert len(list(stage.sent.glob("*.receipt.json"))) == 3


@pytest.mark.long
def test_an_archive_that_is_kept_in_place_is_delivered_once_across_a_restart(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='on_delivered = "keep"\nrescan_every = "0.2s"')
    daemon = stage.daemon().ready()
    kept = stage.put("a.tar.gz", b"kept")
    daemon.wait_for("archive.disposed", disposition="kept")
    daemon.stop()

    again = stage.daemon().ready()
    stage.put("b.tar.gz", b"another")
    again.wait_for("archive.disposed", archive="b.tar.gz")

    assert kept.read_bytes() == b"kept"
    assert not again.events("archive.queued")[1:]
    assert len(stage.stored()) == 2


def test_an_archive_is_deleted_after_its_delivery(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='on_delivered = "delete"')
    daemon = stage.daemon().ready()
    stage.put("a.tar.gz", b"to be deleted")

    daemon.wait_for("archive.disposed", disposition="deleted")

    assert stage.archives(stage.drop) == []
    assert [path.read_bytes() for path in stage.stored()] == [b"to be deleted"]


def test_a_second_daemon_with_the_same_state_folder_does_not_start(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url)
    first = stage.daemon().ready()

    second = stage.backupd("run")

    assert second.returncode == 78
    assert f"another backupd (process {first.pid}) uses it" in second.stderr
    assert first.process.poll() is None
