"""Filesystems on and below drop folders: the trouble of one drop is that of this drop alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupd.core.errors import BAD_CONFIG, REJECTED
from backupd.receiver.serve import RunningReceiver
from tests.e2e.test_as_root import AS_NOBODY, give_away
from tests.programs import do_without, require
from tests.scripted import Peer, ScriptedServer, http_response, server_context
from tests.stage import TIMEOUT, Daemon, Stage, until

pytestmark = pytest.mark.root  # mounting takes root

ANSWER_TIMEOUT = 30.0
"""Seconds in which a command ends, however busy the machine is; a mount that hangs never answers."""


class FuseMount:
    """A folder shown at another place by bindfs, whose process is the file server."""

    def __init__(self, source: Path, at: Path) -> None:
        self._source, self.at = source, at
        self._server: subprocess.Popen[bytes] | None = None
        self.mount()

    def mount(self) -> None:
        """Start the server, and wait until the folder is mounted."""
        self._server = subprocess.Popen([require("bindfs"), "-f", str(self._source), str(self.at)])
        until(lambda: os.path.ismount(self.at) or self._has_ended(), "the mount")
        if self._has_ended():
            do_without("no FUSE filesystem can be mounted")

    def _has_ended(self) -> bool:
        return self._server is None or self._server.poll() is not None

    def hang(self) -> None:
        """Stop the server: no call on the mount returns any more."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def die(self) -> None:
        """Kill the server: every call on the mount fails with ENOTCONN."""
        self._signal(signal.SIGKILL)
        assert self._server is not None
        self._server.wait()

    def _signal(self, number: signal.Signals) -> None:
        assert self._server is not None
        self._server.send_signal(number)

    def unmount(self) -> None:
        if self._server is not None and self._server.poll() is None:
            self.die()
        subprocess.run(["umount", "--lazy", str(self.at)], check=False, capture_output=True)

    def remount(self) -> None:
        """Mount the folder again, as an operator does after the server has died."""
        self.unmount()
        self.mount()


@pytest.fixture
def mount(stage: Stage) -> Iterator[FuseMount]:
    """The folder of the drop `switches`, mounted over FUSE; `other` beside it is a local one."""
    if not os.path.exists("/dev/fuse"):
        do_without("no FUSE here")
    source = stage.base / "exported"
    source.mkdir()
    mounted = FuseMount(source, stage.drop)
    try:
        yield mounted
    finally:
        mounted.unmount()


BREAKS = pytest.mark.parametrize(
    ("break_down", "error"),
    [
        pytest.param(FuseMount.hang, "does not answer within 5 s", id="hangs"),
        pytest.param(FuseMount.die, "Transport endpoint is not connected", id="is dead"),
    ],
)
"""Breaks the mount; commands show the error."""


@pytest.fixture
def other(stage: Stage, mount: FuseMount, receiver: RunningReceiver) -> Path:
    """The folder of a second drop, which is well; both are configured."""
    folder = stage.base / "other"
    folder.mkdir()
    drop = f'[drop.other]\npath = "{folder}"\nstable_for = "0.1s"\n'
    stage.configure(receiver.url, drop='rescan_every = "1s"\nstable_for = "0.1s"', more=drop)
    return folder


def the_problems(stage: Stage) -> list[tuple[str, str]]:
    """Return drop and reason of each problem that `status` shows; it has to answer in time."""
    started = time.monotonic()
    shown = json.loads(stage.backupd("status", "--json").stdout)
    assert time.monotonic() - started < ANSWER_TIMEOUT
    return [(problem["drop"], problem["reason"]) for problem in shown["problems"]]


def check_is_critical(stage: Stage) -> None:
    """Assert that `status --check` and `check` answer in time, and name the folder."""
    started = time.monotonic()
    line = stage.backupd("status", "--check")
    assert line.returncode == 2, line.stdout
    assert "switches" in line.stdout
    checked = stage.backupd("check", "--offline")
    assert checked.returncode == BAD_CONFIG
    assert f"drop.switches.path: {stage.drop}" in checked.stdout, checked.stdout
    assert time.monotonic() - started < ANSWER_TIMEOUT


