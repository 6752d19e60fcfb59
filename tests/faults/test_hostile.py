"""Attacks by a user who may write into the drop folder: no file outside is read, moved or overwritten."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.stage import Daemon, Stage, until

FREQUENT_SCANS = 'stable_for = "0s"\nrescan_every = "1s"'
SECRET = b"a secret of another user " * 80
_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


def exchange(one: Path, other: Path) -> None:
    """Exchange two names atomically; see renameat2(2)."""
    with suppress(FileNotFoundError):
        if _libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), _EXCHANGE):
            raise OSError(ctypes.get_errno(), "renameat2")


class Outside:
    """A folder beside the drop folder with files of another user."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(SECRET)
        self._before = self._state()

    def _state(self) -> dict[str, tuple[int, int, bytes]]:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(self.folder)): (s.st_ino, s.st_mtime_ns, path.read_bytes())
            for path in files
            for s in [path.stat()]
        }

    def assert_untouched(self, stage: Stage) -> None:
        assert self._state() == self._before
        for folder in (stage.store / "archives", stage.sent, stage.rejected):
            real = [] if folder.is_symlink() else folder.rglob("*")
            for path in real:
                with suppress(FileNotFoundError):  # a receipt file that was just completed
                    assert path.is_symlink() or not path.is_file() or path.read_bytes() != SECRET


@contextmanager
def repeatedly(attack: Callable[[], None]) -> Iterator[Counter[str]]:
    """Repeat an attack in a thread; yield the count."""
    count: Counter[str] = Counter()
    stopping = threading.Event()

    def repeat() -> None:
        while not stopping.is_set():
            attack()
            count["times"] += 1

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield count
    finally:
        stopping.set()
        thread.join()


def a_link(path: Path, outside: Outside) -> None:
    path.symlink_to(outside.folder / "r0.cfg")


def a_pipe(path: Path, outside: Outside) -> None:
    os.mkfifo(path)


def a_folder(path: Path, outside: Outside) -> None:
    path.mkdir()


@pytest.mark.long
@pytest.mark.parametrize("kind", [a_link, a_pipe, a_folder])
def test_files_swapped_for_links_pipes_and_folders_stop_no_other_archive(
    stage: Stage, receiver: RunningReceiver, kind: Callable[[Path, Outside], None]
) -> None:
    outside = Outside(stage.base / "outside", ["r0.cfg"])
    stage.configure(receiver.url, drop=FREQUENT_SCANS)
    bait, trap = stage.drop / "r0.cfg", stage.base / "trap"
    daemon = stage.daemon().ready()

    def swap() -> None:
        if not bait.exists() and not bait.is_symlink():
            bait.write_bytes(b"bait")
        kind(trap, outside)
        exchange(bait, trap)
        exchange(bait, trap)
        trap.rmdir() if trap.is_dir() and not trap.is_symlink() else trap.unlink(missing_ok=True)

    with repeatedly(swap) as count:
        for number in range(1, 31):
            stage.put(f"r{number}.cfg", b"%d" % number)
        for number in range(1, 31):
            daemon.wait_for("archive.disposed", archive=f"r{number}.cfg")
        until(lambda: count["times"] > 300, "enough swaps")
    outside.assert_untouched(stage)
    assert not daemon.events("daemon.failed")
    assert daemon.stop() == 0


