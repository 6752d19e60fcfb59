"""Files that change during their upload: only complete contents are reported as delivered."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from backupd.core.model import Delivered, Superseded, fingerprint_of
from backupd.upload.base import FileChangedDuringUploadError, ReadFailedError, UploadJob
from tests.scripted import Peer, ScriptedServer, accept_all, header_of, in_turn, receipt_for, server_context
from tests.stage import TIMEOUT, Stage
from tests.uploading import MIB, a_destination, a_sender

OLD = b"old content, " * 1_500_000  # 19.5 MB: more than the buffers of a connection hold
NEW = b"new content! " * 1_500_000

Change = Callable[[Path], bytes | None]
"""Changes a file and returns its new content; None if it was removed."""


def pause_early(peer: Peer) -> None:
    """Read a part of the body, wait for the test, and read the rest without a response."""
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


def rewrite_and_restore_mtime(path: Path) -> bytes:
    before = path.stat()
    with path.open("r+b", buffering=0) as file:  # while it is open, the daemon does not queue it again
        assert file.write(NEW) == len(NEW)
        os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    return NEW


def rewrite_the_sent_part(path: Path) -> bytes:
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


CHANGES = [truncate, append, rewrite, rewrite_and_restore_mtime, rewrite_the_sent_part, rename_over]


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_during_its_upload_is_delivered_with_its_new_content(
    stage: Stage, change: Change
) -> None:
    with ScriptedServer(in_turn(pause_early, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "1h"', destination="workers = 1")
        daemon = stage.daemon().ready()
        path = stage.put("a.tar.gz", OLD)
        assert server.paused.wait(TIMEOUT)

        new_content = change(path)
        server.resume()
        daemon.wait_for("archive.disposed")
        stage.put("b.tar.gz", b"next archive")
        daemon.wait_for("archive.disposed", archive="b.tar.gz")

    assert new_content is not None
    assert [request.archive for request in server.requests] == [new_content, b"next archive"]
    assert (stage.sent / "a.tar.gz").read_bytes() == new_content
    assert stage.archives(stage.drop) == [stage.sent / "a.tar.gz", stage.sent / "b.tar.gz"]
    delivered = daemon.events("archive.delivered")
    digest = f"sha256:{hashlib.sha256(new_content).hexdigest()}"
    assert [e["digest"] for e in delivered if e["archive"] == "a.tar.gz"] == [digest]
    assert [e["archive"] for e in daemon.events("archive.superseded")] == ["a.tar.gz"]
    assert not daemon.events("attempt.failed")
    assert not daemon.events("daemon.failed")


@pytest.mark.long
def test_an_archive_is_moved_later_if_its_folder_is_replaced_before_the_move(stage: Stage) -> None:
    def delay_response(peer: Peer) -> None:
        archive = peer.read_request().archive
        peer.pause()
        peer.send(receipt_for(archive))
        accept_all(peer)

    moved, other = stage.base / "moved", stage.base / "other"
    other.mkdir()
    (other / "sent").mkdir()
    with ScriptedServer(delay_response, server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "0.5s"', destination="workers = 1")
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", b"content")
        assert server.paused.wait(TIMEOUT)
        stage.drop.rename(moved)
        other.rename(stage.drop)
        daemon.wait_for("watch.recovered")

        server.resume()
        daemon.wait_for("disposition.failed")
        stage.drop.rename(other)
        moved.rename(stage.drop)
        daemon.wait_for("archive.disposed", disposition="moved")
        assert daemon.stop() == 0

    assert [request.archive for request in server.requests] == [b"content"]
    assert len(daemon.events("archive.delivered")) == 1
    assert stage.archives(stage.drop) == [stage.sent / "a.tar.gz"]


def test_the_upload_of_a_removed_file_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "huge.tar"
    path.touch()
    os.truncate(path, 256 * MIB)

    def remove_file(peer: Peer) -> None:
        peer.read_head()
        peer.read(MIB)
        path.unlink()
        peer.drain()

    with ScriptedServer(remove_file) as server, a_sender(a_destination(server.url)) as sender:
        assert isinstance(sender.send(path), Superseded)
    assert server.received < 64 * MIB


def test_a_file_that_is_removed_during_its_upload_is_logged_as_missing(stage: Stage) -> None:
    with ScriptedServer(in_turn(pause_early, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "0.2s"', destination="workers = 1")
        daemon = stage.daemon().ready()
        path = stage.put("a.tar.gz", OLD)
        assert server.paused.wait(TIMEOUT)

        path.unlink()
        server.resume()
        daemon.wait_for("archive.missing", archive="a.tar.gz")
        stage.put("b.tar.gz", b"next archive")
        daemon.wait_for("archive.disposed", archive="b.tar.gz")

    assert [request.archive for request in server.requests] == [b"next archive"]
    assert [e["archive"] for e in daemon.events("archive.delivered")] == ["b.tar.gz"]
    assert not daemon.events("archive.superseded")
    assert stage.archives(stage.drop) == [stage.sent / "b.tar.gz"]


@pytest.mark.parametrize(
    ("change", "event_of_the_old"), [(append, "archive.superseded"), (rename_over, "archive.missing")]
)
def test_the_new_content_does_not_wait_for_the_upload_of_the_old_one(
    stage: Stage, change: Change, event_of_the_old: str
) -> None:
    with ScriptedServer(in_turn(pause_early, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "0.2s"', destination="workers = 2")
        daemon = stage.daemon().ready()
        path = stage.put("a.tar.gz", OLD)
        assert server.paused.wait(TIMEOUT)

        new_content = change(path)
        daemon.wait_for("archive.disposed", archive="a.tar.gz")
        server.resume()
        daemon.wait_for(event_of_the_old, archive="a.tar.gz")
        stage.put("b.tar.gz", b"next")
        daemon.wait_for("archive.disposed", archive="b.tar.gz")

    assert [request.archive for request in server.requests] == [new_content, b"next"]
    assert [e["archive"] for e in daemon.events("archive.delivered")] == ["a.tar.gz", "b.tar.gz"]
    assert stage.archives(stage.drop) == [stage.sent / "a.tar.gz", stage.sent / "b.tar.gz"]


def test_a_file_that_replaces_the_sent_one_before_the_response_is_delivered_next(stage: Stage) -> None:
    def delay_response(peer: Peer) -> None:
        archive = peer.read_request().archive
        peer.pause()
        peer.send(receipt_for(archive))
        accept_all(peer)

    with ScriptedServer(in_turn(delay_response, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "1h"', destination="workers = 1")
        daemon = stage.daemon().ready()
        path = stage.put("a.tar.gz", b"old")
        assert server.paused.wait(TIMEOUT)

        (stage.base / "new").write_bytes(b"new")
        (stage.base / "new").rename(path)
        server.resume()
        daemon.wait_for("archive.disposed", count=2, archive="a.tar.gz")

    assert [request.archive for request in server.requests] == [b"old", b"new"]
    assert [e["disposition"] for e in daemon.events("archive.disposed")] == ["missing", "moved"]
    assert [p.read_bytes() for p in stage.archives(stage.drop)] == [b"new"]


@pytest.mark.parametrize("change", [*CHANGES, delete])
def test_the_request_of_a_changed_file_never_completes(tmp_path: Path, change: Change) -> None:
    path = tmp_path / "drop" / "a.tar.gz"
    path.parent.mkdir()
    path.write_bytes(OLD)
    is_complete: list[bool] = []

    def change_file(peer: Peer) -> None:
        head = peer.read_head()
        peer.read(MIB)
        change(path)
        peer.drain()
        is_complete.append(peer.received >= int(header_of(head, "Content-Length") or 0))

    with (
        ScriptedServer(in_turn(change_file, accept_all)) as server,
        a_sender(a_destination(server.url)) as sender,
    ):
        outcome = sender.send(path)
        path.write_bytes(b"x")
        again = sender.send(path)

    assert isinstance(outcome, Superseded)
    assert is_complete == [False]
    assert isinstance(again, Delivered)
    assert [request.archive for request in server.requests] == [b"x"]


def test_a_file_that_is_read_but_fails_to_close_is_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.cfg"
    path.write_bytes(b"content")
    close = os.close
    failed: list[int] = []

    def close_on_a_dead_mount(fd: int) -> None:
        is_archive = os.readlink(f"/proc/self/fd/{fd}") == str(path)
        close(fd)
        if is_archive and not failed:  # not the descriptor of the sender, which it closes last
            failed.append(fd)
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    with ScriptedServer(accept_all) as server, a_sender(a_destination(server.url)) as sender:
        monkeypatch.setattr(os, "close", close_on_a_dead_mount)
        assert isinstance(sender.send(path), Delivered)
        monkeypatch.undo()
    assert failed


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOENT, FileChangedDuringUploadError),
        (errno.ELOOP, FileChangedDuringUploadError),
        (errno.ENOTCONN, ReadFailedError),
        (errno.ESTALE, ReadFailedError),
        (errno.EACCES, ReadFailedError),
    ],
)
def test_a_removed_file_has_only_changed_if_its_folder_can_be_read(
    tmp_path: Path, number: int, expected: type[Exception]
) -> None:
    def open_path() -> int:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a.cfg"
    path.write_bytes(b"content")
    with path.open("rb") as file:
        fingerprint = fingerprint_of(os.fstat(file.fileno()))
        job = UploadJob("1", b"a.cfg", file.fileno(), fingerprint, {}, open_path=open_path)
        job.check_unchanged()
        path.unlink()
        with pytest.raises(expected):
            job.check_unchanged()