def test_a_dead_mount_at_the_start_stops_no_other_drop(stage: Stage, mount: FuseMount, other: Path) -> None:
    mount.die()
    daemon = stage.daemon().ready()
    stage.put("a.cfg", b"a", into=other)
    daemon.wait_for("archive.disposed", drop="other")
    assert ("switches", "folder_failed") in the_problems(stage)
    check_is_critical(stage)
    mount.remount()
    (stage.drop / "b.cfg").write_bytes(b"b")
    daemon.wait_for("archive.disposed", drop="switches")
    until(lambda: not the_problems(stage), "the end of the problem")
    assert daemon.stop() == 0


def test_a_mount_that_dies_and_comes_back_delivers_what_was_pending(
    stage: Stage, mount: FuseMount, other: Path, receiver: RunningReceiver
) -> None:
    receiver.__exit__(None, None, None)
    daemon = stage.daemon().ready()
    (stage.drop / "b.cfg").write_bytes(b"b")
    daemon.wait_for("archive.queued", drop="switches")
    mount.die()
    daemon.wait_for("drop.failed", drop="switches")
    receiver.__enter__()
    stage.put("a.cfg", b"a", into=other)
    daemon.wait_for("archive.disposed", drop="other")
    assert not daemon.events("archive.missing")
    mount.remount()
    daemon.wait_for("archive.disposed", drop="switches")
    assert [path.read_bytes() for path in stage.stored()] == [b"a", b"b"]
    assert daemon.stop() == 0


def test_a_dead_mount_is_one_problem_and_none_of_each_file(
    stage: Stage, mount: FuseMount, other: Path, receiver: RunningReceiver
) -> None:
    wait = 'stable_for = "2s"'
    drop = f'[drop.other]\npath = "{other}"\n{wait}\n[log]\nlevel = "debug"'
    stage.configure(receiver.url, drop=f'rescan_every = "1s"\n{wait}', more=drop)
    (stage.drop / "site").mkdir()
    (stage.drop / "empty.cfg").touch()
    daemon = stage.daemon().ready()
    daemon.wait_for("archive.ignored", reason="too_small")
    for name in ("a.cfg", "site/b.cfg"):
        (stage.drop / name).write_bytes(name.encode())
    daemon.wait_for("drop.scanned", drop="switches", unfinished_files=3)
    mount.die()
    daemon.wait_for("drop.failed", drop="switches")
    stage.put("c.cfg", b"c", into=other)
    daemon.wait_for("archive.disposed", drop="other")  # by now the others would have been unchanged for 2 s
    assert the_problems(stage) == [("switches", "folder_failed"), ("switches", "too_small")]
    mount.remount()
    daemon.wait_for("archive.disposed", 2, drop="switches")
    assert {event["reason"] for event in daemon.events("archive.ignored")} == {"too_small"}
    assert daemon.stop() == 0


def test_a_mount_that_hangs_delays_no_other_drop(stage: Stage, mount: FuseMount, other: Path) -> None:
    daemon = stage.daemon().ready()
    mount.hang()
    try:
        for number in range(8):
            stage.put(f"{number}.cfg", b"a", into=other)
        daemon.wait_for("archive.disposed", drop="other", count=8)
        until(lambda: ("switches", "not_answering") in the_problems(stage), "the problem")
        check_is_critical(stage)
        assert daemon.process.poll() is None
    finally:
        mount.go_on()
    until(lambda: not the_problems(stage), "the end of the problem")
    (stage.drop / "b.cfg").write_bytes(b"b")
    daemon.wait_for("archive.disposed", drop="switches")
    assert daemon.stop() == 0


def open_files(daemon: Daemon, suffix: str) -> int:
    """Return how many files with names of this kind the daemon has open."""
    count = 0
    for entry in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += os.readlink(entry).endswith(suffix)
    return count


