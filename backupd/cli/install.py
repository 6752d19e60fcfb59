"""`backupd install` and `backupd uninstall`: the systemd service, its user and its folders."""

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
INSTALLED_FILES = {
    "etc/systemd/system/backupd.service": "backupd.service",
    "etc/systemd/system/backupd.service.d/10-see-writers.conf": "see-writers.conf",
    "etc/systemd/system/backupd@.service": "backupd@.service",
    "etc/systemd/system/backupd@.service.d/10-see-writers.conf": "see-writers.conf",
    "etc/sysusers.d/backupd.conf": "backupd.sysusers.conf",
    "etc/tmpfiles.d/backupd.conf": "backupd.tmpfiles.conf",
}
"""The files to write, relative to the root, and the shipped file that each is made from."""

_SHIPPED_COMMAND = "/opt/backupd/bin/backupd"
_UNITS = "etc/systemd/system"
_SYSUSERS = "etc/sysusers.d/backupd.conf"
_TMPFILES = "etc/tmpfiles.d/backupd.conf"
_FOLDERS = ("/etc/backupd", "/etc/backupd/tls", "/srv/backups")
_KEPT = "kept: /etc/backupd, /var/lib/backupd, the drop folders, the user backupd, your own drop-ins"
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 -- from the service
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9/._+-]+")

Root = Annotated[
    Path, typer.Option(help="Use this folder in place of / and run no command, for packages and images.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the steps without doing them.")]


