"""The interfaces of a destination, whatever its kind: uploader, endpoint and probe result."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from backupd.core.certificate_life import Validity
from backupd.core.model import Digest, Fingerprint, Outcome, fingerprint_of, may_have_content_of
from backupd.core.policy import Reason, rule_of

OnProgress = Callable[[int], None]
"""Called with the number of bytes of the archive that were handed to the connection so far."""

OnAlive = Callable[[], None]
"""Called to report that a thread is alive; see `UploadJob`."""


def _ignore_progress(_sent: int) -> None:
    return


def _ignore() -> None:
    return


def _open_nothing() -> int:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


class FileChangedDuringUploadError(Exception):
    """The file changed after it was queued."""


class ReadFailedError(Exception):
    """The file can't be read."""


_NO_FILE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.ELOOP))
"""Errors of a path with no file, or with one that is no regular file."""

_READ_BYTES = 1024 * 1024
"""Bytes that are read at a time when the content is compared."""


@dataclass(slots=True)
class UploadJob:
    """One archive, open for reading, to upload to one destination.

    The uploader reads it with `read_at` and does not close `fd`. `variables` are the values of the
    placeholders in templates. `unconfirmed_digest` is the digest of an earlier attempt with a lost
    response, `known_digests` are those of the content that any destination has. The uploader calls `on_alive`
    at least once a second while it works or waits for the network, and `on_idle` before a wait that it cannot
    bound, such as that for the name service. It sets `sent_bytes`, in bytes of the archive, and `address`, to
    which it was connected, and `tls_version`, each empty if unknown.
    `is_being_written` returns whether another process has the file open for writing, if that is known.
    `open_path` opens the file that is under the archive's path now, or raises OSError: if the archive's file
    was replaced by one with its size and modification time, `fd` becomes a descriptor of that one.
    `confirmed` is the fingerprint of the file when its content was compared last.
    """

    delivery_id: str
    name: bytes
    fd: int
    fingerprint: Fingerprint
    variables: Mapping[str, str]
    on_progress: OnProgress = _ignore_progress
    on_alive: OnAlive = _ignore
    on_idle: OnAlive = _ignore
    unconfirmed_digest: Digest | None = None
    known_digests: tuple[Digest, ...] = ()
    is_being_written: Callable[[], bool] = lambda: False
    open_path: Callable[[], int] = _open_nothing
    sent_bytes: int = field(default=0, init=False)
    address: str = field(default="", init=False)
    tls_version: str = field(default="", init=False)
    confirmed: Fingerprint | None = field(default=None, init=False)
    _was_replaced: bool = field(default=False, init=False)
    """Whether the bytes that were sent may be those of several files."""

    def read_at(self, offset: int, count: int) -> bytes:
        """Return up to `count` bytes at `offset`, none at the end of the file; raises ReadFailedError."""
        try:
            return os.pread(self.fd, count, offset)
        except OSError as error:
            raise ReadFailedError(error.strerror) from error

    def check_unchanged(self) -> None:
        """Raise FileChangedDuringUploadError if the file changed after it was queued, or ReadFailedError.

        A change of metadata alone is none, and neither is another file with the same size and modification
        time. If the content may have changed nevertheless, `confirm_content` finds it.
        """
        self._current_fingerprint(self.fd)

    def confirm_content(self, digest: Digest) -> Iterator[None]:
        """Check that the file has this digest; to be iterated over before the last bytes are sent.

        If the file has its fingerprint still, the content that was read is that of the file. If only metadata
        differs, or the file was replaced, the content is read again, and each iteration reads a part of it.
        Raises FileChangedDuringUploadError if it has another digest than this one or than `known_digests`, or
        ReadFailedError.
        """
        found = self._reopened_fingerprint()
        if found != self.fingerprint or self._was_replaced:
            expected = {digest, *self.known_digests}
            hashers = {each: hashlib.new(each.algorithm, usedforsecurity=False) for each in expected}
            for offset in range(0, self.fingerprint.size, _READ_BYTES):
                data = self.read_at(offset, min(_READ_BYTES, self.fingerprint.size - offset))
                for hasher in hashers.values():
                    hasher.update(data)
                yield
            self.check_unchanged()
            if any(hasher.hexdigest() != each.hex for each, hasher in hashers.items()):
                raise FileChangedDuringUploadError("the file was rewritten, its size and times were restored")
            if self.is_being_written():
                raise FileChangedDuringUploadError("the file changed, and another process is writing to it")
        self.confirmed = found

    def _reopened_fingerprint(self) -> Fingerprint:
        """Return the current fingerprint; a network filesystem is asked for it when a file is opened."""
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # its mode has changed, or /proc is not mounted
            return self._current_fingerprint(self.fd)
        try:
            return self._current_fingerprint(fd)
        finally:
            with suppress(OSError):  # of a network filesystem that is gone: the status was read, or not
                os.close(fd)

    def _current_fingerprint(self, fd: int) -> Fingerprint:
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise ReadFailedError(error.strerror) from error
        if status.st_nlink == 0:
            status = self._open_replacement()
        found = fingerprint_of(status)
        if not may_have_content_of(found, self.fingerprint):
            raise FileChangedDuringUploadError(
                f"the file changed: {self.fingerprint.size} bytes when it was queued,"
                f" {status.st_size} bytes now"
            )
        return found

    def _open_replacement(self) -> os.stat_result:
        """Have `fd` be that of the file which has replaced the removed one, and return its status."""
        try:
            fd = self.open_path()
        except OSError as error:
            if error.errno in _NO_FILE:
                raise FileChangedDuringUploadError("the file was removed or replaced") from error
            raise ReadFailedError(error.strerror) from error
        try:
            os.dup2(fd, self.fd, inheritable=False)
            self._was_replaced = True
            return os.fstat(fd)
        except OSError as error:
            raise ReadFailedError(error.strerror) from error
        finally:
            with suppress(OSError):  # of a network filesystem that is gone: the other descriptor decides
                os.close(fd)


