"""A real Prometheus scrapes a real daemon through troubles: each alert fires once and ends."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver, ServerTls
from tests.e2e.test_reload import reload, renew_client_files
from tests.monitoring.prometheus import AlertTimes, Prometheus, running_prometheus
from tests.pki import in_days
from tests.privileges import IS_ROOT
from tests.programs import require
from tests.stage import Daemon, Stage, until

pytestmark = pytest.mark.long

TOP = 'heartbeat_every = "1s"'
SHORT_RETRY = 'retry = { initial = "100ms", max = "500ms" }'
EXPECT = 'expect = { every = "%s", by = "{stem}", devices = ["sw9"] }'
MAX_SIZE = 1000


class Scene:
    """A daemon with two drops whose metrics Prometheus scrapes."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.people = stage.base / "people"
        self.people.mkdir()
        self.port = stage.a_free_port()
        self.receiver = self.a_receiver()
        self.receiver.__enter__()
        self.configure()
        self.daemon = self.start()

    def a_receiver(self, port: int = 0, max_size: int = MAX_SIZE) -> RunningReceiver:
        pki = self.stage.pki
        tls = ServerTls(pki.server_cert, pki.server_key, pki.ca_pem)
        return RunningReceiver(self.stage.store, tls, port=port, max_size=max_size)

    def configure(self, expect: str = "") -> None:
        self.stage.configure(
            self.receiver.url,
            top=TOP,
            drop=f'rescan_every = "1s"\n{expect}',
            destination=SHORT_RETRY,
            more=f'[drop.people]\npath = "{self.people}"\nstable_for = "0.1s"\nrescan_every = "1s"\n'
            f'[metrics]\nlisten = "127.0.0.1:{self.port}"',
        )

    def start(self) -> Daemon:
        # root may read every folder
        before = [require("setpriv"), "--bounding-set=-dac_override,-dac_read_search"] if IS_ROOT else ["env"]
        return self.stage.daemon(before=before).ready()

    def stop_receiver(self) -> None:
        self.receiver.__exit__(None, None, None)

    def start_receiver(self, max_size: int = MAX_SIZE) -> None:
        self.receiver = self.a_receiver(self.receiver.port, max_size)
        self.receiver.__enter__()


def outage(scene: Scene, prometheus: Prometheus) -> None:
    scene.stop_receiver()
    scene.stage.put("sw1.cfg", b"a")
    prometheus.wait_for("BackupdDestinationPaused", "BackupdBacklogOld")
    scene.start_receiver()
    scene.daemon.wait_for("archive.disposed", archive="sw1.cfg")


def rejected_archive(scene: Scene, prometheus: Prometheus) -> None:
    scene.stage.put("sw2.cfg", b"b" * (MAX_SIZE + 1))
    prometheus.wait_for("BackupdArchivesInQuarantine")
    scene.stop_receiver()
    scene.start_receiver(max_size=10 * MAX_SIZE)
    [rejected] = json.loads(scene.stage.backupd("list", "--state", "rejected", "--json").stdout)
    assert scene.stage.backupd("retry", rejected["id"]).returncode == 0
    scene.daemon.wait_for("archive.delivered", archive="sw2.cfg")


def unreadable_folder(scene: Scene, prometheus: Prometheus) -> None:
    closed = scene.stage.drop / "closed"
    closed.mkdir(mode=0)
    prometheus.wait_for("BackupdFilesNotSent")
    closed.chmod(0o750)
    prometheus.wait_for()
    scene.people.chmod(0)
    prometheus.wait_for("BackupdDropFailing")
    scene.people.chmod(0o750)


def expiring_certificate(scene: Scene, prometheus: Prometheus) -> None:
    pki = scene.stage.pki
    renew_client_files(scene.stage, pki.issue_client("short", not_before=in_days(-3), not_after=in_days(0.9)))
    prometheus.wait_for("BackupdCertificateExpiring")
    renew_client_files(scene.stage, pki.issue_client("renewed"))


def silent_device(scene: Scene, prometheus: Prometheus) -> None:
    scene.configure(EXPECT % "5s")
    reload(scene.daemon)
    prometheus.wait_for("BackupdDropOverdue")
    scene.configure(EXPECT % "1h")  # else it is overdue again later
    scene.stage.put("sw9.cfg", b"c")
    reload(scene.daemon)


def dead_daemon(scene: Scene, prometheus: Prometheus) -> None:
    scene.daemon.kill()
    prometheus.wait_for("BackupdHeartbeatMissing")
    scene.daemon = scene.start()


TROUBLES = {
    "the destination is down": (outage, ["BackupdDestinationPaused", "BackupdBacklogOld"]),
    "an archive is rejected": (rejected_archive, ["BackupdArchivesInQuarantine"]),
    "a device is silent": (silent_device, ["BackupdDropOverdue"]),
    "a folder is unreadable": (unreadable_folder, ["BackupdFilesNotSent", "BackupdDropFailing"]),
    "the client certificate expires soon": (expiring_certificate, ["BackupdCertificateExpiring"]),
    "the daemon is killed": (dead_daemon, ["BackupdHeartbeatMissing"]),
}


def test_each_trouble_raises_its_alerts_once_and_they_end(stage: Stage, tmp_path: Path) -> None:
    scene = Scene(stage)
    try:
        with running_prometheus(tmp_path / "prometheus", stage.a_free_port(), scene.port) as prometheus:
            prometheus.wait_for()
            for trouble, _ in TROUBLES.values():
                trouble(scene, prometheus)
                prometheus.wait_for()
            timeline = until(lambda: all_ended(prometheus.timeline()), "the end of all alerts")
    finally:
        scene.stop_receiver()
    fired = [times for times in timeline if times.first("firing") is not None]
    show(fired)
    expected = [name for _, names in TROUBLES.values() for name in names]
    assert sorted(times.labels["alertname"] for times in fired) == sorted(expected)
    for times in fired:
        assert times.course in (["pending", "firing", "ended"], ["firing", "ended"]), times
        assert times.labels["host"] == socket.gethostname()
        assert times.labels["instance"] == f"127.0.0.1:{scene.port}"
    assert scene.daemon.process.poll() is None
    scene.daemon.process.send_signal(signal.SIGTERM)
    assert scene.daemon.process.wait(60) == 0


def all_ended(timeline: list[AlertTimes]) -> list[AlertTimes]:
    """Return a timeline, empty until all of its alerts have ended."""
    return timeline if all(times.course[-1] == "ended" for times in timeline) else []


def show(fired: list[AlertTimes]) -> None:
    """Print the timeline as the table of the page."""
    alerts = {times.labels["alertname"]: times for times in fired}
    print("\n| trouble | alert | pending | firing | ended |\n|---|---|---|---|---|")
    for title, (_, names) in TROUBLES.items():
        for name in names:
            if name in alerts:
                cells = [alerts[name].first(state) for state in ("pending", "firing", "ended")]
                shown = " | ".join("" if at is None else f"{at:.0f} s" for at in cells)
                print(f"| {title} | `{name}` | {shown} |")
