"""The content of a file: its digest, and whether it is that of an archive although metadata has changed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable

from backupd.core.model import Digest, Fingerprint, fingerprint_of, is_same_file, may_have_content_of
from backupd.dropfolder.decompress import BoundedFile, ShouldStop
from backupd.dropfolder.folder import close_descriptor


def digest_of(fd: int, size: int, algorithm: str, should_stop: ShouldStop) -> Digest:
    """Return the digest of the first `size` bytes of an open file.

    Raises StoppedError once `should_stop` returns True, and OSError if the file can't be read.
    """
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    for data in BoundedFile(fd, size, should_stop).chunks():
        hasher.update(data)
    return Digest(algorithm, hasher.hexdigest())


class ExpectedFile:
    """The file of an archive that is to be moved; finds out whether a file is this one, unchanged.

    Where only metadata differs, the content is read and compared with `digest`. Without a digest (a rejected
    archive that was not sent completely) the same size and modification time are enough: it is not removed.
    """

    def __init__(
        self, fingerprint: Fingerprint, digest: Digest | None, should_stop: ShouldStop = lambda: False
    ) -> None:
        self.fingerprint = fingerprint
        """That of the archive, or of the file when its content was compared last."""
        self._digest = digest
        self.should_stop = should_stop
        """Called while the content is read, which ends once it returns True."""

    def is_at(self, directory: int, name: bytes) -> bool:
        """Return whether the file is under a name in an open directory.

        Raises OSError and StoppedError.
        """
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            return False
        return self._matches(fingerprint_of(status), lambda: _open(directory, name))

    def is_open_as(self, fd: int) -> bool:
        """Return whether a descriptor is that of the file; raises OSError and StoppedError."""
        return self._matches(fingerprint_of(os.fstat(fd)), lambda: os.dup(fd))

    def was_renamed_to(self, directory: int, name: bytes) -> bool:
        """Return whether a file that was just checked and renamed is the expected one.

        The rename may have changed its change time, on some network filesystems its inode. Raises OSError and
        StoppedError.
        """
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return is_same_file(status, self.fingerprint) or self.is_at(directory, name)

    def was_moved_to(self, directory: int, name: bytes) -> bool:
        """Return whether an earlier process moved the file to this name; raises OSError and StoppedError."""
        if self._digest is not None:
            return self.is_at(directory, name)
        return is_same_file(os.stat(name, dir_fd=directory, follow_symlinks=False), self.fingerprint)

    def _matches(self, found: Fingerprint, open_file: Callable[[], int]) -> bool:
        if found == self.fingerprint:
            return True
        if not may_have_content_of(found, self.fingerprint):
            return False
        if self._digest is not None:
            fd = open_file()
            try:
                found = fingerprint_of(os.fstat(fd))
                digest = digest_of(fd, self.fingerprint.size, self._digest.algorithm, self.should_stop)
                ended = fingerprint_of(os.fstat(fd))
            finally:
                close_descriptor(fd)
            if digest != self._digest or not may_have_content_of(ended, self.fingerprint):
                return False
        self.fingerprint = found
        return True


def _open(directory: int, name: bytes) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=directory)
