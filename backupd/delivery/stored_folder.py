"""The files in a `sent_dir` or `rejected_dir`, and the archives that their receipt files describe."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice

from backupd.core.checksum import is_checksum_name
from backupd.core.model import Archive, DeliveryState, fingerprint_of
from backupd.core.names import (
    MAX_RECEIPT_FILE_BYTES,
    MAX_RECEIPT_FILE_NUMBER,
    NAME_MAX,
    as_text,
    free_names,
    receipt_file_name,
)
from backupd.delivery.disposition import ReceiptFile, parse_receipt_file
from backupd.dropfolder.folder import DropFolder, walk
from backupd.ledger.port import CompletedArchive

_MAX_NEW_NAMES = 100
"""New names that an archive may have got because others were taken."""

_RECEIPT_FILE = re.compile(rb"\.(receipt|reason)(-\d+)?\.json$")
"""A file with such a name is not taken for an archive."""

_NOT_A_RECEIPT_FILE = {
    errno.ENOENT,
    errno.ELOOP,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENXIO,
    errno.ENAMETOOLONG,
}
"""Errors from opening a file that is no receipt file; after any other error a later scan may succeed."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_MAX_TIME_NS = (1 << 63) - 1
"""The latest time of a file; later ones, from the year 2262 on, count as this one."""

_MAX_CLOCK_SKEW = timedelta(hours=1)
"""How far a time may be in the future: a file server has a clock of its own."""


class NotReachableError(Exception):
    """A file can't be read, or has a time in the future; a later scan may succeed."""


@dataclass(slots=True)
class ReadProblems:
    """The number of files and folders that could not be read, and a description of the first."""

    count: int = 0
    first: str = ""

    def add(self, description: str) -> None:
        """Count one more."""
        self.count += 1
        self.first = self.first or description


@dataclass(frozen=True, slots=True, order=True)
class StoredFile:
    """A file in a stored folder; its order is that of `ctime_ns`, in nanoseconds since the epoch."""

    ctime_ns: int
    relpath: bytes


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """The `sent_dir` or `rejected_dir` of a drop.

    `top` is its path relative to `folder`, `state` that of its archives, and `kind` that of their receipt
    files: `receipt` or `reason`.
    """

    drop: str
    folder: DropFolder
    top: bytes
    state: DeliveryState
    kind: bytes

    @property
    def path(self) -> bytes:
        """Return its absolute path."""
        return os.path.join(os.fsencode(self.folder.path), self.top)

    def exists(self) -> bool:
        """Return whether there is such a folder now, readable or not."""
        try:
            with self.folder.directory(self.top):
                return True
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # `files` reports the error

    def files(self, should_continue: Callable[[], bool], problems: ReadProblems) -> list[StoredFile]:
        """Return the files that may be archives, in the order of their times.

        `should_continue` is called before each file. Unreadable folders are added to `problems`.
        """

        def on_unreadable(path: bytes, error: OSError) -> None:
            if error.errno != errno.ENAMETOOLONG:  # no archive was ever moved to so long a path
                problems.add(f"{as_text(path)} ({error.strerror})")

        found = []
        for relpath, status in walk(
            self.folder,
            self.top,
            frozenset(),
            on_unreadable,
            recursive=True,
            should_continue=should_continue,
        ):
            if not should_continue():
                break
            if stat.S_ISREG(status.st_mode) and not _is_not_an_archive(relpath):
                found.append(StoredFile(min(status.st_ctime_ns, _MAX_TIME_NS), relpath))
        return sorted(found)

    def read_archive(self, relpath: bytes) -> tuple[CompletedArchive, datetime] | None:
        """Return the archive that a file holds by its latest valid receipt file, and when it was moved here.

        Returns None if there is no valid receipt file. Raises NotReachableError if a later scan may succeed.
        """
        try:
            status = self.folder.stat(relpath)
            candidates = [r for r in self._receipt_files(relpath) if self._matches(r, status)]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise NotReachableError(f"{as_text(relpath)} ({error.strerror})") from error
        below = relpath[len(self.top) + 1 :]
        receipts = [(r, path) for r in candidates if (path := _original_path(r, below)) is not None]
        if not receipts:
            return None
        now = datetime.now(UTC)
        changed_at = _EPOCH + timedelta(microseconds=min(status.st_ctime_ns, _MAX_TIME_NS) // 1000)
        past = [each for each in receipts if each[0].ended_at <= now + _MAX_CLOCK_SKEW]
        if not past or changed_at > now + _MAX_CLOCK_SKEW:
            raise NotReachableError(
                f"{as_text(relpath)} (its time is in the future: the clock of this host may be wrong)"
            )
        receipt, original_path = max(past, key=lambda each: each[0].ended_at)
        archive = Archive(
            0, self.drop, original_path, fingerprint_of(status), receipt.queued_at, self.folder.inode()
        )
        # the ctime is the time of the move, or later if the files were restored from a backup
        return receipt.completed(archive), min(receipt.ended_at, changed_at, now)

    def _receipt_files(self, relpath: bytes) -> Iterator[ReceiptFile]:
        directory, _, name = relpath.rpartition(b"/")
        for number in range(1, MAX_RECEIPT_FILE_NUMBER + 1):
            path = directory + b"/" + receipt_file_name(name, self.kind, number)
            try:
                receipt = parse_receipt_file(self.folder.read(path, MAX_RECEIPT_FILE_BYTES + 1))
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                if error.errno not in _NOT_A_RECEIPT_FILE:
                    raise
                continue
            if receipt is not None:
                yield receipt

    def _matches(self, receipt: ReceiptFile, status: os.stat_result) -> bool:
        """Return whether a receipt file can be that of a file, by drop, size and state."""
        return (
            stat.S_ISREG(status.st_mode)
            and (receipt.drop, receipt.size) == (self.drop, status.st_size)
            and receipt.state is self.state
        )


def _is_not_an_archive(relpath: bytes) -> bool:
    """Return whether a file is a receipt file, a checksum file, or hidden by another program."""
    name = relpath.rpartition(b"/")[2]
    is_hidden = name.startswith(b".") and not name.startswith(b".backupd-")
    return is_hidden or bool(_RECEIPT_FILE.search(name)) or is_checksum_name(name)


def _original_path(receipt: ReceiptFile, path: bytes) -> bytes | None:
    """Return the path in the drop folder from which the archive at `path` was moved; None if it can't be it.

    If the archive got a new name because its own was taken, bytes that are not UTF-8 stay escaped.
    """
    if as_text(path) == receipt.archive:
        return path
    parent, slash, name = path.rpartition(b"/")
    original_parent, original_slash, original = receipt.archive.rpartition("/")
    if original_parent + original_slash != as_text(parent + slash):
        return None
    if original[:1] in ("", ".") or "\0" in original or len(original.encode()) > NAME_MAX:
        return None
    names = islice(free_names(original.encode(), receipt.queued_at), _MAX_NEW_NAMES)
    return parent + slash + original.encode() if as_text(name) in map(as_text, names) else None
