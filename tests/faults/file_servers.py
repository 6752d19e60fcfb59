"""File servers of all kinds on the loopback interface, which export one folder, and mounts of folders."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.programs import find

START_TIMEOUT = 30.0
"""Seconds in which a server accepts connections, and a mount is there."""

_FTP_USER, _FTP_PASSWORD = "backup", "loopback"


class MissingError(Exception):
    """A program is not installed, or does not work on this host."""


def program(name: str) -> str:
    """Return the path of a program; raise MissingError where it is not installed."""
    path = find(name)
    if path is None:
        raise MissingError(f"{name} is not installed")
    return path


def end_process(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> None:
    """End a process with its group, which it has alone, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(slots=True)
class FileServers:
    """Servers that export `site`, each on a port of its own; `missing` has those that can't run."""

    base: Path
    site: Path
    ports: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.base.mkdir(mode=0o755)
        try:
            starts = (
                self._sshd,
                self._vsftpd,
                self._proftpd,
                self._smbd,
                self._tftpd,
                self._rsyncd,
                self._http,
            )
            for start in starts:
                name = start.__name__.lstrip("_")
                try:
                    start(self.a_port(name))
                except MissingError as error:
                    self.missing[name] = str(error)
                    del self.ports[name]
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            end_process(process)
        self._processes.clear()

    def a_port(self, name: str) -> int:
        """Return a port without a listener, the one of the server with this name."""
        kind = socket.SOCK_DGRAM if name == "tftpd" else socket.SOCK_STREAM
        with socket.socket(type=kind) as listener:
            listener.bind(("127.0.0.1", 0))
            self.ports[name] = int(listener.getsockname()[1])
        return self.ports[name]

    @property
    def ssh_options(self) -> list[str]:
        """The options of ssh, scp and sftp, without the port."""
        known = (
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "BatchMode=yes",
        )
        return ["-F", "/dev/null", "-i", str(self.base / "user"), *(f"-o{option}" for option in known)]

    def ftp_url(self, server: str) -> str:
        """Return the URL of an FTP server with the user and the password."""
        user = f"{_FTP_USER}:{_FTP_PASSWORD}" if server == "proftpd" else "anonymous:backup"
        return f"ftp://{user}@127.0.0.1:{self.ports[server]}"

    def _start(self, name: str, command: Sequence[str | Path], *, listens: bool = True) -> None:
        """Start a server, and wait until it accepts connections."""
        log = (self.base / f"{name}.log").open("ab")
        with log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append(process)
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and process.poll() is None:
            if not listens:
                time.sleep(0.5)
                if process.poll() is None:
                    return
                break
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.ports[name]), timeout=1).close()
                return
            time.sleep(0.05)
        last = (self.base / f"{name}.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise MissingError(f"{name} did not start: {' '.join(last)}")

    def _config(self, name: str, text: str) -> Path:
        path = self.base / f"{name}.conf"
        path.write_text(text, encoding="utf-8")
        return path

    def _sshd(self, port: int) -> None:
        server = program("sshd")
        for name in ("host", "user"):
            key = str(self.base / name)
            subprocess.run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        options = [
            "ListenAddress=127.0.0.1",
            f"AuthorizedKeysFile={self.base / 'user.pub'}",
            "StrictModes=no",
            "UsePAM=no",
            "PermitRootLogin=yes",
            "PidFile=none",
            "MaxStartups=200",
            "UseDNS=no",
            "Subsystem=sftp internal-sftp",
        ]
        host = str(self.base / "host")
        command = [server, "-D", "-e", "-f", "/dev/null", "-p", str(port), "-h", host]
        self._start("sshd", [*command, *(f"-o{option}" for option in options)])

    def _vsftpd(self, port: int) -> None:
        empty = self.base / "empty"
        empty.mkdir()
        config = self._config(
            "vsftpd",
            f"listen=YES\nlisten_ipv6=NO\nlisten_address=127.0.0.1\nlisten_port={port}\nbackground=NO\n"
            f"anonymous_enable=YES\nno_anon_password=YES\nlocal_enable=NO\nanon_root={self.site}\n"
            "write_enable=YES\nanon_upload_enable=YES\nanon_mkdir_write_enable=YES\n"
            f"anon_other_write_enable=YES\nanon_umask=022\nsecure_chroot_dir={empty}\nseccomp_sandbox=NO\n"
            f"xferlog_enable=NO\nvsftpd_log_file={self.base / 'vsftpd.transfers'}\npasv_address=127.0.0.1\n",
        )
        self._start("vsftpd", [program("vsftpd"), config])

    def _proftpd(self, port: int) -> None:
        server = program("proftpd")
        hashed = subprocess.run(
            [program("openssl"), "passwd", "-6", _FTP_PASSWORD], check=True, capture_output=True, text=True
        ).stdout.strip()
        users = self.base / "proftpd.users"
        users.write_text(f"{_FTP_USER}:{hashed}:65534:65534::{self.site}:/bin/sh\n")
        users.chmod(0o600)
        config = self._config(
            "proftpd",
            f"ServerType standalone\nDefaultAddress 127.0.0.1\nSocketBindTight on\nPort {port}\nUseIPv6 off\n"
            f"User root\nGroup root\nPidFile {self.base / 'proftpd.pid'}\nDelayTable none\nWtmpLog off\n"
            f"ScoreboardFile {self.base / 'proftpd.board'}\nSystemLog {self.base / 'proftpd.system'}\n"
            f"TransferLog none\nAuthOrder mod_auth_file.c\nAuthUserFile {users}\nRequireValidShell off\n"
            f"DefaultRoot {self.site}\nAllowOverwrite on\nHiddenStores on\nUmask 022\nMaxInstances 50\n",
        )
        self._start("proftpd", [server, "--nodaemon", "--config", config])

    def _smbd(self, port: int) -> None:
        server = program("smbd")
        for name in ("private", "lock", "state", "cache", "pid", "ncalrpc"):
            (self.base / "samba" / name).mkdir(parents=True)
        folder = self.base / "samba"
        config = self._config(
            "smbd",
            f"[global]\nserver role = standalone server\nmap to guest = Bad User\ninterfaces = 127.0.0.1/8\n"
            f"bind interfaces only = yes\nsmb ports = {port}\ndisable netbios = yes\nload printers = no\n"
            f"printing = bsd\ndisable spoolss = yes\nprivate dir = {folder / 'private'}\n"
            f"lock directory = {folder / 'lock'}\nstate directory = {folder / 'state'}\n"
            f"cache directory = {folder / 'cache'}\npid directory = {folder / 'pid'}\n"
            f"ncalrpc dir = {folder / 'ncalrpc'}\nlog file = {folder / 'log'}\n"
            f"[site]\npath = {self.site}\nguest ok = yes\nread only = no\nforce user = root\n",
        )
        self._start("smbd", [server, "-F", "--no-process-group", "-s", config])

    def _tftpd(self, port: int) -> None:
        command: list[str | Path] = [
            program("in.tftpd"),
            "-L",
            "-4",
            "-a",
            f"127.0.0.1:{port}",
            "-c",
            "-u",
            "root",
            "-s",
        ]
        self._start("tftpd", [*command, self.site], listens=False)

    def _rsyncd(self, port: int) -> None:
        config = self._config(
            "rsyncd",
            f"use chroot = no\nuid = root\ngid = root\nlog file = {self.base / 'rsyncd.transfers'}\n"
            f"[site]\npath = {self.site}\nread only = no\n",
        )
        command = [program("rsync"), "--daemon", "--no-detach", "--address=127.0.0.1", f"--port={port}"]
        self._start("rsyncd", [*command, f"--config={config}"])

    def _http(self, port: int) -> None:
        """Serve the contents for downloads."""
        contents = self.base.parent / "contents"
        contents.mkdir(exist_ok=True)
        command: list[str | Path] = [
            program("rclone"),
            "serve",
            "http",
            contents,
            "--addr",
            f"127.0.0.1:{port}",
        ]
        self._start("http", [*command, "--config", "/dev/null", "--dir-cache-time", "0s"])


class Mount:
    """A folder that a FUSE server in the foreground, or the kernel, shows at another place."""

    def __init__(self, at: Path, command: Sequence[str | Path]) -> None:
        self.at = at
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        at.mkdir(parents=True, exist_ok=True)
        self.mount()

    def mount(self) -> None:
        """Mount it; raise MissingError where that is impossible."""
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._process = process
        deadline = time.monotonic() + START_TIMEOUT
        while not os.path.ismount(self.at):
            if time.monotonic() > deadline or process.poll() not in (None, 0):
                end_process(process, signal.SIGKILL)
                error = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
                self.unmount()
                raise MissingError(f"{shlex.join(map(str, self._command[:3]))}: {error}")
            time.sleep(0.05)
        if process.stderr is not None and process.poll() == 0:
            process.stderr.close()

    def die(self) -> None:
        """Kill the server: every call on the mount fails with ENOTCONN."""
        if self._process is not None:
            end_process(self._process, signal.SIGKILL)

    def unmount(self) -> None:
        """Unmount it, and end its server."""
        subprocess.run(["umount", "--lazy", self.at], check=False, capture_output=True)
        if self._process is not None:
            if self._process.poll() is None:
                end_process(self._process)
            if self._process.stderr is not None:
                self._process.stderr.close()
            self._process = None

    def remount(self) -> None:
        """Mount it again, as an operator does after the server has died."""
        self.unmount()
        self.mount()


def sshfs(servers: FileServers, source: Path, at: Path) -> Mount:
    """Mount a folder of this host by sshfs, with its default options."""
    if "sshd" not in servers.ports:
        raise MissingError("sshd is missing")
    command: list[str | Path] = [
        program("sshfs"),
        f"root@127.0.0.1:{source}",
        at,
        "-f",
        "-p",
        str(servers.ports["sshd"]),
    ]
    key = f"IdentityFile={servers.base / 'user'}"
    return Mount(
        at,
        [*command, "-F", "/dev/null", "-o", f"{key},StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null"],
    )


def rclone(source: Path, at: Path, *options: str) -> Mount:
    """Mount a folder of this host by rclone."""
    return Mount(at, [program("rclone"), "mount", source, at, "--config", "/dev/null", *options])


def bindfs(source: Path, at: Path) -> Mount:
    """Show a folder at another place by bindfs."""
    return Mount(at, [program("bindfs"), "-f", source, at])


def overlay(upper: Path, work: Path, at: Path) -> Mount:
    """Show a folder as the upper one of an overlay filesystem, as in a container."""
    lower = work.with_name(f"{work.name}-lower")
    for folder in (lower, work):
        folder.mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    return Mount(at, [program("mount"), "-t", "overlay", "overlay", "-o", options, at])


def tmpfs(at: Path) -> Mount:
    """Mount an empty tmpfs."""
    return Mount(at, [program("mount"), "-t", "tmpfs", "-o", "size=2g,mode=755", "tmpfs", at])


def loop(kind: str, at: Path, image: Path, size: int) -> Mount:
    """Mount a new filesystem of a kind, `xfs` or `btrfs`, of so many bytes in a file."""
    with image.open("wb") as file:
        file.truncate(size)
    made = subprocess.run([program(f"mkfs.{kind}"), "-q", image], check=False, capture_output=True, text=True)
    if made.returncode != 0:
        raise MissingError(f"mkfs.{kind}: {made.stderr.strip()}")
    return Mount(at, [program("mount"), "-t", kind, "-o", "loop", image, at])


def try_mount(missing: dict[str, str], name: str, mount: Callable[[], Mount]) -> Mount | None:
    """Return a mount, or None and an entry in `missing` where it is impossible."""
    try:
        return mount()
    except MissingError as error:
        missing[name] = str(error)
        return None
