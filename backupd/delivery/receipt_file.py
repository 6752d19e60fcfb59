"""The JSON file beside a sent or rejected archive: its content, its names, and the search for it.

`sent_dir` and its receipt files are the record of sent archives; the ledger has no copy of it. Other users
may be able to write to these folders, so that every field is validated.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Annotated

from pydantic import (
    AliasChoices,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationError,
)

from backupd.core.checksum import is_checksum_name
from backupd.core.model import DIGEST_BYTES, Archive, DeliveryState
from backupd.core.names import NAME_MAX, RECEIPT_NAME, as_text, free_names, receipt_file_name
from backupd.core.policy import Reason
from backupd.core.transition import archive_state
from backupd.core.units import machine_time
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import DirectoryCache, DropFolder, OnUnreadable, walk
from backupd.dropfolder.move import partial_file_name, write_new_file
from backupd.ledger.port import CompletedArchive

MAX_RECEIPT_FILE_NUMBER = 99
"""Highest number in a receipt file's name; the number is increased while another file has the name."""

MAX_RECEIPT_FILE_BYTES = 128 * 1024
"""Largest receipt file that is read, in bytes; it has room for long receipts of many destinations."""

MAX_CLOCK_SKEW = timedelta(hours=1)
"""How far a time may be in the future: a file server has a clock of its own."""

_MAX_NEW_NAMES = 100
"""New names that an archive may have got because others were taken."""

_SHORTENED = re.compile(rb"~[0-9a-f]{8}$")
"""The end of a name that `shortened` has cut."""

