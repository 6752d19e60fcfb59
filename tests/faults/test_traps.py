"""Attacks by files under names that the daemon uses itself, and by files that cost time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.faults.test_hostile import FREQUENT_SCANS, SECRET, Outside, exchange, repeatedly
from tests.stage import Daemon, Stage, until

FAST_RETRY = '[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.3s"'
Trap = Callable[[Path, Outside], None]


@pytest.fixture
def outside(stage: Stage) -> Outside:
    return Outside(stage.base / "outside", ["r0.cfg"])


def a_pipe(path: Path, outside: Outside) -> None:
    os.mkfifo(path)


def a_link(path: Path, outside: Outside) -> None:
    path.symlink_to(outside.folder / "r0.cfg")


def a_hard_link(path: Path, outside: Outside) -> None:
    """Only the owner of a file may make a hard link, or any user where fs.protected_hardlinks is 0."""
    path.hardlink_to(outside.folder / "r0.cfg")


def a_folder(path: Path, outside: Outside) -> None:
    path.mkdir()


def wait_until_disposed(daemon: Daemon, *names: str) -> None:
    for name in names:
        daemon.wait_for("archive.disposed", archive=name)


@pytest.mark.long
@pytest.mark.parametrize("trap", [a_pipe, a_link, a_hard_link])
def test_a_trap_with_the_name_of_a_temporary_receipt_file_is_neither_opened_nor_written(
    stage: Stage, receiver: RunningReceiver, outside: Outside, trap: Trap
) -> None:
    stage.configure(receiver.url, drop=FREQUENT_SCANS)
    daemon = stage.daemon().ready()
    stage.sent.mkdir()
    trap(stage.sent / ".backupd-1-1.part", outside)
    stage.put("r1.cfg", b"1")
    stage.put("r2.cfg", b"2")
    wait_until_disposed(daemon, "r1.cfg", "r2.cfg")
    assert (stage.sent / "r1.cfg.receipt.json").read_bytes().startswith(b"{")
    outside.assert_untouched(stage)
    assert not daemon.events("disposition.failed")
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_folder_with_the_name_of_a_temporary_receipt_file_is_logged_and_stops_no_other_archive(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop=FREQUENT_SCANS)
    daemon = stage.daemon().ready()
    trap = stage.sent / ".backupd-1-1.part"
    trap.mkdir(parents=True)
    stage.put("r1.cfg", b"1")
    (failed,) = daemon.wait_for("disposition.failed", archive="r1.cfg")
    assert "hidden name" in failed["hint"]
    stage.put("r2.cfg", b"2")
    wait_until_disposed(daemon, "r2.cfg")
    assert len(daemon.events("disposition.failed")) == 1
    assert daemon.stop() == 0
    trap.rmdir()
    daemon = stage.daemon().ready()
    wait_until_disposed(daemon, "r1.cfg")
    assert (stage.sent / "r1.cfg.receipt.json").exists()
    assert sorted(path.read_bytes() for path in stage.stored()) == [b"1", b"2"]
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("trap", [a_pipe, a_link, a_folder, a_hard_link])
@pytest.mark.parametrize("action", ["move", "delete"])
def test_a_trap_with_a_hidden_name_of_the_daemon_is_renamed(
    stage: Stage, receiver: RunningReceiver, outside: Outside, trap: Trap, action: str
) -> None:
    stage.configure(receiver.url, drop=f'{FREQUENT_SCANS}\non_delivered = "{action}"\nmax_size = "1kB"')
    daemon = stage.daemon().ready()
    place = stage.sent if action == "move" else stage.drop
    place.mkdir(exist_ok=True)
    for ending in ("taken", "deleted") if action == "delete" else ("taken",):
        trap(place / f".backupd-1.{ending}", outside)
    stage.put("r1.cfg", b"1")
    stage.put("r2.cfg", b"2")
    wait_until_disposed(daemon, "r1.cfg", "r2.cfg")
    assert os.path.lexists(stage.drop / "1-r1.cfg")  # renamed to a visible name, and not lost
    assert sorted(path.read_bytes() for path in stage.stored()) == [b"1", b"2"]
    outside.assert_untouched(stage)
    assert not daemon.events("disposition.failed")
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("trap", [a_pipe, a_link, a_folder])
def test_an_archive_replaced_by_a_trap_before_its_upload_is_missing_until_it_is_back(
    stage: Stage, receiver: RunningReceiver, outside: Outside, trap: Trap
) -> None:
    stage.configure(receiver.url, drop=FREQUENT_SCANS, more=FAST_RETRY)
    receiver.__exit__(None, None, None)
    daemon = stage.daemon().ready()
    path = stage.put("r1.cfg", b"1")
    daemon.wait_for("delivery.deferred", archive="r1.cfg")
    kept = stage.base / "kept"
    path.rename(kept)
    trap(path, outside)
    receiver.__enter__()
    daemon.wait_for("archive.missing", archive="r1.cfg")
    outside.assert_untouched(stage)

    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    kept.rename(path)  # the archive is back, and is delivered
    wait_until_disposed(daemon, "r1.cfg")
    assert len(daemon.events("archive.delivered")) == 1
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_sent_folder_swapped_for_a_link_during_moves_leads_to_no_file_outside(
    stage: Stage, receiver: RunningReceiver
) -> None:
    names = [f"r{number}.cfg" for number in range(100)]
    outside = Outside(stage.base / "outside", names)
    stage.configure(receiver.url, drop=FREQUENT_SCANS)
    stage.sent.mkdir()
    real, trap = stage.sent.stat().st_ino, stage.base / "trap"
    trap.symlink_to(outside.folder)
    daemon = stage.daemon().ready()
    with repeatedly(lambda: exchange(stage.sent, trap)) as count:
        for name in names:
            stage.put(name, name.encode())
        daemon.wait_for("delivery.verified", len(names))
        until(lambda: count["times"] > 2000, "enough swaps")
    if stage.sent.lstat().st_ino != real:
        exchange(stage.sent, trap)
    assert not daemon.events("daemon.failed")
    assert daemon.stop() == 0
    daemon = stage.daemon().ready()
    until(lambda: len(stage.archives(stage.sent)) == len(names), "all archives in sent")
    outside.assert_untouched(stage)
    assert sorted(path.name for path in outside.folder.iterdir()) == sorted(names)
    assert sorted(p.read_bytes() for p in stage.archives(stage.sent)) == sorted(map(str.encode, names))
    assert not daemon.events("daemon.failed")
    assert daemon.stop() == 0


def nest(top: Path, *stretches: tuple[int, str, bytes]) -> None:
    """Nest directories: for each stretch so many of one name, with an archive in the last."""
    here = os.open(top, os.O_RDONLY)
    for depth, name, content in stretches:
        for _ in range(depth):
            os.mkdir(name, dir_fd=here)
            below = os.open(name, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        with open(os.open("deep.cfg", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as stream:
            stream.write(content)
    os.close(here)


@pytest.mark.long
@pytest.mark.parametrize("when", ["before the start", "while it runs"])
def test_directories_nested_beyond_the_limits_do_not_end_the_daemon(
    stage: Stage, receiver: RunningReceiver, when: str
) -> None:
    """1200 levels exceed the recursion limit of Python, and the rest exceeds the 4096 bytes of a path."""
    stage.configure(receiver.url, drop=FREQUENT_SCANS)
    daemon = stage.daemon().ready() if when == "while it runs" else None
    pit = stage.base / "pit"
    pit.mkdir()
    try:
        nest(pit, (1200, "d", b"deep"), (10, "d" * 200, b"too deep"))
        pit.rename(stage.drop / "pit")
        daemon = daemon or stage.daemon()
        stage.put("r1.cfg", b"1")
        daemon.wait_for("archive.disposed", 2)
        ignored = daemon.wait_for("archive.ignored")
        stage.put("r2.cfg", b"2")
        wait_until_disposed(daemon, "r1.cfg", "r2.cfg")
        assert sorted(path.read_bytes() for path in stage.stored()) == [b"1", b"2", b"deep"]
        assert [(line["reason"], line["error"]) for line in ignored] == [("unreadable", "File name too long")]
        assert "4096 bytes" in ignored[0]["hint"]
        assert not daemon.events("daemon.failed")
        assert daemon.stop() == 0
    finally:
        subprocess.run(["rm", "-rf", stage.drop, pit], check=True)  # shutil.rmtree is recursive


@contextmanager
def a_filesystem_for_huge_files(stage: Stage) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "backupd-test", stage.drop], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", stage.drop], check=True)


def a_huge_file(path: Path) -> None:
    with path.open("wb") as stream:
        os.truncate(stream.fileno(), 2**63 - 1)


@pytest.mark.long
@pytest.mark.root
@pytest.mark.parametrize(
    "destination", ['workers = 1\ndeadline = "1s"', 'workers = 2\ndigest_at = "before"'], ids=["sent", "read"]
)
def test_uploading_and_reading_huge_files_delays_no_other_archive_and_no_stop(
    stage: Stage, receiver: RunningReceiver, destination: str
) -> None:
    """With a deadline one worker is enough. Reading a file for its digest ends with the daemon."""
    with a_filesystem_for_huge_files(stage):
        drop = f'{FREQUENT_SCANS}\nchecksum_file = "auto"'
        stage.configure(
            receiver.url, top='shutdown_grace = "0s"', drop=drop, destination=destination, more=FAST_RETRY
        )
        daemon = stage.daemon().ready()
        a_huge_file(stage.drop / "sent.cfg")
        (stage.drop / "examined.cfg.sha256").write_text("0" * 64)
        a_huge_file(stage.drop / "examined.cfg")
        daemon.wait_for("archive.queued", archive="sent.cfg")
        names = [f"r{number}.cfg" for number in range(10)]
        for name in names:
            (stage.drop / name).write_bytes(name.encode())
        wait_until_disposed(daemon, *names)
        assert not [e for e in daemon.events("archive.queued") if e["archive"] == "examined.cfg"]
        assert daemon.memory("VmHWM") < 150 * 2**20
        assert daemon.stop() == 0


HOLDS_A_LEASE = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lease_on_a_file_delays_no_other_archive(stage: Stage, receiver: RunningReceiver) -> None:
    """Opening such a file with O_NONBLOCK does not wait; else it waits up to fs.lease-break-time."""
    stage.configure(receiver.url, drop=FREQUENT_SCANS)
    held = stage.base / "held.cfg"
    held.write_bytes(b"held")
    command = [sys.executable, "-c", HOLDS_A_LEASE, str(held)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        daemon = stage.daemon().ready()
        held.rename(stage.drop / "held.cfg")
        stage.put("r1.cfg", b"1")
        wait_until_disposed(daemon, "r1.cfg")
        holder.communicate(b"")
    wait_until_disposed(daemon, "held.cfg")
    assert daemon.stop() == 0


def test_a_file_touched_without_end_delays_no_other_archive(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='stable_for = "1s"\nrescan_every = "1s"')
    daemon = stage.daemon().ready()
    touched = stage.put("touched.cfg", b"touched")

    def touch() -> None:
        os.utime(touched)

    with repeatedly(touch):
        stage.put("r1.cfg", b"1")
        wait_until_disposed(daemon, "r1.cfg")
        assert touched.exists()
    wait_until_disposed(daemon, "touched.cfg")
    assert SECRET not in [path.read_bytes() for path in stage.stored()]
    assert len(daemon.events("archive.delivered")) == 2
    assert daemon.stop() == 0