@pytest.mark.long
def test_a_directory_swapped_for_a_link_during_moves_leads_to_no_file_outside(
    stage: Stage, receiver: RunningReceiver
) -> None:
    names = [f"r{number}.cfg" for number in range(100)]
    outside = Outside(stage.base / "outside", names)
    stage.configure(receiver.url, drop=FREQUENT_SCANS)
    site, trap = stage.drop / "site", stage.base / "trap"
    site.mkdir()
    trap.symlink_to(outside.folder)
    daemon = stage.daemon().ready()
    real = os.stat(site).st_ino

    with repeatedly(lambda: exchange(site, trap)) as count:
        for name in names:
            while True:  # until the name leads to the real directory
                with suppress(OSError):
                    fd = os.open(site, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                    break
            with open(os.open(name, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd), "wb") as stream:
                stream.write(name.encode())
            os.close(fd)
        until(lambda: count["times"] > 2000, "enough swaps")
    if os.lstat(site).st_ino != real:
        exchange(site, trap)
    for name in names:
        daemon.wait_for("archive.disposed", archive=f"site/{name}")
    outside.assert_untouched(stage)
    assert sorted(p.read_bytes() for p in stage.archives(stage.sent)) == sorted(map(str.encode, names))
    assert not daemon.events("daemon.failed")
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("folder", ["sent", "rejected"])
def test_a_sent_or_rejected_folder_that_is_a_link_is_not_followed(
    stage: Stage, receiver: RunningReceiver, folder: str
) -> None:
    outside = Outside(stage.base / "outside", ["r0.cfg"])
    stage.configure(receiver.url, drop=f'{FREQUENT_SCANS}\ninspect_grace = "0s"\non_suspicious = "reject"')
    daemon = stage.daemon().ready()
    (stage.drop / folder).symlink_to(outside.folder)
    name, content = ("r1.cfg", b"whole") if folder == "sent" else ("r1.tar.gz", b"\x1f\x8b\x08")  # cut
    stage.put(name, content)
    failed = daemon.wait_for("disposition.failed", archive=name)
    assert "neither files nor links" in failed[0]["hint"]
    assert (stage.drop / name).exists()
    outside.assert_untouched(stage)
    assert sorted(p.name for p in outside.folder.iterdir()) == ["r0.cfg"]
    (stage.drop / folder).unlink()
    assert daemon.stop() == 0

    again = stage.daemon().ready()
    until((stage.drop / folder / name).exists, "the archive to be moved")
    assert len(daemon.events("disposition.failed")) == 1
    assert again.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("plant", [a_link, a_pipe, Path.touch], ids=["link", "pipe", "file"])
def test_a_file_in_place_of_the_sent_folder_does_not_keep_the_daemon_from_starting(
    stage: Stage, receiver: RunningReceiver, plant: Callable[..., None]
) -> None:
    """The other drops continue. `check` fails, so that the operator fixes it."""
    other = stage.base / "other"
    other.mkdir()
    stage.configure(
        receiver.url,
        drop='stable_for = "0s"',
        more=f'[drop.other]\npath = "{other}"\nstable_for = "0s"',
    )
    outside = Outside(stage.base / "outside", ["r0.cfg"])
    plant(stage.sent) if plant is Path.touch else plant(stage.sent, outside)
    daemon = stage.daemon().ready()
    (warning,) = daemon.events("config.warning")
    assert warning["path"] == "drop.switches.sent_dir"
    stage.put("r1.cfg", b"1", into=other)
    daemon.wait_for("archive.disposed", archive="r1.cfg", drop="other")
    stage.put("r2.cfg", b"2")
    daemon.wait_for("disposition.failed", archive="r2.cfg")
    assert stage.backupd("check").returncode == 78
    assert daemon.stop() == 0
    outside.assert_untouched(stage)


def test_a_hard_link_to_a_file_outside_leaves_that_file_unchanged(
    stage: Stage, receiver: RunningReceiver
) -> None:
    """The kernel allows such a link only to users who may read the file (fs.protected_hardlinks)."""
    stage.configure(receiver.url, drop='stable_for = "0s"')
    daemon = stage.daemon().ready()
    other = stage.base / "other"
    other.write_bytes(b"other")
    before = other.stat()
    os.link(other, stage.drop / "r1.cfg")
    daemon.wait_for("archive.disposed", archive="r1.cfg")
    after = other.stat()
    assert other.read_bytes() == b"other"
    assert (after.st_ino, after.st_mtime_ns, after.st_mode, after.st_uid) == (
        before.st_ino,
        before.st_mtime_ns,
        before.st_mode,
        before.st_uid,
    )
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.root
def test_a_sparse_file_of_eight_exbibytes_stops_no_other_archive(
    stage: Stage, receiver: RunningReceiver
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "backupd-test", str(stage.drop)], check=True)
    try:
        stage.configure(receiver.url, drop=FREQUENT_SCANS, destination="workers = 2")
        daemon = stage.daemon().ready()
        with (stage.drop / "huge.cfg").open("wb") as stream:
            os.truncate(stream.fileno(), 2**63 - 1)
        daemon.wait_for("archive.queued", archive="huge.cfg")
        for number in range(20):
            (stage.drop / f"r{number}.cfg").write_bytes(b"%d" % number)
        for number in range(20):
            daemon.wait_for("archive.disposed", archive=f"r{number}.cfg")
        assert daemon.memory("VmHWM") < 150 * 2**20
        os.truncate(stage.drop / "huge.cfg", 5)
        daemon.wait_for("archive.disposed", archive="huge.cfg")
        assert (stage.sent / "huge.cfg").read_bytes() == bytes(5)
        assert daemon.stop() == 0
    finally:
        subprocess.run(["umount", "--lazy", str(stage.drop)], check=True)