class Abort:
    """Ends every wait for the network at once and permanently; safe to use from any thread."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        """Abort the uploads that are running, and all later ones."""
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        """Return a descriptor that is readable once aborted."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


class Uploader(Protocol):
    """Uploads archives to one destination, one at a time; each worker has its own.

    Every expected failure is an outcome: `upload` and `query` raise for bugs only.
    """

    def upload(self, job: UploadJob) -> Outcome:
        """Send an archive and verify the receipt."""
        ...

    def query(self, job: UploadJob, digest: Digest) -> Outcome | None:
        """Return the destination's state of content that was sent earlier; None if it does not have it.

        `Delivered` means that the destination stated this digest. A destination that can't be reached is a
        failure. The archive itself is not read.
        """
        ...

    def close(self) -> None:
        """Close the connections; the next upload opens new ones."""
        ...


class Endpoint(Protocol):
    """The connection settings that the workers of one destination share: limits, sign-in and TLS files.

    It is the local side, an object in this process. In the documents, "endpoint" is the remote server, to
    which its uploaders connect. The defaults are those of a kind without certificates.
    """

    def make_uploader(self) -> Uploader:
        """Return a new uploader for one worker."""
        ...

    def files_changed(self) -> bool:
        """Return whether the certificate files changed since the last call."""
        return False

    def reload_files(self) -> None:
        """Use the certificate files as they are now, for new connections.

        Raises ConfigError if they can't be used, and goes on with the earlier ones.
        """

    @property
    def server_certificate(self) -> Validity | None:
        """Return the validity of the destination's own certificate; None if it is not known."""
        return None


CLOCK_TOLERANCE = 60.0
"""Seconds by which two clocks may differ before `check` gives a hint."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How a destination reacted to a probe; `reason` is None if nothing keeps it from taking uploads.

    A field that a kind of destination does not know is None. `certificate_required` is whether the
    destination refuses clients without a certificate. `signed_in` is False if it refused the sign-in by
    `sign_in_scheme`, None if there is no sign-in or the probe did not get that far. `server_days_left` is for
    how many days its certificate is valid, by `server_validity`, `clock_ahead_s` by how many seconds its
    clock is ahead of this host's. `is_proven` is False if the reaction shows neither that it would take an
    upload nor that it would not.
    """

    destination: str
    reason: Reason | None
    detail: str
    tls: str | None = None
    http_version: str | None = None
    http_status: int | None = None
    server_names: tuple[str, ...] = ()
    server_issuer: str | None = None
    server_days_left: int | None = None
    server_validity: Validity | None = None
    certificate_required: bool | None = None
    signed_in: bool | None = None
    clock_ahead_s: float | None = None
    took_s: float = 0.0
    advice: str = ""
    sign_in_scheme: str = ""
    is_proven: bool = True

    @property
    def hint(self) -> str:
        """Return the command or edit that fixes the failure; empty without one."""
        return self.advice or (rule_of(self.reason).hint if self.reason else "")

    @property
    def clock_is_off(self) -> bool:
        """Return whether the clocks differ so much that certificates and tokens may be refused."""
        return self.clock_ahead_s is not None and abs(self.clock_ahead_s) > CLOCK_TOLERANCE
