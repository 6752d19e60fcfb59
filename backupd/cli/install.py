"""`backupd install` and `uninstall`: the service, its user and its folders."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import backupd
from backupd.core.errors import BackupdError, UsageError

USER = "backupd"
PLACES = {
    "etc/systemd/system/backupd.service": "backupd.service",
    "etc/systemd/system/backupd.service.d/10-see-writers.conf": "see-writers.conf",
    "etc/systemd/system/backupd@.service": "backupd@.service",
    "etc/systemd/system/backupd@.service.d/10-see-writers.conf": "see-writers.conf",
    "etc/sysusers.d/backupd.conf": "backupd.sysusers.conf",
    "etc/tmpfiles.d/backupd.conf": "backupd.tmpfiles.conf",
}
"""Where files go, below the root, and which of the shipped ones they are."""

_SHIPPED_EXEC = "/opt/backupd/bin/backupd"
_UNITS = "etc/systemd/system"
_SYSUSERS = "etc/sysusers.d/backupd.conf"
_TMPFILES = "etc/tmpfiles.d/backupd.conf"
_FOLDERS = ("/etc/backupd", "/etc/backupd/tls", "/srv/backups")
_LEFT = "left alone: /etc/backupd, /var/lib/backupd, the drop folders, the user backupd, drop-ins of your own"
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 -- by ProtectHome and PrivateTmp
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9/._+-]+")

Root = Annotated[
    Path, typer.Option(help="Write below this folder and run nothing: for packagers, images and tests.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]


@dataclass(frozen=True, slots=True)
class Write:
    """A file to put in its place."""

    path: Path
    content: str

    def __str__(self) -> str:
        return f"write {self.path}"

    def do(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(self.content, encoding="utf-8")
        part.chmod(0o644)
        part.replace(self.path)


@dataclass(frozen=True, slots=True)
class Remove:
    """A file to take away."""

    path: Path

    def __str__(self) -> str:
        return f"remove {self.path}"

    def do(self) -> None:
        """Remove the file, and a folder of drop-ins that it was alone in."""
        self.path.unlink()
        if self.path.parent.suffix == ".d" and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


@dataclass(frozen=True, slots=True)
class Run:
    """A command of systemd to run."""

    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"run {' '.join(self.command)}"

    def do(self) -> None:
        """Run the command; raise BackupdError with what it said if it fails."""
        try:
            done = subprocess.run(self.command, check=False, capture_output=True, text=True)  # noqa: S603
        except OSError as error:
            raise BackupdError(
                f"{self.command[0]}: can't be run ({error.strerror})",
                "this needs a host with systemd; --root writes the files alone",
            ) from error
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise BackupdError(f"{' '.join(self.command)} failed with {done.returncode}: {said}")


InstallStep = Write | Remove | Run


def install(root: Root = Path("/"), dry_run: DryRun = False) -> None:
    """Install the systemd service: units, user and folders. Run again, it changes nothing, or upgrades.

    Needs root. The configuration and your drop-ins are never touched, and nothing is started.
    """
    steps = list(_to_install(root))
    _do(steps, dry_run=dry_run, needs_root=_is_live(root))
    if not steps:
        typer.echo("nothing to do: all of it is installed")
    if not _is_live(root):
        typer.echo("the user and the folders are made when systemd boots from there")
        return
    typer.echo("next: write /etc/backupd/backupd.toml (`backupd init` prints one), try it with")
    typer.echo("  sudo -u backupd backupd check")
    typer.echo("then: systemctl enable --now backupd; after an upgrade: systemctl restart backupd")


def uninstall(root: Root = Path("/"), dry_run: DryRun = False) -> None:
    """Stop the service and remove what `install` wrote; data, configuration and user stay.

    Needs root. Archives that are pending stay in their drop folders, and known to the ledger.
    """
    steps = list(_to_uninstall(root))
    _do(steps, dry_run=dry_run, needs_root=_is_live(root))
    if not steps:
        typer.echo("nothing to do: it is not installed")
    typer.echo(_LEFT)


def _to_install(root: Path) -> Iterator[InstallStep]:
    command = _command(root)
    writes = [Write(root / place, _shipped(name, command)) for place, name in PLACES.items()]
    # a link is an administrator's: one to /dev/null masks a unit
    changed = [w for w in writes if not w.path.is_symlink() and _content(w.path) != w.content]
    yield from changed
    if not _is_live(root):
        return
    paths = {write.path for write in changed}
    if not _is_user(USER) or root / _SYSUSERS in paths:
        yield Run(("systemd-sysusers", str(root / _SYSUSERS)))
    if not all(map(os.path.isdir, _FOLDERS)) or root / _TMPFILES in paths:
        yield Run(("systemd-tmpfiles", "--create", str(root / _TMPFILES)))
    if any(path.is_relative_to(root / _UNITS) for path in paths):
        yield Run(("systemctl", "daemon-reload"))


def _to_uninstall(root: Path) -> Iterator[InstallStep]:
    there = [Remove(root / place) for place in PLACES if (root / place).exists()]
    live_units = _is_live(root) and any(removal.path.is_relative_to(root / _UNITS) for removal in there)
    if live_units and (services := _services(root)):
        yield Run(("systemctl", "disable", "--now", *services))
    yield from there
    if live_units:
        yield Run(("systemctl", "daemon-reload"))


def _do(steps: Sequence[InstallStep], *, dry_run: bool, needs_root: bool) -> None:
    """Say each step and do it; a dry run only says it."""
    if needs_root and not dry_run and os.geteuid() != 0:
        raise UsageError(
            "this changes the system and needs root", "use sudo, or --dry-run to see what it does"
        )
    for step in steps:
        if not dry_run:
            try:
                step.do()
            except OSError as error:
                raise BackupdError(f"{step}: {error.strerror}", "mend that and run it again") from error
        typer.echo(str(step))


def _command(root: Path) -> str:
    """Return the path of the installed `backupd`, as the units are to name it."""
    command = Path(sys.executable).parent / "backupd"
    if not _is_live(root):
        if command.is_relative_to(root):
            return f"/{command.relative_to(root)}"
        return str(command)
    if not _PLAIN_PATH.fullmatch(str(command)):
        raise UsageError(
            f"{command}: units can't name such a path", "install into a folder such as /opt/backupd"
        )
    for place in (command, Path(sys.executable).resolve()):
        if not place.exists():
            raise UsageError(f"{place}: not there", "pip install backupd into this Python's environment")
        if any(place.is_relative_to(hidden) for hidden in _HIDDEN):
            raise UsageError(
                f"{place}: the service can't see that folder (ProtectHome, PrivateTmp)",
                "install with `/usr/bin/python3 -m venv /opt/backupd` and its pip, and run this from there",
            )
    return str(command)


def _services(root: Path) -> list[str]:
    """Return the service and its instances, as far as they are there, loaded or enabled."""
    units = root / _UNITS
    command = ("systemctl", "list-units", "--all", "--plain", "--no-legend", "backupd@*.service")
    try:
        listed = subprocess.run(command, check=False, capture_output=True, text=True).stdout  # noqa: S603
    except OSError:
        listed = ""
    loaded = {line.split()[0] for line in listed.splitlines() if line.strip()}
    enabled = {link.name for link in units.glob("*.wants/backupd@*.service")}
    only = ["backupd.service"] if (units / "backupd.service").exists() else []
    return [*only, *sorted(loaded | enabled)]


def _shipped(name: str, command: str) -> str:
    """Return a file of `systemd/`: within the package once that is installed, beside it in a checkout."""
    package = Path(backupd.__file__).parent
    for folder in (package / "systemd", package.parent / "systemd"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8").replace(_SHIPPED_EXEC, command)
    raise BackupdError(f"{name}: not among the files of this installation", "install the package again")


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        return ""


def _is_live(root: Path) -> bool:
    return root.resolve() == Path("/")


def _is_user(name: str) -> bool:

    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