@dataclass(frozen=True, slots=True)
class WriteFile:
    """Write a file, in place of an older version."""

    path: Path
    content: str

    def __str__(self) -> str:
        return f"write {self.path}"

    def apply(self) -> None:
        """Write the file under a temporary name and rename it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(self.content, encoding="utf-8")
        part.chmod(0o644)
        part.replace(self.path)


@dataclass(frozen=True, slots=True)
class RemoveFile:
    """Remove a file."""

    path: Path

    def __str__(self) -> str:
        return f"remove {self.path}"

    def apply(self) -> None:
        """Remove the file, and its folder if that is an empty folder of drop-ins."""
        self.path.unlink()
        if self.path.parent.suffix == ".d" and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


@dataclass(frozen=True, slots=True)
class RunCommand:
    """Run a command of systemd."""

    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"run {' '.join(self.command)}"

    def apply(self) -> None:
        """Run the command; raise BackupdError with its output if it fails."""
        try:
            result = subprocess.run(self.command, check=False, capture_output=True, text=True)  # noqa: S603
        except OSError as error:
            raise BackupdError(
                f"{self.command[0]}: can't be run ({error.strerror})",
                "this needs a host with systemd; --root writes the files only",
            ) from error
        if result.returncode != 0:
            output = (result.stderr or result.stdout).strip()
            raise BackupdError(
                f"{' '.join(self.command)} failed with exit code {result.returncode}: {output}"
            )


InstallStep = WriteFile | RemoveFile | RunCommand


def install(root: Root = Path("/"), dry_run: DryRun = False) -> None:
    """Install or upgrade the systemd service: its units, its user and its folders.

    Needs root. Only missing and outdated files are written. The configuration and your own drop-ins are not
    changed, and no service is started.
    """
    steps = list(_install_steps(root))
    _apply(steps, dry_run=dry_run, needs_root=_is_live(root))
    if not steps:
        typer.echo("nothing to do: the installed files are up to date")
    if not _is_live(root):
        typer.echo("systemd creates the user and the folders when it boots from there")
        return
    typer.echo("next: write /etc/backupd/backupd.toml (`backupd init` prints one) and check it with")
    typer.echo("  sudo -u backupd backupd check")
    typer.echo("then: systemctl enable --now backupd; after an upgrade: systemctl restart backupd")


def uninstall(root: Root = Path("/"), dry_run: DryRun = False) -> None:
    """Stop the service and remove the files that `backupd install` wrote; data and configuration are kept.

    Needs root. Pending archives stay in their drop folders and in the ledger.
    """
    steps = list(_uninstall_steps(root))
    _apply(steps, dry_run=dry_run, needs_root=_is_live(root))
    if not steps:
        typer.echo("nothing to do: the service is not installed")
    typer.echo(_KEPT)


def _install_steps(root: Path) -> Iterator[InstallStep]:
    command = _command(root)
    writes = [WriteFile(root / path, _shipped(name, command)) for path, name in INSTALLED_FILES.items()]
    # an administrator made a symbolic link: one to /dev/null masks a unit
    changed = [w for w in writes if not w.path.is_symlink() and _content(w.path) != w.content]
    yield from changed
    if not _is_live(root):
        return
    paths = {write.path for write in changed}
    if not _is_user(USER) or root / _SYSUSERS in paths:
        yield RunCommand(("systemd-sysusers", str(root / _SYSUSERS)))
    if not all(map(os.path.isdir, _FOLDERS)) or root / _TMPFILES in paths:
        yield RunCommand(("systemd-tmpfiles", "--create", str(root / _TMPFILES)))
    if any(path.is_relative_to(root / _UNITS) for path in paths):
        yield RunCommand(("systemctl", "daemon-reload"))


def _uninstall_steps(root: Path) -> Iterator[InstallStep]:
    removals = [RemoveFile(root / path) for path in INSTALLED_FILES if (root / path).exists()]
    live_units = _is_live(root) and any(removal.path.is_relative_to(root / _UNITS) for removal in removals)
    if live_units and (services := _services(root)):
        yield RunCommand(("systemctl", "disable", "--now", *services))
    yield from removals
    if live_units:
        yield RunCommand(("systemctl", "daemon-reload"))


def _apply(steps: Sequence[InstallStep], *, dry_run: bool, needs_root: bool) -> None:
    """Apply the steps and print each one; a dry run only prints them."""
    if needs_root and not dry_run and os.geteuid() != 0:
        raise UsageError(
            "this changes the system and needs root", "use sudo, or --dry-run to print the steps"
        )
    for step in steps:
        if not dry_run:
            try:
                step.apply()
            except OSError as error:
                raise BackupdError(
                    f"{step}: {error.strerror}", "fix that and run the command again"
                ) from error
        typer.echo(str(step))


def _command(root: Path) -> str:
    """Return the path of the installed `backupd` for the ExecStart= of the units."""
    command = Path(sys.executable).parent / "backupd"
    if not _is_live(root):
        if command.is_relative_to(root):
            return f"/{command.relative_to(root)}"
        return str(command)
    if not _PLAIN_PATH.fullmatch(str(command)):
        raise UsageError(
            f"{command}: a unit can't have such a path", "install into a folder such as /opt/backupd"
        )
    for path in (command, Path(sys.executable).resolve()):
        if not path.exists():
            raise UsageError(f"{path}: no such file", "pip install backupd into this Python's environment")
        if any(path.is_relative_to(hidden) for hidden in _HIDDEN):
            raise UsageError(
                f"{path}: the service can't see that folder (ProtectHome, PrivateTmp)",
                "install with `/usr/bin/python3 -m venv /opt/backupd` and its pip, and run this from there",
            )
    return str(command)


def _services(root: Path) -> list[str]:
    """Return the service if it is installed, and its instances that are loaded or enabled."""
    units = root / _UNITS
    command = ("systemctl", "list-units", "--all", "--plain", "--no-legend", "backupd@*.service")
    try:
        listed = subprocess.run(command, check=False, capture_output=True, text=True).stdout  # noqa: S603
    except OSError:
        listed = ""
    loaded = {line.split()[0] for line in listed.splitlines() if line.strip()}
    enabled = {link.name for link in units.glob("*.wants/backupd@*.service")}
    installed = ["backupd.service"] if (units / "backupd.service").exists() else []
    return [*installed, *sorted(loaded | enabled)]


def _shipped(name: str, command: str) -> str:
    """Return the content of a file of `systemd/`: inside the installed package, beside it in a checkout."""
    package = Path(backupd.__file__).parent
    for folder in (package / "systemd", package.parent / "systemd"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8").replace(_SHIPPED_COMMAND, command)
    raise BackupdError(f"{name}: missing from this installation", "install the package again")


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
