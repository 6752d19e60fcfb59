"""Files that change while they are being sent: what is reported delivered is what was there, whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from backupd.core.model import Delivered, Superseded
from tests.scripted import Peer, ScriptedServer, header_of, in_turn, receipt_for, server_context, take_all
from tests.stage import TIMEOUT, Stage
from tests.uploading import MIB, a_destination, a_sender

OLD = b"old content, " * 1_500_000  # 19.5 MB: more than a connection's buffers hold
NEW = b"new content! " * 1_500_000

Change = Callable[[Path], bytes | None]
"""Changes a file, and returns what it then holds; None: nothing, as it is gone."""


def pauses_early(peer: Peer) -> None:
    """Read some of the body, wait, and then take whatever comes for an archive."""
    peer.read_head()
    peer.read(MIB)
    peer.pause()
    peer.drain()


def truncate(path: Path) -> bytes:
    os.truncate(path, 2 * MIB)
    return OLD[: 2 * MIB]


def append(path: Path) -> bytes:
    with path.open("ab") as file:
        file.write(b"and more")
    return OLD + b"and more"


def rewrite(path: Path) -> bytes:
    with path.open("r+b") as file:
        file.write(NEW)
    return NEW


def rewrite_in_disguise(path: Path) -> bytes:
    before = path.stat()
    with path.open("r+b", buffering=0) as file:  # as long as it is open, nobody takes it for a new one
        assert file.write(NEW) == len(NEW)
        os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    return NEW


def rewrite_what_was_sent(path: Path) -> bytes:
    with path.open("r+b") as file:
        file.write(b"NEW")
    return b"NEW" + OLD[3:]


def rename_over(path: Path) -> bytes:
    other = path.parent.parent / "other"
    other.write_bytes(NEW)
    other.rename(path)
    return NEW


def delete(path: Path) -> None:
    path.unlink()


CHANGES = [truncate, append, rewrite, rewrite_in_disguise, rewrite_what_was_sent, rename_over]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_sent_is_delivered_as_it_then_is(
    stage: Stage, change: Change
) -> None:
    with ScriptedServer(in_turn(pauses_early, take_all), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "1h"', destination="workers = 1")
        daemon = stage.daemon().ready()
        path = stage.put("a.tar.gz", OLD)
        assert server.paused.wait(TIMEOUT)

        now_holds = change(path)
        server.go_on()
        daemon.wait_for("archive.disposed")
        stage.put("b.tar.gz", b"the worker lives")
        daemon.wait_for("archive.disposed", archive="b.tar.gz")

    assert now_holds is not None
    assert [request.archive for request in server.requests] == [now_holds, b"the worker lives"]
    assert (stage.sent / "a.tar.gz").read_bytes() == now_holds
    assert stage.archives(stage.drop) == [stage.sent / "a.tar.gz", stage.sent / "b.tar.gz"]
    delivered = daemon.events("archive.delivered")
    digest = f"sha256:{hashlib.sha256(now_holds).hexdigest()}"
    assert [e["digest"] for e in delivered if e["archive"] == "a.tar.gz"] == [digest]
    assert [e["archive"] for e in daemon.events("archive.superseded")] == ["a.tar.gz"]
    assert not daemon.events("attempt.failed")
    assert not daemon.events("daemon.failed")


def test_one_whose_folder_is_away_when_it_is_to_be_moved_is_moved_once_it_is_back(stage: Stage) -> None:
    def keeps_the_answer(peer: Peer) -> None:
        archive = peer.read_request().archive
        peer.pause()
        peer.send(receipt_for(archive))
        take_all(peer)

    away, other = stage.base / "away", stage.base / "other"
    other.mkdir()
    (other / "sent").mkdir()
    with ScriptedServer(keeps_the_answer, server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "0.5s"', destination="workers = 1")
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", b"content")
        assert server.paused.wait(TIMEOUT)
        stage.drop.rename(away)
        other.rename(stage.drop)
        daemon.wait_for("watch.recovered")

        server.go_on()
        daemon.wait_for("archive.disposed", disposition="missing")
        stage.drop.rename(other)
        away.rename(stage.drop)
        daemon.wait_for("archive.disposed", disposition="moved")
        assert daemon.stop() == 0

    assert [request.archive for request in server.requests] == [b"content"]
    assert len(daemon.events("archive.delivered")) == 1
    assert stage.archives(stage.drop) == [stage.sent / "a.tar.gz"]


def test_a_file_that_is_removed_is_not_sent_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "huge.tar"
    path.touch()
    os.truncate(path, 256 * MIB)

    def removes_it(peer: Peer) -> None:
        peer.read_head()
        peer.read(MIB)
        path.unlink()
        peer.drain()

    with ScriptedServer(removes_it) as server, a_sender(a_destination(server.url)) as sender:
        assert isinstance(sender.send(path), Superseded)
    assert server.received < 64 * MIB


def test_a_file_removed_while_it_is_sent_is_said_to_be_gone(stage: Stage) -> None:
    with ScriptedServer(in_turn(pauses_early, take_all), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "1h"', destination="workers = 1")
        daemon = stage.daemon().ready()
        path = stage.put("a.tar.gz", OLD)
        assert server.paused.wait(TIMEOUT)

        path.unlink()
        server.go_on()
        daemon.wait_for("archive.missing", archive="a.tar.gz")
        stage.put("b.tar.gz", b"the worker lives")
        daemon.wait_for("archive.disposed", archive="b.tar.gz")

    assert [request.archive for request in server.requests] == [b"the worker lives"]
    assert [e["archive"] for e in daemon.events("archive.delivered")] == ["b.tar.gz"]
    assert not daemon.events("archive.superseded")
    assert stage.archives(stage.drop) == [stage.sent / "b.tar.gz"]


@pytest.mark.parametrize(
    ("change", "end_of_the_old"), [(append, "archive.superseded"), (rename_over, "archive.missing")]
)
def test_the_new_content_need_not_wait_for_the_end_of_the_old_one(
    stage: Stage, change: Change, end_of_the_old: str
) -> None:
    with ScriptedServer(in_turn(pauses_early, take_all), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "1h"', destination="workers = 2")
        daemon = stage.daemon().ready()
        path = stage.put("a.tar.gz", OLD)
        assert server.paused.wait(TIMEOUT)

        now_holds = change(path)
        daemon.wait_for("archive.disposed", archive="a.tar.gz")
        server.go_on()
        daemon.wait_for(end_of_the_old, archive="a.tar.gz")
        stage.put("b.tar.gz", b"next")
        daemon.wait_for("archive.disposed", archive="b.tar.gz")

    assert [request.archive for request in server.requests] == [now_holds, b"next"]
    assert [e["archive"] for e in daemon.events("archive.delivered")] == ["a.tar.gz", "b.tar.gz"]
    assert stage.archives(stage.drop) == [stage.sent / "a.tar.gz", stage.sent / "b.tar.gz"]


def test_a_file_that_changes_behind_the_last_byte_is_not_moved_in_place_of_the_one_sent(stage: Stage) -> None:
    def keeps_the_answer(peer: Peer) -> None:
        archive = peer.read_request().archive
        peer.pause()
        peer.send(receipt_for(archive))
        take_all(peer)

    with ScriptedServer(in_turn(keeps_the_answer, take_all), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "1h"', destination="workers = 1")
        daemon = stage.daemon().ready()
        path = stage.put("a.tar.gz", b"old")
        assert server.paused.wait(TIMEOUT)

        (stage.base / "new").write_bytes(b"new")
        (stage.base / "new").rename(path)
        server.go_on()
        daemon.wait_for("archive.disposed", count=2, archive="a.tar.gz")

    assert [request.archive for request in server.requests] == [b"old", b"new"]
    assert [e["disposition"] for e in daemon.events("archive.disposed")] == ["missing", "moved"]
    assert [p.read_bytes() for p in stage.archives(stage.drop)] == [b"new"]


@pytest.mark.parametrize("change", [*CHANGES, delete])
def test_a_changed_file_never_makes_a_whole_request(tmp_path: Path, change: Change) -> None:
    path = tmp_path / "drop" / "a.tar.gz"
    path.parent.mkdir()
    path.write_bytes(OLD)
    ends: list[bool] = []

    def changes_it(peer: Peer) -> None:
        head = peer.read_head()
        peer.read(MIB)
        change(path)
        peer.drain()
        ends.append(peer.received >= int(header_of(head, "Content-Length") or 0))

    with (
        ScriptedServer(in_turn(changes_it, take_all)) as server,
        a_sender(a_destination(server.url)) as sender,
    ):
        outcome = sender.send(path)
        path.write_bytes(b"x")
        again = sender.send(path)

    assert isinstance(outcome, Superseded)
    assert ends == [False]
    assert isinstance(again, Delivered)
    assert [request.archive for request in server.requests] == [b"x"]
