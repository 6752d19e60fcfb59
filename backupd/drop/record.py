"""Writing a small file beside an archive: whole or not at all, and over nobody else's."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress

from backupd.core.names import fitted
from backupd.drop.folder import DropFolder
from backupd.drop.move import rename_no_replace

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_record(folder: DropFolder, directory: bytes, names: Iterable[bytes], content: bytes) -> None:
    """Write a file under the first name that is free; the directory is not synced yet.

    It is synced under another name and then renamed. One with that very content is of an earlier attempt,
    and stays. Raises FileExistsError where every name is taken by something else, of whatever kind.
    """
    with folder.directory(directory, create=True) as fd:
        part = b""
        for name in names:
            if not part:
                part = fitted(b"." + name, b".part")
                _write(fd, part, content)
            try:
                rename_no_replace(fd, part, fd, name)
            except FileExistsError:
                if not _holds(folder, directory + b"/" + name if directory else name, content):
                    continue
                os.unlink(part, dir_fd=fd)
            return
        os.unlink(part, dir_fd=fd)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def _holds(folder: DropFolder, relpath: bytes, content: bytes) -> bool:
    try:
        return folder.read(relpath, len(content) + 1) == content
    except OSError:  # a link, a pipe, a folder, or what we may not read: somebody else's
        return False


def _write(directory: int, name: bytes, content: bytes) -> None:
    """Write a file that is new: what has its name may be a pipe, or a link to something of worth."""
    try:
        fd = os.open(name, _FLAGS, 0o660, dir_fd=directory)
    except FileExistsError:
        os.unlink(name, dir_fd=directory)
        fd = os.open(name, _FLAGS, 0o660, dir_fd=directory)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    except OSError:
        with suppress(OSError):
            os.unlink(name, dir_fd=directory)
        raise
    finally:
        os.close(fd)
