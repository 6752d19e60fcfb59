"""Where log lines go: to systemd's journal as entries with a field for each key, or to a file descriptor.

The journal's protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import socket
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from backupd.core.names import printable

LogRecord = Mapping[str, object]
"""The keys of a log line and their values, which are values of JSON."""

JOURNAL_SOCKET = "/run/systemd/journal/socket"

SYSLOG_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}
"""Priorities of syslog(3) by level."""

_JOURNAL_TIMEOUT = 1.0
"""Seconds to wait for a journal that reads nothing."""

_READER_TIMEOUT = 5.0
"""Seconds to wait for the reader of standard output; a reader that hangs must not stop deliveries."""

_INFO: LogRecord = MappingProxyType({"level": "info"})
_WITHOUT_FIELD = frozenset(("timestamp", "level", "event", "message", "host"))
"""Keys that the journal has in fields of its own."""

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
"""The seals that the journal expects of a file with an entry."""


class LineWriter:
    """Writes whole lines to a descriptor and never raises; `lost` counts the lines that could not be written.

    With `prefixed`, each line starts with its priority as `<N>`, for the journal (sd-daemon(3)). `timeout`
    is the number of seconds to wait for a reader that reads nothing; once it has passed, lines are lost
    without a wait until the reader reads again. None waits indefinitely.
    """

    def __init__(self, fd: int, *, prefixed: bool = False, timeout: float | None = None) -> None:
        self._fd = fd
        self._prefixed = prefixed
        self._timeout = timeout
        self._next_timeout = timeout
        self._lock = threading.Lock()
        self._has_partial_line = False
        self.lost = 0

    @property
    def is_terminal(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._fd)

    def write_line(self, text: str, record: LogRecord = _INFO) -> bool:
        """Write a line and return whether all of it was written; `record` has the level."""
        if self._prefixed:
            prefix = f"<{SYSLOG_PRIORITIES[str(record['level'])]}>"
            text = prefix + text.replace("\n", "\n" + prefix)
        data = (text + "\n").encode("utf-8", "backslashreplace")
        with self._lock:
            if self._has_partial_line:
                data = b"\n" + data
            rest = data
            try:
                while rest:
                    rest = rest[self._write(rest) :]
            except OSError:
                self._has_partial_line = self._has_partial_line or len(rest) < len(data)
                self.lost += 1
                return False
            self._has_partial_line = False
            return True

    debug = info = warning = error = write_line  # structlog calls the method of the level

    def subtract_lost(self, count: int) -> None:
        """Subtract lost lines that have been logged, or that were counted twice."""
        with self._lock:
            self.lost -= count

    def _write(self, data: bytes) -> int:
        if self._next_timeout is None:
            return os.write(self._fd, data)
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        if not poll.poll(self._next_timeout * 1000):
            self._next_timeout = 0.0
            raise TimeoutError
        self._next_timeout = self._timeout
        return os.write(self._fd, data[: select.PIPE_BUF])  # a pipe that is ready accepts PIPE_BUF at once


class JournalWriter:
    """Writes entries to the journal, or lines to its stream if the journal accepts no entries; never raises.

    An entry has the sentence for people in `MESSAGE`, the line in `BACKUPD_JSON`, the event in
    `BACKUPD_EVENT`, and a field for each key of the event.
    """

    is_terminal = False

    def __init__(self, lines: LineWriter, path: str = JOURNAL_SOCKET) -> None:
        self._lines = lines
        self._path = path
        self._lock = threading.Lock()
        self._next_timeout = _JOURNAL_TIMEOUT
        self._socket: socket.socket | None = None

    @property
    def lost(self) -> int:
        """Return the number of lines that could be written neither as entries nor as lines."""
        return self._lines.lost

    def subtract_lost(self, count: int) -> None:
        """See `LineWriter.subtract_lost`."""
        self._lines.subtract_lost(count)

    def write_line(self, text: str, record: LogRecord) -> bool:
        """Write a line and its record; return whether all of it was written."""
        with self._lock:
            sent = self._send(encode_entry(text, record))
        return sent or self._lines.write_line(text, record)

    debug = info = warning = error = write_line  # structlog calls the method of the level

    def close(self) -> None:
        """Close the connection; the next line opens a new one."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def _send(self, entry: bytes) -> bool:
        for _ in range(2):  # the second time over a new connection: the journal may have been restarted
            try:
                connection = self._connect()
                connection.settimeout(self._next_timeout)
                _send_entry(connection, entry)
            except TimeoutError:
                self._next_timeout = 0.0
                return False
            except BlockingIOError:
                return False
            except OSError:
                self.close()
            else:
                self._next_timeout = _JOURNAL_TIMEOUT
                return True
        return False

    def _connect(self) -> socket.socket:
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                connection.connect(self._path)
            except OSError:
                connection.close()
                raise
            self._socket = connection
        return self._socket


def writer_for(
    fd: int, environ: Mapping[str, str] = os.environ, path: str = JOURNAL_SOCKET
) -> LineWriter | JournalWriter:
    """Return the writer for a descriptor: entries if it is connected to the journal, else lines."""
    if not is_connected_to_journal(fd, environ):
        return LineWriter(fd, timeout=_READER_TIMEOUT)
    return JournalWriter(LineWriter(fd, prefixed=True, timeout=_JOURNAL_TIMEOUT), path)


def is_connected_to_journal(fd: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a descriptor is the one that $JOURNAL_STREAM names; systemd.exec(5)."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _send_entry(connection: socket.socket, entry: bytes) -> None:
    """Send an entry as a datagram, or in a sealed file if it is larger than one, about 200 KiB."""
    try:
        connection.send(entry)
    except OSError as error:
        if error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
            raise
    else:
        return
    with os.fdopen(os.memfd_create("backupd-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb") as file:
        file.write(entry)
        file.flush()
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        socket.send_fds(connection, [b""], [file.fileno()])


def message_for_people(record: LogRecord) -> str:
    """Return the sentence of an event with its hint, and the stack trace of a bug in further lines."""
    hint, trace = record.get("hint"), str(record.get("exception", ""))
    sentence = str(record["message"]) + (f"; hint: {printable(str(hint))}" if hint else "")
    return "\n".join((sentence, *map(printable, trace.splitlines())))


def encode_entry(text: str, record: LogRecord) -> bytes:
    """Return the entry of a line of JSON and its record in the journal's format.

    Every value is preceded by its length, so that no value can start another field.
    """
    return b"".join(
        b"%b\n%b%b\n" % (name.encode(), len(data).to_bytes(8, "little"), data)
        for name, value in _fields(text, record)
        for data in [value.encode("utf-8", "backslashreplace")]
    )


def _fields(text: str, record: LogRecord) -> Iterator[tuple[str, str]]:
    yield "MESSAGE", message_for_people(record)
    yield "PRIORITY", str(SYSLOG_PRIORITIES[str(record["level"])])
    yield "SYSLOG_IDENTIFIER", "backupd"
    yield "BACKUPD_EVENT", str(record["event"])
    yield "BACKUPD_JSON", text
    for key, value in record.items():
        if key not in _WITHOUT_FIELD:
            for item in value if isinstance(value, list) else [value]:
                yield f"BACKUPD_{key.upper()}", item if isinstance(item, str) else json.dumps(item)
