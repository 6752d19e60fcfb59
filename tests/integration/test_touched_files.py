"""Files of which only metadata changes: their content decides, and is delivered once."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backupd.core.model import Delivered, Digest, Superseded, fingerprint_of
from backupd.dropfolder import content
from backupd.dropfolder.content import ExpectedFile
from backupd.dropfolder.folder import DropFolder
from backupd.dropfolder.move import FileChangedError, find_moved, move
from backupd.intake.problem_list import ProblemList
from backupd.intake.unfinished_files import UnfinishedFiles
from backupd.ledger.port import DispositionResult, Ledger, content_key
from backupd.ledger.sqlite.connection import open_ledger
from backupd.ledger.sqlite.deliveries import SqliteLedger
from backupd.telemetry.journal import LineWriter
from backupd.telemetry.log import EventLog
from tests.factories import NOW, a_claim_result, a_digest, a_drop, delivered, record_dispositions
from tests.integration.test_intake import LONG, RunningIntake, running_intake
from tests.programs import require
from tests.scripted import (
    Peer,
    Request,
    ScriptedServer,
    accept_all,
    header_of,
    in_turn,
    receipt_for,
    server_context,
)
from tests.stage import Stage, until
from tests.uploading import MIB, a_destination, a_sender

CONTENT = b"0123456789abcdef" * (MIB // 2)  # 8 MiB

Touch = Callable[[Path], None]


def chmod(path: Path) -> None:
    path.chmod(path.stat().st_mode ^ 0o010)


def link(path: Path) -> None:
    """Make a hard link of the file, as `cp -al` and `rsync --link-dest` do for snapshots."""
    os.link(path, path.parent.parent / f"link-{time.monotonic_ns()}")


def copy_as_links(path: Path) -> None:
    snapshot = path.parent.parent / f"snapshot-{time.monotonic_ns()}"
    subprocess.run(["cp", "-al", path.parent, snapshot], check=True)


def rsync_to_links(path: Path) -> None:
    """Make a snapshot as rsnapshot does with `link_dest`, of which each file is a link to the one before."""
    base = path.parent.parent / "rsync"
    first, second = base / "0", base / f"{time.monotonic_ns()}"
    command = [require("rsync"), "-a", "--exclude=sent", f"--link-dest={path.parent}"]
    for target in (first, second):
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, f"{path.parent}/", target], check=True)


def rename_and_back(path: Path) -> None:
    aside = path.parent.parent / "aside"
    path.rename(aside)
    aside.rename(path)


def set_acl(path: Path) -> None:
    subprocess.run([require("setfacl"), "-m", "u:nobody:r", path], check=True)


def set_owner(path: Path) -> None:
    os.chown(path, os.getuid(), os.getgid())


def replace_by_copy(path: Path) -> None:
    aside = path.parent.parent / "aside"
    shutil.copy2(path, aside)
    aside.rename(path)


def rsync_again(path: Path) -> None:
    """Write the file once more, as each run of `rsync --ignore-times` does."""
    source = path.parent.parent / f"source-{time.monotonic_ns()}"
    shutil.copy2(path, source)
    subprocess.run([require("rsync"), "-aI", source, path], check=True)


REPLACEMENTS = [replace_by_copy, rsync_again]
TOUCHES = [chmod, set_owner, set_acl, link, copy_as_links, rsync_to_links, rename_and_back, *REPLACEMENTS]


def rewrite(path: Path, content: bytes) -> None:
    """Rewrite a file in place and restore its modification time, as `touch -r` does."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by(path: Path, content: bytes) -> None:
    """Rename another file over the path, with the same size and modification time, as `rsync -t` does."""
    before, other = path.stat(), path.parent.parent / "other"
    other.write_bytes(content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


@contextmanager
def touched_all_the_time(path: Path) -> Iterator[threading.Event]:
    """Change the mode of a file all the time, wherever it is; the event is set after the first change."""
    stop, has_touched = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.wait(0.01):
            with suppress(FileNotFoundError):
                path.chmod(path.stat().st_mode ^ 0o010)
                has_touched.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield has_touched
    finally:
        stop.set()
        thread.join()


# during the upload


def file_in(folder: Path, content: bytes = CONTENT) -> Path:
    path = folder / "drop" / "a.tar.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def at(offset: int, action: Callable[[], Any]) -> Callable[[int], None]:
    """Return a progress callback that runs an action once an upload has sent this many bytes."""
    done: list[int] = []

    def progress(sent: int) -> None:
        if sent >= offset and not done:
            done.append(sent)
            action()

    return progress


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("digest_at", ["after", "before"])
def test_metadata_that_changes_during_an_upload_does_not_break_it_off(
    tmp_path: Path, touch: Touch, digest_at: str
) -> None:
    path = file_in(tmp_path)
    with (
        ScriptedServer(accept_all) as server,
        a_sender(a_destination(server.url, digest_at=digest_at)) as sender,
    ):
        outcome = sender.send(path, at(2 * MIB, lambda: touch(path)))
    assert isinstance(outcome, Delivered)
    assert [request.archive for request in server.requests] == [CONTENT]


@pytest.mark.parametrize("change", [rewrite, replace_by])
@pytest.mark.parametrize("offset", [1, 5 * MIB, 8 * MIB - 300_000])
def test_a_content_that_changes_while_size_and_time_are_restored_is_not_delivered(
    tmp_path: Path, change: Callable[[Path, bytes], None], offset: int
) -> None:
    path, heads = file_in(tmp_path), []

    def count(peer: Peer) -> None:
        heads.append(peer.read_head())
        peer.drain()
        assert peer.received < int(header_of(heads[0], "Content-Length") or 0)

    with ScriptedServer(count) as server, a_sender(a_destination(server.url)) as sender:
        outcome = sender.send(path, at(offset, lambda: change(path, CONTENT[::-1])))
    assert isinstance(outcome, Superseded)
    assert len(heads) == 1


def test_a_file_that_is_open_for_writing_after_its_metadata_changed_is_not_delivered(tmp_path: Path) -> None:
    path = file_in(tmp_path)
    with ScriptedServer(accept_all) as server, a_sender(a_destination(server.url)) as sender:
        sender.is_being_written = lambda: True
        assert isinstance(sender.send(path), Delivered)
        assert isinstance(sender.send(path, at(1, lambda: chmod(path))), Superseded)


def test_a_content_that_another_destination_does_not_have_is_not_delivered(tmp_path: Path) -> None:
    path = file_in(tmp_path)
    with ScriptedServer(accept_all) as server, a_sender(a_destination(server.url)) as sender:
        sender.known_digests = (a_digest(CONTENT, "md5"), a_digest(CONTENT))
        assert isinstance(sender.send(path, at(1, lambda: chmod(path))), Delivered)
        sender.known_digests = (a_digest(b"another", "md5"),)
        assert isinstance(sender.send(path, at(1, lambda: chmod(path))), Superseded)


def test_bytes_are_sent_while_the_content_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backupd.upload.http.body._SEND_EVERY", 0.0)
    path = file_in(tmp_path)
    with (
        ScriptedServer(accept_all) as server,
        a_sender(a_destination(server.url, min_rate="1GB")) as sender,
    ):
        outcome = sender.send(path, at(1, lambda: chmod(path)))
    assert isinstance(outcome, Delivered)
    assert [request.archive for request in server.requests] == [CONTENT]


# in the daemon


def fingerprints(stage: Stage) -> list[tuple[int, int]]:
    """Return the inode and change time of each archive in the ledger."""
    with closing(sqlite3.connect(stage.state / "ledger.sqlite3")) as ledger:
        return ledger.execute("SELECT inode, ctime_ns FROM archive ORDER BY id").fetchall()


def wait_until_known(stage: Stage, path: Path) -> None:
    """Wait until the ledger has the current fingerprint of a file."""
    status = path.stat()
    until(
        lambda: (status.st_ino, status.st_ctime_ns) in fingerprints(stage),
        f"the fingerprint of {path.name}, found {fingerprints(stage)}",
    )


KEPT = 'on_delivered = "keep"\nrescan_every = "0.2s"'


def test_an_archive_that_is_touched_all_the_time_is_delivered_once_and_moved(stage: Stage) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url, drop='rescan_every = "0.2s"')
        daemon = stage.daemon().ready()
        with touched_all_the_time(stage.drop / "a.tar.gz") as has_touched:
            stage.put("a.tar.gz", CONTENT)
            assert has_touched.wait(60)
            daemon.wait_for("archive.disposed")
    assert [request.archive for request in server.requests] == [CONTENT]
    assert (stage.sent / "a.tar.gz").read_bytes() == CONTENT
    assert not daemon.events("archive.superseded")
    assert [line["disposition"] for line in daemon.events("archive.disposed")] == ["moved"]


