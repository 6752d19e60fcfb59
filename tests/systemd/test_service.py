"""The shipped unit under a real systemd: start, delivery with full hardening, kills, and stop."""

from __future__ import annotations

import hashlib
import os

import pytest

from backupd.receiver.serve import RunningReceiver
from tests.scripted import Peer, ScriptedServer, accept_all, in_turn, server_context
from tests.systemd.conftest import ROOT, UNIT, Site
from tests.uploading import MIB

pytestmark = [pytest.mark.systemd, pytest.mark.xdist_group("systemd")]

LARGE = os.urandom(16 * MIB)
"""More bytes than the buffers of a connection hold."""
CAP_LEASE = 1 << 28
UNIT_SUCCEEDED = "7ad2d189f7e94e70a38c781354912448"
"""The message id of a unit that ended without a failure, see `journalctl --catalog`."""
EXAMPLES = ROOT / "systemd/examples"


def stops_reading(peer: Peer) -> None:
    peer.read_head()
    peer.read(MIB)
    peer.pause()


def process_status(site: Site) -> dict[str, str]:
    """Return the fields of the daemon's status in /proc; proc_pid_status(5)."""
    text = site.machine.run("cat", f"/proc/{site.pid()}/status").stdout
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def test_the_unit_becomes_active_and_shows_a_status(site: Site, receiver: RunningReceiver) -> None:
    site.configure(receiver.url)
    site.start()
    shown = site.machine.show(
        UNIT,
        *("ActiveState", "SubState", "StatusText", "InactiveExitTimestampMonotonic"),
        "ActiveEnterTimestampMonotonic",
    )
    took = int(shown["ActiveEnterTimestampMonotonic"]) - int(shown["InactiveExitTimestampMonotonic"])
    print(f"ready after {took / 1000:.0f} ms")
    assert (shown["ActiveState"], shown["SubState"]) == ("active", "running")
    status = [line for line in site.machine.systemctl("status", UNIT).splitlines() if "Status: " in line]
    assert shown["StatusText"]
    assert shown["StatusText"] in status[0]


@pytest.mark.parametrize(("drop_in", "capabilities"), [("", CAP_LEASE), ("least-rights", 0)])
def test_an_archive_is_delivered_with_full_hardening(
    site: Site, receiver: RunningReceiver, drop_in: str, capabilities: int
) -> None:
    site.configure(receiver.url)
    if drop_in:
        site.drop_in(drop_in, (EXAMPLES / f"{drop_in}.conf").read_text())
    site.start()
    content = os.urandom(3 * MIB)
    site.put("core.tar.gz", content)

    sent = site.sent("core.tar.gz")

    assert sent.read_bytes() == content
    assert [path.read_bytes() for path in site.stage.stored()] == [content]
    assert [event["BACKUPD_OBSERVER"] for event in site.events("drop.watched")] == ["inotify"]
    assert not site.events("watch.degraded")
    folder = sent.parent.stat()
    assert (folder.st_gid, folder.st_mode & 0o7777) == (site.drop.stat().st_gid, 0o2770)
    daemon = process_status(site)
    assert set(daemon["Uid"].split()) == {site.machine.run("id", "-u", "backupd").stdout.strip()}
    assert (daemon["NoNewPrivs"], daemon["Seccomp"]) == ("1", "2")
    assert {int(daemon[key], 16) for key in ("CapEff", "CapPrm", "CapBnd")} == {capabilities}


def test_an_archive_that_another_user_is_writing_waits(site: Site, receiver: RunningReceiver) -> None:
    site.configure(receiver.url)
    site.start()
    slow = site.drop / "slow.tar.gz"
    with slow.open("wb") as stream:
        os.fchmod(stream.fileno(), 0o640)
        stream.write(b"the first half")
        stream.flush()
        site.put("quick.tar.gz", b"complete")
        site.sent("quick.tar.gz")
        assert [path.read_bytes() for path in site.stage.stored()] == [b"complete"]
        stream.write(b" and the second")
    assert site.sent("slow.tar.gz").read_bytes() == b"the first half and the second"


def test_an_archive_is_delivered_by_a_dynamic_user(site: Site, receiver: RunningReceiver) -> None:
    site.configure(receiver.url)
    site.drop_in("dynamic-user", (EXAMPLES / "dynamic-user.conf").read_text())
    site.start()
    site.put("core.tar.gz", b"content")

    assert site.sent("core.tar.gz").read_bytes() == b"content"

    user = site.machine.show(UNIT, "User")["User"]
    assert user not in site.machine.path("/etc/passwd").read_text()
    uid = int(process_status(site)["Uid"].split()[0])
    assert 61184 <= uid <= 65519
    assert site.machine.path("/var/lib/private/backupd/ledger.sqlite3").stat().st_uid == uid


