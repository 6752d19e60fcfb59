"""Moving a file below its drop folder without overwriting another, nor taking another for it."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from backupd.core.model import Fingerprint, is_same_file, is_unchanged
from backupd.drop.folder import DropFolder
from backupd.drop.writer import is_being_written, without_writers

_NOREPLACE = 1
_libc = ctypes.CDLL(None, use_errno=True)


class FileChangedError(Exception):
    """What lies under the name is not the file that was meant, or is no longer as it was."""


def move(
    folder: DropFolder,
    relpath: bytes,
    expected: Fingerprint,
    to: bytes,
    names: Iterator[bytes],
    hidden: bytes,
) -> bytes:
    """Move a file into the directory `to`, under the first of `names` that is free; return its new path.

    It is there under the name `hidden` first, of its own, until we saw that it is the one that was meant.
    Raises FileNotFoundError if it is gone, FileChangedError if it is not as expected, BeingWrittenError if
    that may still come; it is in its old place then. The directories are not synced yet.
    """
    parent, _, name = relpath.rpartition(b"/")
    with folder.directory(parent) as source:
        if not is_unchanged(os.stat(name, dir_fd=source, follow_symlinks=False), expected):
            raise FileChangedError
        with (
            folder.directory(to, create=True) as target,
            _without_writers(folder, relpath, expected) as somebody_waits,
        ):
            take(source, name, target, hidden)
            # a producer may have renamed a new file over the name since we looked, or be about to write
            is_ours = is_same_file(os.stat(hidden, dir_fd=target, follow_symlinks=False), expected)
            if not is_ours or somebody_waits():
                put_back(target, hidden, source, name)
                raise FileChangedError
            for new_name in names:
                try:
                    rename_no_replace(target, hidden, target, new_name)
                except FileExistsError:
                    continue
                return to + b"/" + new_name if to else new_name
            put_back(target, hidden, source, name)
    raise FileExistsError(errno.EEXIST, "every name is taken")


@contextmanager
def _without_writers(
    folder: DropFolder, relpath: bytes, expected: Fingerprint
) -> Iterator[Callable[[], bool]]:
    """Have whoever would write to a file wait while it is moved; yields what tells whether somebody does."""
    fd = None
    with suppress(PermissionError):  # whoever may not read it may move it, and just does not hear of writers
        fd = folder.open(relpath)
    if fd is None:
        yield lambda: False
        return
    try:
        with without_writers(fd) as somebody_waits:
            if not is_unchanged(os.fstat(fd), expected):
                raise FileChangedError
            yield somebody_waits
    finally:
        os.close(fd)


def take(source: int, name: bytes, target: int, hidden: bytes) -> None:
    """Rename a file to a hidden name of ours; whatever has that name is another's, and has to leave it."""
    try:
        rename_no_replace(source, name, target, hidden)
    except FileExistsError:
        put_back(target, hidden, source, name)
        rename_no_replace(source, name, target, hidden)


def put_back(target: int, new_name: bytes, source: int, name: bytes) -> None:
    """Undo a rename that took the wrong file: it was never delivered, and has to be found again.

    Where its name is taken by yet another file, it gets a number in front, so that its ending stays.
    """
    for number in itertools.count(1):
        try:
            rename_no_replace(target, new_name, source, name)
        except FileExistsError:
            name = b"%d-%s" % (number, name[-240:])
        else:
            return


def find_moved(
    folder: DropFolder,
    relpath: bytes,
    expected: Fingerprint,
    to: bytes,
    names: Iterator[bytes],
    hidden: bytes,
) -> bytes | None:
    """Return where an earlier `move` with the same arguments put the file, or None.

    What a crash left under the hidden name goes where it belongs: ours on, another one back.
    """
    parent, _, old_name = relpath.rpartition(b"/")
    try:
        with folder.directory(to) as target:
            is_ours = False
            with suppress(FileNotFoundError):
                is_ours = is_same_file(os.stat(hidden, dir_fd=target, follow_symlinks=False), expected)
                is_ours = is_ours and not _is_written_at(target, hidden)
                if not is_ours:
                    with folder.directory(parent, create=True) as source:
                        put_back(target, hidden, source, old_name)
            for name in names:
                if is_ours:
                    with suppress(FileExistsError):
                        rename_no_replace(target, hidden, target, name)
                        return to + b"/" + name if to else name
                elif is_same_file(os.stat(name, dir_fd=target, follow_symlinks=False), expected):
                    return to + b"/" + name if to else name
    except FileNotFoundError:
        pass  # `move` would have used the first free name
    return None


def _is_written_at(directory: int, name: bytes) -> bool:
    with suppress(PermissionError):
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            return is_being_written(fd)
        finally:
            os.close(fd)
    return False


def rename_no_replace(source: int, name: bytes, target: int, new_name: bytes) -> None:
    """Rename between two directories; raises FileExistsError where the new name is taken.

    renameat2(2) with RENAME_NOREPLACE; on a filesystem that lacks it, a look and then a rename.
    """
    if _libc.renameat2(source, name, target, new_name, _NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code), os.fsdecode(name))
    try:
        os.stat(new_name, dir_fd=target, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)
        return
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fsdecode(new_name))