FAST_RETRY = '[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.3s"'


def test_a_pending_archive_that_is_renamed_for_a_moment_keeps_its_delivery(stage: Stage) -> None:
    aside = stage.base / "aside"
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        server.refuse()
        stage.configure(server.url, drop='rescan_every = "1h"', more=FAST_RETRY)
        path = stage.drop / "r1.cfg"
        stage.put(path.name, CONTENT)
        for _ in range(2):
            daemon = stage.daemon().ready()
            daemon.wait_for("attempt.failed", reason="connect_failed")
            path.rename(aside)
            (missed,) = daemon.wait_for("attempt.failed", reason="archive_missing")
            aside.rename(path)
            wait_until_known(stage, path)
            daemon.stop()
        server.accept_again()
        daemon = stage.daemon()
        (verified,) = daemon.wait_for("delivery.verified")
    assert verified["delivery_id"] == missed["delivery_id"]
    events = [json.loads(line)["event"] for line in stage.log.read_text().splitlines()]
    assert events.count("archive.queued") == 1
    assert "archive.missing" not in events


def test_a_file_that_is_missing_twice_is_removed(stage: Stage) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        server.refuse()
        stage.configure(server.url, drop='rescan_every = "0.2s"', more=FAST_RETRY)
        daemon = stage.daemon().ready()
        path = stage.put("r1.cfg", CONTENT)
        daemon.wait_for("attempt.failed", reason="connect_failed")
        path.unlink()
        daemon.wait_for("archive.missing", archive=path.name)
    assert len([e for e in daemon.events("attempt.failed") if e["reason"] == "archive_missing"]) == 1


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_an_archive_that_is_replaced_by_copies_during_its_upload_is_delivered_once(
    stage: Stage, replace: Touch
) -> None:
    path = stage.drop / "a.tar.gz"

    def replace_and_accept(peer: Peer) -> None:
        head, body = peer.read_head(), b""
        for _ in range(2):
            body += peer.read(5 * MIB)
            replace(path)
        body += peer.read(int(header_of(head, "Content-Length") or 0) - len(body))
        server.requests.append(Request(head, body))
        peer.send(receipt_for(server.requests[0].archive))
        accept_all(peer)

    with ScriptedServer(in_turn(replace_and_accept, accept_all), server_context(stage.pki)) as server:
        stage.configure(server.url, drop=KEPT)
        daemon = stage.daemon().ready()
        stage.put("a.tar.gz", CONTENT * 3)
        daemon.wait_for("archive.disposed")
        wait_until_known(stage, path)
    assert [request.archive for request in server.requests] == [CONTENT * 3]
    assert not daemon.events("archive.superseded")
    assert len(fingerprints(stage)) == 1


