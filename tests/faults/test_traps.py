"""Traps that are laid in a drop folder: under names that the daemon will use, and for its time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.faults.test_hostile import SECRET, Outside, exchange, meanwhile
from tests.privileges import needs_root
from tests.stage import Daemon, Stage, until

OFTEN = 'stable_for = "0s"\nrescan_every = "1s"'
SOON = '[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.3s"'
Trap = Callable[[Path, Outside], None]


@pytest.fixture
def outside(stage: Stage) -> Outside:
    return Outside(stage.base / "outside", ["r0.cfg"])


def a_pipe(path: Path, outside: Outside) -> None:
    os.mkfifo(path)


def a_link(path: Path, outside: Outside) -> None:
    path.symlink_to(outside.folder / "r0.cfg")


def a_hard_link(path: Path, outside: Outside) -> None:
    """As only the file's owner may make one, or anybody where fs.protected_hardlinks is 0."""
    path.hardlink_to(outside.folder / "r0.cfg")


def a_folder(path: Path, outside: Outside) -> None:
    path.mkdir()


def disposed(daemon: Daemon, *names: str) -> None:
    for name in names:
        daemon.wait_for("archive.disposed", archive=name)


@pytest.mark.parametrize("trap", [a_pipe, a_link, a_hard_link])
def test_what_has_the_name_of_an_unfinished_record_is_neither_waited_for_nor_written_to(
    stage: Stage, receiver: RunningReceiver, outside: Outside, trap: Trap
) -> None:
    stage.configure(receiver.url, drop=OFTEN)
    daemon = stage.daemon().ready()
    stage.sent.mkdir()
    trap(stage.sent / ".r1.cfg.receipt.json.part", outside)
    stage.put("r1.cfg", b"1")
    stage.put("r2.cfg", b"2")
    disposed(daemon, "r1.cfg", "r2.cfg")
    assert (stage.sent / "r1.cfg.receipt.json").read_bytes().startswith(b"{")
    outside.assert_untouched(stage)
    assert not daemon.events("disposition.failed")
    assert daemon.stop() == 0


def test_a_folder_with_the_name_of_an_unfinished_record_is_said_and_stops_no_other(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, drop=OFTEN)
    daemon = stage.daemon().ready()
    trap = stage.sent / ".r1.cfg.receipt.json.part"
    trap.mkdir(parents=True)
    stage.put("r1.cfg", b"1")
    (failed,) = daemon.wait_for("disposition.failed", archive="r1.cfg")
    assert "hidden name" in failed["hint"]
    stage.put("r2.cfg", b"2")
    disposed(daemon, "r2.cfg")
    assert len(daemon.events("disposition.failed")) == 1
    assert daemon.stop() == 0
    trap.rmdir()
    daemon = stage.daemon().ready()
    disposed(daemon, "r1.cfg")
    assert (stage.sent / "r1.cfg.receipt.json").exists()
    assert sorted(path.read_bytes() for path in stage.stored()) == [b"1", b"2"]
    assert daemon.stop() == 0


@pytest.mark.parametrize("trap", [a_pipe, a_link, a_folder, a_hard_link])
@pytest.mark.parametrize("action", ["move", "delete"])
def test_what_has_a_hidden_name_of_ours_has_to_leave_it(
    stage: Stage, receiver: RunningReceiver, outside: Outside, trap: Trap, action: str
) -> None:
    stage.configure(receiver.url, drop=f'{OFTEN}\non_delivered = "{action}"\nmax_size = "1kB"')
    daemon = stage.daemon().ready()
    place = stage.sent if action == "move" else stage.drop
    place.mkdir(exist_ok=True)
    for ending in ("taken", "deleted") if action == "delete" else ("taken",):
        trap(place / f".backupd-1.{ending}", outside)
    stage.put("r1.cfg", b"1")
    stage.put("r2.cfg", b"2")
    disposed(daemon, "r1.cfg", "r2.cfg")
    assert os.path.lexists(stage.drop / "1-r1.cfg")  # where it is seen, and nothing is lost of it
    assert sorted(path.read_bytes() for path in stage.stored()) == [b"1", b"2"]
    outside.assert_untouched(stage)
    assert not daemon.events("disposition.failed")
    assert daemon.stop() == 0


@pytest.mark.parametrize("trap", [a_pipe, a_link, a_folder])
def test_an_archive_whose_name_something_else_has_before_it_is_sent_is_gone(
    stage: Stage, receiver: RunningReceiver, outside: Outside, trap: Trap
) -> None:
    stage.configure(receiver.url, drop=OFTEN, more=SOON)
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
    kept.rename(path)  # it was not the archive's fault
    disposed(daemon, "r1.cfg")
    assert len(daemon.events("archive.delivered")) == 1
    assert daemon.stop() == 0


