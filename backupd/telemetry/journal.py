"""Logging to systemd's journal in its own protocol, so that it can be asked by the keys of an event.

The protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL
"""

from __future__ import annotations

import array
import errno
import fcntl
import json
import os
import select
import socket
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType

LogRecord = Mapping[str, object]
"""An event with its keys, all of them plain, as it is written."""

PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}
"""Of syslog(3), by level."""

_NONE: LogRecord = MappingProxyType({"level": "info"})


class LineWriter:
    """Writes whole lines to a descriptor and never raises; what could not be written is counted.

    `prefixed` puts `<N>` with the priority before each line, for the journal (sd-daemon(3)). `patience` are
    the seconds for which a reader that takes nothing is waited for; once that is over, it is waited for
    by no other line until it takes one. None: forever.
    """

    def __init__(self, fd: int, *, prefixed: bool = False, patience: float | None = None) -> None:
        self._fd = fd
        self._prefixed = prefixed
        self._patience = self._left = patience
        self._lock = threading.Lock()
        self._torn = False
        self.lost = 0

    def line(self, text: str, record: LogRecord = _NONE) -> bool:
        """Write a line; return whether it went out whole."""
        if self._prefixed:
            prefix = f"<{PRIORITIES[str(record['level'])]}>"
            text = prefix + text.replace("\n", "\n" + prefix)
        data = (text + "\n").encode("utf-8", "backslashreplace")
        with self._lock:
            if self._torn:
                data = b"\n" + data
            left = data
            try:
                while left:
                    left = left[self._write(left) :]
            except OSError:
                self._torn = self._torn or len(left) < len(data)
                self.lost += 1
                return False
            self._torn = False
            return True

    debug = info = warning = error = line

    def forget(self, lost: int) -> None:
        """Count so many lines as told of."""
        with self._lock:
            self.lost -= lost

    def _write(self, data: bytes) -> int:
        if self._left is None:
            return os.write(self._fd, data)
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        if not poll.poll(self._left * 1000):
            self._left = 0.0
            raise TimeoutError
        self._left = self._patience
        return os.write(self._fd, data[: select.PIPE_BUF])  # so much goes out at once if anything does


SOCKET = "/run/systemd/journal/socket"

_PATIENCE = 1.0
"""Seconds for which a journal that takes nothing is waited for, once; then not at all until it does."""

_PATIENCE_WITH_A_READER = 5.0
"""Likewise for whoever reads our output: what hangs there must keep no archive from its destination."""

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_PLAIN = ("timestamp", "level", "event")


class JournalWriter:
    """Writes events to the journal, or as lines where it takes none; never raises.

    `MESSAGE` is the line itself, `BACKUPD_EVENT` the event, and each of its keys has a field of its own.
    """

    def __init__(self, lines: LineWriter, path: str = SOCKET) -> None:
        self._lines = lines
        self._path = path
        self._lock = threading.Lock()
        self._patience = _PATIENCE
        self._socket: socket.socket | None = None

    @property
    def lost(self) -> int:
        """Return how many lines went neither way."""
        return self._lines.lost

    def forget(self, lost: int) -> None:
        """Count so many lines as told of."""
        self._lines.forget(lost)

    def line(self, text: str, record: LogRecord) -> bool:
        """Write a line and the event that it shows; return whether it went out whole."""
        with self._lock:
            sent = self._send(as_datagram(text, record))
        return sent or self._lines.line(text, record)

    debug = info = warning = error = line

    def close(self) -> None:
        """Close the connection; the next line makes another."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def _send(self, datagram: bytes) -> bool:
        for _ in range(2):  # once more over a new connection: the journal may have been restarted
            try:
                self._put(self._connected(), datagram)
            except TimeoutError:
                self._patience = 0.0
                return False
            except BlockingIOError:
                return False
            except OSError:
                self.close()
            else:
                self._patience = _PATIENCE
                return True
        return False

    def _put(self, connection: socket.socket, datagram: bytes) -> None:
        connection.settimeout(self._patience)
        try:
            connection.send(datagram)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            _send_in_memory(connection, datagram)

    def _connected(self) -> socket.socket:
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                connection.connect(self._path)
            except OSError:
                connection.close()
                raise
            self._socket = connection
        return self._socket


def reads(fd: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the journal reads a descriptor, by what systemd says in $JOURNAL_STREAM."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def writer_for(
    fd: int, environ: Mapping[str, str] = os.environ, path: str = SOCKET
) -> LineWriter | JournalWriter:
    """Return what writes the log: to the journal where it reads that descriptor, else lines to it."""
    if not reads(fd, environ):
        return LineWriter(fd, patience=_PATIENCE_WITH_A_READER)
    return JournalWriter(LineWriter(fd, prefixed=True, patience=_PATIENCE), path)


def as_datagram(text: str, record: LogRecord) -> bytes:
    """Return an entry of the journal.

    Every value goes with its length before it, so that none can begin another field.
    """
    return b"".join(
        b"%b\n%b%b\n" % (name.encode(), len(data).to_bytes(8, "little"), data)
        for name, value in _fields(text, record)
        for data in [value.encode("utf-8", "backslashreplace")]
    )


def _fields(text: str, record: LogRecord) -> Iterator[tuple[str, str]]:
    yield "MESSAGE", text
    yield "PRIORITY", str(PRIORITIES[str(record["level"])])
    yield "SYSLOG_IDENTIFIER", "backupd"
    yield "BACKUPD_EVENT", str(record["event"])
    for key, value in record.items():
        if key not in _PLAIN:
            for one in value if isinstance(value, list) else [value]:
                yield f"BACKUPD_{key.upper()}", one if isinstance(one, str) else json.dumps(one)


def _send_in_memory(connection: socket.socket, datagram: bytes) -> None:
    """Send what is too large for a datagram as a sealed file in memory."""
    fd = os.memfd_create("backupd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", buffering=0) as file:
        left = memoryview(datagram)
        while left:
            left = left[file.write(left) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        connection.sendmsg([], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