def test_a_kept_archive_is_not_sent_again_when_only_metadata_changes(stage: Stage) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url, drop=KEPT)
        daemon = stage.daemon().ready()
        path = stage.put("a.tar.gz", CONTENT)
        daemon.wait_for("archive.disposed")
        for touch in TOUCHES:
            touch(path)
            wait_until_known(stage, path)
        daemon.stop()
        chmod(path)
        daemon = stage.daemon().ready()
        wait_until_known(stage, path)
    assert len(fingerprints(stage)) == len(server.requests) == 1


@pytest.mark.parametrize("change", [rewrite, replace_by])
def test_a_kept_archive_is_sent_again_with_a_new_content_of_the_same_size_and_time(
    stage: Stage, change: Callable[[Path, bytes], None]
) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url, drop=KEPT)
        daemon = stage.daemon().ready()
        path = stage.put("a.tar.gz", CONTENT)
        daemon.wait_for("archive.disposed")
        change(path, CONTENT[::-1])
        daemon.wait_for("archive.disposed", 2)
    assert [request.archive for request in server.requests] == [CONTENT, CONTENT[::-1]]


@pytest.mark.parametrize("after_kill", [CONTENT, CONTENT[::-1]], ids=["same", "other"])
def test_the_content_decides_after_a_kill_between_delivery_and_disposition(
    stage: Stage, after_kill: bytes
) -> None:
    """The file is rewritten and its times are restored while no daemon runs."""
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url)
        path = stage.put("a.tar.gz", CONTENT)
        (stage.drop / "sent").write_bytes(b"a file")  # nothing can be moved
        daemon = stage.daemon().ready()
        daemon.wait_for("disposition.failed", archive="a.tar.gz")
        daemon.kill()
        rewrite(path, after_kill)
        (stage.drop / "sent").unlink()
        daemon = stage.daemon()
        daemon.wait_for("archive.disposed", 1 if after_kill == CONTENT else 2)
        daemon.stop()
    contents = [CONTENT] if after_kill == CONTENT else [CONTENT, after_kill]
    assert [request.archive for request in server.requests if request.archive != b"a file"] == contents
    assert [path.read_bytes() for path in stage.archives(stage.sent)] == [after_kill]