_NOT_A_RECEIPT_FILE = {
    errno.ENOENT,
    errno.ELOOP,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENXIO,
    errno.ENAMETOOLONG,
}
"""Errors from opening a file that is no receipt file; after any other error a later walk may succeed."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_MAX_TIME_NS = (1 << 63) - 1
"""The latest time of a file; later ones, from the year 2262 on, count as this one."""

_DIGEST = "|".join(f"{algorithm}:[0-9a-f]{{{2 * size}}}" for algorithm, size in DIGEST_BYTES.items())

_Name = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
_Digest = Annotated[str, StringConstraints(pattern=f"^({_DIGEST})$")]
_Id = Annotated[str, StringConstraints(pattern="^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
_Time = Annotated[AwareDatetime, Field(ge=_EPOCH)]


class ReceiptFileDelivery(BaseModel):
    """The result of one delivery in a receipt file; other fields in the file are for people."""

    model_config = ConfigDict(strict=True)

    destination: _Name
    delivery_id: _Id
    state: DeliveryState
    ended_at: _Time
    digest: _Digest | None
    reason: Reason | None


class ReceiptFile(BaseModel):
    """The content of `NAME.receipt.json` or `NAME.reason.json`."""

    model_config = ConfigDict(strict=True)

    archive: _Name
    drop: _Name
    size: int
    digest: _Digest | None
    # the receipt files of development versions have the second key
    queued_at: Annotated[_Time, Field(validation_alias=AliasChoices("queued_at", "admitted_at"))]
    deliveries: Annotated[list[ReceiptFileDelivery], FailFast(), Field(min_length=1, max_length=64)]

    @property
    def state(self) -> DeliveryState:
        """Return the state of the archive, from those of its deliveries."""
        return archive_state([delivery.state for delivery in self.deliveries])

    @property
    def ended_at(self) -> datetime:
        """Return when the last delivery ended; not before `queued_at`, even if the clock was set back."""
        return max(self.queued_at, *(delivery.ended_at for delivery in self.deliveries))

    def moved_at(self, status: os.stat_result) -> datetime:
        """Return when the archive with this status was moved to its folder.

        The change time is the time of the move, or later if the files were restored from a backup.
        """
        return min(self.ended_at, file_time(status.st_ctime_ns))


def parse_receipt_file(content: bytes) -> ReceiptFile | None:
    """Return the receipt file with this content; None if it is invalid.

    A delivered archive without a digest is invalid, too: its delivery could not be proved.
    """
    if len(content) > MAX_RECEIPT_FILE_BYTES:
        return None
    try:
        receipt = ReceiptFile.model_validate_json(content)
    except ValidationError:
        return None
    delivered = [d for d in receipt.deliveries if d.state is DeliveryState.DELIVERED]
    is_proved = all(d.digest for d in delivered) and (receipt.digest or not delivered)
    return receipt if is_proved else None


_JSON = json.JSONEncoder(separators=(",\n ", ": "))
"""Writes a line for each key; with `indent`, json would use its encoder in Python, which is much slower."""


def receipt_file_content(completed: CompletedArchive) -> bytes:
    """Return the content of the receipt file of an archive."""
    archive = completed.archive
    fields = {
        "archive": as_text(archive.relpath),
        "drop": archive.drop,
        "size": archive.fingerprint.size,
        "digest": completed.digest,
        "queued_at": machine_time(archive.queued_at, "microseconds"),
        "deliveries": [
            {
                "destination": result.destination,
                "delivery_id": result.delivery_id,
                "state": result.state,
                "ended_at": machine_time(result.ended_at, "microseconds"),
                "digest": result.digest,
                "verified": result.verified,
                "http_status": result.http_status,
                "reason": result.reason,
                "error": result.error,
                "receipt": result.receipt,
            }
            for result in completed.results
        ],
    }
    return (_JSON.encode(fields) + "\n").encode("ascii")


def write_receipt_file(
    folder: DropFolder, completed: CompletedArchive, moved_to: bytes, session: int
) -> None:
    """Write the receipt file of an archive that was moved to `moved_to`; the directory is not synced.

    `session` is the session of the daemon, and part of the temporary name. A file with the same content, of
    an earlier attempt, is kept instead. Raises FileExistsError if all names are taken.
    """
    kind = b"receipt" if completed.state is DeliveryState.DELIVERED else b"reason"
    directory, _, name = moved_to.rpartition(b"/")
    digest = hashlib.sha256(completed.results[0].delivery_id.encode()).digest()
    # the last number cannot be guessed, so that another user cannot create all of these names
    numbers = (*range(1, MAX_RECEIPT_FILE_NUMBER + 1), int.from_bytes(digest[:8], "big"))
    names = (receipt_file_name(name, kind, number) for number in numbers)
    temporary = partial_file_name(completed.archive.id, session)
    write_new_file(folder, directory, names, receipt_file_content(completed), temporary)


def remove_receipt_file(folder: DropFolder, relpath: bytes, archive: Archive, kind: bytes) -> None:
    """Remove the receipt file of the archive at `relpath`; `kind` is `receipt` or `reason`."""
    expected = as_text(archive.relpath), archive.queued_at
    for path, receipt in _receipt_files(folder, relpath, kind):
        if (receipt.archive, receipt.queued_at) == expected:
            folder.unlink(path)
            return


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

    @classmethod
    def of_sent(cls, drop: Drop) -> StoredFolder:
        """Return the `sent_dir` of a drop."""
        return cls(drop.name, drop.folder, drop.sent_dir, DeliveryState.DELIVERED, b"receipt")

    @classmethod
    def of_rejected(cls, drop: Drop) -> StoredFolder:
        """Return the `rejected_dir` of a drop."""
        return cls(drop.name, drop.folder, drop.rejected_dir, DeliveryState.REJECTED, b"reason")

    def below(self, relpath: bytes) -> bytes:
        """Return the path below this folder of a path relative to the drop folder."""
        return relpath[len(self.top) + 1 :]

    def files(
        self, on_unreadable: OnUnreadable, should_continue: Callable[[], bool] = lambda: True
    ) -> Iterator[StoredFile]:
        """Yield the archives, and the receipt files of archives that are gone; no file is read.

        `should_continue` is called before each file. Files and folders that can't be read, this one
        included, go to `on_unreadable`; if it does not exist there are no files.
        """
        try:
            if not stat.S_ISDIR(self.folder.stat(self.top).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory; links are not followed")
        except FileNotFoundError:
            return
        except OSError as error:
            on_unreadable(self.top, error)
            return
        last, fd = b"", -1
        with closing(DirectoryCache(self.folder)) as directories:
            for relpath, status in walk(
                self.folder,
                self.top,
                _is_hidden,
                on_unreadable,
                should_continue,
            ):
                if not should_continue():
                    return
                directory, _, name = relpath.rpartition(b"/")
                try:
                    if directory != last:
                        last, fd = directory, directories.directory(directory)
                    found = self._stored_file(fd, directory, name, status)
                except OSError as error:
                    last = b""
                    on_unreadable(relpath, error)
                    continue
                if found is not None:
                    yield found

    def receipts(self, relpath: bytes) -> list[FoundReceipt]:
        """Return the receipt files of the archive at `relpath` by state and name, the latest first.

        Raises OSError if one of them can't be read now.
        """
        found = [
            FoundReceipt(path, receipt, original)
            for path, receipt in _receipt_files(self.folder, relpath, self.kind)
            if (original := self._original_path(receipt, relpath)) is not None
        ]
        return sorted(found, key=lambda each: each.receipt.ended_at, reverse=True)

    def receipt(self, relpath: bytes, status: os.stat_result) -> FoundReceipt | None:
        """Return the latest receipt file that matches an archive by its size, too; None without one."""
        if not stat.S_ISREG(status.st_mode):
            return None
        return next((r for r in self.receipts(relpath) if r.receipt.size == status.st_size), None)

    def lone_receipt(self, relpath: bytes, path: bytes) -> FoundReceipt | None:
        """Return the receipt file at `path` of an archive that is gone; None if it is not valid here."""
        receipt = parse_receipt_file(self.folder.read(path, MAX_RECEIPT_FILE_BYTES + 1))
        original = self._original_path(receipt, relpath) if receipt else None
        return FoundReceipt(path, receipt, original) if receipt and original is not None else None

    def _stored_file(
        self, fd: int, directory: bytes, name: bytes, status: os.stat_result
    ) -> StoredFile | None:
        """Return what a file in the open directory `fd` is, None for a file that belongs to another one."""
        if stat.S_ISDIR(status.st_mode) or (name.startswith(b".") and not name.startswith(b".backupd-")):
            return None  # of another program
        match = RECEIPT_NAME.search(name)
        archive = name[: match.start()] if match else b""
        if match and _status_of(archive, fd) is not None:
            return None  # the receipt file of that archive
        own = receipt_file_name(name, self.kind)
        receipt = _status_of(own, fd)
        if receipt is not None or not (match or is_checksum_name(name)):
            return StoredFile(directory + b"/" + name, status, directory + b"/" + own, receipt)
        if match and match[1] == self.kind and not _SHORTENED.search(archive):
            return StoredFile(directory + b"/" + archive, None, directory + b"/" + name, status)
        return None  # a checksum file belongs to its archive, unless it was sent itself

    def _original_path(self, receipt: ReceiptFile, relpath: bytes) -> bytes | None:
        """Return the path in the drop folder from which the archive was moved; None if it can't be it.

        If the archive got a new name because its own was taken, bytes that are not UTF-8 stay escaped.
        """
        if receipt.state is not self.state:  # the drop may have had another name
            return None
        path = self.below(relpath)
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


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An archive in a stored folder and its receipt file; paths are relative to the drop folder.

    `status` is that of the archive, None if only its receipt file is left. `receipt_status` is that of the
    file at `receipt_path`, None if there is none.
    """

    relpath: bytes
    status: os.stat_result | None
    receipt_path: bytes
    receipt_status: os.stat_result | None


