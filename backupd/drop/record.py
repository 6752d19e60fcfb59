"""Writing a small file beside an archive: whole or not at all, and over nobody else's."""

from __future__ import annotations

import os
from contextlib import suppress

from backupd.core.names import fitted
from backupd.drop.folder import DropFolder
from backupd.drop.move import rename_no_replace

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_record(folder: DropFolder, relpath: bytes, content: bytes) -> None:
    """Write a new file, synced under another name and then renamed; its directory is not synced yet.

    One with that very content is of an earlier attempt, and stays. Raises FileExistsError where the name is
    taken by something else, of whatever kind.
    """
    parent, _, name = relpath.rpartition(b"/")
    with folder.directory(parent, create=True) as directory:
        part = fitted(b"." + name, b".part")
        _write(directory, part, content)
        try:
            rename_no_replace(directory, part, directory, name)
        except FileExistsError:
            os.unlink(part, dir_fd=directory)
            if not _holds(folder, relpath, content):
                raise


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
