"""Removing an archive that was put away, and the record beside it: only ours, whoever works there too."""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import suppress

from backupd.core.model import Archive, Fingerprint, is_same_file
from backupd.core.names import LARGEST_RECORD, RECORDS, as_text, record_name
from backupd.drop.folder import DropFolder
from backupd.drop.move import put_back, take


def is_ours(status: os.stat_result, expected: Fingerprint) -> bool:
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
                if not is_ours(os.stat(name, dir_fd=fd, follow_symlinks=False), expected):
                    return None
                take(fd, name, fd, hidden)
            status = os.stat(hidden, dir_fd=fd, follow_symlinks=False)
            if not is_ours(status, expected):
                put_back(fd, hidden, fd, name)
                return None
            os.unlink(hidden, dir_fd=fd)
    except FileNotFoundError:
        return 0
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def remove_record(folder: DropFolder, relpath: bytes, archive: Archive, kind: bytes) -> None:
    """Remove the record of a kind that was written beside an archive, under whichever number it stands."""
    directory, _, name = relpath.rpartition(b"/")
    for number in range(1, RECORDS + 1):
        record = record_name(name, kind, number)
        record = directory + b"/" + record if directory else record
        try:
            content = folder.read(record, LARGEST_RECORD)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EINVAL):  # a link or a folder: somebody else's
                continue
            raise
        if is_record_of(archive, content):
            folder.unlink(record)
            return


def is_record_of(archive: Archive, content: bytes) -> bool:
    """Tell whether a record is of an archive."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and (
        fields.get("archive"),
        fields.get("drop"),
        fields.get("admitted_at"),
    ) == (as_text(archive.relpath), archive.drop, archive.admitted_at.isoformat())
