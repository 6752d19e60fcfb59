"""Drop folders on mounts of sshfs, rclone and bindfs: new inode numbers, and attributes that are cached."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.programs import require
from tests.stage import Daemon, Stage, until

pytestmark = pytest.mark.root

Mount = Callable[[Path, Path], None]
"""Mounts a folder on another one."""


@pytest.fixture
def source(stage: Stage) -> Iterator[Path]:
    """The folder behind the mount; the end of the test unmounts the drop folder."""
    source = stage.base / "source"
    source.mkdir()
    yield source
    for path in (stage.drop / "site", stage.drop):
        subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)


@pytest.fixture
def ssh_options(stage: Stage) -> Iterator[list[str]]:
    """The options of sshfs for a server on the loopback interface."""
    base = stage.base / "ssh"
    base.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", base / name], check=True)
    port = stage.a_free_port()
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen(
        [
            *(require("sshd"), "-D", "-e", "-f", "/dev/null", "-p", str(port), "-h", base / "host"),
            *("-o", "ListenAddress=127.0.0.1", "-o", f"AuthorizedKeysFile={base / 'user.pub'}"),
            *("-o", "StrictModes=no", "-o", "UsePAM=no", "-o", "PermitRootLogin=yes", "-o", "PidFile=none"),
            *("-o", "Subsystem=sftp internal-sftp"),
        ],
        stderr=subprocess.DEVNULL,
    )
    user = base / "user"
    options = f"IdentityFile={user},StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null,ConnectTimeout=60"
    yield ["-p", str(port), "-o", options]
    server.terminate()
    server.wait()


def mount_by(program: str, ssh_options: list[str], *options: str) -> Mount:
    commands = {
        "sshfs": lambda source, target: [require("sshfs"), f"root@127.0.0.1:{source}", target, *ssh_options],
        "rclone": lambda source, target: [require("rclone"), "mount", source, target, "--daemon"],
        "bindfs": lambda source, target: [require("bindfs"), source, target],
    }

    def mount(source: Path, target: Path) -> None:
        def is_mounted() -> bool:
            command = [*commands[program](source, target), *options]
            done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return done.returncode == 0 and os.path.ismount(target)

        until(is_mounted, f"the mount by {program}")

    return mount


def unmount(path: Path) -> None:
    subprocess.run(["umount", "--lazy", path], check=True)


def inodes_in_ledger(stage: Stage) -> list[int]:
    """Return the inode of each archive in the ledger."""
    with contextlib.closing(sqlite3.connect(stage.state / "ledger.sqlite3")) as ledger:
        return [int(row[0]) for row in ledger.execute("SELECT inode FROM archive ORDER BY id")]


def wait_until_known(stage: Stage, daemon: Daemon) -> None:
    """Wait until the ledger has the inodes that the files have now."""

    def is_known() -> bool:
        with contextlib.suppress(OSError):
            return sorted(inodes_in_ledger(stage)) == sorted(p.stat().st_ino for p in stage.drop.iterdir())
        return False

    until(is_known, f"the inodes in the ledger: {daemon.text()[-3000:]}")


@pytest.mark.parametrize("program", ["sshfs", "rclone", "bindfs"])
def test_kept_archives_are_not_sent_again_after_a_remount(
    stage: Stage, receiver: RunningReceiver, source: Path, ssh_options: list[str], program: str
) -> None:
    mount = mount_by(program, ssh_options)
    mount(source, stage.drop)
    stage.configure(receiver.url, drop='on_delivered = "keep"\nrescan_every = "0.3s"')
    daemon = stage.daemon().ready()
    names = [f"sw-{number}.cfg" for number in range(3)]
    for name in names:
        (stage.drop / name).write_bytes(f"content of {name}".encode())
    daemon.wait_for("archive.disposed", len(names))

    for order in (names, names[::-1]):
        unmount(stage.drop)
        mount(source, stage.drop)
        for name in order:  # sshfs numbers files in the order of their first use
            (stage.drop / name).stat()
        wait_until_known(stage, daemon)
    for name in names:
        (source / name).chmod(0o640)
    wait_until_known(stage, daemon)

    assert len(stage.stored()) == len(inodes_in_ledger(stage)) == len(names)
    assert len(daemon.events("archive.delivered")) == len(names)


def test_a_file_that_grows_behind_a_cached_mount_is_delivered_whole(
    stage: Stage, receiver: RunningReceiver, source: Path
) -> None:
    mount_by("rclone", [], "--dir-cache-time", "2s", "--attr-timeout", "1s")(source, stage.drop)
    stage.configure(receiver.url, drop='stable_for = "6s"\nrescan_every = "0.3s"')
    daemon = stage.daemon().ready()
    content = b""
    with (source / "core.cfg").open("wb") as file:
        for number in range(20):
            file.write(b"line %d\n" % number)
            file.flush()
            content += b"line %d\n" % number
            time.sleep(0.5)  # the writer is slower than backupd, and its changes are seen later
    daemon.wait_for("archive.disposed")
    assert [path.read_bytes() for path in stage.stored()] == [content]
    assert (source / "sent" / "core.cfg").read_bytes() == content


@pytest.mark.parametrize("place", ["", "site"], ids=["the drop folder", "a folder below"])
def test_files_on_a_mount_that_caches_attributes_wait_for_longer_by_default(
    stage: Stage, receiver: RunningReceiver, source: Path, place: str
) -> None:
    (stage.drop / place).mkdir(exist_ok=True)
    mount_by("rclone", [])(source, stage.drop / place)
    stage.configure(receiver.url)
    config = stage.config.read_text().replace('stable_for = "0.1s"', "")
    stage.config.write_text(config)
    daemon = stage.daemon().ready()
    (watched,) = daemon.wait_for("drop.watched")
    assert watched["observer"] == ("inotify" if place else "polling")
    assert watched["stable_for_s"] > 300
    checked = stage.backupd("check", "--offline")
    assert f"{stage.drop / place} is on fuse.rclone, which has no change time" in checked.stdout
    assert "of which the cache time is not visible" in checked.stdout

    stage.config.write_text(config.replace("[drop.switches]", '[drop.switches]\nstable_for = "2s"'))
    assert "may show a growing file unchanged for 305 s" in stage.backupd("check", "--offline").stdout
