"""The request's body: the file is read once, and the bytes that are hashed are the bytes that are sent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from backupd.core.model import Digest, is_unchanged
from backupd.upload.line import Line
from backupd.upload.multipart import Framing
from backupd.upload.port import Cargo

CHUNK = 256 * 1024
"""Bytes of a read."""

_LOOK = 16 * CHUNK
"""Bytes between looks whether the file is still the one that was admitted."""


class FileChangedError(Exception):
    """The file is not as it was when it was admitted."""


class ReadFailedError(Exception):
    """The file can't be read."""


class Body:
    """An iterable of chunks, from the beginning each time it is asked for an iterator.

    `complete` tells whether the last chunk was handed over; `digest` is known from then on. `expected`
    is the digest that was stated before, where one was.
    """

    def __init__(
        self, cargo: Cargo, framing: Framing, algorithm: str, line: Line, expected: Digest | None = None
    ) -> None:
        self._cargo = cargo
        self._framing = framing
        self._algorithm = algorithm
        self._line = line
        self._expected = expected
        self.complete = False
        self.digest = Digest(algorithm, "")

    @property
    def size(self) -> int:
        """Return its bytes, the framing's included; `len` ends before what a file can have."""
        blank = hashlib.new(self._algorithm).hexdigest()
        return len(self._framing.before) + self._cargo.fingerprint.size + len(self._framing.after(blank))

    def begin(self) -> None:
        """Note that a request begins, of which nothing was handed over yet."""
        self.complete, self._cargo.sent = False, 0

    def __iter__(self) -> Iterator[bytes]:
        self.begin()
        self._line.body_begins()
        hasher = hashlib.new(self._algorithm)
        size = self._cargo.fingerprint.size
        pending = self._framing.before
        for at, chunk in self._chunks():
            hasher.update(chunk)
            if at + len(chunk) < size:
                yield pending + chunk if pending else chunk
                pending = b""
                self._handed_over(at + len(chunk))
            else:
                pending += chunk
        check_unchanged(self._cargo)  # before the last bytes: a request that is not complete stores nothing
        self.digest = Digest(self._algorithm, hasher.hexdigest())
        if self._expected not in (None, self.digest):
            raise FileChangedError("was rewritten since its digest was stated")
        yield pending + self._framing.after(self.digest.hex)
        self._handed_over(size)
        self.complete = True
        self._line.body_sent()

    def _handed_over(self, sent: int) -> None:
        self._cargo.sent = sent
        self._cargo.progress(sent)

    def _chunks(self) -> Iterator[tuple[int, bytes]]:
        at, size = 0, self._cargo.fingerprint.size
        while at < size:
            if at % _LOOK == 0:  # what was removed or changed must not keep a worker to its end
                check_unchanged(self._cargo)
            try:
                chunk = os.pread(self._cargo.fd, min(CHUNK, size - at), at)
            except OSError as error:
                raise ReadFailedError(error.strerror) from error
            if not chunk:
                raise FileChangedError(f"ended after {at} of {size} bytes")
            yield at, chunk
            at += len(chunk)


def check_unchanged(cargo: Cargo) -> None:
    """Raise FileChangedError if the file is not as it was when it was admitted."""
    try:
        status = os.fstat(cargo.fd)
    except OSError as error:
        raise ReadFailedError(error.strerror) from error
    if not is_unchanged(status, cargo.fingerprint):
        raise FileChangedError(
            f"was {cargo.fingerprint.size} bytes, is {status.st_size} bytes, or was rewritten"
        )
