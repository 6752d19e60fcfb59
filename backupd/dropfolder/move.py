"""Moving a file below its drop folder without overwriting another, nor taking another for it."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from backupd.core.model import Archive, Fingerprint, is_same_file, is_unchanged
from backupd.core.names import (
    MAX_RECEIPT_FILE_BYTES,
    RECEIPT_FILE_KINDS,
    as_text,
    receipt_file_name,
    shortened,
)
from backupd.dropfolder.filesystem import is_being_written, read_lease
from backupd.dropfolder.folder import DropFolder

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
            move_to_hidden_name(source, name, target, hidden)
            # a producer may have renamed a new file over the name since we looked, or be about to write
            is_ours = is_same_file(os.stat(hidden, dir_fd=target, follow_symlinks=False), expected)
            if not is_ours or somebody_waits():
                move_back(target, hidden, source, name)
                raise FileChangedError
            for new_name in names:
                try:
                    rename_no_replace(target, hidden, target, new_name)
                except FileExistsError:
                    continue
                return to + b"/" + new_name if to else new_name
            move_back(target, hidden, source, name)
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
        with read_lease(fd) as somebody_waits:
            if not is_unchanged(os.fstat(fd), expected):
                raise FileChangedError
            yield somebody_waits
    finally:
        os.close(fd)


def move_to_hidden_name(source: int, name: bytes, target: int, hidden: bytes) -> None:
    """Rename a file to a hidden name of ours; whatever has that name is another's, and has to leave it."""
    try:
        rename_no_replace(source, name, target, hidden)
    except FileExistsError:
        move_back(target, hidden, source, name)
        rename_no_replace(source, name, target, hidden)


def move_back(target: int, new_name: bytes, source: int, name: bytes) -> None:
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
                        move_back(target, hidden, source, old_name)
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


def is_expected_file(status: os.stat_result, expected: Fingerprint) -> bool:
    """Tell whether a status is of the file that was put away."""
    return stat.S_ISREG(status.st_mode) and is_same_file(status, expected)


def remove_archive(folder: DropFolder, relpath: bytes, archive: Archive) -> int | None:
    """Remove the file of an archive from where it was put; return the bytes that this freed.

    None where another file has its name; 0 where it is gone already. It gets a hidden name first, so that
    what another renamed over it meanwhile is seen and put back.
    """
    parent, _, name = relpath.rpartition(b"/")
    hidden, expected = b".backupd-%d.expired" % archive.id, archive.fingerprint
    try:
        with folder.directory(parent) as fd:
            with suppress(FileNotFoundError):
                if not is_expected_file(os.stat(name, dir_fd=fd, follow_symlinks=False), expected):
                    return None
                move_to_hidden_name(fd, name, fd, hidden)
            status = os.stat(hidden, dir_fd=fd, follow_symlinks=False)
            if not is_expected_file(status, expected):
                move_back(fd, hidden, fd, name)
                return None
            os.unlink(hidden, dir_fd=fd)
    except FileNotFoundError:
        return 0
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def remove_receipt_file(folder: DropFolder, relpath: bytes, archive: Archive, kind: bytes) -> None:
    """Remove the record of a kind that was written beside an archive, under whichever number it stands."""
    directory, _, name = relpath.rpartition(b"/")
    for number in range(1, RECEIPT_FILE_KINDS + 1):
        record = receipt_file_name(name, kind, number)
        record = directory + b"/" + record if directory else record
        try:
            content = folder.read(record, MAX_RECEIPT_FILE_BYTES)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EINVAL):  # a link or a folder: somebody else's
                continue
            raise
        if is_receipt_file_of(archive, content):
            folder.unlink(record)
            return


def is_receipt_file_of(archive: Archive, content: bytes) -> bool:
    """Tell whether a record is of an archive."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and (
        fields.get("archive"),
        fields.get("drop"),
        fields.get("queued_at"),
    ) == (as_text(archive.relpath), archive.drop, archive.queued_at.isoformat())


_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_receipt_file(folder: DropFolder, directory: bytes, names: Iterable[bytes], content: bytes) -> None:
    """Write a file under the first name that is free; the directory is not synced yet.

    It is synced under another name and then renamed. One with that very content is of an earlier attempt,
    and stays. Raises FileExistsError where every name is taken by something else, of whatever kind.
    """
    with folder.directory(directory, create=True) as fd:
        part = b""
        for name in names:
            if not part:
                part = shortened(b"." + name, b".part")
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
