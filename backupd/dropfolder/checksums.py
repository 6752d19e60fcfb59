"""The checksum files beside an archive: reading them safely, and moving them with it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field

from backupd.core.checksum import (
    DIRECTORY_CHECKSUM_FILES,
    checksum_file_names,
    digest_in_list,
    digest_in_single,
)
from backupd.core.model import Archive, Digest
from backupd.core.names import free_names, receipt_file_name, shortened
from backupd.dropfolder.folder import CachedFolder, DropFolder
from backupd.dropfolder.move import rename_no_replace

_MAX_CHECKSUM_FILE_BYTES = 64 * 1024
"""A larger checksum file is not used."""

_Parser = Callable[[bytes, bytes, str], Digest | None]


@dataclass(slots=True)
class StatedDigests:
    """The digests that checksum files state for an archive, each by the name of its file.

    `unusable` has the reason for each file that states none.
    """

    digests: dict[bytes, Digest] = field(default_factory=dict)
    unusable: dict[bytes, str] = field(default_factory=dict)


def read_checksum_files(folder: DropFolder, relpath: bytes) -> StatedDigests:
    """Return the digests that the checksum files beside an archive state for it.

    The lists of the whole directory are read only if the archive has no checksum file of its own.
    """
    parent, _, name = relpath.rpartition(b"/")
    stated = StatedDigests()
    with closing(CachedFolder(folder)) as cached:
        for files, parser in (
            (checksum_file_names(name), digest_in_single),
            (DIRECTORY_CHECKSUM_FILES, digest_in_list),
        ):
            _read_files(cached, parent, name, files, parser, stated)
            if stated.digests or stated.unusable:
                break
    return stated


def move_checksum_files(folder: DropFolder, archive: Archive, moved_to: bytes | None) -> None:
    """Move an archive's own checksum files to the archive's new path and name; None removes them.

    A checksum file that is not a regular file, or can't be moved, stays in place. So does one that is newer
    than the archive's entry in the queue: it belongs to the next content of that name.
    """
    parent, _, name = archive.relpath.rpartition(b"/")
    target, _, new_name = (moved_to or archive.relpath).rpartition(b"/")
    with folder.directory(parent) as from_fd, folder.directory(target) as to_fd:
        for file in checksum_file_names(name):
            with suppress(OSError):
                status = os.stat(file, dir_fd=from_fd, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode) or status.st_ctime > archive.queued_at.timestamp():
                    continue
                if moved_to is None:
                    os.unlink(file, dir_fd=from_fd)
                    continue
                names = free_names(shortened(new_name, file[len(name) :]), archive.queued_at)
                # an existing file is replaced: without a receipt it belonged to an archive that was removed
                new = next(new for new in names if not _is_moved_archive(to_fd, new))
                os.rename(file, new, src_dir_fd=from_fd, dst_dir_fd=to_fd)


def restore_checksum_files(folder: DropFolder, relpath: bytes, moved_to: bytes) -> None:
    """Move the checksum files of the archive at `moved_to` back beside `relpath`; nothing is overwritten."""
    parent, _, name = relpath.rpartition(b"/")
    sent, _, new_name = moved_to.rpartition(b"/")
    with folder.directory(parent) as to_fd, folder.directory(sent) as from_fd:
        for file in checksum_file_names(new_name):
            with suppress(OSError):
                status = os.stat(file, dir_fd=from_fd, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and not _is_moved_archive(from_fd, file):
                    rename_no_replace(from_fd, file, to_fd, shortened(name, file[len(new_name) :]))


def remove_checksum_files(folder: DropFolder, relpath: bytes) -> None:
    """Remove the checksum files of the archive at `relpath`, which was removed; only regular files."""
    parent, _, name = relpath.rpartition(b"/")
    with folder.directory(parent) as directory:
        for file in checksum_file_names(name):
            with suppress(FileNotFoundError):
                if stat.S_ISREG(os.stat(file, dir_fd=directory, follow_symlinks=False).st_mode):
                    os.unlink(file, dir_fd=directory)


def _read_files(
    folder: DropFolder,
    parent: bytes,
    name: bytes,
    files: dict[bytes, str],
    parser: _Parser,
    stated: StatedDigests,
) -> None:
    for file, algorithm in files.items():
        try:
            text = folder.read(parent + b"/" + file if parent else file, _MAX_CHECKSUM_FILE_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            is_link = error.errno == errno.ELOOP
            stated.unusable[file] = "it is a symbolic link" if is_link else error.strerror or str(error)
            continue
        if len(text) > _MAX_CHECKSUM_FILE_BYTES:
            stated.unusable[file] = f"it is larger than {_MAX_CHECKSUM_FILE_BYTES} bytes"
            continue
        digest = parser(text, name, algorithm)
        if digest is not None:
            stated.digests[file] = digest
        elif parser is digest_in_single:
            stated.unusable[file] = f"it contains no {algorithm} digest"


def _is_moved_archive(directory: int, name: bytes) -> bool:
    """Return whether a moved file is an archive and no checksum file: it has a receipt file."""
    for kind in (b"receipt", b"reason"):
        with suppress(FileNotFoundError):
            os.stat(receipt_file_name(name, kind), dir_fd=directory, follow_symlinks=False)
            return True
    return False
