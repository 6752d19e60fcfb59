"""A machine with backupd installed, and the files and settings of a test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.programs import do_without
from tests.stage import TIMEOUT, Stage, until
from tests.systemd.machine import Machine, require_machine

ROOT = Path(__file__).parents[2]
UNIT = "backupd.service"
BACKUPD = "/opt/backupd/bin/backupd"
DROP = "/srv/backups/switches"


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Yield a booted machine with backupd in /opt/backupd and its service installed."""
    require_machine()
    base = tmp_path_factory.mktemp("machine")
    for folder in (base, *base.parents[:2]):
        folder.chmod(0o755)  # users inside the machine need to reach the tree
    machine = Machine(base / "tree")
    try:
        _make_wheels(base, machine.path("/opt/wheels"))
        print(f"booted in {machine.boot():.2f} s")
        machine.run("/usr/bin/python3", "-m", "venv", "/opt/backupd")
        pip = ("/opt/backupd/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        machine.run(*pip, "--no-index", "--find-links", "/opt/wheels", "backupd[notify]")
        machine.run(BACKUPD, "install")
        yield machine
    finally:
        machine.end()
        shutil.rmtree(base, ignore_errors=True)


def _make_wheels(base: Path, into: Path) -> None:
    """Build wheels of backupd and its dependencies for the Python of the system."""
    made = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"],
        check=False,
        capture_output=True,
        timeout=TIMEOUT,
    )
    if made.returncode != 0:
        do_without("/usr/bin/python3 is older than 3.11 or has no venv")
    subprocess.run(["/usr/bin/python3", "-m", "venv", str(base / "builder")], check=True, timeout=TIMEOUT)
    pip = [str(base / "builder/bin/python"), "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--wheel-dir", str(into), f"{ROOT}[notify]"], check=True, timeout=600)


class Site:
    """An installation that a test configures; `clear` removes its folders and drop-ins."""

    def __init__(self, machine: Machine, stage: Stage) -> None:
        self.machine = machine
        self.stage = stage
        self.drop = machine.path(DROP)
        self.since = time.time()
        machine.run("install", "-d", "-o", "backupd", "-g", "backupd", "-m", "2770", DROP)
        tls = machine.path("/etc/backupd/tls")
        for name, mode in (("ca.pem", 0o644), ("client.pem", 0o644), ("client.key", 0o640)):
            shutil.copyfile(stage.pki.folder / name, tls / name)
            (tls / name).chmod(mode)
        machine.run("chgrp", "backupd", "/etc/backupd/tls/client.key")
        self.drop_in("soon", "[Service]\nRestartSec=100ms\n")

    def configure(self, url: str, *, instance: str = "backupd", drop: str = DROP, **lines: str) -> None:
        """Write a configuration; `top`, `destination` and `key` add lines of TOML."""
        key = lines.get("key", "/etc/backupd/tls/client.key")
        text = f"""
{lines.get("top", "")}
[drop.switches]
path = "{drop}"
stable_for = "0.1s"
[destination.vault]
url = "{url}"
ca = "/etc/backupd/tls/ca.pem"
cert = "/etc/backupd/tls/client.pem"
key = "{key}"
{lines.get("destination", "")}
"""
        self.machine.write(f"/etc/backupd/{instance}.toml", text)

    def drop_in(self, name: str, text: str, unit: str = UNIT) -> None:
        """Write a drop-in and reload systemd."""
        self.machine.write(f"/etc/systemd/system/{unit}.d/{name}.conf", text)
        self.machine.systemctl("daemon-reload")

    def start(self, unit: str = UNIT) -> None:
        """Start a unit and wait until it is ready."""
        self.machine.systemctl("start", unit)

    def put(self, name: str, content: bytes, drop: str = DROP) -> Path:
        """Rename a finished archive into the drop folder, as another user in its group."""
        folder = self.machine.path(drop)
        part = folder / f".{name}.part"
        part.write_bytes(content)
        os.chown(part, 12345, folder.stat().st_gid)
        part.chmod(0o640)
        part.rename(folder / name)
        return folder / name

    def sent(self, name: str, drop: str = DROP) -> Path:
        """Wait until an archive was moved to sent/, and return its path."""
        return self._wait_for_receipt_file(self.machine.path(drop) / "sent" / name)

    def _wait_for_receipt_file(self, archive: Path) -> Path:
        try:
            until(
                lambda: archive.with_name(f"{archive.name}.receipt.json").exists(), f"{archive.name} in sent/"
            )
        except AssertionError as error:
            journal = self.machine.run("journalctl", "--no-pager", "-n", "60", "-o", "cat", check=False)
            raise AssertionError(f"{error}\n{journal.stdout}") from None
        return archive

    def events(self, name: str, unit: str = UNIT) -> list[dict[str, Any]]:
        """Return the events of a name that the daemon has logged since the start of the test."""
        logged = []
        for entry in self.machine.journal("--unit", unit, since=self.since):
            text = entry.get("BACKUPD_JSON") or entry.get("MESSAGE") or ""
            keys = json.loads(text) if isinstance(text, str) and text.startswith("{") else {}
            if name == keys.get("event"):
                logged.append({**entry, **keys})
        return logged

    def systemd_entries(self, message_id: str, unit: str = UNIT) -> list[dict[str, Any]]:
        """Return the entries of systemd about a unit with a message id since the start of the test."""
        entries = self.machine.journal("--unit", unit, since=self.since)
        return [entry for entry in entries if entry.get("MESSAGE_ID") == message_id]

    def wait_for(self, name: str, count: int = 1, unit: str = UNIT) -> list[dict[str, Any]]:
        """Wait until a number of events of a name were logged, and return them."""
        found: list[dict[str, Any]] = until(
            lambda: found if len(found := self.events(name, unit)) >= count else None, f"{count} x {name}"
        )
        return found

    def pid(self, unit: str = UNIT) -> int:
        """Return the process id of the daemon inside the machine; 0 if it does not run."""
        return int(self.machine.show(unit, "MainPID")["MainPID"])

    def clear(self) -> None:
        """Stop all instances and remove the files of the test."""
        machine = self.machine
        machine.run("systemctl", "stop", "backupd.service", "backupd@*.service", check=False)
        machine.run("systemctl", "reset-failed", check=False)
        for folder in ("/srv/backups", "/etc/backupd/tls"):
            for left in machine.path(folder).glob("*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        for left in machine.path("/etc/backupd").glob("*.toml"):
            left.unlink()
        for drop_in in machine.path("/etc/systemd/system").glob("backupd*.d/*.conf"):
            if drop_in.name != "10-see-writers.conf":
                drop_in.unlink()
        machine.run("rm", "-rf", "/var/lib/backupd", "/var/lib/private/backupd")
        machine.systemctl("daemon-reload")


@pytest.fixture
def site(machine: Machine, stage: Stage) -> Iterator[Site]:
    """Yield an installation for one test; the receiver runs on the host."""
    site = Site(machine, stage)
    yield site
    site.clear()
