"""What takes the daemon's sight: each time it is said, archives are found by scan, and events come back."""

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
from tests.faults.delivery import stands_still
from tests.privileges import needs_root
from tests.stage import Daemon, Stage, until

OFTEN = 'stable_for = "0s"\nrescan_every = "1s"'
SCANS_TOLD = '[log]\nlevel = "debug"\n'
"""Without it no `drop.scanned` is logged, and nothing is known of what a scan found."""
KNOBS = Path("/proc/sys/user")
OWN_LIMITS = ["unshare", "--user", "--map-root-user"]


def deliver(stage: Stage, daemon: Daemon, name: str) -> None:
    """Drop an archive, and wait until it is in `sent`."""
    stage.put(name, os.urandom(1000))
    daemon.wait_for("archive.disposed", archive=name)


def sees_again(stage: Stage, daemon: Daemon, name: str) -> None:
    """Show that events come: some archive is admitted while no scan has ended since it was dropped."""
    daemon.wait_for("drop.scanned")
    tries = itertools.count(1)

    def came_by_event() -> bool:
        archive = f"{name}-{next(tries)}.tar.gz"
        known = len(daemon.events())
        deliver(stage, daemon, archive)
        lines = [(line["event"], line.get("archive")) for line in daemon.events()[known:]]
        return ("drop.scanned", None) not in lines[: lines.index(("archive.queued", archive))]

    until(came_by_event, "an archive that an event told of")


def scans(daemon: Daemon) -> int:
    """Return how many scans have ended."""
    return len(daemon.events("drop.scanned"))


def assert_said_by_the_next_scan(daemon: Daemon, before: int, count: int = 1) -> None:
    """Check that an event told of blindness by the next scan; one may have been under way at the cause."""
    lines = [line["event"] for line in daemon.events()]
    blind = [index for index, event in enumerate(lines) if event == "watch.degraded"]
    assert lines[: blind[count - 1]].count("drop.scanned") <= before + 2


def within_limits(**limits: int) -> list[str]:
    """Return the beginning of a command for the daemon to run under its own limits of inotify."""
    first = "; ".join(f"echo {value} > {KNOBS / name}" for name, value in limits.items())
    return [*OWN_LIMITS, "sh", "-c", f'{first}; exec "$@"', "sh"]


def set_limit(daemon: Daemon, name: str, value: int) -> None:
    subprocess.run(
        ["nsenter", "--user", f"--target={daemon.pid}", "sh", "-c", f"echo {value} > {KNOBS / name}"],
        check=True,
    )


@pytest.fixture
def own_limits() -> None:
    """Skip where a process can't have limits of its own."""
    able = [*OWN_LIMITS, "test", "-w", str(KNOBS / "max_inotify_watches")]
    if subprocess.run(able, check=False, capture_output=True).returncode:
        pytest.skip("user namespaces can't be made")


@pytest.fixture
def mounts(stage: Stage) -> Iterator[None]:
    """Unmount whatever a test mounted on the drop folder."""
    yield
    while os.path.ismount(stage.drop):
        subprocess.run(["umount", "--lazy", stage.drop], check=True)


def mount(folder: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "backupd-test", folder], check=True)


@needs_root
@pytest.mark.usefixtures("mounts")
def test_a_root_that_is_mounted_over_and_unmounted(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, drop=OFTEN, more=SCANS_TOLD)
    daemon = stage.daemon().ready()
    deliver(stage, daemon, "before.tar.gz")

    mount(stage.drop)
    after = scans(daemon)
    daemon.wait_for("watch.degraded", reason="replaced")
    assert_said_by_the_next_scan(daemon, after)
    daemon.wait_for("watch.recovered")
    (stage.drop / "over.tar.gz").write_bytes(b"over")
    daemon.wait_for("archive.disposed", archive="over.tar.gz")
    assert (stage.drop / "sent" / "over.tar.gz").read_bytes() == b"over"

    subprocess.run(["umount", "--lazy", stage.drop], check=True)
    after = scans(daemon)
    daemon.wait_for("watch.degraded", 2, reason="replaced")
    assert_said_by_the_next_scan(daemon, after, 2)
    daemon.wait_for("watch.recovered", 2)
    deliver(stage, daemon, "after.tar.gz")
    sees_again(stage, daemon, "later")
    assert sorted(p.name for p in stage.archives(stage.sent) if "later" not in p.name) == [
        "after.tar.gz",
        "before.tar.gz",
    ]
    assert daemon.stop() == 0


