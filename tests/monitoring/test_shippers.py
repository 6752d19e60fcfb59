"""Configurations of log shippers, run by the programs that Debian has."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from backupd.receiver.serve import RunningReceiver
from tests.monitoring.tools import KIT
from tests.programs import require
from tests.stage import Stage, until

SHIPPERS = KIT / "shippers"


def test_rsyslog_passes_on_each_event_with_its_keys(
    stage: Stage, receiver: RunningReceiver, tmp_path: Path
) -> None:
    rsyslogd = require("rsyslogd")
    text = (SHIPPERS / "rsyslog.conf").read_text("utf-8").replace("/var/log/", f"{tmp_path}/")
    config = tmp_path / "rsyslog.conf"
    config.write_text(f'global(workDirectory="{tmp_path}")\n{text}')
    assert subprocess.run([rsyslogd, "-N1", "-f", config], capture_output=True, check=False).returncode == 0
    stage.configure(receiver.url, drop='inspect = "quick"')
    (tmp_path / "backupd.log").symlink_to(stage.log)
    daemon = stage.daemon().ready()
    stage.put("r1.cfg", b"abc")
    (stage.drop / "linked.cfg").symlink_to("/nowhere")
    daemon.wait_for("archive.disposed")
    daemon.wait_for("archive.ignored")
    shipper = subprocess.Popen([rsyslogd, "-n", "-f", config, "-i", tmp_path / "pid"])
    try:
        daemon.stop()
        written = tmp_path / "backupd-events.json"
        until(lambda: written.exists() and "daemon.stopped" in written.read_text(), "the last event")
    finally:
        shipper.terminate()
        shipper.wait()
    events = [json.loads(line) for line in written.read_text().splitlines()]
    for event in events:
        del event["metadata"]  # of rsyslog
    assert events == daemon.events()
    problems = (tmp_path / "backupd-problems.log").read_text().splitlines()
    assert any(re.search(r"Z \S+ warning linked.cfg is ignored: ", line) for line in problems)
    assert len(problems) == sum(event["level"] in {"warning", "error"} for event in events)


def test_each_shipper_and_other_file_is_on_the_page() -> None:
    page = (KIT / "README.md").read_text("utf-8")
    files = [path for path in KIT.rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(files) > 10
    missing = {path.name for path in files if f"]({path.relative_to(KIT)})" not in page}
    assert missing == {"backupd.rules.test.yaml"}
