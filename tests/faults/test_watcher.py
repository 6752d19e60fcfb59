"""Faults of the watcher are logged, scans find the archives meanwhile, and events arrive again afterwards."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.faults.delivery import is_stopped
from tests.stage import Daemon, Stage, until

FREQUENT_SCANS = 'stable_for = "0s"\nrescan_every = "1s"'
SCANS_LOGGED = '[log]\nlevel = "debug"\n'
"""Log `drop.scanned` for each scan."""
USER_LIMITS = Path("/proc/sys/user")
OWN_LIMITS = ["unshare", "--user", "--map-root-user"]


def deliver(stage: Stage, daemon: Daemon, name: str) -> None:
    """Put an archive into the drop folder, and wait until it is in `sent`."""
    stage.put(name, os.urandom(1000))
    daemon.wait_for("archive.disposed", archive=name)


def wait_for_events(stage: Stage, daemon: Daemon, name: str) -> None:
    """Wait until an archive is found by its event: it is queued before any scan ends."""
    daemon.wait_for("drop.scanned")
    numbers = itertools.count(1)

    def found_by_event() -> bool:
        archive = f"{name}-{next(numbers)}.tar.gz"
        known = len(daemon.events())
        deliver(stage, daemon, archive)
        lines = [(line["event"], line.get("archive")) for line in daemon.events()[known:]]
        return ("drop.scanned", None) not in lines[: lines.index(("archive.queued", archive))]

    until(found_by_event, "an archive found by its event")


def scans(daemon: Daemon) -> int:
    """Return how many scans have ended."""
    return len(daemon.events("drop.scanned"))


def assert_logged_by_the_next_scan(daemon: Daemon, before: int, count: int = 1) -> None:
    """Assert that the fault was logged by the end of the next scan; one scan may have run at its cause."""
    lines = [line["event"] for line in daemon.events()]
    degraded = [index for index, event in enumerate(lines) if event == "watch.degraded"]
    assert lines[: degraded[count - 1]].count("drop.scanned") <= before + 2


def within_limits(**limits: int) -> list[str]:
    """Return a command prefix that runs the daemon in a user namespace with its own limits of inotify."""
    first = "; ".join(f"echo {value} > {USER_LIMITS / name}" for name, value in limits.items())
    return [*OWN_LIMITS, "sh", "-c", f'{first}; exec "$@"', "sh"]


def set_limit(daemon: Daemon, name: str, value: int) -> None:
    subprocess.run(
        [
            # the namespace of a plain user allows no change of groups
            *("nsenter", "--user", "--preserve-credentials", f"--target={daemon.pid}"),
            *("sh", "-c", f"echo {value} > {USER_LIMITS / name}"),
        ],
        check=True,
    )


@pytest.fixture
def own_limits() -> None:
    """Skip the test where a process can't have limits of its own."""
    able = [*OWN_LIMITS, "test", "-w", str(USER_LIMITS / "max_inotify_watches")]
    if subprocess.run(able, check=False, capture_output=True).returncode:
        pytest.skip("no user namespace can be created")


@pytest.fixture
def mounts(stage: Stage) -> Iterator[None]:
    """Unmount the filesystems that a test mounted on the drop folder."""
    yield
    while os.path.ismount(stage.drop):
        subprocess.run(["umount", "--lazy", stage.drop], check=True)


def mount(folder: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "backupd-test", folder], check=True)


@pytest.mark.long
@pytest.mark.root
@pytest.mark.usefixtures("mounts")
def test_a_mount_over_the_drop_folder_is_detected(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop=FREQUENT_SCANS, more=SCANS_LOGGED)
    daemon = stage.daemon().ready()
    deliver(stage, daemon, "before.tar.gz")

    mount(stage.drop)
    after = scans(daemon)
    daemon.wait_for("watch.degraded", reason="replaced")
    assert_logged_by_the_next_scan(daemon, after)
    daemon.wait_for("watch.recovered")
    (stage.drop / "over.tar.gz").write_bytes(b"over")
    daemon.wait_for("archive.disposed", archive="over.tar.gz")
    assert (stage.drop / "sent" / "over.tar.gz").read_bytes() == b"over"

    subprocess.run(["umount", "--lazy", stage.drop], check=True)
    after = scans(daemon)
    daemon.wait_for("watch.degraded", 2, reason="replaced")
    assert_logged_by_the_next_scan(daemon, after, 2)
    daemon.wait_for("watch.recovered", 2)
    deliver(stage, daemon, "after.tar.gz")
    wait_for_events(stage, daemon, "later")
    assert sorted(p.name for p in stage.archives(stage.sent) if "later" not in p.name) == [
        "after.tar.gz",
        "before.tar.gz",
    ]
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.root
@pytest.mark.usefixtures("mounts")
def test_archives_on_an_unmounted_filesystem_are_delivered_later(
    stage: Stage, receiver: RunningReceiver
) -> None:
    image = stage.base / "image"
    image.mkdir()
    mount(image)
    try:
        subprocess.run(["mount", "--bind", image, stage.drop], check=True)
        stage.configure(
            receiver.url,
            drop=FREQUENT_SCANS,
            more='[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.5s"',
        )
        receiver.__exit__(None, None, None)
        daemon = stage.daemon().ready()
        (stage.drop / "waits.tar.gz").write_bytes(b"waits")
        daemon.wait_for("attempt.failed", archive="waits.tar.gz")
        subprocess.run(["umount", "--lazy", stage.drop], check=True)
        daemon.wait_for("watch.degraded", reason="replaced")
        receiver.__enter__()

        subprocess.run(["mount", "--bind", image, stage.drop], check=True)
        daemon.wait_for("archive.delivered", archive="waits.tar.gz")
        daemon.wait_for("archive.disposed", archive="waits.tar.gz")
        assert (stage.sent / "waits.tar.gz").read_bytes() == b"waits"
        assert len(stage.stored()) == 1
        assert daemon.stop() == 0
    finally:
        while os.path.ismount(stage.drop):
            subprocess.run(["umount", "--lazy", stage.drop], check=True)
        subprocess.run(["umount", "--lazy", image], check=True)