def test_a_sent_folder_that_is_swapped_for_a_link_while_archives_are_moved(
    stage: Stage, receiver: RunningReceiver
) -> None:
    names = [f"r{number}.cfg" for number in range(100)]
    outside = Outside(stage.base / "outside", names)
    stage.configure(receiver.url, drop=OFTEN)
    stage.sent.mkdir()
    real, trap = stage.sent.stat().st_ino, stage.base / "trap"
    trap.symlink_to(outside.folder)
    daemon = stage.daemon().ready()
    with meanwhile(lambda: exchange(stage.sent, trap)) as played:
        for name in names:
            stage.put(name, name.encode())
        daemon.wait_for("delivery.verified", len(names))
        until(lambda: played["times"] > 2000, "enough swaps")
    if stage.sent.lstat().st_ino != real:
        exchange(stage.sent, trap)
    assert not daemon.events("daemon.failed")
    assert daemon.stop() == 0
    daemon = stage.daemon().ready()
    until(lambda: len(stage.archives(stage.sent)) == len(names), "all in sent")
    outside.assert_untouched(stage)
    assert sorted(path.name for path in outside.folder.iterdir()) == sorted(names)
    assert sorted(p.read_bytes() for p in stage.archives(stage.sent)) == sorted(map(str.encode, names))
    assert not daemon.events("daemon.failed")
    assert daemon.stop() == 0


def dig(top: Path, *stretches: tuple[int, str, bytes]) -> None:
    """Make so many directories of a name in one another, an archive in the last, and so on below it."""
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


@pytest.mark.parametrize("when", ["before the start", "while it runs"])
def test_directories_in_one_another_without_end_end_no_daemon(
    stage: Stage, receiver: RunningReceiver, when: str
) -> None:
    """At 1200 levels Python's own stack ends, at 4096 bytes the length of a path."""
    stage.configure(receiver.url, drop=OFTEN)
    daemon = stage.daemon().ready() if when == "while it runs" else None
    pit = stage.base / "pit"
    pit.mkdir()
    try:
        dig(pit, (1200, "d", b"deep"), (10, "d" * 200, b"too deep"))
        pit.rename(stage.drop / "pit")
        daemon = daemon or stage.daemon()
        stage.put("r1.cfg", b"1")
        daemon.wait_for("archive.disposed", 2)
        ignored = daemon.wait_for("archive.ignored")
        stage.put("r2.cfg", b"2")
        disposed(daemon, "r1.cfg", "r2.cfg")
        assert sorted(path.read_bytes() for path in stage.stored()) == [b"1", b"2", b"deep"]
        assert [(line["reason"], line["error"]) for line in ignored] == [("unreadable", "File name too long")]
        assert "4096 bytes" in ignored[0]["hint"]
        assert not daemon.events("daemon.failed")
        assert daemon.stop() == 0
    finally:
        subprocess.run(["rm", "-rf", stage.drop, pit], check=True)  # shutil.rmtree calls itself too often


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


@needs_root
@pytest.mark.parametrize(
    "destination", ['workers = 1\ndeadline = "1s"', 'workers = 2\ndigest_at = "before"'], ids=["sent", "read"]
)
def test_huge_files_that_are_sent_and_read_without_end_stop_no_other_and_no_end(
    stage: Stage, receiver: RunningReceiver, destination: str
) -> None:
    """With a deadline one worker is enough; and what is read for its digest heeds the end, too."""
    with a_filesystem_for_huge_files(stage):
        drop = f'{OFTEN}\nchecksum_file = "auto"'
        stage.configure(
            receiver.url, top='shutdown_grace = "0s"', drop=drop, destination=destination, more=SOON
        )
        daemon = stage.daemon().ready()
        a_huge_file(stage.drop / "sent.cfg")
        (stage.drop / "examined.cfg.sha256").write_text("0" * 64)
        a_huge_file(stage.drop / "examined.cfg")
        daemon.wait_for("archive.queued", archive="sent.cfg")
        names = [f"r{number}.cfg" for number in range(10)]
        for name in names:
            (stage.drop / name).write_bytes(name.encode())
        disposed(daemon, *names)
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


def test_a_lease_on_a_file_makes_nobody_wait(stage: Stage, receiver: RunningReceiver) -> None:
    """Opening such a file waits for up to fs.lease-break-time, unless it is asked not to."""
    stage.configure(receiver.url, drop=OFTEN)
    held = stage.base / "held.cfg"
    held.write_bytes(b"held")
    command = [sys.executable, "-c", HOLDS_A_LEASE, str(held)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        daemon = stage.daemon().ready()
        held.rename(stage.drop / "held.cfg")
        stage.put("r1.cfg", b"1")
        disposed(daemon, "r1.cfg")
        holder.communicate(b"")
    disposed(daemon, "held.cfg")
    assert daemon.stop() == 0


def test_a_file_that_is_touched_without_end_stops_no_other(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop='stable_for = "1s"\nrescan_every = "1s"')
    daemon = stage.daemon().ready()
    touched = stage.put("touched.cfg", b"touched")

    def touch() -> None:
        os.utime(touched)

    with meanwhile(touch):
        stage.put("r1.cfg", b"1")
        disposed(daemon, "r1.cfg")
        assert touched.exists()
    disposed(daemon, "touched.cfg")
    assert SECRET not in [path.read_bytes() for path in stage.stored()]
    assert len(daemon.events("archive.delivered")) == 2
    assert daemon.stop() == 0