@pytest.mark.long
def test_kills_while_kept_archives_are_compared_send_nothing_again(stage: Stage) -> None:
    with ScriptedServer(accept_all, server_context(stage.pki)) as server:
        stage.configure(server.url, drop=KEPT)
        daemon = stage.daemon().ready()
        paths = [stage.put(f"sw-{number}.cfg", CONTENT + b"%d" % number) for number in range(4)]
        daemon.wait_for("archive.disposed", len(paths))
        for number in range(8):
            for path in paths:
                chmod(path)
            time.sleep(0.1 * number)
            daemon.kill()
            daemon = stage.daemon().ready()
        for path in paths:
            wait_until_known(stage, path)
    assert len(fingerprints(stage)) == len(server.requests) == len(paths)


# in the intake


def deliver(ledger: Ledger, content: bytes = b"abc") -> None:
    """Record the delivery of the only archive, which stays in its place."""
    (delivery,) = ledger.claim("vault", ledger.now())
    (completed,) = ledger.record([a_claim_result(delivery, delivered(content))], NOW).completed
    record_dispositions(ledger, [DispositionResult(completed.archive.id, None, kept_in_place=True)], [], NOW)


def wait_known(scene: RunningIntake, path: Path) -> None:
    def is_known() -> bool:
        changes = scene.ledger.known_since("switches")
        key = content_key(os.fsencode(path.name), fingerprint_of(path.stat()))
        return changes.added.get(hash(os.fsencode(path.name))) == key

    until(is_known, "the fingerprint in the ledger")


def test_a_content_is_read_once_for_each_change_of_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest_of = content.digest_of

    def counted(*arguments: Any) -> Digest:
        read.append(threading.current_thread().name)
        return digest_of(*arguments)

    monkeypatch.setattr("backupd.intake.examiner.digest_of", counted)
    with running_intake(tmp_path) as scene:
        path = scene.put("r1.cfg")
        scene.wait_queued("r1.cfg")
        deliver(scene.ledger)
        for number in (1, 2):
            chmod(path)
            wait_known(scene, path)
            scene.wait_scan()
            scene.wait_scan()
            assert len(read) == number
        assert scene._thread.name not in read
        assert scene.queued() == ["r1.cfg"]


def test_a_pending_archive_keeps_its_age_when_it_is_touched(scene_of_one: RunningIntake) -> None:
    path = scene_of_one.root / "r1.cfg"
    queued_at = scene_of_one.ledger.backlog()["vault"].oldest
    for touch in (chmod, link, rename_and_back):
        touch(path)
        wait_known(scene_of_one, path)
    assert scene_of_one.queued() == ["r1.cfg"]
    assert not scene_of_one.events("archive.superseded")
    backlog = scene_of_one.ledger.backlog()["vault"]
    assert (backlog.pending, backlog.oldest) == (1, queued_at)


@pytest.fixture
def scene_of_one(tmp_path: Path) -> Iterator[RunningIntake]:
    with running_intake(tmp_path) as scene:
        scene.put("r1.cfg")
        scene.wait_queued("r1.cfg")
        yield scene


def test_a_new_file_that_is_touched_all_the_time_is_queued(tmp_path: Path) -> None:
    with running_intake(tmp_path, rescan_every=LONG) as scene:
        with touched_all_the_time(scene.root / "r1.cfg") as has_touched:
            scene.put("r1.cfg")
            assert has_touched.wait(60)
            scene.wait_queued("r1.cfg")


@pytest.mark.parametrize("checks", [{"inspect": "full"}, {"checksum_file": "auto"}])
def test_a_damaged_archive_that_is_touched_all_the_time_is_rejected_after_its_grace(
    tmp_path: Path, checks: dict[str, Any]
) -> None:
    with running_intake(tmp_path, inspect_grace="1s", on_suspicious="reject", **checks) as scene:
        scene.put("r1.tar.gz.sha256", b"0" * 64)
        with touched_all_the_time(scene.root / "r1.tar.gz") as has_touched:
            scene.put("r1.tar.gz", gzip.compress(os.urandom(1000))[:-5])
            assert has_touched.wait(60)
            until(scene.ledger.pending_dispositions, "the rejection")
            assert not scene.queued()