@needs_root
@pytest.mark.usefixtures("mounts")
def test_archives_that_wait_on_a_filesystem_that_goes_away_are_sent_when_it_is_back(
    stage: Stage, receiver: RunningReceiver
) -> None:
    image = stage.base / "image"
    image.mkdir()
    mount(image)
    try:
        subprocess.run(["mount", "--bind", image, stage.drop], check=True)
        stage.configure(
            receiver.url, drop=OFTEN, more='[destination.vault.retry]\ninitial = "0.1s"\nmax = "0.5s"'
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


@pytest.mark.usefixtures("own_limits")
@pytest.mark.parametrize("limit", ["max_inotify_instances", "max_inotify_watches"])
def test_a_limit_of_the_kernel_is_said_and_archives_are_found_without_events(
    stage: Stage, receiver: RunningReceiver, limit: str
) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1s"', drop=OFTEN, more=SCANS_TOLD)
    daemon = stage.daemon(before=within_limits(**{limit: 0}))

    refused = daemon.wait_for("watch.degraded", reason="refused")[0]
    assert f"max_user_{limit.rpartition('_')[2]}" in refused["hint"]
    daemon.wait_for("daemon.heartbeat", degraded_drops=1)
    deliver(stage, daemon, "found.tar.gz")
    assert len(daemon.events("watch.degraded")) == 1  # however often it is tried again

    set_limit(daemon, limit, 1000)
    daemon.wait_for("watch.recovered")
    sees_again(stage, daemon, "later")
    daemon.wait_for("daemon.heartbeat", degraded_drops=0)
    assert daemon.stop() == 0


@pytest.mark.usefixtures("own_limits")
def test_a_limit_that_leaves_only_some_directories_unwatched_is_said(
    stage: Stage, receiver: RunningReceiver
) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1s"', drop=OFTEN, more=SCANS_TOLD)
    daemon = stage.daemon(before=within_limits(max_inotify_watches=2)).ready()
    sees_again(stage, daemon, "root")
    assert daemon.events("watch.degraded") == []

    for name in ("first", "second"):
        (stage.drop / name).mkdir()
    after = scans(daemon)
    refused = daemon.wait_for("watch.degraded", reason="refused")[0]
    assert_said_by_the_next_scan(daemon, after)
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
        sees_again(stage, daemon, f"{name}/later")
    daemon.wait_for("daemon.heartbeat", degraded_drops=0)
    assert daemon.stop() == 0


@pytest.mark.usefixtures("own_limits")
def test_each_further_reason_to_be_blind_is_said(stage: Stage, receiver: RunningReceiver) -> None:
    """The root is replaced while the kernel has no watcher left to give."""
    stage.configure(receiver.url, drop=OFTEN, more=SCANS_TOLD)
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
    sees_again(stage, daemon, "later")
    assert daemon.stop() == 0


@pytest.mark.parametrize("go", [shutil.rmtree, lambda root: root.rename(root.with_name("away"))])
def test_a_root_that_goes_and_is_made_anew(
    stage: Stage, receiver: RunningReceiver, go: Callable[[Path], object]
) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1s"', drop=OFTEN, more=SCANS_TOLD)
    daemon = stage.daemon().ready()
    deliver(stage, daemon, "before.tar.gz")
    go(stage.drop)
    after = scans(daemon)
    daemon.wait_for("watch.degraded", reason="replaced")
    assert_said_by_the_next_scan(daemon, after)
    (failed,) = daemon.wait_for("drop.failed", error="No such file or directory")
    assert failed["hint"]
    daemon.wait_for("daemon.heartbeat", degraded_drops=1)

    stage.drop.mkdir()
    deliver(stage, daemon, "after.tar.gz")
    daemon.wait_for("watch.recovered")
    sees_again(stage, daemon, "later")
    assert len(daemon.events("watch.degraded")) == len(daemon.events("drop.failed")) == 1
    assert daemon.stop() == 0


@needs_root
def test_a_root_that_is_made_unreadable_in_its_place(stage: Stage, receiver: RunningReceiver) -> None:
    stage.configure(receiver.url, top='heartbeat_every = "1s"', drop=OFTEN, more=SCANS_TOLD)
    bound_by_modes = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    daemon = stage.daemon(before=bound_by_modes).ready()
    deliver(stage, daemon, "before.tar.gz")
    mode = stage.drop.stat().st_mode
    stage.drop.chmod(0)
    (failed,) = daemon.wait_for("drop.failed", error="Permission denied")
    assert "readable" in failed["hint"]
    daemon.wait_for("daemon.heartbeat", degraded_drops=1)
    stage.put("meanwhile.tar.gz", b"meanwhile")
    daemon.wait_for("archive.ignored", archive="meanwhile.tar.gz", reason="unreadable")
    assert len(daemon.events("drop.failed")) == 1

    stage.drop.chmod(mode)
    daemon.wait_for("watch.recovered")
    daemon.wait_for("archive.disposed", archive="meanwhile.tar.gz")
    sees_again(stage, daemon, "later")
    daemon.wait_for("daemon.heartbeat", degraded_drops=0)
    assert len(daemon.events("drop.failed")) == 1
    assert daemon.stop() == 0


def test_more_events_than_the_queue_holds_cost_no_archive(stage: Stage, receiver: RunningReceiver) -> None:
    """The daemon stands still while the kernel's queue runs over, and goes on."""
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 50_000:
        pytest.skip("the kernel's queue is too long to be filled in a test")
    stage.configure(receiver.url, drop='stable_for = "0s"\nrescan_every = "1h"', more=SCANS_TOLD)
    daemon = stage.daemon().ready()
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: stands_still(daemon.pid), "the daemon to stand still")
        noise = stage.drop / "noise.pdf"
        for _ in range(most):  # a creation and a close each
            noise.write_bytes(b"")
            noise.unlink()
        stage.put("after.tar.gz", b"after")
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    daemon.wait_for("watch.degraded", reason="overflow")
    daemon.wait_for("archive.disposed", archive="after.tar.gz")
    sees_again(stage, daemon, "later")
    assert daemon.stop() == 0
