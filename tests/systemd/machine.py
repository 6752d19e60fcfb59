"""A machine that runs a real systemd: a container that uses the /usr and the network of the host."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

from tests.programs import do_without, require
from tests.stage import TIMEOUT, until

_BOOT = Path(__file__).parent / "boot.sh"
_COPIED_FROM_ETC = (
    *("passwd", "group", "shadow", "gshadow", "nsswitch.conf", "ld.so.conf", "ld.so.conf.d", "ld.so.cache"),
    *("alternatives", "ssl", "localtime", "pam.d", "login.defs", "shells", "protocols", "services", "hosts"),
    *("host.conf", "profile", "mime.types", "debian_version", "python3", "python3.11", "python3.13"),
)
"""Files of /etc that the programs in /usr need."""
_MASKED_UNITS = (
    *("getty.target", "console-getty.service", "systemd-logind.service", "systemd-user-sessions.service"),
    *("systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "systemd-firstboot.service"),
    *("systemd-networkd.service", "systemd-resolved.service", "systemd-timesyncd.service"),
    *("systemd-ask-password-wall.path", "systemd-ask-password-console.path", "dev-hugepages.mount"),
    *("sys-fs-fuse-connections.mount", "systemd-tmpfiles-clean.timer", "kmod-static-nodes.service"),
)
"""Units that need hardware or sessions, which the machine does not have."""
_UNSHARE = (
    *("setpriv", "--pdeathsig", "KILL"),  # the machine ends with the tests
    *(
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child=KILL",
        "--mount-proc",
    ),
)
_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
_JOURNALD = """[Journal]
Storage=persistent
RateLimitIntervalSec=0
ForwardToWall=no
Audit=no
"""
_ENVIRON = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "SYSTEMD_PAGER": "",
    "SYSTEMD_COLORS": "0",
}


def require_machine() -> None:
    """Skip the test with a reason if this host cannot run a machine; fail it if $CI is set."""
    if os.geteuid() != 0:
        do_without("a container with systemd needs root")
    for program in ("systemd-nspawn", "dbus-daemon", "unshare", "nsenter", "setpriv", "mountpoint"):
        require(program)
    if not Path("/usr/lib/systemd/systemd").exists():
        do_without("systemd is not installed")
    if not any(Path("/usr/lib").glob("*/libnss_systemd.so.2")) and not any(
        Path("/usr").glob("lib*/libnss_systemd.so.2")
    ):
        do_without("libnss-systemd is not installed")


class Machine:
    """A machine on a tree of files that survives crashes; `tree` is the path of its `/` on the host."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self._name = f"backupd-test-{uuid.uuid4().hex[:8]}"
        self._console = tree.with_suffix(".console")
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0
        _create_tree(tree)

    def boot(self) -> float:
        """Boot and return the seconds until all services were up."""
        began = time.monotonic()
        with self._console.open("ab") as console:
            self._process = subprocess.Popen(
                [*_UNSHARE, "bash", str(_BOOT), str(self.tree), self._name],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._leader = until(self._find_leader, "systemd in the container")
        until(self._is_up, "the container to come up")
        return time.monotonic() - began

    def crash(self) -> None:
        """Kill the machine, as a power cut would."""
        assert self._process is not None
        nspawn = _parent(self._leader)
        os.kill(nspawn, signal.SIGKILL)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def end(self) -> None:
        """Kill the machine if it runs."""
        if self._process is None:
            return
        if self._process.poll() is None and self._leader:
            self.crash()
        else:
            self._process.kill()
            self._process.wait()

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine as root."""
        environ = (f"{key}={value}" for key, value in _ENVIRON.items())
        done = subprocess.run(
            ["nsenter", f"--target={self._leader}", *_NAMESPACES, "--", "env", "-i", *environ, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        if check:
            output = f"{done.stdout}\n{done.stderr}"
            assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}: {output}"
        return done

    def systemctl(self, *arguments: str) -> str:
        """Run systemctl and return its output; raise AssertionError with the journal if it fails."""
        done = self.run("systemctl", *arguments, check=False)
        if done.returncode != 0:
            journal = self.run("journalctl", "--no-pager", "-n", "60", "-o", "cat", check=False).stdout
            raise AssertionError(f"systemctl {' '.join(arguments)}: {done.stdout}{done.stderr}\n{journal}")
        return done.stdout

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit."""
        shown = self.systemctl("show", unit, *(f"--property={name}" for name in properties))
        return dict(line.split("=", 1) for line in shown.splitlines())

    def write(self, path: str, text: str | bytes, mode: int = 0o644) -> Path:
        """Write a file in the machine and return its path on the host."""
        file = self.path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        file.chmod(mode)
        return file

    def path(self, path: str) -> Path:
        """Return the path on the host of a path in the machine."""
        return self.tree / path.lstrip("/")

    def journal(self, *arguments: str, since: float = 0.0) -> list[dict[str, Any]]:
        """Return entries of the journal since a time in seconds since the epoch.

        This does not use a cursor: with a cursor and a match, journalctl omits the first matching entry.
        """
        self.run("journalctl", "--sync", check=False)
        done = self.run("journalctl", "--quiet", f"--since=@{int(since)}", "--all", "-o", "json", *arguments)
        entries = [json.loads(line) for line in done.stdout.splitlines()]
        return [entry for entry in entries if int(entry["__REALTIME_TIMESTAMP"]) >= since * 1e6]

    def _find_leader(self) -> int:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"the container died: {self._console.read_text(errors='replace')[-4000:]}")
        pid = self._process.pid  # unshare, with these descendants: shell, nspawn, systemd
        for _ in range(3):
            children = _children(pid)
            if not children:
                return 0
            pid = children[-1]
        return pid if _name_of(pid) == "systemd" else 0

    def _is_up(self) -> bool:
        self._leader = self._find_leader() or self._leader
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in {"running", "degraded"}


def _create_tree(tree: Path) -> None:
    """Create the tree to boot from: folders, files from the /etc of the host, and settings."""
    for folder in ("usr", "var/lib", "var/log/journal", "var/cache", "var/spool", "var/tmp", "run", "tmp"):
        (tree / folder).mkdir(parents=True)
    for folder in ("proc", "sys", "dev", "root", "home", "opt", "srv", "mnt", "etc/systemd/system"):
        (tree / folder).mkdir(parents=True)
    tree.chmod(0o755)
    for folder in ("tmp", "var/tmp"):
        (tree / folder).chmod(0o1777)
    for link in ("bin", "sbin", "lib", "lib64"):
        (tree / link).symlink_to(f"usr/{link}")
    (tree / "var/run").symlink_to("/run")
    copied = [f"/etc/./{name}" for name in _COPIED_FROM_ETC if Path("/etc", name).exists()]
    subprocess.run(["cp", "--archive", *copied, str(tree / "etc")], check=True, timeout=TIMEOUT)
    shutil.copyfile("/etc/os-release", tree / "etc/os-release")
    for name, text in {
        "etc/machine-id": f"{uuid.uuid4().hex}\n",
        "etc/fstab": "",
        "etc/systemd/journald.conf": _JOURNALD,
        "etc/nsswitch.conf": "passwd: files systemd\ngroup: files systemd\nshadow: files\nhosts: files\n",
    }.items():
        (tree / name).write_text(text)
    for unit in _MASKED_UNITS:
        (tree / "etc/systemd/system" / unit).symlink_to("/dev/null")
    (tree / "etc/systemd/system/default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()
