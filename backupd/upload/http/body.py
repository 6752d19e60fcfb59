"""The request's body: the file is read once, and the bytes that are hashed are the bytes that are sent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from backupd.core.model import Digest, is_unchanged
from backupd.upload.base import UploadJob
from backupd.upload.http.limits import AttemptLimits


def file_name(name: bytes) -> str:
    r"""Return a file name as every common parser reads it: UTF-8, with escapes where they would err.

    Quotes, backslashes, control and other unprintable characters and bytes that are no UTF-8 become
    `%NN`, as browsers do for quotes and line ends (https://url.spec.whatwg.org, multipart/form-data).
    """
    text = name.decode("utf-8", "surrogateescape")
    return "".join(c if c.isprintable() and c not in '"\\' else _percent(c) for c in text)


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True, slots=True)
class MultipartFraming:
    """The bytes around a file: all that goes before it, and a function's worth of what goes after.

    Without a boundary there is nothing around it.
    """

    boundary: str
    before: bytes
    digest_field: str

    def after(self, digest: str) -> bytes:
        """Return what follows the file; its length is the same for every digest of one algorithm."""
        if not self.boundary:
            return b""
        part = b""
        if self.digest_field:
            part = _part(self.boundary, self.digest_field) + digest.encode("ascii") + b"\r\n"
        return b"\r\n" + part + f"--{self.boundary}--\r\n".encode("ascii")

    @property
    def content_type(self) -> str:
        """Return the Content-Type of the request."""
        if not self.boundary:
            return "application/octet-stream"
        return f"multipart/form-data; boundary={self.boundary}"


def raw() -> MultipartFraming:
    """Return the framing of a body that is the file itself."""
    return MultipartFraming("", b"", "")


def frame(
    boundary: str, fields: Mapping[str, str], file_field: str, name: bytes, digest_field: str
) -> MultipartFraming:
    """Return the framing of a body with these fields, then the file, then the digest field."""
    parts: Iterable[bytes] = [
        _part(boundary, key) + value.encode("utf-8", "backslashreplace") + b"\r\n"
        for key, value in fields.items()
    ]
    head = (
        f"--{boundary}\r\nContent-Disposition: form-data; "
        f'name="{_quoted(file_field)}"; filename="{file_name(name)}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return MultipartFraming(boundary, b"".join(parts) + head.encode("utf-8"), digest_field)


def _part(boundary: str, name: str) -> bytes:
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{_quoted(name)}"\r\n\r\n'.encode()


def _quoted(name: str) -> str:
    return "".join(_percent(c) if c in '"\\\r\n' else c for c in name)


CHUNK = 256 * 1024
"""Bytes of a read."""

_LOOK = 16 * CHUNK
"""Bytes between looks whether the file is still the one that was admitted."""


class FileChangedDuringUploadError(Exception):
    """The file is not as it was when it was admitted."""


class ReadFailedError(Exception):
    """The file can't be read."""


class UploadBody:
    """An iterable of chunks, from the beginning each time it is asked for an iterator.

    `complete` tells whether the last chunk was handed over; `digest` is known from then on. `expected`
    is the digest that was stated before, where one was.
    """

    def __init__(
        self,
        cargo: UploadJob,
        framing: MultipartFraming,
        algorithm: str,
        line: AttemptLimits,
        expected: Digest | None = None,
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
        self.complete, self._cargo.sent_bytes = False, 0

    def __iter__(self) -> Iterator[bytes]:
        self.begin()
        self._line.body_started()
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
            raise FileChangedDuringUploadError("was rewritten since its digest was stated")
        yield pending + self._framing.after(self.digest.hex)
        self._handed_over(size)
        self.complete = True
        self._line.body_sent()

    def _handed_over(self, sent: int) -> None:
        self._cargo.sent_bytes = sent
        self._cargo.on_progress(sent)

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
                raise FileChangedDuringUploadError(f"ended after {at} of {size} bytes")
            yield at, chunk
            at += len(chunk)


def check_unchanged(cargo: UploadJob) -> None:
    """Raise FileChangedError if the file is not as it was when it was admitted."""
    try:
        status = os.fstat(cargo.fd)
    except OSError as error:
        raise ReadFailedError(error.strerror) from error
    if not is_unchanged(status, cargo.fingerprint):
        raise FileChangedDuringUploadError(
            f"was {cargo.fingerprint.size} bytes, is {status.st_size} bytes, or was rewritten"
        )