@pytest.mark.long
@pytest.mark.usefixtures("own_limits")
@pytest.mark.parametrize("limit", ["max_inotify_instances", "max_inotify_watches"])
def test_an_inotify_limit_is_logged_and_scans_find_the_archives(
    stage: Stage, receiver: RunningReceiver, limit: str
) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1s"', drop=FREQUENT_SCANS, more=SCANS_LOGGED)
    daemon = stage.daemon(before=within_limits(**{limit: 0}))

    refused = daemon.wait_for("watch.degraded", reason="refused")[0]
    assert f"max_user_{limit.rpartition('_')[2]}" in refused["hint"]
    daemon.wait_for("daemon.heartbeat", degraded_drops=1)
    deliver(stage, daemon, "found.tar.gz")
    assert len(daemon.events("watch.degraded")) == 1  # although the watch is tried again and again

    set_limit(daemon, limit, 1000)
    daemon.wait_for("watch.recovered")
    wait_for_events(stage, daemon, "later")
    daemon.wait_for("daemon.heartbeat", degraded_drops=0)
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.usefixtures("own_limits")
def test_an_inotify_limit_for_some_directories_is_logged(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1s"', drop=FREQUENT_SCANS, more=SCANS_LOGGED)
    daemon = stage.daemon(before=within_limits(max_inotify_watches=2)).ready()
    wait_for_events(stage, daemon, "root")
    assert daemon.events("watch.degraded") == []

    for name in ("first", "second"):
        (stage.drop / name).mkdir()
    after = scans(daemon)
    refused = daemon.wait_for("watch.degraded", reason="refused")[0]
    assert_logged_by_the_next_scan(daemon, after)
    assert "max_user_watches" in refused["hint"]
    daemon.wait_for("daemon.heartbeat", degraded_drops=1)
    for name in ("first", "second"):
        deliver(stage, daemon, f"{name}/found.tar.gz")
    daemon.wait_for("drop.scanned", scans(daemon) + 3)
    assert len(daemon.events("watch.degraded")) == 1
    assert daemon.events("watch.recovered") == []

    set_limit(daemon, "max_inotify_watches", 1000)
    daemon.wait_for("watch.recovered")
    for name in ("first", "second"):
        wait_for_events(stage, daemon, f"{name}/later")
    daemon.wait_for("daemon.heartbeat", degraded_drops=0)
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.usefixtures("own_limits")
def test_directories_beyond_an_inotify_limit_cost_little_memory(
    stage: Stage, receiver: RunningReceiver
) -> None:
    for number in range(100):
        for below in range(200):
            (stage.drop / f"{number}" / f"{below}").mkdir(parents=True)
    stage.configure(receiver.url, top='heartbeat_every = "1s"')
    daemon = stage.daemon(before=within_limits(max_inotify_watches=100)).ready()
    daemon.wait_for("watch.degraded", reason="refused")
    daemon.wait_for("daemon.heartbeat", len(daemon.events("daemon.heartbeat")) + 3)
    assert daemon.memory("VmHWM") < 100 * 2**20
    deliver(stage, daemon, "99/199/found.tar.gz")
    assert daemon.stop() == 0


@pytest.mark.usefixtures("own_limits")
def test_each_further_fault_of_the_watcher_is_logged(stage: Stage, receiver: RunningReceiver) -> None:
    """The drop folder is replaced while the limit allows no new watcher."""
    stage.configure(receiver.url, drop=FREQUENT_SCANS, more=SCANS_LOGGED)
    daemon = stage.daemon(before=within_limits(max_inotify_instances=1)).ready()
    set_limit(daemon, "max_inotify_instances", 0)
    stage.drop.rename(stage.base / "away")
    stage.drop.mkdir()
    daemon.wait_for("watch.degraded", reason="replaced")
    daemon.wait_for("watch.degraded", reason="refused")
    deliver(stage, daemon, "found.tar.gz")
    assert len(daemon.events("watch.degraded")) == 2

    set_limit(daemon, "max_inotify_instances", 1000)
    daemon.wait_for("watch.recovered")
    wait_for_events(stage, daemon, "later")
    assert daemon.stop() == 0


@pytest.mark.parametrize("remove", [shutil.rmtree, lambda root: root.rename(root.with_name("away"))])
def test_a_drop_folder_that_is_removed_and_created_again_is_watched_again(
    stage: Stage, receiver: RunningReceiver, remove: Callable[[Path], object]
) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1s"', drop=FREQUENT_SCANS, more=SCANS_LOGGED)
    daemon = stage.daemon().ready()
    deliver(stage, daemon, "before.tar.gz")
    remove(stage.drop)
    after = scans(daemon)
    daemon.wait_for("watch.degraded", reason="replaced")
    assert_logged_by_the_next_scan(daemon, after)
    (failed,) = daemon.wait_for("drop.failed", error="No such file or directory")
    assert failed["hint"]
    daemon.wait_for("daemon.heartbeat", degraded_drops=1)

    stage.drop.mkdir()
    deliver(stage, daemon, "after.tar.gz")
    daemon.wait_for("watch.recovered")
    wait_for_events(stage, daemon, "later")
    assert len(daemon.events("watch.degraded")) == len(daemon.events("drop.failed")) == 1
    assert daemon.stop() == 0


@pytest.mark.long
@pytest.mark.root
def test_a_drop_folder_without_permissions_is_logged(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1s"', drop=FREQUENT_SCANS, more=SCANS_LOGGED)
    without_capabilities = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    daemon = stage.daemon(before=without_capabilities).ready()
    deliver(stage, daemon, "before.tar.gz")
    mode = stage.drop.stat().st_mode
    stage.drop.chmod(0)
    (failed,) = daemon.wait_for("drop.failed", error="Permission denied")
    assert "readable" in failed["hint"]
    daemon.wait_for("daemon.heartbeat", degraded_drops=1)
    stage.put("meanwhile.tar.gz", b"meanwhile")
    daemon.wait_for("drop.scanned", count=len(daemon.events("drop.scanned")) + 4)
    assert not daemon.events("archive.ignored")  # its folder is the problem
    assert len(daemon.events("drop.failed")) == 1

    stage.drop.chmod(mode)
    daemon.wait_for("watch.recovered")
    daemon.wait_for("archive.disposed", archive="meanwhile.tar.gz")
    wait_for_events(stage, daemon, "later")
    daemon.wait_for("daemon.heartbeat", degraded_drops=0)
    assert len(daemon.events("drop.failed")) == 1
    assert daemon.stop() == 0


@pytest.mark.long
def test_an_overflow_of_the_inotify_queue_loses_no_archive(stage: Stage) -> None:
    """The daemon is stopped while a queue of the kernel overflows, and then continues."""
    other = stage.base / "routers"
    queue_length = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if queue_length > 50_000:
        pytest.skip("the inotify queue is too long to be filled in a test")
    stage.configure(
        f"https://localhost:{stage.a_free_port()}/",  # no receiver: the archives are queued only
        drop='stable_for = "0s"\nrescan_every = "1h"',
        more=f'{SCANS_LOGGED}[drop.routers]\npath = "{other}"\nrescan_every = "1h"',
    )
    (stage.drop / "below").mkdir()
    other.mkdir()
    daemon = stage.daemon().ready()
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: is_stopped(daemon.pid), "the daemon to stop")
        count = queue_length // 2 + 1000  # two events each: create and close
        for number in range(count):
            (stage.drop / f"r{number}.tar.gz").write_bytes(b"x")
        (stage.drop / "new").mkdir()
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    daemon.wait_for("watch.degraded", reason="overflow", drop="switches")
    queued = [line["archive"] for line in daemon.wait_for("archive.queued", count)]
    assert len(set(queued)) == count
    daemon.wait_for("watch.recovered")
    for name in ("below/later.tar.gz", "new/later.tar.gz"):
        stage.put(name, b"later")
        daemon.wait_for("archive.queued", archive=name)
    assert len(daemon.events("archive.queued")) == count + 2
    assert not [line for line in daemon.events("watch.degraded") if line["drop"] == "routers"]
    assert daemon.stop() == 0
