"""Writers of files in drop folders: clients of file servers, copies through mounts, slow programs."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from tests.faults.accounts import Upload
from tests.faults.file_servers import FileServers, MissingError, program

SLOW_RATE = 100_000
"""Bytes per second of a transfer that is going to be broken off, where the program can be slowed down."""

_TRANSFER_TIMEOUT = 120.0
"""Seconds after which a transfer is given up; it counts as failed, and is repeated."""

_PIECE = 16_384


@dataclass(frozen=True, slots=True)
class Place:
    """The folder `site` with one folder for each drop, and other paths of the same folders."""

    site: Path
    views: dict[str, Path] = field(default_factory=dict)
    """Other paths of `site`, by the program that shows it there."""
    mounts: dict[str, Path] = field(default_factory=dict)
    """The drop folder itself, by drop, where it is a mount of the one in `site`."""

    def folder(self, drop: str) -> Path:
        """Return the drop folder as the file servers see it."""
        return self.site / drop / "drop"

    def aside(self, drop: str) -> Path:
        """Return a folder beside the drop folder, on the same filesystem."""
        return self.site / drop / "aside"


@dataclass(frozen=True, slots=True)
class Transfer:
    """One run of a writer; it is broken off if `is_broken_off`."""

    upload: Upload
    place: Place
    chance: random.Random
    is_broken_off: bool

    @property
    def target(self) -> str:
        """The path below `site`."""
        return f"{self.upload.drop}/drop/{self.upload.names[0]}"

    @property
    def path(self) -> Path:
        return self.place.site / self.target


class Writer(ABC):
    """A way to write a file. `hides` is whether an unfinished file never has the final name.

    `drops` are the only drops that it writes to, None for all.
    """

    hides = False
    drops: Sequence[str] | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def write(self, transfer: Transfer) -> bool:
        """Write a file; return whether the writer reports that it is complete."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line, its standard input, and the text that its output must have."""

    words: Sequence[str | Path]
    script: str = ""
    proof: str = ""


