"""`backupd install` and `uninstall` on a machine with systemd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backupd.cli.install import INSTALLED_FILES
from backupd.receiver.serve import RunningReceiver
from tests.systemd.conftest import BACKUPD, UNIT, Site
from tests.systemd.machine import Machine

pytestmark = [pytest.mark.systemd, pytest.mark.xdist_group("systemd")]


@pytest.fixture
def installed(machine: Machine) -> Iterator[Machine]:
    """Yield the machine, and install the service again after the test."""
    yield machine
    machine.run(BACKUPD, "install")


def files(machine: Machine) -> dict[str, tuple[int, int, int]]:
    """Return inode, mode and modification time of each installed file."""
    stats = {place: machine.path(place).stat() for place in INSTALLED_FILES}
    return {place: (stat.st_ino, stat.st_mode, stat.st_mtime_ns) for place, stat in stats.items()}


def test_a_second_install_changes_nothing(machine: Machine) -> None:
    before = files(machine)
    assert machine.run(BACKUPD, "install").stdout.startswith("nothing to do")
    assert files(machine) == before
    assert {mode & 0o7777 for _, mode, _ in before.values()} == {0o644}
    assert machine.show(UNIT, "LoadState", "NeedDaemonReload") == {
        "LoadState": "loaded",
        "NeedDaemonReload": "no",
    }


def test_install_creates_the_user_and_the_folders(machine: Machine) -> None:
    assert machine.run("getent", "passwd", "backupd").stdout.endswith(":/var/lib/backupd:/usr/sbin/nologin\n")
    shown = machine.run("stat", "--format=%n %a %U %G", "/etc/backupd", "/etc/backupd/tls", "/srv/backups")
    assert shown.stdout.splitlines() == [
        "/etc/backupd 750 root backupd",
        "/etc/backupd/tls 750 root backupd",
        "/srv/backups 755 root root",
    ]


def test_install_replaces_a_changed_unit_and_keeps_drop_ins(site: Site, installed: Machine) -> None:
    site.drop_in("mine", "[Service]\nTimeoutStopSec=42s\n")
    installed.write(f"/etc/systemd/system/{UNIT}", "[Service]\nExecStart=/bin/false\n")
    dry = installed.run(BACKUPD, "install", "--dry-run").stdout
    assert "/bin/false" in installed.path(f"/etc/systemd/system/{UNIT}").read_text()
    done = installed.run(BACKUPD, "install").stdout
    assert done == dry
    assert done.splitlines()[:2] == [f"write /etc/systemd/system/{UNIT}", "run systemctl daemon-reload"]
    shown = installed.show(UNIT, "ExecStart", "TimeoutStopUSec")
    assert f"path={BACKUPD} " in shown["ExecStart"]
    assert shown["TimeoutStopUSec"] == "42s"


def test_uninstall_stops_the_services_and_keeps_data_and_configuration(
    site: Site, receiver: RunningReceiver, installed: Machine
) -> None:
    site.configure(receiver.url)
    site.configure(receiver.url, instance="second", drop="/srv/backups/second")
    installed.run("install", "-d", "-o", "backupd", "-g", "backupd", "-m", "2770", "/srv/backups/second")
    installed.systemctl("enable", "--now", "backupd.service", "backupd@second.service")
    site.put("core.tar.gz", b"content")
    sent = site.sent("core.tar.gz")
    dry = installed.run(BACKUPD, "uninstall", "--dry-run").stdout
    assert site.pid() != 0

    done = installed.run(BACKUPD, "uninstall").stdout

    assert done == dry
    assert "kept: /etc/backupd, " in done
    assert site.pid() == 0
    assert site.pid("backupd@second.service") == 0
    assert not list(installed.path("/etc/systemd/system/multi-user.target.wants").glob("backupd*"))
    assert not any(installed.path(place).exists() for place in INSTALLED_FILES)
    assert installed.show(UNIT, "LoadState") == {"LoadState": "not-found"}
    assert sent.read_bytes() == b"content"
    assert installed.path("/var/lib/backupd/ledger.sqlite3").exists()
    assert installed.path("/etc/backupd/backupd.toml").exists()
    assert installed.run("id", "backupd").returncode == 0
    assert "nothing to do" in installed.run(BACKUPD, "uninstall").stdout


def test_install_and_uninstall_require_root(machine: Machine) -> None:
    as_nobody = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", BACKUPD)
    for command in ("install", "uninstall"):
        refused = machine.run(*as_nobody, command, check=False)
        assert refused.returncode == 2
        assert "needs root" in refused.stderr
        assert machine.run(*as_nobody, command, "--dry-run").returncode == 0