@pytest.mark.long
def test_uploads_that_hang_with_a_mount_delay_no_other_drop(
    stage: Stage, mount: FuseMount, other: Path, receiver: RunningReceiver
) -> None:
    config = stage.config.read_text()
    stage.config.write_text(config.replace("[destination.vault]", '[destination.vault]\nbandwidth = "2MB/s"'))
    daemon = stage.daemon().ready()
    names = [f"{number}.bin" for number in range(3)]  # more than there are workers
    for name in names:
        (stage.drop / name).write_bytes(os.urandom(30_000_000))
    daemon.wait_for("archive.queued", drop="switches", count=len(names))
    until(lambda: open_files(daemon, ".bin") == 2, "two uploads")
    mount.hang()
    try:
        stage.put("a.cfg", b"a", into=other)
        daemon.wait_for("archive.disposed", drop="other")
        assert open_files(daemon, ".bin") == 2
        stage.config.write_text(config)  # the rest need not take so long
    finally:
        mount.go_on()
    daemon.wait_for("archive.disposed", drop="switches", count=len(names))
    assert len(stage.stored()) == len(names) + 1
    assert daemon.stop() == 0


def test_a_mount_that_hangs_at_the_start_is_a_problem_at_once(
    stage: Stage, mount: FuseMount, other: Path
) -> None:
    mount.hang()
    try:
        for _ in range(2):  # a restart forgets nothing
            daemon = stage.daemon()
            daemon.wait_for("daemon.started")
            until(lambda: ("switches", "not_answering") in the_problems(stage), "the problem")
            assert not daemon.events("daemon.ready")
            daemon.kill()
            check_is_critical(stage)
    finally:
        mount.go_on()
    daemon = stage.daemon().ready()
    until(lambda: not the_problems(stage), "the end of the problem")
    assert daemon.stop() == 0


def test_the_daemon_starts_and_stops_while_a_mount_hangs(stage: Stage, mount: FuseMount, other: Path) -> None:
    mount.hang()
    try:
        daemon = stage.daemon()
        stage.put("a.cfg", b"a", into=other)
        daemon.wait_for("archive.disposed", drop="other")
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_for("daemon.stopped")
    finally:
        mount.go_on()
    assert daemon.stop() == 0


def test_a_remote_filesystem_that_is_mounted_below_a_drop_folder_is_polled(
    stage: Stage, receiver: RunningReceiver
) -> None:
    source, below = stage.base / "exported", stage.drop / "site"
    source.mkdir()
    below.mkdir()
    mounted = FuseMount(source, below)
    try:
        stage.configure(receiver.url, drop='rescan_every = "1h"\non_delivered = "keep"')
        daemon = stage.daemon().ready()
        (source / "a.cfg").write_bytes(b"a")  # as another host does: without an event here
        daemon.wait_for("delivery.verified", archive="site/a.cfg")
        assert daemon.stop() == 0
    finally:
        mounted.unmount()


# Commands


@pytest.mark.long
@BREAKS
def test_audit_reports_a_folder_that_cannot_be_read_and_audits_all_others(
    stage: Stage, mount: FuseMount, other: Path, break_down: Callable[[FuseMount], None], error: str
) -> None:
    daemon = stage.daemon().ready()
    stage.put("a.cfg", b"a", into=other)
    daemon.wait_for("archive.disposed")
    assert daemon.stop() == 0
    (other / "sent" / "a.cfg").write_bytes(b"b")
    break_down(mount)

    done = stage.backupd("audit", "--json")

    wrong = json.loads(done.stdout)["wrong"]
    assert done.returncode == REJECTED
    assert [(w["drop"], w["path"], w["verdict"]) for w in wrong] == [
        ("switches", ".", "unreadable"),
        ("other", "sent/a.cfg", "changed"),
    ]
    assert wrong[0]["detail"].startswith(f"{stage.drop}: {error}; check its")
    assert f"`findmnt -T {stage.drop}`" in wrong[0]["detail"]


@pytest.mark.long
@BREAKS
def test_retry_puts_the_archives_of_all_other_drops_back(
    stage: Stage, mount: FuseMount, other: Path, break_down: Callable[[FuseMount], None], error: str
) -> None:
    def refuse(peer: Peer) -> None:
        peer.read_request()
        peer.send(http_response(422))

    with ScriptedServer(refuse, server_context(stage.pki)) as server:
        stage.config.write_text(re.sub('url = ".*"', f'url = "{server.url}"', stage.config.read_text()))
        daemon = stage.daemon().ready()
        (stage.drop / "a.cfg").write_bytes(b"a")
        daemon.wait_for("archive.disposed", drop="switches")
        stage.put("b.cfg", b"b", into=other)
        daemon.wait_for("archive.disposed", drop="other")
        assert daemon.stop() == 0
    ids = {each["archive"]["drop"]: each["id"] for each in json.loads(stage.backupd("list", "--json").stdout)}
    break_down(mount)

    every, one = stage.backupd("retry", "--all"), stage.backupd("retry", ids["switches"])

    assert (every.returncode, every.stdout[:18]) == (2, "1 archive put back")
    assert (other / "b.cfg").read_bytes() == b"b"
    for done in (every, one):
        assert f"{stage.drop}: {error}" in done.stderr
    assert f"hint: check its {'mount' if 'not connected' in error else 'file server'}" in one.stderr