def test_a_drop_in_makes_another_drop_folder_writable(site: Site, receiver: RunningReceiver) -> None:
    folder = "/data/backups"
    site.machine.run("install", "-d", "-o", "backupd", "-g", "backupd", "-m", "2770", folder)
    site.configure(receiver.url, drop=folder)
    site.drop_in("drop-folder", (EXAMPLES / "drop-folder.conf").read_text())
    site.start()
    site.put("core.tar.gz", b"content", drop=folder)
    assert site.sent("core.tar.gz", drop=folder).read_bytes() == b"content"


def test_a_key_that_only_root_can_read_is_passed_as_a_credential(
    site: Site, receiver: RunningReceiver
) -> None:
    key = site.machine.path("/etc/backupd/tls/client.key")
    os.chown(key, 0, 0)
    key.chmod(0o600)
    site.configure(receiver.url, key="client.key")
    site.drop_in("credentials", (EXAMPLES / "credentials.conf").read_text())
    site.start()
    site.put("core.tar.gz", b"content")
    assert site.sent("core.tar.gz").read_bytes() == b"content"
    as_backupd = ("setpriv", "--reuid=backupd", "--regid=backupd", "--clear-groups", "cat")
    assert site.machine.run(*as_backupd, "/etc/backupd/tls/client.key", check=False).returncode != 0


def test_a_restart_after_a_kill_repeats_the_upload(site: Site) -> None:
    with ScriptedServer(in_turn(stops_reading, accept_all), server_context(site.stage.pki)) as server:
        site.configure(server.url)
        site.start()
        archive = site.put("core.tar.gz", LARGE)
        assert server.paused.wait(60)
        first = site.pid()

        site.machine.systemctl("kill", "--signal=KILL", "--kill-whom=main", UNIT)

        site.sent("core.tar.gz")
        assert site.pid() not in {0, first}
        assert site.machine.show(UNIT, "NRestarts") == {"NRestarts": "1"}
        assert [request.archive for request in server.requests] == [LARGE]
        assert not archive.exists()
        assert site.events("daemon.ready")[-1]["released_claims"] == 1
        assert len(site.events("archive.delivered")) == 1


def test_the_unit_stops_in_time_while_an_upload_hangs(site: Site) -> None:
    with ScriptedServer(in_turn(stops_reading, accept_all), server_context(site.stage.pki)) as server:
        site.configure(server.url, top='shutdown_grace = "0.5s"')
        site.start()
        archive = site.put("core.tar.gz", LARGE)
        assert server.paused.wait(60)

        site.machine.systemctl("stop", UNIT)

        assert site.machine.show(UNIT, "ActiveState") == {"ActiveState": "inactive"}
        assert len(site.systemd_entries(UNIT_SUCCEEDED)) == 1  # it was not killed after a time-out
        assert site.events("daemon.stopped")[0]["clean"] is False
        assert archive.read_bytes() == LARGE
        assert not server.requests

        site.start()
        site.sent("core.tar.gz")
        assert [request.archive for request in server.requests] == [LARGE]


def test_a_power_cut_during_an_upload_loses_nothing(site: Site) -> None:
    with ScriptedServer(in_turn(stops_reading, accept_all), server_context(site.stage.pki)) as server:
        site.configure(server.url)
        site.machine.systemctl("enable", "--now", UNIT)
        site.put("core.tar.gz", LARGE)
        assert server.paused.wait(60)

        site.machine.crash()
        assert (site.drop / "core.tar.gz").read_bytes() == LARGE
        print(f"booted in {site.machine.boot():.2f} s")  # the unit is enabled

        site.sent("core.tar.gz")
        assert [request.archive for request in server.requests] == [LARGE]
        assert len(site.events("archive.delivered")) == 1
        site.machine.systemctl("disable", UNIT)


def test_two_instances_have_separate_ledgers(site: Site, receiver: RunningReceiver) -> None:
    instances = ("switches", "firewalls")
    for name in instances:
        folder = f"/srv/backups/{name}"
        site.machine.run("install", "-d", "-o", "backupd", "-g", "backupd", "-m", "2770", folder)
        site.configure(receiver.url, instance=name, drop=folder)
        site.start(f"backupd@{name}.service")
    for name in instances:
        site.put(f"{name}.tar.gz", name.encode(), drop=f"/srv/backups/{name}")
    for name in instances:
        folder = f"/srv/backups/{name}"
        assert site.sent(f"{name}.tar.gz", drop=folder).read_bytes() == name.encode()
        assert site.machine.path(f"/var/lib/backupd/{name}/ledger.sqlite3").exists()
        delivered = site.events("archive.delivered", unit=f"backupd@{name}.service")
        assert [event["archive"] for event in delivered] == [f"{name}.tar.gz"]
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in site.stage.stored()}
    assert digests == {hashlib.sha256(name.encode()).hexdigest() for name in instances}
