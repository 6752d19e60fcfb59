"""TLS on a socket that never blocks, with few system calls.

`ssl.SSLSocket` makes one for each record of 16 KiB. Here records go through memory, and a dozen of them
leave together.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress

from backupd.upload.line import Line

_AT_ONCE = 256 * 1024
"""Bytes that are encrypted before they are sent."""

_READ = 64 * 1024


class TlsSocket:
    """Like a non-blocking `ssl.SSLSocket`, whose exceptions it raises; it closes without a farewell.

    `line` is told what the connection took, and may end what would go on for ever without any data.
    """

    def __init__(
        self, context: ssl.SSLContext, sock: socket.socket, server_hostname: str | None, line: Line
    ) -> None:
        self._sock = sock
        self._line = line
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self._unsent = memoryview(b"")
        self._owed = 0

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    @property
    def holds_some(self) -> bool:
        """Whether something has arrived that `recv` has not returned, so that no poll(2) tells of it."""
        return bool(self._incoming.pending or self.tls.pending())

    def do_handshake(self) -> None:
        """See `ssl.SSLSocket.do_handshake`."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._take_in()
            except OSError:
                with suppress(OSError):  # the other side is to hear why, if it can
                    self._flush()
                raise
            else:
                self._flush()
                return

    def send(self, view: memoryview) -> int:
        """Send some bytes and return how many.

        After SSLWantWriteError it has to be called again with what begins with the same bytes.
        """
        if not self._owed:
            while self._owed < min(len(view), _AT_ONCE):
                self._owed += self.tls.write(view[self._owed : _AT_ONCE])
        self._flush()
        sent, self._owed = self._owed, 0
        return sent

    def recv(self, count: int) -> bytes:
        """Return up to so many bytes, none at the end, however the other side made it."""
        while True:
            try:
                return self.tls.read(count)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""
            except ssl.SSLWantReadError:
                with suppress(OSError):  # TLS may have something to answer; `send` tells of what hinders it
                    self._flush()
                self._take_in()

    def _flush(self) -> None:
        while True:
            while self._unsent:
                try:
                    count = self._sock.send(self._unsent)
                except BlockingIOError:
                    raise ssl.SSLWantWriteError from None
                self._unsent = self._unsent[count:]
                self._line.moved(count)
            if not self._outgoing.pending:
                return
            self._unsent = memoryview(self._outgoing.read())

    def _take_in(self) -> None:
        try:
            data = self._sock.recv(_READ)
        except BlockingIOError:
            raise ssl.SSLWantReadError from None
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        self._line.check()
