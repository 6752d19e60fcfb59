"""The body of an upload: the file is read once, and the hashed bytes are the sent bytes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from backupd.core.model import Digest
from backupd.upload.base import FileChangedDuringUploadError, UploadJob
from backupd.upload.http.limits import AttemptLimits

CHUNK = 256 * 1024
"""Bytes that are read from the file at a time."""

_CHECK_EVERY = 16 * CHUNK
"""Bytes between two checks that the file is unchanged."""

_SEND_EVERY = 5.0
"""Seconds after which a byte is sent while the content is compared."""


class UploadBody:
    """The body of a request as an iterable of chunks; each iteration starts at the first byte.

    `complete` is whether the last chunk was handed over; from then on `digest` is that of the file.
    `expected` is the digest that the request has stated already, if any.
    """

    def __init__(
        self,
        job: UploadJob,
        framing: MultipartFraming,
        algorithm: str,
        limits: AttemptLimits,
        expected: Digest | None = None,
    ) -> None:
        self._job = job
        self._framing = framing
        self._algorithm = algorithm
        self._limits = limits
        self._expected = expected
        self.complete = False
        self.digest = Digest(algorithm, "")

    @property
    def size(self) -> int:
        """Return the length of the body in bytes; `len` would be limited to `sys.maxsize`."""
        blank = hashlib.new(self._algorithm).hexdigest()
        return len(self._framing.before) + self._job.fingerprint.size + len(self._framing.after(blank))

    def begin(self) -> None:
        """Reset the progress: a new request starts to send the body."""
        self.complete, self._job.sent_bytes = False, 0

    def __iter__(self) -> Iterator[bytes]:
        self.begin()
        self._limits.body_started()
        hasher = hashlib.new(self._algorithm)
        size = self._job.fingerprint.size
        pending = self._framing.before
        for offset, chunk in self._chunks():
            hasher.update(chunk)
            if offset + len(chunk) < size:
                yield pending + chunk if pending else chunk
                pending = b""
                self._report_progress(offset + len(chunk))
            else:
                pending += chunk
        self.digest = Digest(self._algorithm, hasher.hexdigest())
        if self._expected not in (None, self.digest):
            raise FileChangedDuringUploadError("the file was rewritten after its digest was calculated")
        # before the last bytes: an incomplete request stores nothing
        yield from self._last_bytes(pending + self._framing.after(self.digest.hex))
        self._report_progress(size)
        self.complete = True
        self._limits.body_sent()

    def _last_bytes(self, data: bytes) -> Iterator[bytes]:
        """Yield the last bytes of the body once the content is confirmed.

        If that takes long, single bytes are sent meanwhile, as servers limit the time between two bytes.
        """
        began = sent_at = time.monotonic()
        for _ in self._job.confirm_content(self.digest):
            now = time.monotonic()
            self._limits.exclude(now - began)
            self._limits.check()
            if now - sent_at >= _SEND_EVERY and len(data) > 1:
                yield data[:1]
                data, sent_at = data[1:], now
            began = now
        yield data

    def _report_progress(self, sent_bytes: int) -> None:
        self._job.sent_bytes = sent_bytes
        self._job.on_progress(sent_bytes)

    def _chunks(self) -> Iterator[tuple[int, bytes]]:
        """Yield the chunks of the file with their offsets."""
        offset, size = 0, self._job.fingerprint.size
        while offset < size:
            if offset % _CHECK_EVERY == 0:  # do not upload the rest of a file that was removed or changed
                self._job.check_unchanged()
            chunk = self._job.read_at(offset, min(CHUNK, size - offset))
            if not chunk:
                raise FileChangedDuringUploadError(f"the file ends after {offset} of {size} bytes")
            yield offset, chunk
            offset += len(chunk)


@dataclass(frozen=True, slots=True)
class MultipartFraming:
    """The bytes of a body before and after the file; without a `boundary` there are none."""

    boundary: str
    before: bytes
    digest_field: str

    def after(self, digest: str) -> bytes:
        """Return the bytes after the file; their length is the same for every digest of one algorithm."""
        if not self.boundary:
            return b""
        part = b""
        if self.digest_field:
            part = _part_head(self.boundary, self.digest_field) + digest.encode("ascii") + b"\r\n"
        return b"\r\n" + part + f"--{self.boundary}--\r\n".encode("ascii")

    @property
    def content_type(self) -> str:
        """Return the Content-Type of the request."""
        if not self.boundary:
            return "application/octet-stream"
        return f"multipart/form-data; boundary={self.boundary}"


def raw() -> MultipartFraming:
    """Return the framing of a body that consists of the file only."""
    return MultipartFraming("", b"", "")


def frame(
    boundary: str, fields: Mapping[str, str], file_field: str, name: bytes, digest_field: str
) -> MultipartFraming:
    """Return the framing of a multipart/form-data body (RFC 7578): fields, then file, then digest field."""
    parts: Iterable[bytes] = [
        _part_head(boundary, key) + value.encode("utf-8", "backslashreplace") + b"\r\n"
        for key, value in fields.items()
    ]
    head = (
        f"--{boundary}\r\nContent-Disposition: form-data; "
        f'name="{_quote(file_field)}"; filename="{file_name(name)}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return MultipartFraming(boundary, b"".join(parts) + head.encode("utf-8"), digest_field)


def file_name(name: bytes) -> str:
    r"""Return a file name for a `filename` parameter, escaped so that common parsers agree on it.

    Quotes, backslashes, unprintable characters and bytes that are not UTF-8 become `%NN`, as browsers do for
    quotes and line ends (https://html.spec.whatwg.org, "multipart/form-data").
    """
    text = name.decode("utf-8", "surrogateescape")
    return "".join(c if c.isprintable() and c not in '"\\' else _percent(c) for c in text)


def _part_head(boundary: str, name: str) -> bytes:
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{_quote(name)}"\r\n\r\n'.encode()


def _quote(name: str) -> str:
    return "".join(_percent(c) if c in '"\\\r\n' else c for c in name)


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))