def test_a_file_that_is_written_while_its_time_is_restored_is_not_stable(tmp_path: Path) -> None:
    """The writer closes the file each time, and its size is constant."""
    root = tmp_path / "drop"
    root.mkdir()
    path = root / "r1.cfg"
    path.write_bytes(b"0000")
    with (
        closing(DropFolder(str(root))) as folder,
        closing(SqliteLedger(open_ledger(tmp_path).connection)) as ledger,
        open(os.devnull, "wb") as null,
    ):
        log = EventLog(LineWriter(null.fileno()))
        files = UnfinishedFiles(a_drop(folder, stable_for="2s"), ProblemList("switches", ledger), log)
        assert files.check(b"r1.cfg", 10.0) is None
        for number in range(1, 4):
            rewrite(path, b"%04d" % number)
            candidate = files.check(b"r1.cfg", 10.0 + 2 * number)
            assert candidate is not None
            assert candidate.touched
            digest = a_digest(path.read_bytes())
            assert digest not in candidate.digests  # so that the examiner returns it as touched again
            files.hold_touched(replace(candidate, digests=(digest,)), 10.0 + 2 * number)
        candidate = files.check(b"r1.cfg", 18.0)
        assert candidate is not None
        assert not candidate.touched


# when a file is moved


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[DropFolder]:
    (tmp_path / "drop").mkdir()
    with closing(DropFolder(str(tmp_path / "drop"))) as folder:
        yield folder


def expected_of(path: Path, content: bytes) -> ExpectedFile:
    digest = Digest("sha256", hashlib.sha256(content).hexdigest())
    return ExpectedFile(fingerprint_of(path.stat()), digest)


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_touched_file_is_moved(folder: DropFolder, tmp_path: Path, touch: Touch) -> None:
    path = file_in(tmp_path, b"abc")
    expected = expected_of(path, b"abc")
    touch(path)
    assert move(folder, b"a.tar.gz", expected, b"sent", iter([b"a"]), b".taken") == b"sent/a"


@pytest.mark.parametrize("change", [rewrite, replace_by])
def test_a_file_with_another_content_of_the_same_size_and_time_is_not_moved(
    folder: DropFolder, tmp_path: Path, change: Callable[[Path, bytes], None]
) -> None:
    path = file_in(tmp_path, b"abc")
    expected = expected_of(path, b"abc")
    change(path, b"xyz")
    with pytest.raises(FileChangedError):
        move(folder, b"a.tar.gz", expected, b"sent", iter([b"a"]), b".taken")
    assert path.read_bytes() == b"xyz"
    assert find_moved(folder, b"a.tar.gz", expected, b"sent", iter([b"a"]), b".taken") is None


@pytest.mark.parametrize("name", [b"a", b".taken"])
@pytest.mark.parametrize("content", [b"abc", b"xyz"])
@pytest.mark.parametrize("same_inode", [True, False])
def test_a_moved_file_is_found_by_its_content_after_a_crash(
    folder: DropFolder, tmp_path: Path, name: bytes, content: bytes, same_inode: bool
) -> None:
    """A network filesystem may number its inodes again, and a rename changes the change time."""
    path = file_in(tmp_path, b"abc")
    expected = expected_of(path, b"abc")
    (path.parent / "sent").mkdir()
    moved = path.parent / "sent" / os.fsdecode(name)
    shutil.copy2(path, moved)
    if content != b"abc":
        rewrite(moved, content)
    if same_inode:
        path.rename(moved)
        rewrite(moved, content)
    path.unlink(missing_ok=True)
    found = find_moved(folder, b"a.tar.gz", expected, b"sent", iter([b"a"]), b".taken")
    assert found == (b"sent/a" if content == b"abc" else None)


def test_a_content_that_was_compared_is_not_read_again(folder: DropFolder, tmp_path: Path) -> None:
    path, calls = file_in(tmp_path, b"abc"), []

    def should_stop() -> bool:
        calls.append(1)
        return False

    expected = ExpectedFile(fingerprint_of(path.stat()), a_digest(b"abc"), should_stop)
    chmod(path)
    with folder.directory(b"") as root:
        assert expected.is_at(root, b"a.tar.gz")
        number = len(calls)
        assert number > 0
        assert expected.is_at(root, b"a.tar.gz")
    assert len(calls) == number
