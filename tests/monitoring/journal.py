"""Journals for tests: systemd-journald in a mount namespace, and a socket that reads the protocol."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.programs import do_without, require
from tests.stage import until

Entry = list[tuple[str, str]]


class JournalSocket:
    """Receives entries as journald does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def entries(self) -> list[Entry]:
        """Return the entries that arrived since the last call."""
        found: list[Entry] = []
        while True:
            try:
                data, files, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
            except BlockingIOError:
                return found
            for file in files:
                assert fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
                data = os.pread(file, os.fstat(file).st_size, 0)
                os.close(file)
            found.append(parsed(data))

    def close(self) -> None:
        self._socket.close()
        self.path.unlink(missing_ok=True)


def parsed(data: bytes) -> Entry:
    """Return the fields of an entry; see systemd.io/JOURNAL_NATIVE_PROTOCOL."""
    fields: Entry = []
    while data:
        line, _, rest = data.partition(b"\n")
        name, is_text, value = line.partition(b"=")
        if not is_text:
            size = int.from_bytes(rest[:8], "little")
            value, end, data = rest[8 : 8 + size], rest[8 + size : 9 + size], rest[9 + size :]
            assert end == b"\n"
        else:
            data = rest
        fields.append((name.decode(), value.decode()))
    return fields


class Journald:
    """A running systemd-journald with its own `/run`."""

    def __init__(self, base: Path, process: subprocess.Popen[bytes]) -> None:
        self._base = base
        self._process = process
        self.socket = base / "systemd/journal/socket"

    def inside(self) -> list[str]:
        """Return the prefix of a command that runs in the mount namespace of this journal."""
        return [require("nsenter"), "--mount", f"--target={self._process.pid}"]

    def stream(self) -> socket.socket:
        """Return a stream like the standard output that systemd gives to a service."""
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(str(self._base / "systemd/journal/stdout"))
        stream.sendall(b"backupd\nbackupd.service\n6\n1\n0\n0\n0\n")
        return stream

    def query(self, *words: str) -> list[dict[str, Any]]:
        """Return the entries that journalctl prints."""
        return [json.loads(line) for line in self.journalctl("-o", "json", "--all", *words).splitlines()]

    def journalctl(self, *words: str) -> str:
        """Return the output of journalctl for this journal."""
        folder = str(self._base / "log/journal")
        command = [require("journalctl"), f"--directory={folder}", "--quiet", *words]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout


@contextmanager
def a_journald() -> Iterator[Journald]:
    """Run a journald during a test; needs root."""
    program = Path("/lib/systemd/systemd-journald")
    if os.geteuid() != 0 or not program.exists():
        do_without("a separate journald needs systemd and root")
    base = Path(tempfile.mkdtemp(prefix="run-"))  # short: paths of sockets are
    (base / "systemd/journal").mkdir(parents=True)
    (base / "log/journal").mkdir(parents=True)
    script = f"mount --bind {base} /run && exec {program}"
    process = subprocess.Popen([require("unshare"), "--mount", "sh", "-c", script], stderr=subprocess.DEVNULL)
    try:
        journald = Journald(base, process)
        until(lambda: journald.socket.exists() or process.poll() is not None, "the journal's socket")
        if process.poll() is not None:
            do_without("journald does not start in a mount namespace here")
        yield journald
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(base, ignore_errors=True)
