"""The log in the journal and in a file that systemd opens."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.monitoring.tools import KIT
from tests.programs import require
from tests.stage import until
from tests.systemd.conftest import UNIT, Site

pytestmark = [pytest.mark.systemd, pytest.mark.xdist_group("systemd")]


def test_a_failed_start_is_in_the_journal_as_an_event_and_not_as_text(
    site: Site, receiver: RunningReceiver
) -> None:
    site.configure(receiver.url, top='heartbeat_every = "soon"')
    site.machine.run("systemctl", "start", "--no-block", UNIT)
    failed = site.wait_for("daemon.start_failed")[0]
    site.machine.systemctl("stop", UNIT)
    assert failed["MESSAGE"].startswith("backupd could not start: /etc/backupd/backupd.toml can't be used: ")
    assert "; hint: " in failed["MESSAGE"]
    assert failed["PRIORITY"] == "3"
    entries = site.machine.journal("--unit", UNIT, since=site.since)
    assert not [entry for entry in entries if entry["_TRANSPORT"] == "stdout"]
    site.configure(receiver.url)
    site.start()
    assert until(lambda: site.events("daemon.ready"), "daemon.ready")


@pytest.fixture
def mtail(site: Site) -> Iterator[str]:
    """Run the commands of the page in the machine, and yield the address of the metrics."""
    require("mtail")
    machine = site.machine
    shutil.copytree(KIT, machine.path("/root/monitoring"))
    machine.run("install", "-d", "/etc/mtail", "/etc/logrotate.d", "/etc/default")
    port = site.stage.a_free_port()
    machine.write("/etc/default/mtail", f"HOST=127.0.0.1\nPORT={port}\n")
    page = (KIT / "README.md").read_text("utf-8")
    block = re.search(r"```sh\nsudo apt-get install mtail.*?\n(.*)\ncurl .*?```", page, re.DOTALL)
    assert block
    commands = re.sub(r"\bsudo ", "", block[1])
    machine.run("sh", "-ec", f"cd /root/monitoring\n{commands}")
    yield f"http://127.0.0.1:{port}/metrics"
    machine.run("systemctl", "stop", "mtail", UNIT)
    for path in ("/root/monitoring", "/etc/mtail", "/etc/logrotate.d", "/var/log/backupd.log"):
        machine.run("rm", "-rf", path)


def test_mtail_of_debian_computes_metrics_as_printed_and_through_a_rotation(
    site: Site, receiver: RunningReceiver, request: pytest.FixtureRequest
) -> None:
    require("logrotate")
    site.configure(receiver.url)
    address = request.getfixturevalue("mtail")

    def delivered() -> float:
        text = site.machine.run("curl", "--silent", address, check=False).stdout
        found = re.search(r"^backupd_archives_delivered_total\{.*\} (\d+)", text, re.MULTILINE)
        return float(found[1]) if found else 0

    site.put("one.tar.gz", b"1")
    until(lambda: delivered() == 1, "the first archive in the metrics")
    log = site.machine.path("/var/log/backupd.log")
    assert (log.stat().st_mode & 0o777, log.read_text()[0]) == (0o640, "{")
    site.machine.run("logrotate", "--force", "--state", "/tmp/logrotate", "/etc/logrotate.d/backupd")
    assert '"archive.delivered"' in Path(f"{log}.1").read_text()
    assert '"archive.delivered"' not in log.read_text()
    site.put("two.tar.gz", b"2")
    until(lambda: delivered() == 2, "the second archive in the metrics")
    assert not site.events("archive.delivered")  # the journal has only the messages of systemd
