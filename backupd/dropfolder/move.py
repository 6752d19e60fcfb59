"""Moving and writing files below a drop folder; nothing is overwritten."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from backupd.dropfolder.content import ExpectedFile
from backupd.dropfolder.filesystem import is_being_written, read_lease
from backupd.dropfolder.folder import DropFolder, close_descriptor

_RENAME_NOREPLACE = 1
_CREATE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EIO)  # EIO: rclone
_PARTIAL_FILE = re.compile(rb"\.backupd-[0-9]+-([0-9]+)\.part")
_libc = ctypes.CDLL(None, use_errno=True)


class FileChangedError(Exception):
    """The file under the name is another one, or its content has changed."""


def move(
    folder: DropFolder,
    relpath: bytes,
    expected: ExpectedFile,
    to: bytes,
    names: Iterator[bytes],
    hidden: bytes,
) -> bytes:
    """Move a file into the directory `to`, under the first of `names` that is free; return its new path.

    The file is first renamed to `hidden`, a name that no other file has, and checked again under that name.
    Raises FileNotFoundError if it is gone, FileChangedError if it is another one or has another content,
    BeingWrittenError if another process has it open for writing, StoppedError if `expected` was stopped while
    it read the file, and FileExistsError if no name is free; in these cases it is in its old place. The
    directories are not synced.
    """
    parent, _, name = relpath.rpartition(b"/")
    with folder.directory(parent) as source:
        if not expected.is_at(source, name):  # before the lease, under which a writer would wait for a read
            raise FileChangedError
        with (
            folder.directory(to, create=True) as target,
            _leased(folder, relpath, expected) as is_writer_waiting,
        ):
            move_to_hidden_name(source, name, target, hidden)
            # since the check, a producer may have renamed a new file over the name, or be about to write
            if not expected.was_renamed_to(target, hidden) or is_writer_waiting():
                move_back(target, hidden, source, name)
                raise FileChangedError
            for new_name in names:
                try:
                    rename_no_replace(target, hidden, target, new_name)
                except FileExistsError:
                    continue
                return to + b"/" + new_name if to else new_name
            move_back(target, hidden, source, name)
    raise FileExistsError(errno.EEXIST, "all names are taken")


def find_moved(
    folder: DropFolder,
    relpath: bytes,
    expected: ExpectedFile,
    to: bytes,
    names: Iterator[bytes],
    hidden: bytes,
) -> bytes | None:
    """Return the path to which an earlier `move` with the same arguments moved the file, None if it did not.

    A move that a crash interrupted after the first rename is finished. If another file has the name `hidden`,
    it is moved back to the old place.
    """
    parent, _, old_name = relpath.rpartition(b"/")
    try:
        with folder.directory(to) as target:
            is_hidden = False
            with suppress(FileNotFoundError):
                is_hidden = expected.is_at(target, hidden) and not _is_written_at(target, hidden)
                if not is_hidden:
                    with folder.directory(parent, create=True) as source:
                        move_back(target, hidden, source, old_name)
            if is_hidden:
                with suppress(FileNotFoundError, NotADirectoryError), folder.directory(parent) as source:
                    if _is_same_inode(source, old_name, target, hidden):
                        os.unlink(old_name, dir_fd=source)  # a hard link of a rename that was interrupted
            for name in names:
                if is_hidden:
                    with suppress(FileExistsError):
                        rename_no_replace(target, hidden, target, name)
                        return to + b"/" + name if to else name
                elif expected.was_moved_to(target, name):
                    return to + b"/" + name if to else name
    except FileNotFoundError:
        pass  # `move` would have used the first free name
    return None


def move_to_hidden_name(source: int, name: bytes, target: int, hidden: bytes) -> None:
    """Rename a file to `hidden`, between two open directories; another file with that name is moved back."""
    try:
        rename_no_replace(source, name, target, hidden)
    except FileExistsError:
        move_back(target, hidden, source, name)
        rename_no_replace(source, name, target, hidden)


def move_back(from_fd: int, from_name: bytes, to_fd: int, to_name: bytes) -> None:
    """Undo the rename of a wrong file: it was never delivered, and the next scan has to find it.

    If its old name is taken meanwhile, it gets a number in front, so that its suffix stays.
    """
    for number in itertools.count(1):
        try:
            rename_no_replace(from_fd, from_name, to_fd, to_name)
        except FileExistsError:
            to_name = b"%d-%s" % (number, to_name[-240:])
        else:
            return


def rename_no_replace(source: int, name: bytes, target: int, new_name: bytes) -> None:
    """Rename a file between two open directories; raises FileExistsError if the new name is taken.

    Uses renameat2(2) with RENAME_NOREPLACE. On a filesystem without it, such as NFS, the file gets the new
    name as a hard link and then loses the old one; a call that was interrupted in between may be repeated.
    Only if a hard link is refused as well, the new name is checked before the rename, and a file that gets it
    in between is overwritten.
    """
    if _libc.renameat2(source, name, target, new_name, _RENAME_NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code), os.fsdecode(name))
    try:
        os.link(name, new_name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except FileExistsError:
        if not _is_same_inode(source, name, target, new_name):
            raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        with suppress(FileNotFoundError):
            os.stat(new_name, dir_fd=target, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fsdecode(new_name)) from None
        os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)
        return
    os.unlink(name, dir_fd=source)


def _is_same_inode(directory: int, name: bytes, other_directory: int, other_name: bytes) -> bool:
    try:
        one = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return os.path.samestat(one, os.stat(other_name, dir_fd=other_directory, follow_symlinks=False))
    except FileNotFoundError:
        return False


def partial_file_name(archive_id: int, session: int) -> bytes:
    """Return the temporary name of a receipt file, which no other session of a daemon uses."""
    return b".backupd-%d-%d.part" % (archive_id, session)


def write_new_file(
    folder: DropFolder, directory: bytes, names: Iterable[bytes], content: bytes, temporary: bytes
) -> None:
    """Write a file under the first of `names` that is free; the directory is not synced.

    The file is written and synced under the name `temporary` and then renamed. A file with the same content
    is from an earlier attempt and is kept instead. Raises FileExistsError if all names are taken.
    """
    with folder.directory(directory, create=True) as fd:
        _write_synced(fd, temporary, content)
        for name in names:
            try:
                rename_no_replace(fd, temporary, fd, name)
            except FileExistsError:
                if not _has_content(folder, directory + b"/" + name if directory else name, content):
                    continue
                os.unlink(temporary, dir_fd=fd)
            return
        os.unlink(temporary, dir_fd=fd)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def remove_partial_files(folder: DropFolder, directory: bytes, session: int) -> None:
    """Remove the temporary receipt files that earlier sessions left in a directory when they were killed."""
    with folder.directory(directory) as fd:
        for name in map(os.fsencode, os.listdir(fd)):
            partial = _PARTIAL_FILE.fullmatch(name)
            if partial and int(partial[1]) != session:
                os.unlink(name, dir_fd=fd)


@contextmanager
def _leased(folder: DropFolder, relpath: bytes, expected: ExpectedFile) -> Iterator[Callable[[], bool]]:
    """Hold a read lease on a file while it is moved; yields a function that returns whether a writer waits.

    Raises FileChangedError if the file is not as expected, and BeingWrittenError as `read_lease` does.
    """
    fd = None
    with suppress(PermissionError):  # a file that the daemon may not read is moved without a lease
        fd = folder.open(relpath)
    if fd is None:
        yield lambda: False
        return
    try:
        with read_lease(fd) as is_writer_waiting:
            if not expected.is_open_as(fd):
                raise FileChangedError
            yield is_writer_waiting
    finally:
        close_descriptor(fd)


def _is_written_at(directory: int, name: bytes) -> bool:
    with suppress(PermissionError):
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            return is_being_written(fd)
        finally:
            close_descriptor(fd)
    return False


def _has_content(folder: DropFolder, relpath: bytes, content: bytes) -> bool:
    try:
        return folder.read(relpath, len(content) + 1) == content
    except OSError:  # a link, FIFO or directory, or a file that the daemon may not read
        return False


def _write_synced(directory: int, name: bytes, content: bytes) -> None:
    """Create a file, write its content and sync it; a file with the name is removed first, never opened.

    It may be a FIFO, or a link to a file that must not be overwritten.
    """
    try:
        fd = os.open(name, _CREATE_NEW, 0o660, dir_fd=directory)
    except FileExistsError:
        os.unlink(name, dir_fd=directory)
        fd = os.open(name, _CREATE_NEW, 0o660, dir_fd=directory)
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
        close_descriptor(fd)
