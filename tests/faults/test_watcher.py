"""What takes the daemon's sight: each time it is said, archives are found by scan, and events come back."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.faults.delivery import stands_still
from tests.privileges import needs_root
from tests.stage import Daemon, Stage, until

OFTEN = 'stable_for = "0s"\nrescan_every = "1s"'


def deliver(stage: Stage, daemon: Daemon, name: str) -> None:
    """Drop an archive, and wait until it is in `sent`."""
    stage.put(name, os.urandom(1000))
    daemon.wait_for("archive.disposed", archive=name)


def sees_again(stage: Stage, daemon: Daemon, name: str) -> None:
    """Show that events come: some archive is admitted while no scan has ended."""

    def came_by_event() -> bool:
        came_by_event.tries += 1  # type: ignore[attr-defined]
        archive = f"{name}-{came_by_event.tries}.tar.gz"  # type: ignore[attr-defined]
        known = len(daemon.events())
        deliver(stage, daemon, archive)
        lines = daemon.events()[known:]
        names = [line["event"] for line in lines[: [line.get("archive") for line in lines].index(archive)]]
        return "drop.scanned" not in names

    came_by_event.tries = 0  # type: ignore[attr-defined]
    until(came_by_event, "an archive that an event told of")


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
    stage.configure(receiver.url, drop=OFTEN)
    daemon = stage.daemon().ready()
    deliver(stage, daemon, "before.tar.gz")

    mount(stage.drop)
    daemon.wait_for("watcher.blind", reason="replaced")
    daemon.wait_for("watcher.restored")
    (stage.drop / "over.tar.gz").write_bytes(b"over")
    daemon.wait_for("archive.disposed", archive="over.tar.gz")
    assert (stage.drop / "sent" / "over.tar.gz").read_bytes() == b"over"

    subprocess.run(["umount", "--lazy", stage.drop], check=True)
    daemon.wait_for("watcher.blind", 2, reason="replaced")
    daemon.wait_for("watcher.restored", 2)
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
        daemon.wait_for("watcher.blind", reason="replaced")
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


@pytest.mark.parametrize("limit", ["max_inotify_instances", "max_inotify_watches"])
def test_a_limit_of_the_kernel_is_said_and_archives_are_found_without_events(
    stage: Stage, receiver: RunningReceiver, limit: str
) -> None:
    knob = Path("/proc/sys/user") / limit
    within = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*within, "test", "-w", knob], check=False, capture_output=True).returncode:
        pytest.skip("user namespaces can't be made")
    stage.configure(receiver.url, top='heartbeat_every = "1s"', drop=OFTEN)
    daemon = stage.daemon(before=[*within, "sh", "-c", f'echo 0 > {knob}; exec "$@"', "sh"])

    refused = daemon.wait_for("watcher.blind", reason="refused")[0]
    assert f"max_user_{limit.rpartition('_')[2]}" in refused["hint"]
    daemon.wait_for("daemon.heartbeat", blind=1)
    deliver(stage, daemon, "found.tar.gz")
    assert len(daemon.events("watcher.blind")) == 1  # however often it is tried again

    subprocess.run(
        ["nsenter", "--user", f"--target={daemon.pid}", "sh", "-c", f"echo 1000 > {knob}"],
        check=True,
    )
    daemon.wait_for("watcher.restored")
    sees_again(stage, daemon, "later")
    daemon.wait_for("daemon.heartbeat", blind=0)
    assert daemon.stop() == 0


def test_more_events_than_the_queue_holds_cost_no_archive(stage: Stage, receiver: RunningReceiver) -> None:
    """The daemon stands still while the kernel's queue runs over, and goes on."""
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    stage.configure(receiver.url, drop='stable_for = "0s"')
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
    daemon.wait_for("watcher.blind", reason="overflow")
    daemon.wait_for("archive.disposed", archive="after.tar.gz")
    sees_again(stage, daemon, "later")
    assert daemon.stop() == 0