@pytest.mark.long
@BREAKS
def test_show_does_not_claim_that_an_archive_is_gone_from_a_folder_that_cannot_be_read(
    stage: Stage, mount: FuseMount, other: Path, break_down: Callable[[FuseMount], None], error: str
) -> None:
    daemon = stage.daemon().ready()
    (stage.drop / "a.cfg").write_bytes(b"a")
    daemon.wait_for("archive.disposed")
    assert daemon.stop() == 0
    break_down(mount)

    done = stage.backupd("show", "@1")

    assert done.returncode == 0, done.stderr
    assert f"sent/a.cfg (can't be reached: {error})\n" in done.stdout


@pytest.mark.long
@BREAKS
def test_push_and_init_name_a_file_that_cannot_be_reached(
    stage: Stage, mount: FuseMount, other: Path, break_down: Callable[[FuseMount], None], error: str
) -> None:
    file = stage.drop / "a.cfg"
    file.write_bytes(b"a")
    break_down(mount)

    pushed, written = stage.backupd("push", str(file)), stage.backupd("init", str(stage.drop / "new.toml"))

    assert (pushed.returncode, written.returncode) == (2, 2)
    assert f"{file}: {error}" in pushed.stderr
    assert f"{stage.drop}/new.toml: can't be created ({error})" in written.stderr


@pytest.mark.long
@BREAKS
def test_check_names_a_mount_below_a_drop_folder_that_cannot_be_used(
    stage: Stage, receiver: RunningReceiver, break_down: Callable[[FuseMount], None], error: str
) -> None:
    source, below = stage.base / "exported", stage.drop / "site"
    source.mkdir()
    below.mkdir()
    mounted = FuseMount(source, below)
    try:
        stage.configure(receiver.url)
        break_down(mounted)
        done = stage.backupd("check", "--offline")
        stage.configure(receiver.url, drop='exclude = ["site"]')
        excluded = stage.backupd("check", "--offline")
    finally:
        mounted.unmount()

    shown = {
        "does not answer within 5 s": "does not answer within 3 s",
        "Transport endpoint is not connected": "can't be used: transport endpoint is not connected",
    }[error]
    assert done.returncode == BAD_CONFIG
    assert f"failed: drop.switches.path: {below} {shown}\n  hint: check its" in done.stdout
    assert excluded.returncode == 0
    assert "does not answer" not in excluded.stdout
    assert "has a mount below it" not in excluded.stdout


@pytest.mark.long
def test_a_mount_below_a_drop_folder_that_hangs_hides_no_other_problem_of_the_drop(
    stage: Stage, receiver: RunningReceiver
) -> None:
    source, below, closed = stage.base / "exported", stage.drop / "site", stage.drop / "closed"
    for folder in (source, below, closed):
        folder.mkdir()
    closed.chmod(0o555)
    stage.configure(receiver.url)
    give_away(stage.base)
    mounted = FuseMount(source, below)
    try:
        mounted.hang()
        command = [*AS_NOBODY, sys.executable, "-m", "backupd", "check", "--offline", "--json"]
        environ = {**os.environ, "BACKUPD_CONFIG": str(stage.config)}
        done = subprocess.run(command, capture_output=True, check=False, env=environ, timeout=TIMEOUT)
    finally:
        mounted.unmount()

    messages = [problem["message"] for problem in json.loads(done.stdout)["problems"]]
    for expected in (
        f"{stage.drop} has a mount below it, {below}: ",
        f"{closed} can't be written by the daemon's user: ",
        f"{below} does not answer within 3 s",
    ):
        assert len([message for message in messages if message.startswith(expected)]) == 1, messages
    assert not [message for message in messages if message.startswith(f"{stage.drop} does not answer")]