@pytest.mark.long
def test_20000_ignored_files_are_counted_and_no_archive_is_missed(
    stage: Stage, receiver: RunningReceiver
) -> None:
    count = 20_000
    stage.configure(receiver.url, top='heartbeat_every = "1s"', drop=FREQUENT_SCANS)
    for number in range(count):
        os.close(os.open(stage.drop / f"other-{number}.pdf", os.O_CREAT | os.O_WRONLY))
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"among them")
    daemon.wait_for("archive.disposed", archive="r1.cfg")
    scanned = len(daemon.events("daemon.heartbeat"))
    daemon.wait_for("daemon.heartbeat", scanned + 3)
    ignored = Counter(line["archive"] for line in daemon.events("archive.ignored"))
    assert daemon.count("archive.ignored") == count / 2  # the list is full then
    assert set(ignored.values()) == {1}
    counts = json.loads(stage.backupd("status", "--json").stdout)["problems"]
    assert {each["reason"]: each["files"] for each in counts} == {
        "too_small": count / 2,
        "not_listed": count / 2,
    }
    assert daemon.memory("VmHWM") < 150 * 2**20
    assert daemon.stop() == 0
    shutil.rmtree(stage.drop)


def test_an_ancestor_replaced_by_a_link_leads_to_no_file_outside(
    stage: Stage, receiver: RunningReceiver
) -> None:
    """The daemon works below the folder that it holds open, even if its path leads to another folder."""
    outside = Outside(stage.base / "outside", [])
    parent = stage.base / "srv"
    parent.mkdir()
    stage.drop.rename(parent / "drop")
    stage.drop, before = parent / "drop", stage.drop
    stage.sent = stage.drop / "sent"
    stage.configure(receiver.url, drop='stable_for = "0s"\nrescan_every = "1h"')
    daemon: Daemon = stage.daemon().ready()
    (outside.folder / "drop").mkdir()
    (outside.folder / "drop" / "r1.cfg").write_bytes(SECRET)
    stage.put("r1.cfg", b"inside")
    parent.rename(stage.base / "moved")
    parent.symlink_to(outside.folder)
    daemon.wait_for("archive.disposed", archive="r1.cfg")
    assert (outside.folder / "drop" / "r1.cfg").read_bytes() == SECRET
    assert [p.read_bytes() for p in stage.stored()] == [b"inside"]
    assert (stage.base / "moved" / "drop" / "sent" / "r1.cfg").read_bytes() == b"inside"
    assert not before.exists()
    assert daemon.stop() == 0