@dataclass(frozen=True, slots=True)
class FoundReceipt:
    """A receipt file at `path`, of the archive that was moved from `original_path` in the drop folder."""

    path: bytes
    receipt: ReceiptFile
    original_path: bytes


@dataclass(slots=True)
class SkippedFiles:
    """The files that a walk leaves in place: their number and the first one, by the reason."""

    by_reason: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def add(self, reason: str, relpath: bytes) -> None:
        """Count one more; the reason follows the number of files, such as `without a receipt file`."""
        number, first = self.by_reason.get(reason, (0, relpath))
        self.by_reason[reason] = number + 1, first

    def add_unreadable(self, relpath: bytes, error: OSError) -> None:
        """Count one more file or folder that can't be read."""
        if error.errno != errno.ENAMETOOLONG:  # no archive was ever moved to so long a path
            self.add(f"unreadable ({error.strerror})", relpath)

    @property
    def total(self) -> int:
        """Return the number of all files."""
        return sum(number for number, _ in self.by_reason.values())

    def __str__(self) -> str:
        return "; ".join(
            f"{number} {reason}, the first is {as_text(first)}"
            for reason, (number, first) in self.by_reason.items()
        )


def file_time(time_ns: int) -> datetime:
    """Return the UTC time of a file's time in nanoseconds since the epoch."""
    return _EPOCH + timedelta(microseconds=min(time_ns, _MAX_TIME_NS) // 1000)


def _receipt_files(folder: DropFolder, relpath: bytes, kind: bytes) -> Iterator[tuple[bytes, ReceiptFile]]:
    """Yield the valid files with the names of the archive's receipt file, see `receipt_file_name`."""
    directory, _, name = relpath.rpartition(b"/")
    for number in range(1, MAX_RECEIPT_FILE_NUMBER + 1):
        path = directory + b"/" + receipt_file_name(name, kind, number)
        try:
            receipt = parse_receipt_file(folder.read(path, MAX_RECEIPT_FILE_BYTES + 1))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno not in _NOT_A_RECEIPT_FILE:
                raise
            continue
        if receipt is not None:
            yield path, receipt


def _status_of(name: bytes, directory: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _is_hidden(directory: bytes) -> bool:
    return directory.rpartition(b"/")[2].startswith(b".")