class Client(Writer):
    """A program that transfers a file; to break it off, it is killed in the middle."""

    def __init__(self, name: str, command: Callable[[Transfer], Command], *, hides: bool = False) -> None:
        super().__init__(name)
        self._command = command
        self.hides = hides
        self.last_error = ""

    def write(self, transfer: Transfer) -> bool:
        command = self._command(transfer)
        process = subprocess.Popen(
            command.words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with process:
            try:
                if transfer.is_broken_off:
                    if process.stdin is not None and command.script:
                        process.stdin.write(command.script.encode())
                        process.stdin.flush()
                    self._break_off(process, transfer)
                    output, _ = process.communicate(timeout=_TRANSFER_TIMEOUT)
                else:
                    output, _ = process.communicate(command.script.encode(), timeout=_TRANSFER_TIMEOUT)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                _kill(process)
                return False
        is_complete = process.returncode == 0 and command.proof.encode() in output
        if not is_complete and not transfer.is_broken_off:
            self.last_error = output.decode(errors="replace").strip()[-200:]
        return is_complete

    def _break_off(self, process: subprocess.Popen[bytes], transfer: Transfer) -> None:
        """Kill the client some time after its file has appeared under any name, if it is still there."""
        folder, deadline = transfer.path.parent, time.monotonic() + 10
        stem = transfer.path.name
        while process.poll() is None and time.monotonic() < deadline:
            if any(stem in name for name in os.listdir(folder)):
                break
            time.sleep(0.005)
        time.sleep(transfer.chance.choice((0.0, 0.02, 0.3, 1.5)))
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a client with its group, which it has alone."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


class Copy(Writer):
    """A writer that opens the file by a path of this host and writes it in pieces.

    `where` returns the path. With `pause`, the pieces are written that many seconds apart. With `reopens`,
    the file is closed between two pieces.
    """

    def __init__(
        self,
        name: str,
        where: Callable[[Transfer], Path],
        *,
        pause: float = 0.0,
        reopens: bool = False,
        drops: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name)
        self._where = where
        self._pause = pause
        self._reopens = reopens
        self.drops = drops

    def write(self, transfer: Transfer) -> bool:
        content = transfer.upload.source.read_bytes()
        end = transfer.chance.randrange(len(content)) if transfer.is_broken_off else len(content)
        size = max(_PIECE, len(content) // 10) if self._pause else max(_PIECE, len(content))
        if self._pause and len(content) < 10 * _PIECE:
            size = max(1, len(content) // 5)
        path = self._where(transfer)
        stream = path.open("wb")
        try:
            for start in range(0, end, size):
                if start and self._reopens:
                    stream.close()
                if start:
                    time.sleep(self._pause * transfer.chance.random())
                if start and self._reopens:
                    stream = path.open("ab")
                stream.write(content[start : min(start + size, end)])
                stream.flush()
        finally:
            stream.close()
        return end == len(content)


class Rename(Writer):
    """A writer that writes the file beside the drop folder and renames it into it."""

    hides = True

    def write(self, transfer: Transfer) -> bool:
        part = transfer.place.aside(transfer.upload.drop) / f"part-{transfer.upload.source.name}"
        part.write_bytes(transfer.upload.source.read_bytes())
        if transfer.is_broken_off:
            return False
        part.rename(transfer.path)
        return True


DIRECT = Copy("cp", lambda transfer: transfer.path)
"""The writer that works whatever has failed."""


def all_writers(servers: FileServers, place: Place, missing: dict[str, str]) -> list[Writer]:
    """Return the writers that can run here; `missing` gets those that can't, with the reason."""
    writers: list[Writer] = []
    for name, server, hides, make in _CLIENTS:
        try:
            if server not in servers.ports:
                raise MissingError(f"{server} is missing")
            writers.append(Client(name, make(servers), hides=hides))
        except MissingError as error:
            missing[name] = str(error)
    writers += [
        DIRECT,
        Rename("mv"),
        Copy("slow writer", lambda t: t.path, pause=0.8),
        Copy("writer that reopens", lambda t: t.path, pause=0.5, reopens=True),
    ]
    writers += [
        Copy(f"{view} view", _below(root), drops=("local",) if view == "overlay" else None)
        for view, root in place.views.items()
    ]
    if place.mounts:
        writers.append(
            Copy(
                "its own mount",
                lambda t: place.mounts[t.upload.drop] / t.upload.names[0],
                drops=[*place.mounts],
            )
        )
    return writers


def _below(root: Path) -> Callable[[Transfer], Path]:
    def where(transfer: Transfer) -> Path:
        is_drop_alone = not (root / transfer.upload.drop).is_dir()
        return root / (transfer.upload.names[0] if is_drop_alone else transfer.target)

    return where


Make = Callable[[FileServers], Callable[[Transfer], Command]]


def _sftp(servers: FileServers) -> Callable[[Transfer], Command]:
    client = program("sftp")

    def command(t: Transfer) -> Command:
        script = f'put "{t.upload.source}" "{t.path}"\n'
        return Command([client, *_sftp_options(servers, t), "-b", "-", "root@127.0.0.1"], script)

    return command


def _sftp_rename(servers: FileServers) -> Callable[[Transfer], Command]:
    client = program("sftp")

    def command(t: Transfer) -> Command:
        part = f"{t.path}.part"
        script = f'put "{t.upload.source}" "{part}"\nrename "{part}" "{t.path}"\n'
        return Command([client, *_sftp_options(servers, t), "-b", "-", "root@127.0.0.1"], script)

    return command


def _sftp_options(servers: FileServers, t: Transfer) -> list[str]:
    limit = ["-l", str(SLOW_RATE * 8 // 1000)] if t.is_broken_off else []
    return [*servers.ssh_options, "-q", "-P", str(servers.ports["sshd"]), *limit]


def _scp(*options: str) -> Make:
    def make(servers: FileServers) -> Callable[[Transfer], Command]:
        client = program("scp")

        def command(t: Transfer) -> Command:
            target = shlex.quote(str(t.path)) if options else str(t.path)
            return Command(
                [client, *options, *_sftp_options(servers, t), t.upload.source, f"root@127.0.0.1:{target}"]
            )

        return command

    return make


def _curl(server: str) -> Make:
    def make(servers: FileServers) -> Callable[[Transfer], Command]:
        client = program("curl")

        def command(t: Transfer) -> Command:
            url = f"{servers.ftp_url(server)}/{quote(t.target)}"
            limit = ["--limit-rate", str(SLOW_RATE)] if t.is_broken_off else []
            return Command([client, "-q", "-sS", "--noproxy", "*", *limit, "-T", t.upload.source, url])

        return command

    return make


def _lftp(server: str, *, temporary: bool) -> Make:
    def make(servers: FileServers) -> Callable[[Transfer], Command]:
        client = program("lftp")

        def command(t: Transfer) -> Command:
            script = "set net:max-retries 1; set ftp:use-feat no; set ftp:ssl-allow no; "
            script += "set xfer:use-temp-file yes; set xfer:temp-file-name .in.*; " if temporary else ""
            script += f"set net:limit-rate {SLOW_RATE}:{SLOW_RATE}; " if t.is_broken_off else ""
            script += f'open {servers.ftp_url(server)}; put "{t.upload.source}" -o "/{t.target}"'
            return Command([client, "--norc", "-c", script])

        return command

    return make


def _smbclient(servers: FileServers) -> Callable[[Transfer], Command]:
    client = program("smbclient")

    def command(t: Transfer) -> Command:
        target = t.target.replace("/", "\\")
        config = servers.base / "smbd.conf"
        port = str(servers.ports["smbd"])
        script = f'put "{t.upload.source}" "{target}"'
        return Command([client, "//127.0.0.1/site", "-s", config, "-p", port, "-N", "-c", script])

    return command


def _tftp(servers: FileServers) -> Callable[[Transfer], Command]:
    client = program("tftp")

    def command(t: Transfer) -> Command:
        words = [client, "-4", "-v", "127.0.0.1", str(servers.ports["tftpd"]), "-m", "binary", "-c", "put"]
        return Command([*words, t.upload.source, t.target], proof=f"Sent {t.upload.size} bytes")

    return command


def _rsync(over: str, *options: str) -> Make:
    def make(servers: FileServers) -> Callable[[Transfer], Command]:
        client = program("rsync")

        def command(t: Transfer) -> Command:
            limit = [f"--bwlimit={SLOW_RATE // 1000}"] if t.is_broken_off else []
            if over == "rsyncd":
                url = f"rsync://127.0.0.1:{servers.ports['rsyncd']}/site/{t.target}"
                return Command([client, *options, *limit, t.upload.source, url])
            shell = shlex.join(["ssh", *servers.ssh_options, "-p", str(servers.ports["sshd"])])
            target = f"root@127.0.0.1:{t.path}"
            return Command([client, "-s", "-e", shell, *options, *limit, t.upload.source, target])

        return command

    return make


def _rclone(servers: FileServers) -> Callable[[Transfer], Command]:
    client = program("rclone")

    def command(t: Transfer) -> Command:
        key, port = servers.base / "user", servers.ports["sshd"]
        target = f":sftp,host=127.0.0.1,user=root,port={port},key_file='{key}',shell_type=none:{t.path}"
        limit = ["--bwlimit", f"{SLOW_RATE // 1000}k"] if t.is_broken_off else []
        once = ["--retries", "1", "--config", "/dev/null"]
        return Command([client, "copyto", *once, *limit, t.upload.source, target])

    return command


def _aria2(servers: FileServers) -> Callable[[Transfer], Command]:
    client = program("aria2c")

    def command(t: Transfer) -> Command:
        url = f"http://127.0.0.1:{servers.ports['http']}/{t.upload.source.name}"
        limit = [f"--max-overall-download-limit={SLOW_RATE // 1000}K"] if t.is_broken_off else []
        options = [
            "--no-conf",
            "-q",
            "--allow-overwrite=true",
            "--auto-file-renaming=false",
            "-s4",
            "-x4",
            "-k1M",
        ]
        return Command([client, *options, *limit, "-d", t.path.parent, "-o", t.path.name, url])

    return command


_CLIENTS: list[tuple[str, str, bool, Make]] = [
    ("sftp", "sshd", False, _sftp),
    ("sftp, renamed", "sshd", True, _sftp_rename),
    ("scp", "sshd", False, _scp()),
    ("scp -O", "sshd", False, _scp("-O")),
    ("curl to vsftpd", "vsftpd", False, _curl("vsftpd")),
    ("curl to proftpd", "proftpd", False, _curl("proftpd")),
    ("lftp to vsftpd", "vsftpd", False, _lftp("vsftpd", temporary=False)),
    ("lftp, renamed", "vsftpd", True, _lftp("vsftpd", temporary=True)),
    ("smbclient", "smbd", False, _smbclient),
    ("tftp", "tftpd", False, _tftp),
    ("rsync over ssh", "sshd", True, _rsync("sshd", "-a")),
    ("rsync daemon", "rsyncd", False, _rsync("rsyncd", "--inplace", "--partial")),
    ("rclone copy", "sshd", False, _rclone),
    ("aria2c", "http", False, _aria2),
]
"""Each client with its server, and whether an unfinished file never has the final name.

With `HiddenStores`, ProFTPD renames the stump of a client that was killed: the data connection has ended.
"""


def touches(chance: random.Random, upload: Upload, place: Place) -> Iterator[str]:
    """Change only the metadata of a finished file in a drop folder, and yield the kind of change."""
    path = place.folder(upload.drop) / upload.names[-1]
    link = place.aside(upload.drop) / f"link-{upload.source.name}-{chance.randrange(10**9)}"
    match chance.choice(("chmod", "chmod", "chown", "link", "link", "rename", "second name")):
        case "chmod":
            path.chmod(chance.choice((0o600, 0o640, 0o666)))
            yield "chmod"
        case "chown":
            os.chown(path, chance.choice((0, 65534)), chance.choice((0, 65534)))
            yield "chown"
        case "link":
            os.link(path, link)
            yield "link"
        case kind if not upload.had_stump and len(upload.names) == 1:
            folder, slash, base = upload.names[0].rpartition("/")
            upload.names.append(f"{folder}{slash}{kind.split()[0]}-{base}")
            target = place.folder(upload.drop) / upload.names[1]
            try:
                path.rename(target) if kind == "rename" else os.link(path, target)
            except OSError:
                upload.names.pop()
                raise
            yield kind
        case _:
            pass
