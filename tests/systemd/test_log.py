"""The log in the journal and in a file that systemd opens."""

from __future__ import annotations

from backupd.receiver.serve import RunningReceiver
from tests.stage import until
from tests.systemd.conftest import UNIT, Site


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
