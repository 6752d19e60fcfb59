"""Writers that pause, append, truncate or rename: their final content is delivered, complete."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.privileges import IS_ROOT
from tests.scripted import Peer, ScriptedServer, receipt_for, server_context
from tests.stage import TIMEOUT, Daemon, Stage, until

FREQUENT_SCANS = 'stable_for = "0.1s"\nrescan_every = "1s"'
SIZE = 100_000
BIG = 12_000_000
"""More bytes than the socket buffers between daemon and endpoint hold."""


def wait_for_scans(daemon: Daemon, count: int = 2) -> None:
    """Wait for so many further scans."""
    daemon.wait_for("drop.scanned", len(daemon.events("drop.scanned")) + count)


def wait_until_sent(stage: Stage, daemon: Daemon, count: int) -> list[bytes]:
    """Wait until so many archives are in `sent`, and none in the drop folder; return the contents."""

    def are_sent() -> bool:
        waiting = [p for p in stage.archives(stage.drop) if not p.is_relative_to(stage.sent)]
        return not waiting and len(stage.archives(stage.sent)) >= count

    until(are_sent, f"{count} archives in sent\n{daemon.text()[-3000:]}")
    daemon.wait_for("archive.disposed", count)  # logged last
    return sorted(path.read_bytes() for path in stage.archives(stage.sent))


@pytest.mark.long
@pytest.mark.root  # detecting a file that another user has open takes CAP_LEASE
def test_a_file_that_is_still_open_for_writing_is_not_queued(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, top='[log]\nlevel = "debug"', drop=FREQUENT_SCANS)
    daemon = stage.daemon().ready()
    with (stage.drop / "core.tar.gz").open("wb", buffering=0) as stream:
        stream.write(b"first half, ")
        wait_for_scans(daemon, 3)
        assert not daemon.events("archive.queued")
        stream.write(b"second half")
    assert wait_until_sent(stage, daemon, 1) == [b"first half, second half"]
    assert len(stage.stored()) == 1
    assert daemon.stop() == 0


@pytest.mark.long
def test_without_the_capability_for_leases_start_check_and_status_report_that_writers_are_invisible(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop=FREQUENT_SCANS)
    without_leases = ["setpriv", "--bounding-set=-lease"] if IS_ROOT else []
    daemon = stage.daemon(before=without_leases).ready()
    (watched,) = daemon.wait_for("drop.watched")
    assert "CAP_LEASE" in watched["blind_spot"]

    check = ["check", "--offline", "--config", str(stage.config)]
    done = subprocess.run(
        [*without_leases, sys.executable, "-m", "backupd", *check],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert "CAP_LEASE" in done.stdout + done.stderr, done
    assert "CAP_LEASE" in stage.backupd("status").stdout
    assert daemon.stop() == 0


def test_content_appended_after_the_delivery_is_a_new_archive(
    stage: Stage, receiver: RunningReceiver
) -> None:
    """The file was moved away: a writer that opens the name again creates a new file."""
    stage.configure(receiver.url, drop=FREQUENT_SCANS)
    daemon = stage.daemon().ready()
    for part in (b"first", b"second"):
        with (stage.drop / "core.tar.gz").open("ab") as stream:
            stream.write(part)
        daemon.wait_for("archive.disposed", 1 + (part == b"second"), archive="core.tar.gz")
    assert wait_until_sent(stage, daemon, 2) == [b"first", b"second"]
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.root
@pytest.mark.parametrize("action", ["move", "delete"])
def test_a_queued_file_opened_again_is_moved_after_its_close(
    stage: Stage, receiver: RunningReceiver, action: str
) -> None:
    """The earlier content is uploaded first, and the appended content after the file is closed."""
    stage.configure(
        receiver.url,
        drop=f'{FREQUENT_SCANS}\non_delivered = "{action}"',
        more='[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.5s"',
    )
    receiver.__exit__(None, None, None)
    daemon = stage.daemon().ready()
    path = stage.put("core.tar.gz", b"first half")
    daemon.wait_for("delivery.deferred", archive="core.tar.gz")
    with path.open("ab", buffering=0) as stream:
        receiver.__enter__()
        daemon.wait_for("disposition.failed", archive="core.tar.gz")
        stream.write(b", second half")
    daemon.wait_for("archive.delivered", 2, archive="core.tar.gz")
    until(lambda: not path.exists(), "the file to leave the drop folder")
    assert sorted(p.read_bytes() for p in stage.stored()) == [b"first half", b"first half, second half"]
    kept = [p.read_bytes() for p in stage.archives(stage.drop)]
    assert kept == ([b"first half, second half"] if action == "move" else [])
    assert daemon.stop() == 0


def appended(path: Path) -> bytes:
    with path.open("ab") as stream:
        stream.write(b"more")
    return path.read_bytes()


def cut(path: Path) -> bytes:
    os.truncate(path, path.stat().st_size // 2)
    return path.read_bytes()


def rewritten_unnoticed(path: Path) -> bytes:
    """Rewrite the file and restore its size and times: only the change time (ctime) differs."""
    before = path.stat()
    content = os.urandom(before.st_size)
    with path.open("r+b") as stream:
        stream.write(content)
        stream.flush()
        os.utime(
            stream.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns)
        )  # while the open file keeps the daemon off
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    return content


def renamed_over(path: Path) -> bytes:
    content = os.urandom(SIZE)
    part = path.parent.parent / "part"
    part.write_bytes(content)
    part.rename(path)
    return content


def replaced(path: Path) -> bytes:
    path.unlink()
    return renamed_over(path)


CHANGES = [appended, cut, rewritten_unnoticed, renamed_over, replaced]


class PausesFirstRequest:
    """Accepts every archive, but pauses in the middle of the first request."""

    def __init__(self) -> None:
        self.contents: list[bytes] = []

    def __call__(self, peer: Peer) -> None:
        while True:
            head = peer.read_head()
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = peer.read(length // 2)
            if peer.number == 0:
                peer.pause()
            body += peer.read(length - len(body))
            content = body.partition(b'; filename="')[2].partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
            content = content.partition(b"\r\n--")[0] if b'name="sha256"' in content else content
            self.contents.append(content)
            peer.send(receipt_for(content))


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_during_the_upload_delivers_only_the_new_content(
    stage: Stage, change: Callable[[Path], bytes]
) -> None:
    endpoint = PausesFirstRequest()
    with ScriptedServer(endpoint, server_context(stage.pki)) as server:
        stage.configure(
            server.url,
            drop=FREQUENT_SCANS,
            destination="workers = 1",
            more='[destination.vault.retry]\ninitial = "0.1s"\nmax = "1s"',
        )
        daemon = stage.daemon().ready()
        old = os.urandom(BIG)
        path = stage.put("core.tar.gz", old)
        assert server.paused.wait(TIMEOUT)
        new = change(path)
        server.resume()

        assert wait_until_sent(stage, daemon, 1) == [new]
        assert endpoint.contents == [new]  # the first request never completes
        delivered = daemon.events("archive.delivered")
        assert [line["size_bytes"] for line in delivered] == [len(new)]
        assert daemon.stop() == 0


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_the_upload_delivers_only_the_new_content(
    stage: Stage, receiver: RunningReceiver, change: Callable[[Path], bytes]
) -> None:
    stage.configure(
        receiver.url, drop=FREQUENT_SCANS, more='[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.5s"'
    )
    receiver.__exit__(None, None, None)
    daemon = stage.daemon().ready()
    path = stage.put("core.tar.gz", os.urandom(SIZE))
    daemon.wait_for("delivery.deferred", archive="core.tar.gz")
    new = change(path)
    receiver.__enter__()

    assert wait_until_sent(stage, daemon, 1) == [new]
    assert [stored.read_bytes() for stored in stage.stored()] == [new]
    assert len(daemon.events("archive.delivered")) == 1
    assert daemon.stop() == 0


def test_each_content_under_a_reused_name_is_delivered(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"')
    daemon = stage.daemon().ready()
    contents = []
    for number in range(5):
        contents.append(b"content %d" % number)
        stage.put("core.tar.gz", contents[-1])
        daemon.wait_for("archive.disposed", number + 1, archive="core.tar.gz")
    assert wait_until_sent(stage, daemon, 5) == contents
    assert sorted(stored.read_bytes() for stored in stage.stored()) == contents
    assert daemon.stop() == 0


@pytest.mark.long
def test_every_file_of_a_folder_that_is_moved_in_is_delivered(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop='stable_for = "0s"')
    daemon = stage.daemon().ready()
    site = stage.base / "site"
    for number in range(1000):
        folder = site / f"rack-{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"sw-{number}.cfg").write_bytes(b"%d" % number)
    site.rename(stage.drop / "site")
    assert wait_until_sent(stage, daemon, 1000) == sorted(b"%d" % number for number in range(1000))
    assert len(stage.stored()) == 1000
    assert (stage.sent / "site" / "rack-7" / "sw-17.cfg").read_bytes() == b"17"
    assert daemon.stop() == 0
