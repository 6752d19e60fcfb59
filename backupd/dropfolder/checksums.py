"""Finding and reading the checksum files beside an archive; whatever lies there can do no harm."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field

from backupd.core.checksum import LISTS, digest_in_list, digest_in_single, own_files
from backupd.core.model import Archive, Digest
from backupd.core.names import free_names, receipt_file_name, shortened
from backupd.dropfolder.decompress import CHUNK, BoundedFile
from backupd.dropfolder.folder import CachedFolder, DropFolder
from backupd.dropfolder.move import rename_no_replace

_MOST = 64 * 1024
"""Bytes of a checksum file; of a larger one none is believed."""

_Reader = Callable[[bytes, bytes, str], Digest | None]


@dataclass(slots=True)
class StatedDigests:
    """What checksum files say of an archive: digests by the file's name, and why a file is of no use."""

    digests: dict[bytes, Digest] = field(default_factory=dict)
    unusable: dict[bytes, str] = field(default_factory=dict)


def read_checksum_files(folder: DropFolder, relpath: bytes) -> StatedDigests:
    """Return what the checksum files beside an archive say of it; its own count before the directory's."""
    parent, _, name = relpath.rpartition(b"/")
    stated = StatedDigests()
    with closing(CachedFolder(folder)) as held:
        for files, reader in ((own_files(name), digest_in_single), (LISTS, digest_in_list)):
            _read_all(held, parent, name, files, reader, stated)
            if stated.digests or stated.unusable:
                break
    return stated


def _read_all(
    folder: DropFolder,
    parent: bytes,
    name: bytes,
    files: dict[bytes, str],
    reader: _Reader,
    stated: StatedDigests,
) -> None:
    for file, algorithm in files.items():
        try:
            text = folder.read(parent + b"/" + file if parent else file, _MOST + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            stated.unusable[file] = (
                "it is a link" if error.errno == errno.ELOOP else error.strerror or str(error)
            )
            continue
        if len(text) > _MOST:
            stated.unusable[file] = f"it has more than {_MOST} bytes"
            continue
        digest = reader(text, name, algorithm)
        if digest is not None:
            stated.digests[file] = digest
        elif reader is digest_in_single:
            stated.unusable[file] = f"it holds no {algorithm}"


def digest_of(fd: int, size: int, algorithm: str) -> Generator[None, None, Digest]:
    """Return the digest of an open file, in small steps; raises OSError where it can't be read."""
    source, at = BoundedFile(fd, size), 0
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    while data := source.read(at, CHUNK):
        hasher.update(data)
        at += len(data)
        yield
    return Digest(algorithm, hasher.hexdigest())


def remove_checksum_files(folder: DropFolder, relpath: bytes) -> None:
    """Remove the checksum files beside an archive that was removed; only regular files."""
    parent, _, name = relpath.rpartition(b"/")
    with folder.directory(parent) as directory:
        for file in own_files(name):
            with suppress(FileNotFoundError):
                if stat.S_ISREG(os.stat(file, dir_fd=directory, follow_symlinks=False).st_mode):
                    os.unlink(file, dir_fd=directory)


def move_checksum_files(folder: DropFolder, archive: Archive, moved_to: bytes | None) -> None:
    """Move an archive's own checksum files to where it went, under its new name; None removes them.

    Only regular files; what can't be moved stays, as nothing depends on it. One that is newer than the
    archive's admission stays, too: it was not what was checked, but is of a content that is to come.
    """
    parent, _, name = archive.relpath.rpartition(b"/")
    target, _, new_name = (moved_to or archive.relpath).rpartition(b"/")
    with folder.directory(parent) as source, folder.directory(target) as there:
        for file in own_files(name):
            with suppress(OSError):
                status = os.stat(file, dir_fd=source, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode) or status.st_ctime > archive.queued_at.timestamp():
                    continue
                if moved_to is None:
                    os.unlink(file, dir_fd=source)
                    continue
                names = free_names(shortened(new_name, file[len(name) :]), archive.queued_at)
                # what lies there and is no archive is of one of this name that was removed
                new = next(new for new in names if not _is_archive(there, new))
                os.rename(file, new, src_dir_fd=source, dst_dir_fd=there)


def restore_checksum_files(folder: DropFolder, relpath: bytes, moved_to: bytes) -> None:
    """Move the checksum files beside an archive that was put away back beside it; over no others."""
    parent, _, name = relpath.rpartition(b"/")
    target, _, new_name = moved_to.rpartition(b"/")
    with folder.directory(parent) as source, folder.directory(target) as there:
        for file in own_files(new_name):
            with suppress(OSError):
                status = os.stat(file, dir_fd=there, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and not _is_archive(there, file):
                    rename_no_replace(there, file, source, shortened(name, file[len(new_name) :]))


def _is_archive(directory: int, name: bytes) -> bool:
    """Tell whether what was put away is an archive, and not a checksum file: then it has a record."""
    for kind in (b"receipt", b"reason"):
        with suppress(FileNotFoundError):
            os.stat(receipt_file_name(name, kind), dir_fd=directory, follow_symlinks=False)
            return True
    return False
