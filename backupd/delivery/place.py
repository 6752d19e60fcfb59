"""A folder of archives that were put away, and what the records beside them, by whomever, tell."""

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
    NAME_MAX,
    RECEIPT_FILE_KINDS,
    as_text,
    free_names,
    receipt_file_name,
)
from backupd.delivery import disposition
from backupd.delivery.disposition import ReceiptFile
from backupd.dropfolder.folder import DropFolder, walk
from backupd.ledger.port import CompletedArchive

_MOST = 100
"""Names that an archive may have got, for others that had its own."""

_RECORD = re.compile(rb"\.(receipt|reason)(-\d+)?\.json$")
"""What is named so is taken for a record, and so is an archive of such a name."""

_ANOTHERS = {errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG}
"""What opening a record fails with that is none of ours; all else may be different at the next look."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_LAST_NS = (1 << 63) - 1
"""The last time that is told apart, in the year 2262."""

_SKEW = timedelta(hours=1)
"""By how much a time may be ahead of the clock: a file server has one of its own."""


class NotReachableError(Exception):
    """Something can't be read, or believed, now."""


@dataclass(slots=True)
class ReadProblems:
    """How much of a place could not be seen, and what first."""

    count: int = 0
    first: str = ""

    def add(self, what: str) -> None:
        """Count one more."""
        self.count += 1
        self.first = self.first or what


@dataclass(frozen=True, slots=True, order=True)
class StoredFile:
    """A file in a place, by when it was put away: nanoseconds since the epoch."""

    ctime_ns: int
    relpath: bytes


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """A folder of a drop, where archives lie for a state with records of a kind beside them."""

    drop: str
    folder: DropFolder
    top: bytes
    state: DeliveryState
    kind: bytes

    @property
    def path(self) -> bytes:
        """Return its absolute path."""
        return os.path.join(os.fsencode(self.folder.path), self.top)

    def is_there(self) -> bool:
        """Tell whether there is such a folder now, readable or not."""
        try:
            with self.folder.directory(self.top):
                return True
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # which a look at it will tell

    def files(self, go_on: Callable[[], bool], problems: ReadProblems) -> list[StoredFile]:
        """Return what may be archives, the first one first; `go_on` is asked before each."""

        def complain(path: bytes, error: OSError) -> None:
            if error.errno != errno.ENAMETOOLONG:  # so deep nothing was ever put away
                problems.add(f"{as_text(path)} ({error.strerror})")

        found = []
        walked = walk(self.folder, self.top, frozenset(), complain, recursive=True, go_on=go_on)
        for relpath, status in walked:
            if not go_on():
                break
            if stat.S_ISREG(status.st_mode) and not _goes_along(relpath):
                found.append(StoredFile(min(status.st_ctime_ns, _LAST_NS), relpath))
        return sorted(found)

    def told(self, relpath: bytes) -> tuple[CompletedArchive, datetime] | None:
        """Return what the latest record that can be of a file tells, and when it was put away; None without.

        Raises NotNowError where another look may bring another answer.
        """
        try:
            status = self.folder.stat(relpath)
            fitting = [r for r in self._records(relpath) if self._can_be_of(r, status)]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise NotReachableError(f"{as_text(relpath)} ({error.strerror})") from error
        lies = relpath[len(self.top) + 1 :]
        told = [(r, dropped) for r in fitting if (dropped := _dropped_as(r, lies)) is not None]
        if not told:
            return None
        now = datetime.now(UTC)
        put_away = _EPOCH + timedelta(microseconds=min(status.st_ctime_ns, _LAST_NS) // 1000)
        passed = [each for each in told if each[0].ended_at <= now + _SKEW]
        if not passed or put_away > now + _SKEW:
            raise NotReachableError(f"{as_text(relpath)} (it is of the future: the clock may be wrong)")
        latest, dropped = max(passed, key=lambda each: each[0].ended_at)
        archive = Archive(0, self.drop, dropped, fingerprint_of(status), latest.queued_at)
        # it was put away no later than the kernel has it, which a restore of the files sets anew
        return latest.settled(archive), min(latest.ended_at, put_away, now)

    def _records(self, relpath: bytes) -> Iterator[ReceiptFile]:
        directory, _, name = relpath.rpartition(b"/")
        for number in range(1, RECEIPT_FILE_KINDS + 1):
            beside = directory + b"/" + receipt_file_name(name, self.kind, number)
            try:
                found = disposition.parse_receipt_file(self.folder.read(beside, MAX_RECEIPT_FILE_BYTES + 1))
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                if error.errno not in _ANOTHERS:
                    raise
                continue
            if found is not None:
                yield found

    def _can_be_of(self, found: ReceiptFile, status: os.stat_result) -> bool:
        """Tell whether a record is of a file, by its drop, size and state."""
        return (
            stat.S_ISREG(status.st_mode)
            and (found.drop, found.size) == (self.drop, status.st_size)
            and found.state is self.state
        )


def _goes_along(relpath: bytes) -> bool:
    """Tell whether a file is no archive: a record, a checksum file, or one that somebody hid."""
    name = relpath.rpartition(b"/")[2]
    is_hidden = name.startswith(b".") and not name.startswith(b".backupd-")
    return is_hidden or bool(_RECORD.search(name)) or is_checksum_name(name)


def _dropped_as(found: ReceiptFile, lies: bytes) -> bytes | None:
    """Return the path that an archive had before it was put away; None where it can't lie there.

    Of one that was renamed, as its name was taken, what is no UTF-8 stays escaped.
    """
    if as_text(lies) == found.archive:
        return lies
    parent, slash, name = lies.rpartition(b"/")
    said_parent, said_slash, said = found.archive.rpartition("/")
    if said_parent + said_slash != as_text(parent + slash) or said[:1] in ("", ".") or "\0" in said:
        return None
    if len(said.encode()) > NAME_MAX:
        return None
    names = islice(free_names(said.encode(), found.queued_at), _MOST)
    return parent + slash + said.encode() if as_text(name) in map(as_text, names) else None
